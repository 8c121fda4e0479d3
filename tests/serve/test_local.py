"""Requests to the local backend are answered as the engine alone answers them, whatever else runs."""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dlp_lora
from conftest import USUAL_TARGETS, byte_tokenizer, lively_model, make_adapter
from dlp_lora import AdapterError, Engine
from dlp_lora.errors import PromptError
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.backend import BackendError, ClosedError, Done, PromptScores, QueueFullError, Request, Token
from dlp_lora.serve.keys import Keys
from dlp_lora.serve.local import LocalBackend
from dlp_lora.serve.server import local_service
from dlp_lora.serve.settings import ServerSettings
from serving import PROMPTS, alone, ask, double_engine, extra_adapters, over_http, read, timeless


@pytest.fixture(scope="module")
def engine(lively_adapters: Path) -> Engine:
    return double_engine(lively_adapters)


@pytest.fixture
def backend(engine: Engine) -> Iterator[LocalBackend]:
    backend = LocalBackend(engine, max_batch=4, chunk_tokens=16)
    yield backend
    backend.close()


@pytest.mark.parametrize("kv_policy", ["recompute", "keep"])
@pytest.mark.parametrize("prompt_routing", ["whole", "questions", "sentences"])
def test_rows_of_a_batch_are_answered_as_alone(
    engine: Engine, backend: LocalBackend, kv_policy: str, prompt_routing: str
) -> None:
    settings = {"kv_policy": kv_policy, "prompt_routing": prompt_routing}
    requests = [ask(engine, prompt, settings=settings) for prompt in PROMPTS]
    streams = [backend.open(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        assert timeless(read(stream).generation) == timeless(alone(engine, request))


@pytest.fixture(scope="module")
def extras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return extra_adapters(tmp_path_factory.mktemp("extras"))


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.7, "top_p": 0.8, "seed": 8},
    {"temperature": 1.3, "top_k": 5, "min_p": 0.1, "seed": 9},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.8, "seed": 2**40},
    {"min_tokens": 20},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_tokens_are_sampled_as_transformers_samples_them(
    engine: Engine, backend: LocalBackend, sampling: dict[str, Any]
) -> None:
    request = ask(engine, PROMPTS[0], **sampling)
    streams = [backend.open(request), backend.open(ask(engine, PROMPTS[1], temperature=1.0)), backend.open(request)]
    first, _, again = [timeless(read(stream).generation) for stream in streams]
    assert first == again == timeless(alone(engine, request))


def test_a_fixed_mixture_is_that_of_its_request_alone(engine: Engine, backend: LocalBackend) -> None:
    mixtures: list[dict[str, float]] = [{}, {"math": 1.0}, {"units": 0.6, "poems": 0.4}]
    requests = [ask(engine, PROMPTS[0], mixture=mixture) for mixture in mixtures]
    streams = [backend.open(request) for request in requests]
    answers = [timeless(read(stream).generation) for stream in streams]
    assert answers == [timeless(alone(engine, request)) for request in requests]
    assert len({answer.tokens for answer in answers}) == 3


def test_a_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(
    engine: Engine, backend: LocalBackend
) -> None:
    whole = alone(engine, ask(engine, PROMPTS[0], max_tokens=40)).text
    stop = re.findall("[!-~]{2}|\t.", whole[9:])[0]  # transformers finds no halves of characters
    request = ask(engine, PROMPTS[0], max_tokens=40, stop=("never said", stop))
    events = list(backend.open(request))
    done = read(events)
    assert (done.reason, done.stop) == ("stop", stop)
    assert "".join(event.text for event in events if isinstance(event, Token)) == whole[: whole.index(stop)]
    assert timeless(done.generation) == timeless(alone(engine, request))


def test_a_stop_string_before_min_tokens_does_not_count(engine: Engine, backend: LocalBackend) -> None:
    whole = alone(engine, ask(engine, PROMPTS[0], max_tokens=40))
    done = read(backend.open(ask(engine, PROMPTS[0], max_tokens=40, stop=(whole.text[:2],), min_tokens=12)))
    assert done.usage.completion_tokens >= 12


def test_answers_end_at_tokens_and_lengths(engine: Engine, backend: LocalBackend) -> None:
    token = alone(engine, ask(engine, PROMPTS[0])).tokens[5]
    done = read(backend.open(ask(engine, PROMPTS[0], stop_token_ids=frozenset({token}))))
    assert (done.reason, done.stop, done.generation.tokens[-1]) == ("stop", token, token)
    done = read(backend.open(ask(engine, PROMPTS[0], max_tokens=3)))
    assert (done.reason, done.stop, done.usage.completion_tokens) == ("length", None, 3)
    done = read(backend.open(ask(engine, PROMPTS[0], max_tokens=None, mixture={})))
    assert done.reason in ("stop", "length")
    assert done.usage.prompt_tokens + done.usage.completion_tokens <= 512


def test_an_end_of_sequence_token_ends_an_answer_unless_it_is_ignored(engine: Engine, backend: LocalBackend) -> None:
    bias = {256: 1e4}  # the tokenizer's end of sequence
    done = read(backend.open(ask(engine, PROMPTS[0], logit_bias=bias)))
    assert (done.reason, done.generation.tokens, done.generation.text) == ("stop", (256,), "")
    done = read(backend.open(ask(engine, PROMPTS[0], logit_bias=bias, ignore_eos=True, max_tokens=5)))
    assert (done.reason, done.generation.tokens) == ("length", (256,) * 5)


def test_penalties_are_of_the_answer_alone(engine: Engine, backend: LocalBackend) -> None:
    a, b = engine.tokenizer("AB")["input_ids"]
    bias = {a: 1e4, b: 1e4 - 10}
    fixed: dict[str, Any] = {"mixture": {}, "logit_bias": bias, "max_tokens": 6}
    plain = read(backend.open(ask(engine, "AAAA", **fixed))).generation.text
    assert plain == "AAAAAA"
    once = read(backend.open(ask(engine, "AAAA", presence_penalty=100.0, **fixed))).generation.text
    assert once.startswith("ABA")  # after one of each they are as before
    often = read(backend.open(ask(engine, "AAAA", frequency_penalty=100.0, **fixed))).generation.text
    assert often == "ABABAB"


def test_log_probabilities_are_those_of_the_model_itself(engine: Engine, backend: LocalBackend) -> None:
    """Under the mixture of each token, before any temperature or penalty."""
    request = ask(
        engine, PROMPTS[1], mixture={"math": 1.0}, max_tokens=4, num_logprobs=3, num_prompt_logprobs=2, temperature=0.5
    )
    events = list(backend.open(request))
    generation = read(events).generation
    ids = torch.tensor([[*request.tokens, *generation.tokens]])
    with engine.fixed({"math": 1.0}), torch.no_grad():
        expected = engine.model(ids).logits[0].float().log_softmax(dim=-1)
    tokens = [event for event in events if isinstance(event, Token)]
    for token in tokens:
        row = expected[len(request.tokens) - 1 + token.position]
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-5)
        assert list(token.top) == row.topk(3).indices.tolist()
    (scores,) = [event for event in events if isinstance(event, PromptScores)]
    assert scores.logprobs[0] is None
    for i, token_id in enumerate(request.tokens[1:]):
        assert scores.logprobs[i + 1] == pytest.approx(expected[i, token_id].item(), abs=1e-5)
        assert list(scores.top[i + 1]) == expected[i].topk(2).indices.tolist()
    assert not scores.top[0]


def test_a_prompt_may_be_scored_without_an_answer(engine: Engine, backend: LocalBackend) -> None:
    events = list(backend.open(ask(engine, PROMPTS[1], max_tokens=0, num_prompt_logprobs=0)))
    done = read(events)
    assert (done.reason, done.generation.tokens) == ("length", ())
    (scores,) = [event for event in events if isinstance(event, PromptScores)]
    assert len(scores.logprobs) == done.usage.prompt_tokens


class Letters:
    """A grammar of so many letters, and nothing else."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.schema = {"type": "string", "pattern": f"^[A-E]{{{num}}}$"}

    def mask(self, scores: Tensor) -> None:
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[65:70] = True
        scores[~allowed] = -torch.inf

    def accept(self, token: int) -> bool:
        self.num -= 1
        return self.num == 0


def test_a_grammar_masks_its_row_alone_and_its_mixture_stays(engine: Engine, backend: LocalBackend) -> None:
    other = ask(engine, PROMPTS[1])
    streams = [backend.open(ask(engine, PROMPTS[0], grammar=Letters(20))), backend.open(other)]
    done = read(streams[0])
    assert (done.reason, done.stop) == ("stop", None)
    assert len(done.generation.tokens) == 20
    assert set(done.generation.tokens) <= set(range(65, 70))
    assert len(done.generation.trace) == 1
    assert timeless(read(streams[1]).generation) == timeless(alone(engine, other))


class Never(Letters):
    """A grammar that allows nothing after its first letters."""

    def mask(self, scores: Tensor) -> None:
        super().mask(scores)
        if self.num < 8:
            scores[:] = -torch.inf


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_fails_leaves_the_others_alone(
    engine: Engine, backend: LocalBackend, temperature: float
) -> None:
    other = ask(engine, PROMPTS[1])
    failing = backend.open(ask(engine, PROMPTS[0], grammar=Never(10), temperature=temperature))
    stream = backend.open(other)
    with pytest.raises(BackendError, match="no token may come next"):
        list(failing)
    with pytest.raises(StopIteration):
        next(failing)
    assert timeless(read(stream).generation) == timeless(alone(engine, other))
    assert backend.health.is_alive


def test_what_cannot_be_answered_is_refused_before_the_model_is_asked(engine: Engine, backend: LocalBackend) -> None:
    steps = backend.stats().num_steps
    for request, error, message in (
        (ask(engine, ""), PromptError, "the prompt is empty"),
        (ask(engine, "x" * 500), PromptError, "500 tokens, and 24 new ones .* maximum context length is 512"),
        (replace(ask(engine, "x"), tokens=(5, 4000)), PromptError, "the token id 4000, and the model knows 0 to 259"),
        (ask(engine, "x", logit_bias={-1: 1.0}), ValueError, "logit_bias has the token id -1"),
    ):
        with pytest.raises(error, match=message):
            backend.open(request)
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        list(backend.open(ask(engine, "x", mixture={"nobody": 1.0})))
    assert backend.stats().num_steps == steps


def test_the_queue_is_bounded_and_a_closed_backend_takes_nothing(engine: Engine) -> None:
    backend = LocalBackend(engine, max_batch=1, max_queue=1)
    streams = [backend.open(ask(engine, PROMPTS[0], max_tokens=400, ignore_eos=True)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests run or wait already"):
        backend.open(ask(engine, PROMPTS[0]))
    streams[1].cancel()
    assert read(streams[1]).reason == "abort"
    backend.close()
    with pytest.raises(ClosedError, match="the server is closing"):
        list(streams[0])
    with pytest.raises(ClosedError, match="the server is closing"):
        backend.open(ask(engine, PROMPTS[0]))
    assert not backend.health.is_alive


def test_a_backend_that_drains_lets_answers_end(engine: Engine) -> None:
    backend = LocalBackend(engine)
    request = ask(engine, PROMPTS[0])
    stream = backend.open(request)
    backend.close(drain_s=60)
    assert timeless(read(stream).generation) == timeless(alone(engine, request))


def test_a_task_reads_a_stream_while_others_run(engine: Engine, backend: LocalBackend) -> None:
    async def answer(request: Request) -> Done:
        return read([event async for event in backend.open(request)])

    async def answers() -> list[Done]:
        return await asyncio.gather(*(answer(request) for request in requests))

    requests = [ask(engine, prompt) for prompt in PROMPTS]
    for request, done in zip(requests, asyncio.run(answers()), strict=True):
        assert timeless(done.generation) == timeless(alone(engine, request))


def test_a_failure_of_the_model_ends_the_rows_of_the_step_and_not_the_server(engine: Engine) -> None:
    backend = LocalBackend(engine)
    request = ask(engine, PROMPTS[0])
    stream = backend.open(request)
    while not isinstance(next(stream), Token):
        pass
    handle = engine.model.model.layers[1].register_forward_pre_hook(_fail)
    with pytest.raises(BackendError, match="the request failed: MemoryError: no memory"):
        list(stream)
    with pytest.raises(BackendError, match="no memory"):  # while its prompt is read
        list(backend.open(request))
    handle.remove()
    assert timeless(read(backend.open(request)).generation) == timeless(alone(engine, request))
    backend.close()


def test_scores_that_are_no_numbers_spoil_no_other_row(engine: Engine, backend: LocalBackend) -> None:
    other = ask(engine, PROMPTS[1], max_tokens=40)
    stream = backend.open(other)
    with pytest.raises(BackendError, match="scores that are not numbers"):
        list(backend.open(ask(engine, PROMPTS[0], mixture={"math": 1e200})))
    assert timeless(read(stream).generation) == timeless(alone(engine, other))
    assert timeless(read(backend.open(other)).generation) == timeless(alone(engine, other))


def test_the_next_turn_of_a_chat_finds_its_beginning(engine: Engine, backend: LocalBackend) -> None:
    first = ask(engine, PROMPTS[1], mixture={"math": 1.0}, grammar=Letters(24))
    done = read(backend.open(first))
    assert done.usage.cached_tokens == 0
    longer = PROMPTS[1] + done.generation.text + " And back?"
    second = ask(engine, longer, mixture={"math": 1.0})
    done = read(backend.open(second))
    assert done.usage.cached_tokens == len(first.tokens) + 23  # all but the last token, which was never encoded
    assert timeless(done.generation) == timeless(alone(engine, second))
    for mixture in ({"math": 0.5}, {"units": 1.0}, {}):
        done = read(backend.open(other := ask(engine, longer, mixture=mixture)))
        assert done.usage.cached_tokens == 0
        assert timeless(done.generation) == timeless(alone(engine, other))


def test_a_reloaded_adapter_finds_nothing_of_the_old_one_and_the_same_again_all(
    engine: Engine, backend: LocalBackend, extras: tuple[Path, ...]
) -> None:
    cached, answers = [], []
    for path in (extras[0], extras[1], extras[0]):
        backend.put_adapters({"extra": path})
        request = ask(engine, PROMPTS[1], mixture={"extra": 1.0})
        done = read(backend.open(request))
        assert timeless(done.generation) == timeless(alone(engine, request))
        cached.append(done.usage.cached_tokens)
        answers.append(done.generation.tokens)
        backend.remove_adapter("extra")
    assert cached == [0, 0, len(PROMPTS[1]) - 1]
    assert answers[0] == answers[2] != answers[1]


def test_kept_kv_stays_within_its_budget(engine: Engine) -> None:
    backend = LocalBackend(engine, cache_mb=0.2)
    for prompt in PROMPTS:
        read(backend.open(ask(engine, prompt, mixture={})))
        assert backend.stats().kept_bytes <= 0.2 * 2**20
    backend.close()
    assert backend.stats().kept_bytes > 0
    nothing = LocalBackend(engine, cache_mb=0.0)
    for _ in range(2):
        assert read(nothing.open(ask(engine, PROMPTS[0], mixture={}))).usage.cached_tokens == 0
    nothing.close()


@pytest.mark.parametrize("architecture", ["qwen2", "mistral", "gemma", "phi3", "gpt2"])
def test_other_architectures_are_batched_too(architecture: str, tmp_path: Path) -> None:
    targets = USUAL_TARGETS[architecture]
    for i, name in enumerate(("math", "poems", "units")):
        make_adapter(lively_model(architecture), tmp_path / name, seed=i, scale=0.3, target_modules=targets)
    engine = double_engine(tmp_path, architecture=architecture)
    backend = LocalBackend(engine, chunk_tokens=10)
    requests = [ask(engine, prompt, max_tokens=12) for prompt in PROMPTS]
    streams = [backend.open(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        assert timeless(read(stream).generation) == timeless(alone(engine, request))
    backend.close()


def test_rows_shorter_than_a_sliding_window_attend_to_their_own_window(tmp_path: Path) -> None:
    model = lively_model("mistral")
    model.config.sliding_window = 9
    make_adapter(model, tmp_path / "math", seed=1, scale=0.3)
    engine = dlp_lora.load(model.double(), adapters=tmp_path, tokenizer=byte_tokenizer())
    backend = LocalBackend(engine, chunk_tokens=7)
    requests = [ask(engine, prompt, mixture={"math": 1.0}) for prompt in PROMPTS]
    streams = [backend.open(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        assert timeless(read(stream).generation) == timeless(alone(engine, request))
    backend.close()


def _fail(*_: Any) -> None:
    raise MemoryError("no memory")


def test_a_model_that_samples_by_default_samples_as_with_generate(lively_adapters: Path) -> None:
    engine = double_engine(lively_adapters)
    config = engine.model.generation_config
    config.do_sample, config.temperature, config.top_p = True, 0.9, 0.99
    service = local_service(engine, ServerSettings(), Keys({}), name="tiny")
    try:
        for seed in range(5):
            body = {"prompt": "Once", "model": "math", "max_tokens": 12, "seed": seed}
            answer = over_http(service, AdapterManager(service), "/v1/completions", body).json()["choices"][0]
            assert answer["text"] == engine.generate("Once", mixture={"math": 1.0}, max_new_tokens=12, seed=seed).text
    finally:
        service.backend.close()
