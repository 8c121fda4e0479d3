"""What tests of the server share: an engine in float64, requests, and what the engine alone answers to them."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn

import dlp_lora
from conftest import EveryK, HashRouter, byte_tokenizer, lively_model, make_adapter
from dlp_lora import Engine, Switching
from dlp_lora.engine.trace import Generation, Sentence
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.app import make_app
from dlp_lora.serve.backend import Done, Event, Request, Sampling, SentenceStart, Token
from dlp_lora.serve.service import Service

PROMPTS = ("Tell me a tale", "How far is it to the moon", "Why? " * 12, "x", "One. Two. Three, and four.")


def double_engine(adapters: Path, *, architecture: str = "llama", **settings: Any) -> Engine:
    """An engine whose rows switch every six characters; in float64, so that a batch rounds no token away."""
    settings = {
        "tokenizer": byte_tokenizer(),
        "router": HashRouter(),
        "segmenter": partial(EveryK, 6),
        "switching": Switching(min_tokens=1, margin=0.0),
        **settings,
    }
    return dlp_lora.load(lively_model(architecture).double(), adapters=adapters, **settings)


def extra_adapters(root: Path) -> tuple[Path, ...]:
    """Two adapters that go by one name, one after the other."""
    model = lively_model()
    return tuple(make_adapter(model, root / str(i), seed=10 + i, scale=0.3) for i in range(2))


def ask(
    engine: Engine, prompt: str, *, mixture: Mapping[str, float] | None = None, settings: Any = None, **sampling: Any
) -> Request:
    """A request as the front makes it; greedy and of 24 tokens unless told otherwise."""
    call = engine.call
    if mixture is not None:
        call = replace(call, mixtures=(dlp_lora.Mixture(mixture),))
    if settings:
        call = call.changed(settings)
    sampling = {"temperature": 0.0, "max_tokens": 24, **sampling}
    return Request(tokens=tuple(engine.tokenizer(prompt)["input_ids"]), call=call, sampling=Sampling(**sampling))


def alone(engine: Engine, request: Request) -> Generation:
    """What the engine answers to a request by itself."""
    sampling, call = request.sampling, request.call
    kwargs: dict[str, Any] = {"max_new_tokens": sampling.max_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        kwargs |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        kwargs |= {"min_p": sampling.min_p or None, "seed": sampling.seed}
    if sampling.repetition_penalty != 1:
        kwargs["repetition_penalty"] = sampling.repetition_penalty
    if sampling.stop:
        kwargs |= {"stop_strings": list(sampling.stop), "tokenizer": engine.tokenizer}
    if sampling.min_tokens:
        kwargs["min_new_tokens"] = sampling.min_tokens
    if call.mixtures is not None:
        kwargs["mixture"] = call.mixtures[0]
    generation = engine.generate(engine.tokenizer.decode(request.tokens), settings=call.settings, **kwargs)
    assert isinstance(generation, Generation)
    return generation


def over_http(
    service: Service, manager: AdapterManager, path: str, body: Any = None, *, key: str = ""
) -> httpx.Response:
    """Asks the application of a service, which has no process of its own here."""
    app = make_app(service, manager)

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            return await (client.get(path) if body is None else client.post(path, json=body))

    return asyncio.run(asked())


def events_of(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, the last one "[DONE]"."""
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@contextmanager
def listening(service: Service, manager: AdapterManager) -> Iterator[str]:
    """Has the application of a service listen, in a thread of this process, for clients that need an address."""
    server = uvicorn.Server(uvicorn.Config(make_app(service, manager), log_config=None, lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def timeless(generation: Generation) -> Generation:
    """Leaves out what a clock said."""
    return replace(generation, trace=_timeless(generation.trace), prompt_trace=_timeless(generation.prompt_trace))


def read(events: Iterable[Event]) -> Done:
    """Reads a stream to its end, and checks that its events tell one story."""
    events = list(events)
    done = events[-1]
    assert isinstance(done, Done)
    assert not any(isinstance(event, Done) for event in events[:-1])
    tokens = [event for event in events if isinstance(event, Token)]
    starts = [event for event in events if isinstance(event, SentenceStart)]
    generation = done.generation
    assert [token.id for token in tokens] == list(generation.tokens)
    assert [token.position for token in tokens] == list(range(len(tokens)))
    assert [(s.position, s.mixture, s.switched) for s in starts] == [
        (s.start, s.mixture, s.switched) for s in generation.trace
    ]
    for start in starts:
        # The token that opens a sentence is the next one.
        rest = [event for event in events[events.index(start) :] if isinstance(event, Token)]
        assert not rest or rest[0].position == start.position
    text = "".join(token.text for token in tokens) + done.text
    assert generation.text.startswith(text)
    assert text == generation.text or isinstance(done.stop, str)
    assert done.usage.completion_tokens == len(tokens)
    return done


def _timeless(trace: tuple[Sentence, ...]) -> tuple[Sentence, ...]:
    return tuple(replace(sentence, route_ms=0.0, fuse_ms=0.0, encode_ms=0.0) for sentence in trace)


def until(holds: Callable[[], bool], *, timeout_s: float = 60) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it never holds"
        time.sleep(0.01)
