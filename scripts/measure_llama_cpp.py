"""Measures llama.cpp beside the local backend: start, memory and tokens a second of `dlp-lora serve` on one thread.

    python scripts/measure_llama_cpp.py --bundle runs/demo/bundle --json results/llama_cpp.json

It needs the extras `serve` and `llama-cpp`. All servers run at the same time and take turns with the same requests,
pairs of questions that are routed sentence by sentence. Then it compares the two ways to apply a mixture in llama.cpp:
adapters with scales, or one concatenated adapter.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import llama_cpp
from transformers import AutoConfig

from dlp_lora.bank.mixture_folder import read_source, write_mixture
from dlp_lora.bank.peft_format import read_adapter
from dlp_lora.cli.progress import progress
from dlp_lora.default_model import default_gguf
from dlp_lora.engine.outline import read_outline
from dlp_lora.files import write_json
from dlp_lora.lab.bench.load import Answer, ask, latency, ms_per_token, tokens_per_s
from dlp_lora.lab.bench.serve import ONE_CONTEXT
from dlp_lora.lab.bench.server import Server, serving
from dlp_lora.lab.bench.timing import Run, interleave
from dlp_lora.lab.records.environment import environment
from dlp_lora.policy import Mixture
from dlp_lora.serve.llama_cpp.adapter_file import write_gguf
from dlp_lora.serve.llama_cpp.library import LlamaContext, LoadedAdapter
from dlp_lora.tasks import PROCEDURAL, procedural_task

LOCAL = "PyTorch, float32"
STREAMS = (1, 8)
KV_POLICIES = ("keep", "recompute")
STEPS = 24  # tokens of a run in one context


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--json", type=Path, required=True, help="record to write")
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up")
    parser.add_argument("--requests", type=int, default=8, help="in a round; half of them over one stream")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer, which may end before")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        f16 = as_f16(default_gguf(), Path(folder) / "f16.gguf")
        servers = {
            LOCAL: ("--dtype", "float32"),
            "PyTorch, bfloat16": ("--dtype", "bfloat16"),
            "llama.cpp, Q4_1": ("--backend", "llama.cpp", "--max-batch", "8", "--max-context", "1024"),
            "llama.cpp, F16": (
                "--backend",
                "llama.cpp",
                "--max-batch",
                "8",
                "--max-context",
                "1024",
                "--gguf",
                str(f16),
            ),
        }
        rows, starts = served(servers, args)
        write_json(args.json, {"starts": starts, "rows": rows})
        mixtures = applied(args.bundle, Path(folder), rounds=args.rounds)
    record = {
        "benchmark": "llama_cpp",
        "model": "SmolLM2-135M-Instruct",
        "settings": {"threads": 1, "rounds": args.rounds, "requests": args.requests, "new_tokens": args.tokens},
        "llama_cpp_python": llama_cpp.__version__,
        "environment": environment(),
        "starts": starts,
        "rows": rows,
        "mixtures": mixtures,
        "does_not_measure": "how good answers are, networks, GPUs, more than one thread",
    }
    write_json(args.json, record)


def as_f16(gguf: Path, path: Path) -> Path:
    """Writes a quantised GGUF file in 16 bits."""
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_F16, True
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(path).encode(), params):
        raise SystemExit(f"llama.cpp cannot convert {gguf}")
    return path


def served(servers: Mapping[str, Sequence[str]], args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Starts all servers and lets them take turns. Returns the rows of streams, and those of the starts."""
    with ExitStack() as stack:
        running: dict[str, Server] = {}
        for name, options in servers.items():
            options = ("--bundle", args.bundle, *options)
            running[name] = stack.enter_context(serving(options, model="bench", threads=1))
        starts = [
            {"name": name, "start_s": round(server.start_s, 1), "resident_mb": round(server.resident_mb)}
            for name, server in running.items()
        ]
        turns = {
            (name, kv_policy, streams): Turn(server, kv_policy, streams, args)
            for kv_policy in KV_POLICIES
            for streams in STREAMS
            for name, server in running.items()
        }
        runs: dict[str, Run] = {str(key): turn for key, turn in turns.items()}
        with progress() as on_progress:
            times = interleave(runs, rounds=args.rounds, scenario="serve", on_progress=on_progress)
        for start, server in zip(starts, running.values(), strict=True):
            start["after_mb"] = round(server.resident_mb)
    rows = []
    for (name, kv_policy, streams), turn in turns.items():
        key, local = str((name, kv_policy, streams)), str((LOCAL, kv_policy, streams))
        ratio = times.ratio(key, "tokens_per_s", over=local)
        rows.append(
            {
                "name": name,
                "kv_policy": kv_policy,
                "streams": streams,
                **times.spread(key, "tokens_per_s"),
                **times.spread(key, "ms_per_token"),
                **{f"over_local{end}": ratio[f"ratio{end}"] for end in ("", "_min", "_max")},
                **latency(turn.answers),
                "num_tokens": sum(answer.num_tokens for answer in turn.answers),
                "num_switches": sum(turn.num_switches),
            }
        )
    return rows, starts


@dataclass
class Turn:
    """Asks a server the requests of a round; `answers` are those after the warm-up."""

    server: Server
    kv_policy: str
    streams: int
    args: argparse.Namespace
    answers: list[Answer] = field(default_factory=list)
    num_switches: list[int] = field(default_factory=list)

    def __call__(self, i: int) -> dict[str, float]:
        num = 1 if i == 0 else self.args.requests if self.streams > 1 else self.args.requests // 2
        answers = ask(self.server.target, self.bodies(i)[:num], streams=self.streams)
        if i:
            self.answers += answers
            self.num_switches += [sum(s["switched"] for s in answer.routing[-1]["trace"]) for answer in answers]
        return {"tokens_per_s": tokens_per_s(answers), "ms_per_token": ms_per_token(answers)}

    def bodies(self, i: int) -> list[dict[str, Any]]:
        """Pairs of questions: the same ones for each server, and others in each round, policy and number of streams."""
        seed = (i * len(KV_POLICIES) + KV_POLICIES.index(self.kv_policy)) * len(STREAMS) + STREAMS.index(self.streams)
        num = self.args.requests
        drawn = [procedural_task(name, num_train=1, num_test=num, seed=seed).test for name in PROCEDURAL]
        questions = [examples[k].prompt for k in range(num) for examples in drawn]
        chats = [[{"role": "user", "content": f"{a}\n{b}"}] for a, b in islice(pairwise(questions), num)]
        same = {"max_tokens": self.args.tokens, "temperature": 0, "dlp": {"kv_policy": self.kv_policy, **ONE_CONTEXT}}
        return [{"messages": chat, **same} for chat in chats]


def applied(bundle: str, folder: Path, *, rounds: int) -> list[dict[str, Any]]:
    """Times tokens under mixtures of two and three adapters: by scales, and as one concatenated adapter."""
    outline = read_outline(bundle)
    config = AutoConfig.from_pretrained(outline.source)
    context = LlamaContext(default_gguf(), max_context=512, max_sequences=1, num_threads=1)
    sources = {name: read_source(path, name, outline.layout) for name, path in outline.adapters.items()}

    def load(adapter: Any) -> LoadedAdapter:
        write_gguf(folder / "adapter.gguf", adapter, config, architecture=context.architecture)
        return context.load_adapter(folder / "adapter.gguf")

    loaded = {name: load(source.with_weights()) for name, source in sources.items()}
    names = list(sources)
    ways: dict[str, list[tuple[LoadedAdapter, float]]] = {"base": [], "1 adapter": [(loaded[names[0]], 1.0)]}
    write_ms: dict[str, float] = {}
    for number in (2, 3):
        ways[f"{number} adapters, scales"] = [(loaded[name], 1 / number) for name in names[:number]]
        started = time.perf_counter()
        (folder / str(number)).mkdir()
        write_mixture(folder / str(number), Mixture(dict.fromkeys(names[:number], 1 / number)), sources)
        one = load(read_adapter(folder / str(number), "mixture", layout=outline.layout))
        write_ms[f"{number} adapters, concatenated"] = (time.perf_counter() - started) * 1e3
        ways[f"{number} adapters, concatenated"] = [(one, 1.0)]

    def run(way: list[tuple[LoadedAdapter, float]]) -> Callable[[int], dict[str, float]]:
        def measure(_: int) -> dict[str, float]:
            started = time.perf_counter()
            context.apply(way)
            applied = time.perf_counter()
            ends = []
            for position in range(STEPS):
                context.decode([(0, position, 100 + position, True)])
                ends.append(time.perf_counter())
            context.forget(0)
            return {
                "apply_ms": (applied - started) * 1e3,
                "first_ms": (ends[0] - applied) * 1e3,
                "ms_per_token": (ends[-1] - ends[0]) * 1e3 / (STEPS - 1),
            }

        return measure

    times = interleave({name: run(way) for name, way in ways.items()}, rounds=2 * rounds)
    context.close()
    return [
        {
            "name": name,
            **{k: v for q in ("apply_ms", "first_ms", "ms_per_token") for k, v in times.spread(name, q).items()},
            **times.ratio(name, "ms_per_token"),
            **({"write_ms": round(write_ms[name], 1)} if name in write_ms else {}),
        }
        for name in ways
    ]


if __name__ == "__main__":
    main()
