"""A client of one vLLM server: its public routes, and their errors by kind."""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from dlp_lora.serve.backend import BackendError, UnavailableError
from dlp_lora.sse import data_of

CONNECT_S = 5.0
Body = Mapping[str, Any]


class UpstreamError(BackendError):
    """A request that a vLLM server did not fulfil."""


class LostError(UpstreamError, UnavailableError):
    """It is missing, went away, or was silent for too long."""


class BusyError(UpstreamError):
    """It is busy (429, 503)."""


class GoneError(UpstreamError):
    """It has no such model or route (404)."""


class FailedError(UpstreamError):
    """It failed (500, or an error in a stream)."""


class RefusedError(UpstreamError):
    """It refuses the request (any other 4xx)."""

    def __init__(self, message: str, *, status: int, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.is_about_request = status in (400, 422)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens that came at once, with their log-probabilities if requested, and the reason if the answer ended."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    tops: tuple[Mapping[int, float], ...] = ()
    finish_reason: str | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that a server lists; an adapter has a parent."""

    name: str
    root: str
    parent: str | None
    max_context: int | None


@dataclass
class VLLMClient:
    """A client of one server; `timeout_s` is its longest silence."""

    url: str
    key: str | None = None
    timeout_s: float = 120.0
    _http: httpx.AsyncClient = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=self._timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # backends are reached without this machine's proxy
        )

    @property
    def _timeout(self) -> httpx.Timeout:
        return httpx.Timeout(self.timeout_s, connect=CONNECT_S, pool=None)

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        """Whether it reports that it can answer."""
        try:
            return (await self._http.get("/health", timeout=CONNECT_S)).status_code == 200
        except httpx.HTTPError:
            return False

    async def version(self) -> str:
        """Its release."""
        answer = await self._get("/version")
        with self._form("/version"):
            return str(answer["version"])

    async def models(self) -> tuple[Model, ...]:
        """What it serves: the base model, and the adapters that are loaded."""
        answer = await self._get("/v1/models")
        with self._form("/v1/models"):
            return tuple(
                Model(name=m["id"], root=m["root"], parent=m.get("parent"), max_context=m.get("max_model_len"))
                for m in answer["data"]
            )

    async def metrics(self) -> str:
        """Its metrics, in Prometheus' text format."""
        with self._named("/metrics"):
            response = await self._http.get("/metrics")
        return self._checked(response).text

    async def tokenize(self, model: str, text: str) -> tuple[int, ...]:
        """Encodes a text, without special tokens."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        answer = await self._post("/tokenize", body)
        with self._form("/tokenize"):
            return tuple(answer["tokens"])

    async def load(self, name: str, path: str) -> None:
        """Loads an adapter; if it has one of this name, it reads it again."""
        body = {"lora_name": name, "lora_path": path}
        try:
            await self._post("/v1/load_lora_adapter", body)
        except RefusedError as error:
            if "already been loaded" not in str(error):
                raise
            await self.unload(name)
            await self._post("/v1/load_lora_adapter", body)

    async def unload(self, name: str) -> None:
        """Unloads an adapter, if it is there."""
        try:
            await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        except GoneError:
            return

    async def complete(self, body: Body) -> tuple[Chunk, Mapping[str, Any]]:
        """Requests a whole answer; returns it, and the raw choice."""
        answer = await self._post("/v1/completions", {**body, "stream": False})
        (choice,) = answer["choices"]
        return _chunk(choice, answer.get("usage")), choice

    async def stream(self, body: Body) -> AsyncGenerator[Chunk]:
        """Streams an answer; closing the stream ends it. Close it with `contextlib.aclosing`.

        Raises:
            LostError: if it breaks off before its end.
            UpstreamError: of another kind, depending on the server's error.
        """
        has_finished = False
        try:
            with self._named("/v1/completions"):
                async with self._http.stream(
                    "POST", "/v1/completions", json={**body, "stream": True}, timeout=self._timeout
                ) as response:
                    if response.status_code != 200:
                        await response.aread()
                        self._checked(response)
                    async for data in data_of(response):
                        if data == "[DONE]":
                            break
                        chunk = self._read(data)
                        has_finished = has_finished or chunk.finish_reason is not None
                        yield chunk
        except LostError:
            if not has_finished:  # otherwise only the count of its tokens is missing
                raise
        if not has_finished:
            raise LostError(f"{self.url} ended a stream before the answer's end")

    def _read(self, data: str) -> Chunk:
        try:
            event = json.loads(data)
        except ValueError as error:
            raise LostError(f"{self.url} broke a stream off in the middle of an event") from error
        if "error" in event:
            raise FailedError(f"{self.url}: {_reason(event)}")
        choices = event.get("choices") or [{}]
        return _chunk(choices[0], event.get("usage"))

    async def _get(self, route: str) -> Any:
        with self._named(route):
            response = await self._http.get(route, timeout=self._timeout)
        return self._json(self._checked(response))

    async def _post(self, route: str, body: Body) -> Any:
        with self._named(route):
            response = await self._http.post(route, json=body, timeout=self._timeout)
        self._checked(response)
        return self._json(response) if "json" in response.headers.get("content-type", "") else response.text

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise FailedError(f"{response.request.url} did not answer with JSON: {response.text[:80]!r}") from error

    def _checked(self, response: httpx.Response) -> httpx.Response:
        status = response.status_code
        if status < 400:
            return response
        try:
            reason = _reason(response.json())
        except ValueError:
            is_page = "html" in response.headers.get("content-type", "")
            reason = response.reason_phrase if is_page else " ".join(response.text.split())[:200]
        message = f"{response.request.url} answered {status}: {reason}"
        if status in (404, 429, 503):
            raise GoneError(message) if status == 404 else BusyError(message)
        raise FailedError(message) if status >= 500 else RefusedError(message, status=status, reason=reason)

    @contextmanager
    def _form(self, route: str) -> Iterator[None]:
        """Turns an answer of another form into an error of the server."""
        try:
            yield
        except (KeyError, TypeError, AttributeError) as error:
            raise FailedError(f"{self.url}{route} did not answer in vLLM's form ({error})") from error

    @contextmanager
    def _named(self, route: str) -> Iterator[None]:
        """Adds the server to a connection's error."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise LostError(f"{self.url}{route} did not answer in time ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise LostError(f"{self.url}{route}: {str(error) or type(error).__name__}") from error


def _chunk(choice: Mapping[str, Any], usage: Mapping[str, Any] | None) -> Chunk:
    scores = choice.get("logprobs") or {}
    details = (usage or {}).get("prompt_tokens_details") or {}
    return Chunk(
        tokens=tuple(choice.get("token_ids") or ()),
        logprobs=tuple(scores.get("token_logprobs") or ()),
        tops=tuple(map(_top, scores.get("top_logprobs") or ())),
        finish_reason=choice.get("finish_reason"),
        cached_tokens=details.get("cached_tokens"),
    )


def _top(scores: Mapping[str, float] | None) -> dict[int, float]:
    """Reads log-probabilities by token in the form of `return_tokens_as_token_ids`; the likeliest first."""
    ids = {int(token.removeprefix("token_id:")): logprob for token, logprob in (scores or {}).items()}
    return dict(sorted(ids.items(), key=lambda pair: -pair[1]))


def _reason(body: Any) -> str:
    """The message of an error, in the forms of vLLM's releases."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    message = error.get("message") or error.get("detail") if isinstance(error, Mapping) else error
    return " ".join(str(message or body).split())[:500]
