"""A real vLLM answers as the engine does, token by token. `make vllm` makes an environment for it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = "DLP_LORA_VLLM_PYTHON"  # of an environment that has vLLM
MAX_DIFFERENCE = 1e-4

pytestmark = [pytest.mark.engines, pytest.mark.models, pytest.mark.timeout(1800)]


def vllm_python() -> str:
    made = ROOT / ".venv-vllm" / "bin" / "python"
    if VLLM_PYTHON in os.environ:
        return os.environ[VLLM_PYTHON]
    if made.exists():
        return str(made)
    if find_spec("vllm") is not None:
        return sys.executable
    pytest.skip(f"vLLM is not installed: `make vllm` makes an environment, or {VLLM_PYTHON} names one")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("vllm") / "record.json"
    command = [sys.executable, ROOT / "scripts" / "measure_vllm.py", "--vllm-python", vllm_python(), "--json", path]
    subprocess.run([*map(str, command), "--tokens", "60"], check=True)
    read: dict[str, Any] = json.loads(path.read_text())
    return read


@pytest.mark.parametrize("case", ["recompute", "keep", "one adapter", "base", "abstaining", "8 at once"])
def test_tokens_and_their_probabilities_are_those_of_the_engine(record: dict[str, Any], case: str) -> None:
    found = record["cases"][case]
    assert found["max_difference"] < MAX_DIFFERENCE
    assert found["num_not_greedy"] == 0
    if case not in ("one adapter", "base"):
        assert found["num_switches"] > 3


def test_keep_leaves_whole_blocks(record: dict[str, Any]) -> None:
    kept = record["cases"]["keep"]["kept_tokens"]
    assert kept
    assert all(num > 0 and num % 128 == 0 for num in kept)


def test_abstained_sentences_are_among_those_compared(record: dict[str, Any]) -> None:
    assert record["cases"]["abstaining"]["num_abstained"] > 2
