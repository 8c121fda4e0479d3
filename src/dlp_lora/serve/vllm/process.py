"""A vLLM server that this server starts with the flags of its bundle, and ends with itself."""

import contextlib
import importlib.util
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from dlp_lora.engine.outline import Outline
from dlp_lora.errors import ModelError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's slots
TOGETHER = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))
STOP_S = 20.0
POLL_S = 0.2
KEPT_LINES = 500  # of vLLM's output: the error of a worker comes long before the last one
# An error's name begins a line; "(EngineCore pid=7) " may stand before it.
ERROR = re.compile(r"(\([^)]*\) )?[\w.]*(Error|Exception)\b")
POINTS_UP = "See root cause above"
HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


@dataclass(frozen=True, kw_only=True)
class VLLMFlags:
    """The start of a vLLM server. `python` is that of its environment; `arguments` are further arguments."""

    python: str | None = None
    max_loras: int = 16
    max_context: int | None = None
    arguments: str = ""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A running vLLM server; `ended` says why it has ended, if it has."""

    url: str
    key: str
    ended: Callable[[], str]


def slot_rank(max_rank: int) -> int:
    """The rank of vLLM's slots that holds mixtures of `max_rank`.

    Raises:
        ValueError: if vLLM has no slots of this rank.
    """
    for rank in RANKS:
        if rank >= max_rank:
            return rank
    raise ValueError(f"vLLM has slots of rank {RANKS[-1]} at most, and mixtures may have {max_rank}; lower --max-rank")


def slot_bytes(
    layout: Mapping[str, tuple[int, int]],
    targets: Collection[str],
    *,
    rank: int,
    num_slots: int,
    bytes_each: int = 2,
) -> int:
    """The memory of vLLM's slots: A and B of each layer whose name ends in a target, and of layers that vLLM computes
    together with it.
    """
    together = {name for group in TOGETHER if group & set(targets) for name in group} | set(targets)
    width = sum(d_in + d_out for name, (d_in, d_out) in layout.items() if name.rsplit(".", 1)[-1] in together)
    return width * rank * num_slots * bytes_each


def command(outline: Outline, flags: VLLMFlags, *, targets: Collection[str], max_rank: int, port: int) -> list[str]:
    """Returns the command that starts a server for a bundle.

    Its adapters change the layers whose names end in `targets`.
    """
    return [
        *(flags.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", outline.source, "--host", "127.0.0.1", "--port", str(port)),
        *("--enable-lora", "--max-lora-rank", str(slot_rank(max_rank)), "--max-loras", str(flags.max_loras)),
        *("--max-cpu-loras", str(4 * flags.max_loras), "--enable-prompt-tokens-details"),
        *(("--lora-target-modules", *sorted(targets)) if targets else ()),
        *(() if flags.max_context is None else ("--max-model-len", str(flags.max_context))),
        *shlex.split(flags.arguments),
    ]


def has_vllm(python: str | None) -> bool:
    """Returns whether vLLM is installed in the environment of a Python; None is this one.

    Raises:
        ModelError: if there is no such Python.
    """
    if python is None:
        return importlib.util.find_spec("vllm") is not None
    try:
        return subprocess.run([python, "-c", HAS_VLLM], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise ModelError(f"vLLM cannot be started: {error}") from error


@contextmanager
def vllm_server(
    outline: Outline,
    flags: VLLMFlags,
    *,
    targets: Collection[str],
    max_rank: int,
    on_line: Callable[[str], None] = lambda _: None,
) -> Iterator[Running]:
    """Runs a vLLM server in the block, with a random key. SIGTERM ends it, and then this process.

    Args:
        outline: of the model.
        flags: for its start.
        targets: the ends of the names of the layers that adapters may change; it has slots only for these.
        max_rank: of mixtures.
        on_line: receives each line of its output.

    Raises:
        ModelError: if it is not installed, or ends before it can answer.
    """
    if not has_vllm(flags.python):
        raise ModelError(
            f"vLLM is not installed beside {flags.python or 'this Python'}: pip install vllm there, give --vllm-python "
            "the Python of an environment that has it, or --backend-url the address of a server"
        )
    port, key = _free_port(), secrets.token_urlsafe(24)
    arguments = command(outline, flags, targets=targets, max_rank=max_rank, port=port)
    env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_API_KEY": key, "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    except OSError as error:
        raise ModelError(f"vLLM cannot be started: {error}") from error
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    reader = threading.Thread(target=_read, args=(process, lines, on_line), daemon=True)
    reader.start()
    is_up = False
    try:
        with _exits_at_sigterm():
            url = f"http://127.0.0.1:{port}"
            while not _is_up(url):
                if process.poll() is not None:
                    reader.join(1)
                    raise ModelError(f"vLLM ended with {process.returncode} before it could answer: {reason(lines)}")
                time.sleep(POLL_S)
            is_up = True

            def ended() -> str:
                return "" if process.poll() is None else f"vLLM ended with {process.returncode}: {reason(lines)}"

            yield Running(url=url, key=key, ended=ended)
    finally:
        _end(process, stop_s=STOP_S if is_up else 0.0)  # while it starts, it does not hear SIGTERM


@contextmanager
def _exits_at_sigterm() -> Iterator[None]:
    """Lets SIGTERM raise SystemExit in the block, so that what the block started ends, too. Other handlers stay."""
    is_main = threading.current_thread() is threading.main_thread()  # which alone may set handlers
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _read(process: "subprocess.Popen[str]", lines: deque[str], on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line := line.rstrip():
            lines.append(line)
            on_line(line)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def reason(lines: Sequence[str]) -> str:
    """The last error in vLLM's output that does not only point to one above, with the indented line below it."""
    lines = list(lines) or ["it wrote nothing"]
    errors = [i for i, line in enumerate(lines) if ERROR.match(line)]
    last = next((i for i in reversed(errors) if POINTS_UP not in lines[i]), len(lines) - 1)
    more = [line for line in lines[last + 1 : last + 2] if line.startswith(" ")]
    return " ".join(line.strip() for line in (lines[last], *more))


def _end(process: "subprocess.Popen[str]", *, stop_s: float) -> None:
    """Ends it with its child processes, after `stop_s` by force."""
    for how, seconds in ((signal.SIGTERM, stop_s), (signal.SIGKILL, STOP_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
