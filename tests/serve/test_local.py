"""Requests to the local backend are answered as the engine alone answers them, whatever else runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlp_lora import Engine
from dlp_lora.serve.local import LocalBackend
from serving import PROMPTS, alone, ask, double_engine, read, timeless


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
