"""All benchmarks, with settings for a CPU or for a GPU."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dlp_lora.lab.bench.bank import BankArgs, bench_bank
from dlp_lora.lab.bench.decode import DecodeArgs, bench_decode
from dlp_lora.lab.bench.paths import PathsArgs, bench_paths
from dlp_lora.lab.bench.peers import PeersArgs, bench_peers
from dlp_lora.lab.bench.prefill import PrefillArgs, bench_prefill
from dlp_lora.lab.bench.routers import RoutersArgs, bench_routers
from dlp_lora.lab.bench.serve import ServeArgs, bench_serve
from dlp_lora.lab.bench.switch import SwitchArgs, bench_switch
from dlp_lora.lab.bench.train import TrainArgs, bench_train
from dlp_lora.tasks.hub import read_data
from dlp_lora.tasks.procedural import procedural_task
from dlp_lora.tasks.task import Task

NUM_TASKS = 2  # that are trained on
OWN_TASKS = ("unit_conversion", "object_counting")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The machine's settings, and those that only some benchmarks vary; servers have the names of their records."""

    device: str
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    prefill_batches: tuple[int, ...]
    servers: Mapping[str, ServeArgs] = field(default_factory=dict)


GPU_LOAD = ServeArgs(streams=(1, 8, 32), requests=96, new_tokens=128)
PRESETS = {
    "cpu": Preset(device="cpu", dtypes=("bfloat16", "float32"), batches=(1, 8), prefill_batches=(4,)),
    "gpu": Preset(
        device="cuda",
        dtypes=("bfloat16",),
        batches=(1, 8, 32),
        prefill_batches=(1, 8, 32),
        servers={
            "serve": replace(GPU_LOAD, dtypes=("bfloat16",), serve_args="--max-batch 32"),
            "serve_vllm": replace(
                GPU_LOAD, backend="vllm", serve_args="--vllm-max-loras 32 --vllm-args '--dtype bfloat16'"
            ),
        },
    ),
}


def suite(
    model: str | Path,
    preset: Preset,
    *,
    rounds: int | None = None,
    threads: int | None = None,
    prompts: str | None = None,
    bundle: str | None = None,
    vllm_python: str | None = None,
) -> dict[str, Callable[..., dict[str, Any]]]:
    """Gives the benchmarks ready to run, by the names of their records; each takes `on_progress` and gives a record.

    Servers serve the bundle, or random adapters; `vllm_python` is the Python of an environment with vLLM, if it is not
    this one.
    """
    how: dict[str, Any] = {"device": preset.device, "threads": threads}
    if rounds is not None:
        how["rounds"] = rounds
    both = {**how, "prompts": prompts, "dtypes": preset.dtypes}
    one = {**how, "prompts": prompts, "dtypes": preset.dtypes[:1]}
    found: dict[str, Callable[..., dict[str, Any]]] = {}
    for batch in preset.batches:
        name = "decode" if batch == 1 else f"decode_batch{batch}"
        found[name] = partial(bench_decode, model, DecodeArgs(batch=batch, **both))
    found["decode_all_linear"] = partial(bench_decode, model, DecodeArgs(target_modules=("all-linear",), **both))
    for batch in preset.prefill_batches:
        found[f"prefill_batch{batch}"] = partial(bench_prefill, model, PrefillArgs(batch=batch, **both))
    return {
        **found,
        "paths": partial(bench_paths, model, PathsArgs(**one)),
        "switch": partial(bench_switch, model, SwitchArgs(**one)),
        "bank": partial(bench_bank, model, BankArgs(**one)),
        "routers": partial(bench_routers, model, RoutersArgs(**one)),
        "peers": partial(bench_peers, model, PeersArgs(**one)),
        "train": partial(bench_train, model, _tasks(prompts), TrainArgs(**how)),
        **{
            name: partial(bench_serve, model, replace(_with_vllm(args, vllm_python), bundle=bundle, **how))
            for name, args in preset.servers.items()
        },
    }


def _with_vllm(args: ServeArgs, python: str | None) -> ServeArgs:
    if python is None or args.backend != "vllm":
        return args
    return replace(args, serve_args=f"{args.serve_args} --vllm-python {shlex.quote(python)}")


def _tasks(data: str | None) -> list[Task]:
    if data is not None:
        return read_data(data)[:NUM_TASKS]
    return [procedural_task(name, num_train=TrainArgs.num_samples, num_test=0) for name in OWN_TASKS]
