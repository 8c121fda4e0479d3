"""Requests to the vLLM backend are answered as the engine answers them, whatever happens on the way.

A stand-in speaks vLLM's routes and computes real tokens; `tests/engines` asks a real one.
"""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import dlp_lora
from conftest import WordRouter, byte_tokenizer, lively_model
from dlp_lora import AdapterError, Context, Engine, TopP
from dlp_lora.bank.limits import Within
from dlp_lora.engine.outline import Outline
from dlp_lora.engine.prompts import encode_prompt
from dlp_lora.engine.trace import Generation
from dlp_lora.errors import ModelError, PromptError
from dlp_lora.policy import Only
from dlp_lora.serve.backend import (
    BackendError,
    ClosedError,
    Event,
    PromptScores,
    QueueFullError,
    Request,
    Token,
    UnavailableError,
)
from dlp_lora.serve.grammar import Grammars
from dlp_lora.serve.local import LocalBackend
from dlp_lora.serve.vllm.backend import VLLMBackend, VLLMSettings
from dlp_lora.serve.vllm.client import Chunk, LostError, VLLMClient
from serving import PROMPTS, alone, ask, double_engine, extra_adapters, read, timeless, until
from vllm_stand_in import Fault, StandIn, standing_in

pytestmark = pytest.mark.filterwarnings("ignore:.*changes nothing")  # the adapter that servers are checked with

QUICK = VLLMSettings(poll_s=0.05, timeout_s=30.0)


@pytest.fixture(scope="module")
def engine(lively_adapters: Path) -> Engine:
    """The oracle."""
    return double_engine(lively_adapters)


@pytest.fixture(scope="module")
def outline(engine: Engine) -> Outline:
    return replace(Outline.of(engine), base=replace(Outline.of(engine).base, probe=engine.probe()))


def upstream(lively_adapters: Path) -> Engine:
    """The engine of a stand-in: it has its own adapters beside one that nobody asks for."""
    return dlp_lora.load(
        lively_model().double(), tokenizer=byte_tokenizer(), adapters={"unused": lively_adapters / "math"}
    )


@pytest.fixture(scope="module")
def stand_in(lively_adapters: Path) -> Iterator[StandIn]:
    with standing_in(upstream(lively_adapters)) as server:
        yield server


@pytest.fixture(scope="module")
def shared(outline: Outline, stand_in: StandIn) -> Iterator[VLLMBackend]:
    backend = VLLMBackend(outline, [stand_in.url], settings=QUICK)
    yield backend
    backend.close()


@pytest.fixture
def backend(shared: VLLMBackend, stand_in: StandIn) -> Iterator[VLLMBackend]:
    stand_in.faults.clear()
    stand_in.asked.clear()
    yield shared
    stand_in.faults.clear()


@pytest.fixture
def two(lively_adapters: Path) -> Iterator[tuple[StandIn, StandIn]]:
    with standing_in(upstream(lively_adapters)) as a, standing_in(upstream(lively_adapters)) as b:
        yield a, b


def within(engine: Engine, backend: VLLMBackend, request: Request) -> Request:
    """The request as it is answered under rounded mixtures."""
    call = request.call
    if call.mixtures is not None:
        return replace(request, call=call.changed({"mixtures": tuple(map(backend.limits.check, call.mixtures))}))
    return replace(request, call=call.changed({"policy": Within(call.settings.policy, backend.limits)}))


def plain(generation: Generation) -> Generation:
    """Leaves out what a clock said, and what only servers with blocks tell."""
    generation = timeless(generation)
    return replace(generation, trace=tuple(replace(s, kept_tokens=None) for s in generation.trace))


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_recompute_answers_as_the_engine_under_the_rounded_mixture(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn, prompt: str
) -> None:
    request = ask(engine, prompt)
    done = read(backend.open(request))
    assert plain(done.generation) == plain(alone(engine, within(engine, backend, request)))
    assert len(stand_in.asked) == 1 + sum(sentence.switched for sentence in done.generation.trace)


@pytest.mark.parametrize("chunk_tokens", [3, 100])
def test_what_comes_behind_a_switch_in_a_chunk_is_thrown_away(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn, chunk_tokens: int
) -> None:
    stand_in.chunk_tokens = chunk_tokens
    try:
        request = ask(engine, PROMPTS[0])
        assert plain(read(backend.open(request)).generation) == plain(alone(engine, within(engine, backend, request)))
    finally:
        stand_in.chunk_tokens = 1


def test_many_requests_at_once_are_answered_as_alone(engine: Engine, backend: VLLMBackend) -> None:
    requests = [ask(engine, prompt, max_tokens=12) for prompt in PROMPTS]
    streams = [backend.open(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        assert plain(read(stream).generation) == plain(alone(engine, within(engine, backend, request)))


def test_only_a_change_of_mixture_cuts_the_stream(engine: Engine, backend: VLLMBackend, stand_in: StandIn) -> None:
    request = ask(engine, PROMPTS[0], settings={"policy": Only("math")})
    done = read(backend.open(request))
    assert len(done.generation.trace) > 2
    assert len(stand_in.asked) == 1


def test_mixtures_of_the_trace_are_whole_64ths(engine: Engine, backend: VLLMBackend) -> None:
    trace = read(backend.open(ask(engine, PROMPTS[0]))).generation.trace
    for sentence in trace:
        assert all((64 * weight).is_integer() for weight in sentence.mixture.values())
        assert sum(sentence.mixture.values()) == 1


@torch.no_grad()
def replayed(engine: Engine, generation: Generation) -> list[int]:
    """The greedy tokens where each part of the context has the mixture that the trace says it was encoded under."""
    prompt, answer = list(generation.prompt_tokens), list(generation.tokens)
    mixtures = [generation.trace[0].mixture]
    numbers = [0] * (len(prompt) + len(answer))
    tokens: list[int] = []
    for i, sentence in enumerate(generation.trace):
        if sentence.switched:
            mixtures.append(sentence.mixture)
            assert sentence.kept_tokens is not None
            rest = slice(sentence.kept_tokens, None)
            numbers[rest] = [len(mixtures) - 1] * len(numbers[rest])
        # The token that opens a sentence is sampled before the switch, and so with the sentence before.
        last = len(answer) if i + 1 == len(generation.trace) else generation.trace[i + 1].start + 1
        ids = torch.tensor([prompt + answer])
        with engine.under(mixtures, torch.tensor([numbers])) as forward:
            scores = forward(input_ids=ids).logits[0]
        tokens += scores[len(prompt) - 1 + len(tokens) : len(prompt) - 1 + last].argmax(dim=-1).tolist()
    return tokens


@pytest.mark.parametrize("prompt", PROMPTS[1:4])
def test_keep_answers_as_a_replay_with_the_kept_blocks_under_their_old_mixtures(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn, prompt: str
) -> None:
    done = read(backend.open(ask(engine, prompt, settings={"kv_policy": "keep"}, max_tokens=40)))
    switches = [sentence for sentence in done.generation.trace if sentence.switched]
    assert switches
    for sentence in switches:
        num_before = done.usage.prompt_tokens + sentence.start
        assert sentence.kept_tokens == num_before // stand_in.block_size * stand_in.block_size
    assert replayed(engine, done.generation) == list(done.generation.tokens)
    # Its adapter is unloaded and deleted just after the answer's last event.
    until(lambda: not any(name.startswith("keep-") for name in stand_in.adapters))
    until(lambda: not list(backend._folder.path.glob("keep-*")))


def test_an_answer_under_keep_has_one_name_and_one_path(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn
) -> None:
    read(backend.open(ask(engine, PROMPTS[0], settings={"kv_policy": "keep"}, max_tokens=40)))
    assert len({body["model"] for body in stand_in.asked}) == 1


def test_a_fixed_mixture_is_asked_for_by_one_name_and_an_empty_one_is_the_base(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn
) -> None:
    for mixture in ({}, {"math": 1.0}, {"units": 0.61, "poems": 0.39}):
        request = ask(engine, PROMPTS[1], mixture=mixture, settings={"kv_policy": "keep"})
        assert plain(read(backend.open(request)).generation) == plain(alone(engine, within(engine, backend, request)))
    assert stand_in.asked[0]["model"] == stand_in.name
    assert all(body["model"].startswith("dlp-") for body in stand_in.asked[1:])


def test_a_mixture_is_loaded_once_however_often_it_is_asked_for(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn
) -> None:
    """https://github.com/NovaSky-AI/SkyRL/pull/1606: it was read from disk at every step."""
    num_loads = stand_in.num_loads
    for _ in range(3):
        read(backend.open(ask(engine, PROMPTS[0], mixture={"math": 0.25, "poems": 0.75})))
    assert stand_in.num_loads == num_loads + 1


def test_a_release_that_computes_base_rows_wrongly_gets_an_adapter_of_zeros(
    engine: Engine, outline: Outline, lively_adapters: Path
) -> None:
    with standing_in(upstream(lively_adapters), version="0.32.0") as server:
        backend = VLLMBackend(outline, [server.url], settings=QUICK)
        request = ask(engine, PROMPTS[1], mixture={})
        assert plain(read(backend.open(request)).generation) == plain(alone(engine, request))
        assert server.asked[-1]["model"].startswith("dlp-")
        with pytest.raises(ValueError, match=r"vLLM 0\.32\.0 fails on log-probabilities of prompts"):
            read(backend.open(ask(engine, PROMPTS[1], mixture={}, num_prompt_logprobs=1)))
        backend.close()


# What is counted over several requests for one answer.


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[LocalBackend]:
    """What samples as the engine does, and has what `generate` has not."""
    backend = LocalBackend(engine, max_batch=2)
    yield backend
    backend.close()


COUNTED: list[dict[str, Any]] = [
    {"frequency_penalty": 1.9},
    {"frequency_penalty": -0.6, "logit_bias": {65: 3.0, 66: -2.0}},
    {"repetition_penalty": 1.3},
    {"min_tokens": 20, "stop_token_ids": frozenset(range(60, 200))},
    {"stop_token_ids": frozenset(range(60, 90))},
    {"max_tokens": 7},
    {"max_tokens": 1},
]


@pytest.mark.parametrize("sampling", COUNTED, ids=lambda sampling: " ".join(sampling))
def test_what_vllm_counts_by_request_is_counted_by_answer(
    engine: Engine, backend: VLLMBackend, local: LocalBackend, sampling: dict[str, Any]
) -> None:
    request = ask(engine, PROMPTS[0], **sampling)
    done = read(backend.open(request))
    expected = read(local.open(within(engine, backend, request)))
    assert (done.reason, done.stop) == (expected.reason, expected.stop)
    assert plain(done.generation) == plain(expected.generation)
    assert done.usage.prompt_tokens == len(request.tokens)
    assert done.usage.completion_tokens == len(done.generation.tokens)


def test_an_answer_under_keep_is_as_long_as_it_may_be(engine: Engine, backend: VLLMBackend) -> None:
    for num_tokens in (1, 13):
        done = read(backend.open(ask(engine, PROMPTS[0], settings={"kv_policy": "keep"}, max_tokens=num_tokens)))
        assert (done.reason, done.usage.completion_tokens) == ("length", num_tokens)


def test_a_stop_string_is_found_over_a_cut(engine: Engine, backend: VLLMBackend) -> None:
    for prompt in PROMPTS:
        whole = alone(engine, within(engine, backend, ask(engine, prompt, max_tokens=60)))
        offsets = [sum(len(s.text) for s in whole.trace[:i]) for i, s in enumerate(whole.trace) if s.switched]
        over = [whole.text[at - 1 : at + 1] for at in offsets if "\ufffd" not in whole.text[at - 1 : at + 1]]
        if over:
            break
    stop = over[0]
    events = list(backend.open(ask(engine, prompt, max_tokens=60, stop=("never", stop))))
    done = read(events)
    assert (done.reason, done.stop) == ("stop", stop)
    text = "".join(event.text for event in events if isinstance(event, Token)) + done.text
    assert text == whole.text[: whole.text.index(stop)]


def test_log_probabilities_are_those_under_the_mixture_of_each_token(
    engine: Engine, backend: VLLMBackend, local: LocalBackend
) -> None:
    request = ask(engine, PROMPTS[0], num_logprobs=3, num_prompt_logprobs=2)
    found, expected = (
        [event for event in b.open(within(engine, backend, request)) if isinstance(event, Token | PromptScores)]
        for b in (backend, local)
    )
    assert len(found) == len(expected) == 25
    for event, other in zip(found, expected, strict=True):
        if isinstance(event, Token):
            assert isinstance(other, Token)
            assert event.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert list(event.top) == list(other.top)
        else:
            assert isinstance(other, PromptScores)
            assert event.logprobs[1:] == pytest.approx(other.logprobs[1:], abs=1e-5)
            assert [list(top) for top in event.top] == [list(top) for top in other.top]


def test_a_seeded_answer_is_the_same_twice_and_its_requests_draw_other_numbers(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn
) -> None:
    request = ask(engine, PROMPTS[0], temperature=1.0, seed=7)
    first, again = (plain(read(backend.open(request)).generation) for _ in range(2))
    assert first == again
    seeds = [body["seed"] for body in stand_in.asked]
    assert len(set(seeds)) == len(seeds) / 2 > 1
    other = read(backend.open(ask(engine, PROMPTS[0], temperature=1.0, seed=8))).generation
    assert other.tokens != first.tokens


def test_a_presence_penalty_keeps_one_mixture(engine: Engine, backend: VLLMBackend, stand_in: StandIn) -> None:
    done = read(backend.open(ask(engine, PROMPTS[0], presence_penalty=1.0)))
    assert len(done.generation.trace) == len(stand_in.asked) == 1


def test_an_answer_in_a_grammar_keeps_one_mixture_and_follows_the_schema(
    engine: Engine, backend: VLLMBackend, local: LocalBackend, stand_in: StandIn
) -> None:
    grammars = Grammars(engine.tokenizer, 260, sorted(engine.eos_ids))
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 23]}},
        "required": ["n"],
        "additionalProperties": False,
    }

    def asked() -> Request:
        grammar = grammars.of_format({"type": "json_schema", "json_schema": {"schema": schema}})
        return ask(engine, PROMPTS[0], grammar=grammar, max_tokens=40)

    done = read(backend.open(asked()))
    assert json.loads(done.generation.text)["n"] in (1, 23)
    assert done.generation.text == read(local.open(within(engine, backend, asked()))).generation.text
    assert len(stand_in.asked) == 1


def test_the_cache_of_another_request_is_told_in_usage(engine: Engine, backend: VLLMBackend, stand_in: StandIn) -> None:
    request = ask(engine, "The same beginning of a prompt, " * 2, mixture={"math": 1.0}, max_tokens=4)
    assert read(backend.open(request)).usage.cached_tokens == 0
    assert read(backend.open(request)).usage.cached_tokens == 64 - stand_in.block_size


# What goes wrong.


def test_a_stream_that_is_cut_at_any_byte_goes_on_where_it_was(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn
) -> None:
    request = ask(engine, PROMPTS[0], max_tokens=10)
    expected = plain(alone(engine, within(engine, backend, request)))
    for cut_at in range(0, 620, 47):
        stand_in.faults.append(Fault(cut_at=cut_at))
        assert plain(read(backend.open(request)).generation) == expected, cut_at
        assert not stand_in.faults


WAYS_TO_END = pytest.mark.parametrize("is_clean", [False, True], ids=["broken off", "ended in order"])


@WAYS_TO_END
def test_of_a_stream_that_is_cut_at_any_byte_no_token_is_wrong_and_its_loss_is_noticed(
    stand_in: StandIn, is_clean: bool
) -> None:
    body = {"model": stand_in.name, "prompt": [70, 71, 72], "max_tokens": 3, "temperature": 0.0, "logprobs": 1}
    asked = {**body, "return_tokens_as_token_ids": True, "stream": True}
    stream = httpx.post(f"{stand_in.url}/v1/completions", json=asked).content
    cut_at = len(stream)

    async def replay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.findall(rb"content-length: (\d+)", head.lower())[0]))
        length = b"" if is_clean else b"Content-Length: %d\r\n" % len(stream)
        writer.write(b"HTTP/1.1 200 OK\r\n%sConnection: close\r\n\r\n" % length + stream[:cut_at])
        await writer.drain()
        writer.close()

    async def received(client: VLLMClient) -> tuple[list[Chunk], bool]:
        chunks: list[Chunk] = []
        try:
            async with aclosing(client.stream(body)) as arriving:
                async for chunk in arriving:
                    chunks.append(chunk)
        except LostError:
            return chunks, True
        return chunks, False

    async def at_every_byte() -> None:
        nonlocal cut_at
        async with await asyncio.start_server(replay, "127.0.0.1", 0) as server:
            client = VLLMClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            whole, is_lost = await received(client)
            assert [chunk.finish_reason for chunk in whole] == [None, None, "length", None]
            assert not is_lost
            for cut_at in range(len(stream)):
                chunks, is_lost = await received(client)
                assert chunks == whole[: len(chunks)], cut_at
                assert is_lost == (len(chunks) < 3), cut_at
            await client.close()

    asyncio.run(at_every_byte())


@WAYS_TO_END
def test_an_answer_whose_streams_are_cut_goes_on_at_another_server_once_and_is_whole_or_an_error(
    engine: Engine, outline: Outline, two: tuple[StandIn, StandIn], is_clean: bool
) -> None:
    two[1].faults = two[0].faults  # the next answer has it, whoever gives it
    backend = VLLMBackend(outline, [server.url for server in two], settings=QUICK)
    request = ask(engine, PROMPTS[0], max_tokens=4)
    whole = plain(alone(engine, within(engine, backend, request)))
    num_errors = 0
    for cut_at in range(0, 400, 61):
        fault = Fault(cut_at=cut_at, is_clean=is_clean)
        for server in two:
            server.asked.clear()
        two[0].faults.append(fault)
        assert plain(read(backend.open(request)).generation) == whole, cut_at
        assert not two[0].faults
        assert {len(server.asked) for server in two} <= {0, 1}  # not twice at the same one
        two[0].faults += [fault, fault]
        events: list[Event] = []
        try:
            events.extend(backend.open(request))
        except BackendError:
            tokens = [event.id for event in events if isinstance(event, Token)]
            assert tokens == list(whole.tokens[: len(tokens)]), cut_at
            num_errors += 1
        else:
            assert plain(read(events).generation) == whole, cut_at
        two[0].faults.clear()
    assert num_errors > 2
    backend.close()


@pytest.mark.parametrize(
    "fault", [Fault(status=500), Fault(error_after=1), Fault(ends_early=True), Fault(error_after=0)], ids=str
)
@pytest.mark.parametrize("kv_policy", ["recompute", "keep"])
def test_an_answer_goes_on_once_after_a_failure(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn, fault: Fault, kv_policy: str
) -> None:
    settings = {"kv_policy": kv_policy, "policy": Only("math")}
    request = ask(engine, PROMPTS[0], max_tokens=6, settings=settings)
    stand_in.faults.append(fault)
    expected = plain(alone(engine, within(engine, backend, request)))
    assert plain(read(backend.open(request)).generation) == expected
    stand_in.faults += [fault, fault if fault.error_after != 1 else Fault(error_after=0)]
    with pytest.raises(BackendError):
        read(backend.open(request))


def test_an_answer_in_a_grammar_does_not_go_on_where_it_was_cut(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn
) -> None:
    grammar = Grammars(engine.tokenizer, 260, sorted(engine.eos_ids)).of_format({"type": "json_object"})
    stand_in.faults.append(Fault(error_after=1))
    with pytest.raises(BackendError, match="the engine is broken"):
        read(backend.open(ask(engine, PROMPTS[0], grammar=grammar)))


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_told_as_busy(engine: Engine, backend: VLLMBackend, stand_in: StandIn, status: int) -> None:
    stand_in.faults.append(Fault(status=status))
    with pytest.raises(QueueFullError, match="all backends are busy"):
        read(backend.open(ask(engine, PROMPTS[0])))


def test_an_answer_that_has_begun_waits_for_a_busy_server(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn
) -> None:
    request = ask(engine, PROMPTS[0])
    stand_in.faults += [Fault(), Fault(status=503)]
    assert plain(read(backend.open(request)).generation) == plain(alone(engine, within(engine, backend, request)))


def test_an_adapter_that_a_server_has_lost_is_loaded_again(
    engine: Engine, backend: VLLMBackend, stand_in: StandIn
) -> None:
    request = ask(engine, PROMPTS[1], mixture={"math": 1.0})
    expected = plain(alone(engine, request))
    for _ in range(2):
        assert plain(read(backend.open(request)).generation) == expected
        for name in [name for name in stand_in.adapters if name.startswith("dlp-")]:
            del stand_in.adapters[name]


def test_a_silent_server_is_given_up_on(engine: Engine, outline: Outline, lively_adapters: Path) -> None:
    with standing_in(upstream(lively_adapters)) as slow:
        backend = VLLMBackend(outline, [slow.url], settings=QUICK)
        for replica in backend._replicas:
            replica.client.timeout_s = 0.3
        slow.faults += [Fault(slow_s=0.8)] * 2
        with pytest.raises(UnavailableError, match="did not answer in time"):
            read(backend.open(ask(engine, PROMPTS[1], mixture={})))
        backend.close()


def test_servers_take_turns_and_an_answer_outlives_the_one_that_dies(
    engine: Engine, outline: Outline, two: tuple[StandIn, StandIn]
) -> None:
    backend = VLLMBackend(outline, [server.url for server in two], settings=QUICK)
    for server in two:
        server.asked.clear()
    request = ask(engine, PROMPTS[0], max_tokens=14)
    expected = plain(alone(engine, within(engine, backend, request)))
    for _ in range(2):
        assert plain(read(backend.open(request)).generation) == expected
    assert len(two[0].asked) == len(two[1].asked) > 0
    for server in two:
        server.faults.append(Fault(slow_s=0.05))
    events, dead = [], None
    for event in backend.open(request):
        events.append(event)
        if dead is None and isinstance(event, Token) and event.position == 2:
            dead = two[0] if two[1].faults else two[1]
            dead.stop()
    assert plain(read(events).generation) == expected
    until(lambda: len(backend._replicas.up) == 1)
    assert backend.health.is_alive
    for _ in range(3):
        assert plain(read(backend.open(request)).generation) == expected
    assert dead is not None
    dead.start(port=dead.port)  # with none of its adapters
    until(lambda: len(backend._replicas.up) == 2)
    dead.asked.clear()
    for _ in range(2):
        assert plain(read(backend.open(request)).generation) == expected
    assert dead.asked
    backend.close()


def test_a_server_that_comes_back_with_another_model_gets_nothing(
    engine: Engine, outline: Outline, lively_adapters: Path
) -> None:
    with standing_in(upstream(lively_adapters)) as server:
        backend = VLLMBackend(outline, [server.url], settings=QUICK)
        right = server.engine
        server.stop()
        server.engine = dlp_lora.load(
            lively_model(seed=9).double(), tokenizer=byte_tokenizer(), adapters={"u": lively_adapters / "math"}
        )
        server.start(port=server.port)
        until(lambda: "another model" in backend.health.reason)
        assert not backend.health.is_alive
        with pytest.raises(UnavailableError, match="no backend can answer"):
            read(backend.open(ask(engine, PROMPTS[0])))
        server.stop()
        server.engine = right
        server.start(port=server.port)
        until(lambda: backend.health.is_alive)
        assert read(backend.open(ask(engine, PROMPTS[0]))).reason == "length"
        backend.close()


def test_a_reader_that_leaves_ends_the_request(engine: Engine, backend: VLLMBackend, stand_in: StandIn) -> None:
    stand_in.faults.append(Fault(slow_s=0.02))
    before = stand_in.num_aborted
    stream = backend.open(ask(engine, PROMPTS[1], mixture={}, max_tokens=400, ignore_eos=True))
    events = []
    for event in stream:
        events.append(event)
        if isinstance(event, Token) and event.position == 3:
            stream.cancel()
            stream.cancel()
    assert read(events).reason == "abort"
    until(lambda: stand_in.num_aborted == before + 1)
    until(lambda: backend.stats().decoding == backend.stats().waiting == 0)


def test_a_request_that_is_cancelled_at_once_gives_its_place_back(engine: Engine, backend: VLLMBackend) -> None:
    for _ in range(20):
        stream = backend.open(ask(engine, PROMPTS[0], mixture={}))
        stream.cancel()
        assert read(stream).reason == "abort"
    until(lambda: backend._num_open == 0)


def test_an_answer_that_ends_while_its_adapter_is_loaded_leaves_none_behind(
    engine: Engine, outline: Outline, lively_adapters: Path
) -> None:
    with standing_in(upstream(lively_adapters)) as server:
        backend = VLLMBackend(outline, [server.url], settings=QUICK)
        server.load_s = 0.3
        settings = {"settings": replace(engine.call.settings, kv_policy="keep")}
        for has_closed in (False, True):
            stream = backend.open(ask(engine, PROMPTS[1], settings=settings))
            until(lambda: any(name.startswith("keep-") for name in server.adapters))
            if has_closed:
                backend.close()
            else:
                stream.cancel()
                until(lambda: not any(name.startswith("keep-") for name in server.adapters))
                until(lambda: not list(backend._folder.path.glob("keep-*")))
        assert not server.adapters


def test_an_adapter_that_comes_back_is_not_chosen_by_an_answer_that_began_without_it(
    engine: Engine, outline: Outline, lively_adapters: Path
) -> None:
    with standing_in(upstream(lively_adapters)) as server:
        backend = VLLMBackend(outline, [server.url], settings=QUICK)
        backend.remove_adapter("units")
        server.faults.append(Fault(slow_s=0.02))
        events = []
        for event in backend.open(ask(engine, PROMPTS[1], max_tokens=60, ignore_eos=True)):
            events.append(event)
            if isinstance(event, Token) and event.position == 3:
                backend.put_adapters({"units": lively_adapters / "units"})
        trace = read(events).generation.trace
        assert len(trace) > 3
        assert not any("units" in sentence.mixture for sentence in trace)
        backend.close()


def test_a_server_that_answers_strangely_is_looked_at_again(
    engine: Engine, outline: Outline, lively_adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with standing_in(upstream(lively_adapters)) as server:
        backend = VLLMBackend(outline, [server.url], settings=QUICK)
        with monkeypatch.context() as patch:
            patch.setattr(StandIn, "_models", lambda self: {"object": "list"})
            until(lambda: not backend.health.is_alive)
            assert "/v1/models did not answer in vLLM's form" in backend.health.reason
        until(lambda: backend.health.is_alive)
        assert read(backend.open(ask(engine, "x", mixture={}))).reason == "length"
        backend.close()


def test_closing_ends_what_runs_and_leaves_nothing_on_the_servers(
    engine: Engine, outline: Outline, lively_adapters: Path
) -> None:
    with standing_in(upstream(lively_adapters)) as server:
        backend = VLLMBackend(outline, [server.url], settings=QUICK, max_running=1, max_queue=1)
        server.faults.append(Fault(slow_s=0.05))
        running = backend.open(ask(engine, PROMPTS[1], mixture={"math": 1.0}, max_tokens=400))
        waiting = backend.open(ask(engine, PROMPTS[1], mixture={}))
        with pytest.raises(QueueFullError, match="2 requests run or wait already"):
            backend.open(ask(engine, PROMPTS[1], mixture={}))
        until(lambda: backend.stats().decoding == 1)
        backend.close(drain_s=0.1)
        for stream in (running, waiting):
            with pytest.raises(ClosedError):
                list(stream)
        with pytest.raises(ClosedError):
            backend.open(ask(engine, PROMPTS[1], mixture={}))
        assert not server.adapters
        assert not backend._folder.path.exists()
        backend.close()


# Adapters that come and go.


def test_an_adapter_is_there_when_every_server_has_it(
    engine: Engine, outline: Outline, two: tuple[StandIn, StandIn], tmp_path: Path
) -> None:
    backend = VLLMBackend(outline, [server.url for server in two], settings=QUICK)
    (path, other) = extra_adapters(tmp_path)
    backend.put_adapters({"extra": path})
    assert all(any(name.startswith("dlp-") for name in server.adapters) for server in two)
    oracle = double_engine(engine.bank.adapters["math"].path.parent)
    oracle.add_adapter(path, "extra")
    request = ask(oracle, PROMPTS[1], mixture={"extra": 1.0})
    assert plain(read(backend.open(request)).generation) == plain(alone(oracle, request))
    first = read(backend.open(request)).generation
    backend.put_adapters({"extra": other})
    oracle.put_adapters({"extra": other})
    assert plain(read(backend.open(request)).generation) == plain(alone(oracle, request)) != plain(first)
    assert sum(name.startswith("dlp-") for name in two[0].adapters) == 1  # the replaced one is unloaded
    backend.remove_adapter("extra")
    assert not any(name.startswith("dlp-") for server in two for name in server.adapters)
    with pytest.raises(AdapterError, match="no adapter 'extra'"):
        backend.open(request)
    with pytest.raises(AdapterError, match="no adapter 'extra'"):
        backend.remove_adapter("extra")
    two[1].max_rank = 1
    before = read(backend.open(ask(engine, PROMPTS[1], mixture={"math": 1.0}))).generation
    with pytest.raises(AdapterError, match="not every backend could load it"):
        backend.put_adapters({"math": other, "extra": path})
    assert "extra" not in backend.adapters
    two[1].max_rank = 64
    assert plain(read(backend.open(ask(engine, PROMPTS[1], mixture={"math": 1.0}))).generation) == plain(before)
    backend.close()


def test_an_adapter_of_layers_without_slots_is_refused(
    outline: Outline, stand_in: StandIn, lively_adapters: Path
) -> None:
    settings = replace(QUICK, targets=frozenset({"q_proj", "v_proj"}))
    few = replace(outline, adapters={"math": outline.adapters["math"]})
    backend = VLLMBackend(few, [stand_in.url], settings=settings)
    with pytest.raises(AdapterError, match=r"changes .*k_proj, .* for which vLLM was started without slots"):
        backend.put_adapters({"poems": lively_adapters / "poems"})
    backend.close()


def test_a_reloaded_adapter_is_another_one(engine: Engine, backend: VLLMBackend, tmp_path: Path) -> None:
    answers = []
    for path in extra_adapters(tmp_path):
        backend.put_adapters({"extra": path})
        answers.append(read(backend.open(ask(engine, PROMPTS[1], mixture={"extra": 1.0}))).generation.tokens)
        backend.remove_adapter("extra")
    assert answers[0] != answers[1]


def test_the_folder_keeps_what_is_in_use_and_drops_what_was_used_longest_ago(
    engine: Engine, outline: Outline, stand_in: StandIn, tmp_path: Path
) -> None:
    settings = replace(QUICK, adapter_cache=tmp_path, adapter_cache_mb=0.0)
    backend = VLLMBackend(outline, [stand_in.url], settings=settings)
    request = ask(engine, PROMPTS[0], max_tokens=14)
    expected = plain(alone(engine, within(engine, backend, request)))
    for _ in range(2):
        assert plain(read(backend.open(request)).generation) == expected
        assert len(list(tmp_path.glob("dlp-*"))) <= 1  # the last one, as none was written since
    backend.close()
    assert not list(tmp_path.glob("probe-*"))


def test_two_servers_of_one_folder_do_not_delete_each_others_mixtures(
    engine: Engine, outline: Outline, stand_in: StandIn, tmp_path: Path
) -> None:
    first, second = (
        VLLMBackend(outline, [stand_in.url], settings=replace(QUICK, adapter_cache=tmp_path, adapter_cache_mb=mb))
        for mb in (100.0, 0.0)
    )
    math, units = (ask(engine, PROMPTS[1], mixture={name: 1.0}, max_tokens=4) for name in ("math", "units"))
    read(first.open(math))
    (kept,) = tmp_path.glob("dlp-*")
    read(second.open(math))
    read(second.open(units))
    assert kept.is_dir()
    assert plain(read(first.open(math)).generation) == plain(alone(engine, math))
    first.close()
    second.close()


def test_a_mixture_of_too_large_a_rank_leaves_out_the_least_likely(
    engine: Engine, outline: Outline, stand_in: StandIn
) -> None:
    backend = VLLMBackend(outline, [stand_in.url], settings=replace(QUICK, max_rank=10))
    request = ask(engine, PROMPTS[0], settings={"policy": TopP(1.0)})
    done = read(backend.open(request))
    assert plain(done.generation) == plain(alone(engine, within(engine, backend, request)))
    ranks = {"math": 4, "units": 8, "poems": 2}
    for sentence in done.generation.trace:
        assert sum(ranks[name] for name in sentence.mixture) <= 10
        assert {*sentence.mixture, *sentence.mixture.left_out} == set(ranks)
        assert sum(sentence.mixture.values()) == 1
    with pytest.raises(ValueError, match="have a rank of 12 together, and this server takes 10"):
        backend.open(ask(engine, PROMPTS[0], mixture={"math": 0.5, "units": 0.5}))
    backend.close()
    with pytest.raises(ValueError, match="max_rank is 7, and the adapter 'units' alone has rank 8"):
        VLLMBackend(outline, [stand_in.url], settings=replace(QUICK, max_rank=7))


# The checks at the start.


CHECKS: list[tuple[dict[str, Any], str]] = [
    ({"has_lora": False}, "has no LoRA: start it with --enable-lora"),
    ({"allows_updates": False}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ({"max_rank": 8}, "refuses an adapter of rank 14: start it with --max-lora-rank 14"),
    ({"sees": Path("/nowhere")}, "give --adapter-cache a folder that both sides see"),
]


@pytest.mark.parametrize("settings, message", CHECKS, ids=[message for _, message in CHECKS])
def test_a_server_that_cannot_answer_is_refused_with_what_to_do(
    outline: Outline, lively_adapters: Path, settings: dict[str, Any], message: str
) -> None:
    with (
        standing_in(upstream(lively_adapters), **settings) as server,
        pytest.raises(ModelError, match=re.escape(message)),
    ):
        VLLMBackend(outline, [server.url], settings=QUICK)


def test_other_models_and_tokenizers_are_refused(outline: Outline, lively_adapters: Path) -> None:
    other = dlp_lora.load(lively_model(seed=3), tokenizer=byte_tokenizer(), adapters={"u": lively_adapters / "math"})
    with standing_in(other) as server, pytest.raises(ModelError, match=r"another model than .* differ by"):
        VLLMBackend(outline, [server.url], settings=QUICK)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["apples"])
    with standing_in(upstream(lively_adapters)) as server:
        server.engine.tokenizer = tokenizer
        with pytest.raises(ModelError, match="whose tokenizer is another one"):
            VLLMBackend(outline, [server.url], settings=QUICK)


def test_a_server_that_is_not_there_or_is_no_vllm_is_named(outline: Outline) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=re.escape(url)):
            VLLMBackend(outline, [url], settings=QUICK)
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{files.server_port}"
        with pytest.raises(ModelError) as caught:
            VLLMBackend(outline, [url], settings=QUICK)
        assert str(caught.value) == f"{url} is no vLLM server: {url}/v1/models answered 404: File not found"
        files.shutdown()


def test_without_a_prefix_cache_only_recompute_is_answered(
    engine: Engine, outline: Outline, lively_adapters: Path
) -> None:
    with standing_in(upstream(lively_adapters), has_cache=False) as server:
        backend = VLLMBackend(outline, [server.url], settings=QUICK)
        (note,) = (note for note in backend.notes if "prefix cache" in note)
        assert note == f"{server.url}: it has no prefix cache (--enable-prefix-caching): kv_policy keep is refused"
        with pytest.raises(ValueError, match=r"kv_policy: .* \(--enable-prefix-caching, .*\); use 'recompute'"):
            backend.open(ask(engine, PROMPTS[0], settings={"kv_policy": "keep"}))
        request = ask(engine, PROMPTS[0])
        assert plain(read(backend.open(request)).generation) == plain(alone(engine, within(engine, backend, request)))
        backend.close()


def test_what_is_slower_or_refused_is_noted(engine: Engine, outline: Outline, lively_adapters: Path) -> None:
    with standing_in(upstream(lively_adapters), max_loras=2, tells_cached=False) as server:
        backend = VLLMBackend(replace(outline, base=replace(outline.base, probe=None)), [server.url], settings=QUICK)
        notes = " ".join(backend.notes)
        assert "slots for 2 mixtures (--max-loras), and 64 requests may run" in notes
        assert "--enable-prompt-tokens-details" in notes
        assert "no record of its base model's answers" in notes
        with pytest.raises(ValueError, match=r"kv_policy: .* use 'recompute'"):
            backend.open(ask(engine, PROMPTS[0], settings={"kv_policy": "keep"}))
        backend.close()


def test_what_these_servers_cannot_do_is_refused(engine: Engine, backend: VLLMBackend) -> None:
    with pytest.raises(ValueError, match="prompt_routing: vLLM encodes a prompt under one mixture"):
        backend.open(ask(engine, PROMPTS[0], settings={"prompt_routing": "sentences"}))
    with pytest.raises(PromptError, match="maximum context length is 512"):
        backend.open(ask(engine, "x" * 512))
    with pytest.raises(ValueError, match="logit_bias has the token id 260, and the model knows 0 to 259"):
        backend.open(ask(engine, "x", logit_bias={260: 1.0}))


class _OneAtATime(WordRouter):
    """Notes whether a thread asks it while another one does."""

    def __init__(self) -> None:
        super().__init__()
        self.is_running = self.overlapped = False

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        self.overlapped |= self.is_running
        self.is_running = True
        time.sleep(0.002)
        self.is_running = False
        return super().probabilities(contexts)


def test_the_router_is_never_asked_by_two_threads_at_once(stand_in: StandIn, lively_adapters: Path) -> None:
    router = _OneAtATime()
    engine = double_engine(lively_adapters, router=router)
    backend = VLLMBackend(Outline.of(engine), [stand_in.url], settings=QUICK)
    try:
        streams = [backend.open(ask(engine, prompt, max_tokens=60)) for prompt in PROMPTS[:3]]
        prompt = encode_prompt(engine.tokenizer, "Add the sum?\nA rhyme in verse?")
        threads = [threading.Thread(target=backend.prompt_router.apart, args=(prompt,)) for _ in range(30)]
        for thread in threads:
            thread.start()
        for stream in streams:
            read(stream)
        for thread in threads:
            thread.join()
    finally:
        backend.close()
    assert not router.overlapped
