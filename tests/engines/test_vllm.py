"""A real vLLM answers as the engine does, token by token. `make vllm` makes an environment for it.

The model is tiny, with heads of the smallest size that vLLM takes on CPUs. `scripts/measure_vllm.py` compares the
default model in the same way.
"""

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import EveryK, byte_tokenizer
from vllm_python import vllm_python

ROOT = Path(__file__).parents[2]
MAX_DIFFERENCE = 1e-4
NUM_TOKENS = 48  # of an answer: six sentences

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("vllm")
    write_model(folder / "model")
    script = runpy.run_path(str(ROOT / "scripts" / "measure_vllm.py"))
    engine = script["make_engine"](folder / "adapters", folder / "model", scale=0.1, segmenter=partial(EveryK, 8))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("KVCACHE_SPACE", "1"), ("OMP_THREADS_BIND", "nobind")):
            patch.setenv(f"VLLM_CPU_{name}", value)
        patch.setenv("OMP_NUM_THREADS", "1")
        read: dict[str, Any] = script["measured"](engine, vllm_python(), NUM_TOKENS, story=script["STORY"][:400])
    return read


def write_model(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=257,
        eos_token_id=256,
        pad_token_id=258,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)  # so that an answer depends on every token and adapter
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


CASES = ("recompute", "keep", "one adapter", "base", "abstaining", "abstaining, keep", "8 at once")


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_their_probabilities_are_those_of_the_engine(record: dict[str, Any], case: str) -> None:
    found = record["cases"][case]
    assert found["max_difference"] < MAX_DIFFERENCE
    assert found["num_not_greedy"] == 0
    if case not in ("one adapter", "base"):
        assert found["num_switches"] > 3


@pytest.mark.parametrize("case", ["keep", "abstaining, keep"])
def test_keep_leaves_whole_blocks(record: dict[str, Any], case: str) -> None:
    kept = record["cases"][case]["kept_tokens"]
    assert kept
    assert all(num > 0 and num % 128 == 0 for num in kept)


@pytest.mark.parametrize(("case", "expected"), [("abstaining", 3), ("abstaining, keep", 3), ("8 at once", 1)])
def test_abstained_sentences_are_among_those_compared(record: dict[str, Any], case: str, expected: int) -> None:
    assert record["cases"][case]["num_abstained"] >= expected


@pytest.mark.parametrize("case", ["recompute", "keep"])
def test_some_answer_switches_several_times(record: dict[str, Any], case: str) -> None:
    assert record["cases"][case]["most_switches"] >= 2
