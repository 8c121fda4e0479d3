"""A real vLLM answers as the engine does, token by token. `make vllm` makes an environment for it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_python import interrupted_by_sigterm, vllm_python

ROOT = Path(__file__).parents[2]
MAX_DIFFERENCE = 1e-4

pytestmark = [pytest.mark.engines, pytest.mark.models, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("vllm") / "record.json"
    command = [sys.executable, ROOT / "scripts" / "measure_vllm.py", "--vllm-python", vllm_python(), "--json", path]
    command += ["--tokens", "60"]
    with interrupted_by_sigterm(), subprocess.Popen(list(map(str, command))) as process:
        try:
            code = process.wait()
        finally:
            process.terminate()  # not killed: it ends vLLM
    assert code == 0
    read: dict[str, Any] = json.loads(path.read_text())
    return read


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
