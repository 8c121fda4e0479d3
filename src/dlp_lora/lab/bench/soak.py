"""The soak: hours of many clients, of clients that leave and of adapters that come and go, on a server process.

Each answer names the tokens that were read and the mixture of each sentence, so an answer that belongs to somebody else
is seen, even where a batch rounds otherwise than the same request alone.
"""

import asyncio
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from dlp_lora.engine.bundle import read_bundle
from dlp_lora.errors import DLPLoRAError
from dlp_lora.lab.bench.case import PROMPTS, BenchArgs, Row, begin, record
from dlp_lora.lab.bench.load import Answer, ask, connect, send
from dlp_lora.lab.bench.memory import bandwidth_gb_s
from dlp_lora.lab.bench.random_adapters import write_random_adapters
from dlp_lora.lab.bench.server import ADMIN, Server, serving
from dlp_lora.progress import OnProgress, Progress, unseen

MODEL = "soak"
LENGTHS = (4, 12, 24, 40)  # tokens of an answer
SAME = {"temperature": 0, "ignore_eos": True}  # in all requests: each answer has its length
NUM_LOADED = 8  # adapters that come and go
CHANGE_S = 1.0  # from one of these changes to the next
LOOK_S = 0.5  # from one look at the process to the next
WARM_UP = 0.2  # of the time, before memory counts
IDLE_S = 60  # until a server without requests must be idle
SLACK = {"rows": 0, "threads": 40, "sockets": 0}  # the web framework keeps a pool of threads


@dataclass(frozen=True, kw_only=True)
class SoakArgs(BenchArgs):
    """How long and with whom."""

    rounds: Annotated[int, "How often the server is killed and started again on its port."] = 1
    bundle: Annotated[str, "Bundle to serve."] = "runs/demo/bundle"
    minutes: Annotated[float, "Length of the test."] = 30.0
    clients: Annotated[int, "Clients at once; each sends its next request after an answer."] = 32
    leaving: Annotated[float, "Share of requests whose client hangs up."] = 0.01
    dtype: Annotated[str, "Precision of the base model."] = "float32"
    cache_mb: Annotated[float, "KV that the server keeps: little, so that it is full before memory counts."] = 64.0


def bench_soak(model: str | Path, args: SoakArgs | None = None, *, on_progress: OnProgress = unseen) -> dict[str, Any]:
    """Runs the soak; gives the record as JSON data.

    Raises:
        BundleError: if there is no bundle.
        DLPLoRAError: if an answer is lost or mixed up, if rows, threads or sockets stay, or the server does not start
            again.
    """
    args = args or SoakArgs()
    device = begin(args)
    bundle = read_bundle(args.bundle)
    with tempfile.TemporaryDirectory() as folder:
        write_random_adapters(str(model), Path(folder), NUM_LOADED, r=8, target_modules=("q_proj", "v_proj"))
        options = ["--bundle", args.bundle, "--model", str(model), "--dtype", args.dtype, "--device", args.device]
        options += ["--adapter-dir", folder, "--cache-mb", str(args.cache_mb)]
        with serving(options, model=MODEL, threads=args.threads) as server:
            port = server.target.url.removesuffix("/v1").rpartition(":")[2]
            soak = _Soak(server, tuple(bundle.adapters), Path(folder), args)
            row = soak.run(on_progress)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        restarts = []
        for _ in range(args.rounds):
            with serving([*options, "--port", port], model=MODEL, threads=args.threads) as again:
                restarts.append(again.start_s)
                ask(again.target, [soak.bodies[0]], streams=1)
                again.process.send_signal(signal.SIGKILL)
                again.process.wait()
    row["restart_s"] = round(median(restarts), 2)
    return record(
        "soak",
        model,
        args,
        [{"name": f"{args.clients} clients", "dtype": args.dtype, **row}],
        bandwidth=bandwidth_gb_s(device),
        does_not_measure="speed, since the clients share the machine with the server",
    )


@dataclass
class _Soak:
    server: Server
    names: Sequence[str]
    folder: Path
    args: SoakArgs
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    resident_mb: list[tuple[float, float]] = field(default_factory=list)  # second, megabytes

    @property
    def bodies(self) -> list[dict[str, Any]]:
        """Routed prompts and prompts for mixtures by name."""
        same = {**SAME, "dlp": {"prompt_tokens": True}}
        models = [MODEL, *self.names, *(f"{a}=0.6,{b}=0.4" for a, b in zip(self.names, self.names[1:], strict=False))]
        return [
            {"model": model, "prompt": text, "max_tokens": length, **same}
            for model in models
            for text, length in zip(PROMPTS, LENGTHS * 2, strict=False)
        ]

    def run(self, on_progress: OnProgress) -> Row:
        bodies = self.bodies
        quiet = ask(self.server.target, bodies, streams=1)
        before = self._idle()
        began = time.perf_counter()
        asyncio.run(self._load(list(zip(bodies, quiet, strict=True)), on_progress))
        seconds = time.perf_counter() - began
        after = self._idle()
        if self.wrong:
            raise DLPLoRAError(f"{len(self.wrong)} answers are wrong; the first: {self.wrong[0]}")
        for what, number in before.items():
            if after[what] > number + SLACK[what]:
                raise DLPLoRAError(f"{what} stay behind: {number} before, {after[what]} after")
        late = [mb for second, mb in self.resident_mb if second > WARM_UP * seconds]
        third = max(1, len(late) // 3)
        first_mb, last_mb = median(late[:third]), median(late[-third:])
        return {
            "minutes": round(seconds / 60, 1),
            **{key: self.counts[key] for key in ("answers", "left", "changes", "other_text")},
            "wrong": 0,
            "resident_mb": round(median(late)),
            "resident_mb_min": round(min(late)),
            "resident_mb_max": round(max(late)),
            "first_mb": round(first_mb, 1),
            "last_mb": round(last_mb, 1),
            "growth": round(last_mb / first_mb - 1, 4),
            **{f"{what}_after": number for what, number in after.items()},
        }

    async def _load(self, asked: Sequence[tuple[dict[str, Any], Answer]], on_progress: OnProgress) -> None:
        end = time.perf_counter() + self.args.minutes * 60
        async with connect() as client, asyncio.TaskGroup() as group:
            for number in range(self.args.clients):
                group.create_task(self._client(client, asked, random.Random(number), end))
            group.create_task(self._change(client, random.Random(-1), end))
            group.create_task(self._look(end, on_progress))

    async def _client(
        self, client: Any, asked: Sequence[tuple[dict[str, Any], Answer]], rng: random.Random, end: float
    ) -> None:
        while time.perf_counter() < end:
            body, alone = rng.choice(asked)
            leaves = rng.random() < self.args.leaving
            answer = await send(client, self.server.target, body, Answer(), leave_after=1 if leaves else None)
            if leaves:
                self.counts["left"] += 1
                continue
            self.counts["answers"] += 1
            self.counts["other_text"] += answer.text != alone.text
            if _read(answer) != _read(alone) or answer.num_tokens != body["max_tokens"]:
                self.wrong.append(f"{body} was answered {answer.text!r}, {answer.routing[-1:]}")

    async def _change(self, client: Any, rng: random.Random, end: float) -> None:
        """Loads and unloads adapters, and asks for those that are there."""
        there: set[str] = set()
        while time.perf_counter() < end:
            name = f"adapter_{rng.randrange(NUM_LOADED):04d}"
            call = "unload" if name in there else "load"
            body = {"lora_name": name, **({"lora_path": name} if call == "load" else {})}
            response = await client.post(f"{self.server.target.url}/{call}_lora_adapter", json=body, headers=ADMIN)
            if response.status_code != 200:
                self.wrong.append(f"{call} of {name}: {response.status_code} {response.text[:200]}")
            there ^= {name}
            self.counts["changes"] += 1
            if there:
                asked = {"model": rng.choice(sorted(there)), "prompt": rng.choice(PROMPTS), "max_tokens": LENGTHS[0]}
                await send(client, self.server.target, {**asked, **SAME}, Answer())
            await asyncio.sleep(CHANGE_S)

    async def _look(self, end: float, on_progress: OnProgress) -> None:
        began = time.perf_counter()
        while (now := time.perf_counter()) < end:
            self.resident_mb.append((now - began, self.server.resident_mb))
            on_progress(
                Progress("soak", int(now - began), int(self.args.minutes * 60), f"{self.counts['answers']} answers")
            )
            await asyncio.sleep(LOOK_S)

    def _idle(self) -> dict[str, int]:
        """Rows, threads and sockets of an idle server; waits until its rows have ended."""
        until = time.monotonic() + IDLE_S
        while (rows := self.server.num_rows()) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1)  # the last connection closes
        process = Path(f"/proc/{self.server.process.pid}")
        sockets = [fd for fd in (process / "fd").iterdir() if _is_socket(fd)]
        return {"rows": rows, "threads": len(list((process / "task").iterdir())), "sockets": len(sockets)}


def _is_socket(fd: Path) -> bool:
    try:
        return os.readlink(fd).startswith("socket:")
    except FileNotFoundError:
        return False


def _read(answer: Answer) -> tuple[Any, Any]:
    """The text of the answer, and its first mixture."""
    last: Mapping[str, Any] = answer.routing[-1] if answer.routing else {}
    trace = last.get("trace") or [{}]
    return last.get("prompt_tokens"), trace[0].get("mixture")
