"""Where a real vLLM is, for the tests that need one."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

VLLM_PYTHON = "DLP_LORA_VLLM_PYTHON"  # of an environment that has vLLM


def vllm_python() -> str:
    made = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    if VLLM_PYTHON in os.environ:
        return os.environ[VLLM_PYTHON]
    if made.exists():
        return str(made)
    if find_spec("vllm") is not None:
        return sys.executable
    pytest.skip(f"vLLM is not installed: `make vllm` makes an environment, or {VLLM_PYTHON} names one")


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM interrupt pytest as Ctrl-C does, so that fixtures end the processes that they started."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
