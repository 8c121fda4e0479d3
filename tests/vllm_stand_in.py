"""A stand-in for vLLM: its routes, over the local engine, which computes real tokens.

It has adapters by name and path, a prefix cache by name and path as vLLM has it, several tokens a chunk, and faults on
demand. Only what vLLM does by itself is left out: batches, and speed.
"""

import asyncio
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import DynamicCache

from dlp_lora import Engine, Mixture
from dlp_lora.engine.cache import cache_argument
from dlp_lora.serve.backend import Sampling
from dlp_lora.serve.grammar import Grammars
from dlp_lora.serve.sampler import Sampler, logprobs


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong with the next answer: a status, its stream cut at a byte, an error in it, or a slow one."""

    status: int | None = None
    cut_at: int | None = None
    is_clean: bool = False  # the cut: the response ends there, as behind a proxy, and its connection does not break
    error_after: int | None = None  # tokens
    slow_s: float = 0.0  # a token
    ends_early: bool = False  # without a reason to finish


@dataclass(eq=False)
class StandIn:
    """One server. `block_size` is that of its prefix cache, `chunk_tokens` come at once."""

    engine: Engine
    name: str = "/models/base"
    max_rank: int = 64
    max_loras: int = 8
    block_size: int = 8
    chunk_tokens: int = 1
    version: str = "0.33.0"
    has_lora: bool = True
    allows_updates: bool = True
    has_cache: bool = True
    tells_cached: bool = True
    sees: Path = Path("/")
    faults: deque[Fault] = field(default_factory=deque)
    asked: list[dict[str, Any]] = field(default_factory=list)  # bodies
    num_aborted: int = 0
    num_loads: int = 0
    load_s: float = 0.0  # how long it takes to answer that an adapter is loaded
    adapters: dict[str, tuple[str, str]] = field(default_factory=dict)  # names in the bank, and paths, by name
    url: str = ""

    def __post_init__(self) -> None:
        self._blocks: dict[tuple[str, str, tuple[int, ...]], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._listener: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._lock = threading.Lock()
        self._has_answered = False
        vocab = self.engine.model.get_input_embeddings().num_embeddings
        self._grammars = Grammars(self.engine.tokenizer, vocab, sorted(self.engine.eos_ids))

    def start(self, *, port: int = 0) -> None:
        """Begins to listen."""
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        config = uvicorn.Config(_Cutting(self._app(), self), log_config=None, lifespan="off")
        config.timeout_graceful_shutdown = 0
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        """Goes away as a process does: its connections break, and it forgets its adapters."""
        assert self._server is not None
        assert self._listener is not None
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        self._listener.close()
        self.adapters.clear()
        self._blocks.clear()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def _app(self) -> ASGIApp:
        routes = [
            Route("/health", lambda _: Response()),
            Route("/version", lambda _: JSONResponse({"version": self.version})),
            Route("/metrics", lambda _: PlainTextResponse(self._metrics())),
            Route("/v1/models", lambda _: JSONResponse(self._models())),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        if self.allows_updates:
            routes += [
                Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self._unload, methods=["POST"]),
            ]
        return Starlette(routes=routes)

    def _metrics(self) -> str:
        lines = [
            f'vllm:cache_config_info{{block_size="{self.block_size}",enable_prefix_caching="{self.has_cache}"}} 1.0'
        ]
        if self._has_answered:
            lines.append(f'vllm:lora_requests_info{{max_lora="{self.max_loras}",running_lora_adapters=""}} 1.0')
        return "\n".join(lines) + "\n"

    def _models(self) -> Any:
        base = {"id": self.name, "root": self.name, "parent": None, "max_model_len": 512}
        loaded = [{"id": n, "root": path, "parent": self.name} for n, (_, path) in self.adapters.items()]
        return {"object": "list", "data": [base, *loaded]}

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        tokens = self.engine.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        return JSONResponse({"count": len(tokens), "max_model_len": 512, "tokens": tokens})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if not self.has_lora:
            return _error(500, "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded. If you want to load ...")
        if not (Path(path) / "adapter_config.json").is_file() or not Path(path).is_relative_to(self.sees):
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        with self._lock:
            self.num_loads += 1
            key = f"{name}#{self.num_loads}"
        await run_in_threadpool(self.engine.add_adapter, path, key)
        self.adapters[name] = key, path
        await asyncio.sleep(self.load_s)
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return Response("Success")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        is_check = bool(body.get("allowed_token_ids")) or body["model"].startswith("probe-")
        fault = self.faults.popleft() if self.faults and not is_check else Fault()
        if fault.status is not None:
            return _error(fault.status, "something is wrong")
        if body["model"] != self.name and body["model"] not in self.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > 512:
            return _error(400, "max_tokens is too large")
        request.scope["fault"] = fault
        answer = _Answer(self, body, fault)
        self._has_answered = True
        if not body["stream"]:
            return JSONResponse(await run_in_threadpool(answer.whole))

        async def events() -> Any:
            chunks = answer.chunks()
            try:
                while (chunk := await run_in_threadpool(next, chunks, None)) is not None:
                    yield chunk
            except (asyncio.CancelledError, GeneratorExit):
                self.num_aborted += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")

    def find_blocks(self, key: tuple[str, str], tokens: list[int]) -> tuple[DynamicCache, int]:
        """The KV of as many whole blocks as are kept, of all tokens but the last."""
        cache, kept = DynamicCache(), 0
        while self.has_cache and kept + self.block_size < len(tokens):
            block = self._blocks.get((*key, tuple(tokens[: kept + self.block_size])))
            if block is None:
                break
            for layer, (k, v) in enumerate(block):
                cache.update(k, v, layer)
            kept += self.block_size
        return cache, kept

    def keep_blocks(self, key: tuple[str, str], tokens: list[int], cache: DynamicCache) -> None:
        """Keeps the whole blocks of what was encoded; the first of a kind stays."""
        for end in range(self.block_size, cache.get_seq_length() + 1, self.block_size):
            place = (*key, tuple(tokens[:end]))
            if place not in self._blocks:
                part = slice(end - self.block_size, end)
                self._blocks[place] = [
                    (layer.keys[:, :, part].clone(), layer.values[:, :, part].clone()) for layer in cache.layers
                ]


class _Answer:
    """One answer, step by step."""

    def __init__(self, server: StandIn, body: dict[str, Any], fault: Fault) -> None:
        self._server, self._body, self._fault = server, body, fault
        key, path = server.adapters.get(body["model"], ("", ""))
        self._mixture = Mixture({key: 1.0}) if key else Mixture()
        self._key = (body["model"], path)
        self._tokens: list[int] = list(body["prompt"])
        schema = (body.get("structured_outputs") or {}).get("json")
        grammar = None
        if schema is not None:
            grammar = server._grammars.of_format({"type": "json_schema", "json_schema": {"schema": schema}})
        names = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
        self._ends = frozenset(body.get("stop_token_ids") or ())
        self._sampling = Sampling(
            temperature=body.get("temperature", 1.0),
            min_tokens=body.get("min_tokens", 0),
            max_tokens=body["max_tokens"],
            logit_bias={int(token): bias for token, bias in (body.get("logit_bias") or {}).items()},
            grammar=grammar,
            **{name: body[name] for name in names if body.get(name) is not None},
        )
        self.num_cached = 0

    def whole(self) -> Any:
        steps = list(self._steps())
        choice = self._choice(steps)
        if self._body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(self._body["prompt_logprobs"])
        return {"model": self._body["model"], "choices": [choice], "usage": self._usage()}

    def chunks(self) -> Iterator[bytes]:
        steps: list[Any] = []
        for i, step in enumerate(self._steps()):
            if self._fault.error_after == i:
                yield _event({"error": {"message": "the engine is broken", "type": "InternalServerError", "code": 500}})
                yield b"data: [DONE]\n\n"
                return
            steps.append(step)
            if step[3] is not None and self._fault.ends_early:
                return
            if len(steps) == self._server.chunk_tokens or step[3] is not None:
                yield _event({"choices": [self._choice(steps)]})
                steps = []
        yield _event({"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _usage(self) -> Any:
        details = {"prompt_tokens_details": {"cached_tokens": self.num_cached}} if self._server.tells_cached else {}
        return {"prompt_tokens": len(self._body["prompt"]), **details}

    def _choice(self, steps: list[Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": "", "token_ids": [step[0] for step in steps]}
        choice["finish_reason"] = steps[-1][3]
        if self._body.get("logprobs") is not None:
            tops = [{self._named(t): p for t, p in [*step[2].items(), (step[0], step[1])]} for step in steps]
            choice["logprobs"] = {"token_logprobs": [step[1] for step in steps], "top_logprobs": tops}
        return choice

    def _named(self, token: int) -> str:
        if self._body.get("return_tokens_as_token_ids"):
            return f"token_id:{token}"
        return str(self._server.engine.tokenizer.decode([token]))

    @torch.no_grad()
    def _steps(self) -> Iterator[tuple[int, float, dict[int, float], str | None]]:
        engine, server = self._server.engine, self._server
        with server._lock:
            cache, self.num_cached = server.find_blocks(self._key, self._tokens)
        sampler = Sampler(self._sampling, self._tokens, self._ends, engine.device)
        allowed = self._body.get("allowed_token_ids")
        new = self._tokens[self.num_cached :]
        for i in range(self._body["max_tokens"]):
            time.sleep(self._fault.slow_s)
            with server._lock:
                scores = self._forward(new, cache)
                server.keep_blocks(self._key, self._tokens, cache)
            token = allowed[0] if allowed else sampler.sample(scores.float())
            logprob, top = logprobs(scores, token, self._body.get("logprobs") or 0)
            sampler.add(token)
            self._tokens.append(token)
            new = [token]
            reason = "length" if i + 1 == self._body["max_tokens"] else None
            grammar = self._sampling.grammar
            if (grammar is not None and grammar.accept(token)) or (token in self._ends and not allowed):
                reason = "stop"
            yield token, logprob, top, reason
            if reason is not None:
                return

    def _forward(self, tokens: list[int], cache: DynamicCache | None, *, keep: int = 1) -> torch.Tensor:
        engine = self._server.engine
        start = 0 if cache is None else cache.get_seq_length()
        with engine.under([self._mixture]) as forward:
            logits = forward(
                input_ids=torch.tensor([tokens]),
                position_ids=torch.arange(start, start + len(tokens))[None],
                use_cache=cache is not None,
                logits_to_keep=keep,
                **cache_argument(cache),
            ).logits[0]
        return logits[-1] if keep else logits

    def _prompt_logprobs(self, num_top: int) -> list[Any]:
        prompt = self._body["prompt"]
        with self._server._lock, torch.no_grad():
            rows = self._forward(prompt, None, keep=0)
        told: list[Any] = [None]
        for token, scores in zip(prompt[1:], rows, strict=False):
            logprob, top = logprobs(scores, token, num_top)
            told.append({str(t): {"logprob": p} for t, p in {**top, token: logprob}.items()})
        return told


class _Cutting:
    """Breaks a connection off after so many bytes of a body."""

    def __init__(self, app: ASGIApp, server: StandIn) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_sent = 0

        async def cut(message: Message) -> None:
            nonlocal num_sent
            fault = scope.get("fault", Fault())
            limit, body = fault.cut_at, message.get("body", b"")
            if limit is not None and message["type"] == "http.response.body" and num_sent + len(body) > limit:
                await send({**message, "body": body[: limit - num_sent], "more_body": not fault.is_clean})
                raise ConnectionAbortedError
            num_sent += len(body)
            await send(message)

        with suppress(ConnectionAbortedError):  # what it began and did not end breaks off
            await self._app(scope, receive, cut)


@contextmanager
def standing_in(engine: Engine, **settings: Any) -> Iterator[StandIn]:
    """Runs a stand-in while the block lasts."""
    server = StandIn(engine, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"  # as vLLM does


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "Error", "code": status}}, status)
