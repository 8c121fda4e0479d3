"""The application: routes, and their shared parts."""

from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import anyio
from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from dlp_lora.engine.text import decode
from dlp_lora.serve import schema
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.answers import Answers
from dlp_lora.serve.bodies import JSONRoute
from dlp_lora.serve.chat import ChatAnswer
from dlp_lora.serve.completions import CompletionAnswer
from dlp_lora.serve.errors import APIError, ErrorResponse, of_exception, of_validation
from dlp_lora.serve.keys import Access
from dlp_lora.serve.logprobs import token_text
from dlp_lora.serve.middleware import Gate
from dlp_lora.serve.schema import ChatRequest, CompletionRequest
from dlp_lora.serve.service import Asked, Service
from dlp_lora.serve.trace import rounded
from dlp_lora.serve.wire import END, HEADERS, error_event, events, usage_event, usage_of

PAGE = Path(__file__).parent / "page"
Result = TypeVar("Result")

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The request cannot be followed; `param` names the field.",
        401: "The key is missing or wrong.",
        403: "The key may not do this.",
        404: "There is no such model.",
        413: "The body is too large.",
        415: "The body is no JSON.",
        421: "The server has another name.",
        500: "The backend failed.",
        503: "Too many requests wait, the server is closing, or the files of an adapter changed on disk.",
        504: "The time is up.",
    }.items()
}
STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}


def make_app(service: Service, manager: AdapterManager, *, lifespan: Lifespan[FastAPI] | None = None) -> ASGIApp:
    """Makes the application of a service."""
    app = FastAPI(
        lifespan=lifespan,
        title="dlp-lora",
        version=version("dlp-lora"),
        summary="An OpenAI API that picks LoRA adapters by content, sentence by sentence.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.include_router(_generation(service))
    app.include_router(_adapters(service, manager))
    app.include_router(_operation(service))
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    gated: ASGIApp = Gate(app, service)
    if origins := service.settings.allow_origin:
        exposed = ["X-Request-Id", "Retry-After"]
        gated = CORSMiddleware(
            gated, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=exposed
        )
    return gated


def access_of(request: Request) -> Access:
    """The sender's rights, from the middleware."""
    return cast(Access, request.scope["state"]["access"])


def admin_of(request: Request) -> Access:
    """As `access_of`, for a sender who may manage adapters.

    Raises:
        APIError: if the sender may not.
    """
    access: Access = request.scope["state"]["access"]
    if not access.is_admin:
        raise APIError(
            403,
            "managing adapters needs the admin key; without --admin-key at the start, it is off",
            type="permission_error",
            code="admin_key_needed",
        )
    return access


Sender = Annotated[Access, Depends(access_of)]
Admin = Annotated[Access, Depends(admin_of)]


def _router() -> APIRouter:
    return APIRouter(route_class=JSONRoute, responses=ERRORS, dependencies=[Security(HTTPBearer(auto_error=False))])


def _generation(service: Service) -> APIRouter:
    router = _router()

    @router.post("/v1/chat/completions", response_model=schema.ChatResponse, responses={200: STREAM})
    async def chat(body: ChatRequest, request: Request, sender: Sender) -> Response:
        """Answers a chat."""
        service.check_open()
        asked = await to_thread.run_sync(service.chat, body, sender)
        answer = ChatAnswer(service, body, asked)
        return await _respond(service, request, body, asked, answer, "chat.completion.chunk")

    @router.post("/v1/completions", response_model=schema.CompletionResponse, responses={200: STREAM})
    async def complete(body: CompletionRequest, request: Request, sender: Sender) -> Response:
        """Continues a prompt."""
        service.check_open()
        asked = await to_thread.run_sync(service.completion, body, sender)
        answer = CompletionAnswer(service, body, asked)
        return await _respond(service, request, body, asked, answer, "text_completion")

    @router.post("/v1/route")
    async def route(body: schema.RouteRequest, sender: Sender) -> schema.RouteResponse:
        """Returns the adapters that would answer a prompt, without an answer."""
        routed = await to_thread.run_sync(service.route, body, sender)
        opening = routed.rows[0].decisions[0]
        return {
            "model": routed.choice.asked,
            "mixture": dict(opening.mixture),
            "probabilities": rounded(opening.probabilities),
            "abstained": opening.abstained,
            "questions": list(routed.questions),
            "route_ms": round(opening.route_ms, 3),
            "num_tokens": routed.num_tokens,
        }

    @router.post("/tokenize")
    async def tokenize(body: schema.TokenizeRequest, sender: Sender) -> schema.TokenizeResponse:
        """Encodes a prompt, or messages through the chat template."""
        encoder = service.encoder
        service.names.choose(body.model, service.visible(sender))
        if body.prompt is None:
            encoded = await to_thread.run_sync(encoder.chat, body, body.tools or ())
        else:
            text, special = body.prompt, body.add_special_tokens
            encoded = await to_thread.run_sync(lambda: encoder.text(text, add_special_tokens=special))
        tokens = encoded.tokens
        return {
            "count": len(tokens),
            "max_model_len": encoder.max_context,
            "tokens": list(tokens),
            "token_strs": [token_text(encoder.tokenizer, t) for t in tokens] if body.return_token_strs else None,
        }

    @router.post("/detokenize")
    async def detokenize(body: schema.DetokenizeRequest, sender: Sender) -> schema.DetokenizeResponse:
        """Decodes token ids."""
        service.names.choose(body.model, service.visible(sender))
        tokens = service.encoder.ids(body.tokens, "tokens").tokens if body.tokens else ()
        return {"prompt": decode(service.encoder.tokenizer, tokens, skip_special_tokens=False)}

    @router.get("/v1/models")
    async def models(sender: Sender) -> schema.ModelList:
        """Lists the models for this key: the routed one, the base model, and each adapter."""
        names = service.names.listed(service.visible(sender))
        return {"object": "list", "data": [_card(service, name) for name in names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str, sender: Sender) -> schema.ModelCard:
        """Describes one model."""
        service.names.choose(name, service.visible(sender))
        return _card(service, name)

    return router


def _adapters(service: Service, manager: AdapterManager) -> APIRouter:
    router = _router()

    @router.post("/v1/load_lora_adapter")
    async def load(body: schema.LoadAdapterRequest, _: Admin) -> schema.AdapterResponse:
        """Loads an adapter from a folder inside --adapter-dir; `examples` teach it to the router."""
        return await to_thread.run_sync(manager.load, body)

    @router.post("/v1/unload_lora_adapter")
    async def unload(body: schema.UnloadAdapterRequest, _: Admin) -> schema.AdapterResponse:
        """Removes an adapter; running answers keep it."""
        return await to_thread.run_sync(manager.unload, body.lora_name)

    @router.post("/v1/reload")
    async def reload(_: Admin) -> schema.ReloadResponse:
        """Reads the bundle again."""
        return await to_thread.run_sync(manager.reload)

    return router


def _operation(service: Service) -> APIRouter:
    router = APIRouter()

    @router.head("/health", include_in_schema=False)  # which load balancers send
    @router.get("/health", responses={503: {"model": schema.HealthResponse}})
    async def health() -> Response:
        """Returns whether the server can answer."""
        state = service.backend.health
        answer: schema.HealthResponse = {"status": "ok", "reason": ""}
        if service.is_draining:
            answer = {"status": "draining", "reason": "the server is closing"}
        elif not state.is_alive:
            answer = {"status": "unhealthy", "reason": state.reason}
        return JSONResponse(answer, 200 if answer["status"] == "ok" else 503)

    @router.get("/version")
    async def tell_version() -> schema.VersionResponse:
        """Returns the releases of dlp-lora and of the program that computes the tokens."""
        return {"version": version("dlp-lora"), "backend": service.backend.program}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Returns metrics in Prometheus' text format."""
        text = await to_thread.run_sync(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4")

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(PAGE / "docs.html", headers={"Cache-Control": "no-cache"})

    return router


async def _respond(
    service: Service,
    request: Request,
    body: schema.SamplingFields,
    asked: Asked,
    answer: ChatAnswer | CompletionAnswer,
    object_: str,
) -> Response:
    answers = Answers(service, asked)
    log = request.scope["state"]["log"]
    log.update(model=asked.choice.label, stream=bool(body.stream), id=asked.id)
    if not body.stream:
        async with answers:
            whole = await _unless_gone(request, lambda: answer.whole(answers))
        log.update(prompt_tokens=answers.num_prompt, completion_tokens=answers.num_answer)
        if whole is None:
            service.metrics.aborted.labels("disconnect").inc()
            return Response(status_code=499)
        return JSONResponse(whole)
    await answers.__aenter__()  # a request that is refused has a status; left where the stream ends

    async def written() -> AsyncIterator[bytes]:
        has_ended = False
        try:
            options = body.stream_options or schema.StreamOptions()
            is_counted = options.include_usage and options.continuous_usage_stats
            async for data in events(
                answer.chunks(answers), (lambda: usage_of(answers, asked)) if is_counted else None
            ):
                yield data
            if options.include_usage:
                yield usage_event(object_, answers, asked)
            has_ended = True
            yield END
        except Exception as error:
            has_ended = True
            failure = of_exception(error, request.scope["state"]["request_id"])
            log["error"] = failure.reason
            yield error_event(asked, failure)
            yield END
        finally:
            if not has_ended:
                service.metrics.aborted.labels("disconnect").inc()
            log.update(prompt_tokens=answers.num_prompt, completion_tokens=answers.num_answer)

    return AnswerStream(answers, written())


class AnswerStream(StreamingResponse):
    """A stream of running answers; they end with it, even if the client leaves before its first byte."""

    def __init__(self, answers: Answers, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, headers=HEADERS, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answers.__aexit__()


async def _unless_gone(request: Request, work: Callable[[], Awaitable[Result]]) -> Result | None:
    """Waits for work; if the client leaves, the work is cancelled, and the result is None."""
    done: list[Result] = []
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async def do() -> None:
            done.append(await work())
            group.cancel_scope.cancel()

        group.start_soon(watch)
        group.start_soon(do)
    return done[0] if done else None


def _card(service: Service, name: str) -> schema.ModelCard:
    is_served = name == service.names.served
    return {
        "id": name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "dlp-lora",
        "root": service.root if is_served or name == service.names.base else name,
        "parent": None if is_served else service.names.served,
        "max_model_len": service.encoder.max_context,
    }


def _as_response(error: APIError, request: Request) -> Response:
    request.scope["state"]["log"]["reason"] = error.reason
    return JSONResponse(error.body, error.status_code, headers=error.headers)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _as_response(of_validation(error.errors()), request)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if isinstance(error, APIError):
        return _as_response(error, request)
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        answer = APIError(404, f"there is no route {path[:200]}; {_supported(request)}", code="route_not_found")
    elif error.status_code == 405:
        answer = APIError(405, f"{path} does not accept {request.method}; {_supported(request)}", code="wrong_method")
    else:
        answer = APIError(error.status_code, str(error.detail))
    return _as_response(answer, request)


def _supported(request: Request) -> str:
    paths = request.app.openapi()["paths"]
    return "there are " + ", ".join(f"{' '.join(map(str.upper, ways))} {path}" for path, ways in paths.items())
