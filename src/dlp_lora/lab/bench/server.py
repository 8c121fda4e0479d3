"""Servers under measurement: options of `dlp-lora serve` in, a process that answers out; its memory and metrics."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from dlp_lora.errors import DLPLoRAError
from dlp_lora.lab.bench.load import PERCENTILES, Target, percentile

LIMIT_S = 600  # to start
READY = "the API at "
ADMIN_KEY = "of-the-benchmark"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
PEAK_S = 0.02  # between two looks at the memory


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that runs, and how long it took to start."""

    process: "subprocess.Popen[bytes]"
    target: Target
    start_s: float

    @property
    def resident_mb(self) -> float:
        """Memory of its process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    @contextmanager
    def peak(self) -> Iterator["Peak"]:
        """Follows the memory of its process while the block lasts."""
        peak, has_ended = Peak(self.resident_mb), threading.Event()

        def follow() -> None:
            while not has_ended.wait(PEAK_S):
                peak.resident_mb = max(peak.resident_mb, self.resident_mb)

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield peak
        finally:
            has_ended.set()
            thread.join()

    def backend(self) -> str:
        """The program that computes its tokens, with its release."""
        with urlopen(self.target.url.removesuffix("/v1") + "/version") as response:
            return str(json.load(response)["backend"])

    def histograms(self) -> tuple[dict[float, float], dict[float, float]]:
        """How often time to the first token, and time between tokens, were at most each bound, in seconds."""
        return self._counts("time_to_first_token_seconds"), self._counts("inter_token_latency_seconds")

    def load_adapter(self, name: str) -> None:
        """Loads an adapter of the server's adapter folders; clients may ask for it by name."""
        body = json.dumps({"lora_name": name, "lora_path": name}).encode()
        headers = {**ADMIN, "Content-Type": "application/json"}
        urlopen(Request(f"{self.target.url}/load_lora_adapter", data=body, headers=headers)).close()

    def num_rows(self) -> int:
        """Requests that run or wait."""
        names = ("dlp_lora_num_requests_running", "dlp_lora_num_requests_waiting")
        return int(sum(sample.value for sample in self._samples() if sample.name in names))

    def _counts(self, metric: str) -> dict[float, float]:
        found: dict[float, float] = {}
        for sample in self._samples():
            if sample.name == f"dlp_lora_{metric}_bucket":
                bound = float(sample.labels["le"])
                found[bound] = found.get(bound, 0) + sample.value
        return found

    def _samples(self) -> Iterator[Any]:
        from prometheus_client.parser import text_string_to_metric_families  # of the extra `serve`

        with urlopen(self.target.url.removesuffix("/v1") + "/metrics") as response:
            for family in text_string_to_metric_families(response.read().decode()):
                yield from family.samples


@dataclass
class Peak:
    """The most memory that was seen."""

    resident_mb: float


@contextmanager
def serving(options: Sequence[str], *, model: str, threads: int | None) -> Iterator[Server]:
    """Runs `dlp-lora serve` on any free port while the block lasts; clients call it `model`. SIGTERM ends it, too.

    Raises:
        DLPLoRAError: if it does not start.
    """
    env = {**os.environ, "DLP_LORA_ADMIN_KEY": ADMIN_KEY}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "dlp_lora", "serve", "--served-model-name", model, *options]
    command += [] if "--port" in options else ["--port", "0"]
    with tempfile.NamedTemporaryFile() as log, _ended_by_sigterm() as running:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        running.append(process)
        try:
            target = Target(name="dlp-lora serve", url=_address(process, Path(log.name)), model=model)
            yield Server(process=process, target=target, start_s=time.perf_counter() - started)
        finally:
            process.terminate()
            process.wait()


@contextmanager
def _ended_by_sigterm() -> Iterator["list[subprocess.Popen[bytes]]"]:
    """Has SIGTERM end the processes that the block puts into the list, and then this one."""
    running: list[subprocess.Popen[bytes]] = []
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield running
        return

    def end(*_: object) -> None:
        for process in running:
            process.terminate()
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield running
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def agree(before: Mapping[float, float], after: Mapping[float, float], values: Sequence[float]) -> bool:
    """Whether the percentiles of a histogram's new counts are those of the values, within one bucket."""
    bounds = sorted(after)
    counts = [after[bound] - before.get(bound, 0) for bound in bounds]
    for share in PERCENTILES:
        counted = next(i for i, count in enumerate(counts) if count >= share / 100 * counts[-1])
        measured = next(i for i, bound in enumerate(bounds) if percentile(values, share) <= bound)
        if abs(counted - measured) > 1:
            return False
    return True


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        if READY in text and "\n" in text.split(READY)[1]:
            return text.split(READY)[1].split()[0]
        if process.poll() is not None:
            raise DLPLoRAError(f"the server did not start: {_last_line(text)}")
        time.sleep(0.05)
    raise DLPLoRAError(f"the server did not start within {LIMIT_S} s")


def _last_line(text: str) -> str:
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    return next((line.removeprefix("error: ") for line in reversed(lines) if line), "it says nothing")
