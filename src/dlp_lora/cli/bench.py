"""The bench commands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dlp_lora.bank.device import choose_device
from dlp_lora.bank.paths import Paths
from dlp_lora.cli.common import DataOption, ModelOption, base_model, check_serve_extra, console, say
from dlp_lora.cli.options import with_options, words
from dlp_lora.cli.progress import progress
from dlp_lora.cli.tables import show_table
from dlp_lora.files import check_target, write_json
from dlp_lora.lab.bench.bank import BankArgs, bench_bank
from dlp_lora.lab.bench.contexts import bench_contexts
from dlp_lora.lab.bench.decode import DecodeArgs, bench_decode
from dlp_lora.lab.bench.paths import PathsArgs, bench_paths
from dlp_lora.lab.bench.peers import PeersArgs, bench_peers
from dlp_lora.lab.bench.plot import check_plot, plot
from dlp_lora.lab.bench.prefill import PrefillArgs, bench_prefill
from dlp_lora.lab.bench.routers import RoutersArgs, bench_routers
from dlp_lora.lab.bench.serve import ServeArgs, bench_serve
from dlp_lora.lab.bench.soak import SoakArgs, bench_soak
from dlp_lora.lab.bench.suite import PRESETS, Preset
from dlp_lora.lab.bench.suite import suite as all_benchmarks
from dlp_lora.lab.bench.switch import SwitchArgs, bench_switch
from dlp_lora.lab.bench.train import TrainArgs, bench_train
from dlp_lora.lab.records.table import Table, table_of
from dlp_lora.tasks.hub import read_data

LABELS = ("name", "dtype", "task")
_VARIANT = {"variant": "name", "dtype": "dtype"}
_DECODING = {**_VARIANT, "ms/token": "ms_per_token", "over base": "ratio", "tokens/s": "tokens_per_s"}
_MEMORY = {"held, MB": "held_mb", "peak, MB": "peak_mb", "peak over base": "memory_ratio"}
_DECODE = {
    **_DECODING,
    "over a base alike": "ratio_over_alike",
    "first token, ms": "ttft_ms",
    "of bandwidth": "bandwidth_share",
    **_MEMORY,
}
COLUMNS = {
    "decode": _DECODE,
    "paths": _DECODE,
    "prefill": {
        **_VARIANT,
        "ms": "ms",
        "over base": "ratio",
        "tokens/s": "tokens_per_s",
        **_MEMORY,
        "error of logits": "logit_error",
    },
    "switch": {
        **_VARIANT,
        "router, ms": "route_ms",
        "policy, ms": "policy_ms",
        "fuse, ms": "fuse_ms",
        "whole switch, ms": "switch_ms",
        "over PEFT": "over_peft",
        "switches": "num_switches",
        "allocated": "num_allocations",
        "moved": "num_moved",
        "grown, MB": "growth_mb",
    },
    "switch_context": {
        **_VARIANT,
        "tokens before": "context",
        "pass, ms": "pass_ms",
        "more than a token, ms": "extra_ms",
        "of a sentence": "over_sentence",
    },
    "bank": {
        **_DECODING,
        "share of parameters": "share_of_parameters",
        "load, s": "load_s",
        "budget, MB": "budget_mb",
        "kept, MB": "kept_mb",
        "resident, MB": "resident_mb",
        "fuse, ms": "hit_ms",
        "from disk, ms": "miss_ms",
    },
    "routers": {
        **_DECODING,
        "whole answer over base": "answer_ratio",
        "router's parameters": "router_parameters",
        "router, ms a sentence": "route_ms",
    },
    "peers": {**_DECODING, "first token, ms": "ttft_ms", **_MEMORY},
    "serve": {
        **_VARIANT,
        "streams": "streams",
        "tokens of a prompt": "prompt_tokens",
        "of an answer": "answer_tokens",
        "switches": "switches",
        "tokens/s": "tokens_per_s",
        "over one stream": "speedup",
        "ms/token": "ms_per_token",
        "over engine.stream": "over_engine",
        "over base": "over_base",
        "first token, p50": "first_ms_p50",
        "first token, p95": "first_ms_p95",
        "first token, p99": "first_ms_p99",
        "between tokens, p50": "gap_ms_p50",
        "between tokens, p95": "gap_ms_p95",
        "between tokens, p99": "gap_ms_p99",
        "metrics agree": "metrics_agree",
        "start, s": "start_s",
        "resident, MB": "resident_mb",
        "longest wait, ms": "longest_ms",
        "over chunk and step": "over_chunk",
        "MB a request": "mb_per_request",
        "first token from disk, ms": "first_from_disk_ms",
        "again, ms": "first_again_ms",
    },
    "soak": {
        **_VARIANT,
        "minutes": "minutes",
        "answers": "answers",
        "clients that left": "left",
        "adapters changed": "changes",
        "wrong": "wrong",
        "other text than alone": "other_text",
        "first, MB": "first_mb",
        "last, MB": "last_mb",
        "growth": "growth",
        "rows after": "rows_after",
        "threads after": "threads_after",
        "sockets after": "sockets_after",
        "restart, s": "restart_s",
    },
    "train": {
        "variant": "name",
        "task": "task",
        "samples/s": "samples_per_s",
        "speed-up": "speedup",
        "tokens/s": "tokens_per_s",
        "peak, MB": "peak_mb",
        "peak over Trainer": "memory_ratio",
        "shared": "shared",
        "loss": "loss",
    },
}


@dataclass(frozen=True, kw_only=True)
class Output:
    """The files for a record, in addition to the table."""

    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record to this file, too.")] = None
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw a plot into this file, .png or .svg.")] = None


@with_options
def decode(args: DecodeArgs, output: Output, model: ModelOption = None) -> None:
    """Time per generated token over the base model, with sentence switching on.

    Example: `dlp-lora bench decode --json results/decode.json`
    """
    _run(partial(bench_decode, base_model(model), args), args.device, output)


@with_options
def paths(args: PathsArgs, output: Output, model: ModelOption = None) -> None:
    """Time per generated token of every way to compute a mixture: stacked, concatenated, prepacked, merged, compiled.

    Example: `dlp-lora bench paths --rounds 5 --no-compiled`
    """
    _run(partial(bench_paths, base_model(model), args), args.device, output)


@with_options
def prefill(args: PrefillArgs, output: Output, model: ModelOption = None) -> None:
    """Time to read prompts over the base model, with routing and fusing.

    Example: `dlp-lora bench prefill --batch 4 --length 512`
    """
    _run(partial(bench_prefill, base_model(model), args), args.device, output)


@with_options
def switch(args: SwitchArgs, output: Output, model: ModelOption = None) -> None:
    """Time of each part of a switch, for mixtures of 1 to --selected adapters, beside PEFT's add_weighted_adapter.

    With `--context`, the cost of a switch in the middle of a text, under each KV policy, over a sentence of 25 tokens.
    Examples: `dlp-lora bench switch --sizes 10,100`, or `dlp-lora bench switch --context 128,512,2048`
    """
    measure = bench_contexts if args.context else bench_switch
    _run(partial(measure, base_model(model), args), args.device, output)


@with_options
def bank(args: BankArgs, output: Output, model: ModelOption = None) -> None:
    """Time per generated token, start-up and memory as the bank grows, in memory and on disk (the paper's Table 6).

    Example: `dlp-lora bench bank --sizes 1,10,100 --on-disk 1000 --budget-mb 64`
    """
    _run(partial(bench_bank, base_model(model), args), args.device, output)


@with_options
def routers(args: RoutersArgs, output: Output, model: ModelOption = None) -> None:
    """Two routers, the mini-MLP and an encoder of ALBERT's shape, alone and while decoding (the paper's Table 4).

    Example: `dlp-lora bench routers --threads 1`
    """
    _run(partial(bench_routers, base_model(model), args), args.device, output)


@with_options
def peers(args: PeersArgs, output: Output, model: ModelOption = None) -> None:
    """Time per generated token of other methods: PEFT's, and those of papers as we wrote them (Table 7).

    Example: `dlp-lora bench peers --methods "peft arrow,meteora (ours)"`
    """
    _run(partial(bench_peers, base_model(model), args), args.device, output)


@with_options
def serve(args: ServeArgs, output: Output, model: ModelOption = None) -> None:
    """`dlp-lora serve` under load, beside other servers: tokens per second, latency, waiting, memory, 1,000 adapters.

    With another backend than the local one, it measures tokens per second and latency.
    Examples: `dlp-lora bench serve --bundle runs/demo/bundle --threads 1`, or
    `dlp-lora bench serve --bundle runs/demo/bundle --backend vllm --backend-url http://localhost:8001`
    """
    _run(partial(bench_serve, base_model(model), args), args.device, output)


@with_options
def soak(args: SoakArgs, output: Output, model: ModelOption = None) -> None:
    """A server with many clients over a long time: clients leave, adapters change; then kill -9 and a restart.

    Example: `dlp-lora bench soak --bundle runs/demo/bundle --minutes 30`
    """
    _run(partial(bench_soak, base_model(model), args), args.device, output)


@with_options
def train(
    data: DataOption,
    args: TrainArgs,
    output: Output,
    model: ModelOption = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Comma-separated task names. [default: all]")] = None,
) -> None:
    """Training speed and memory against the plain transformers Trainer with PEFT, on the same samples.

    Example: `dlp-lora bench train --data data/ --tasks gsm8k,winowhy`
    """
    examples = read_data(data, names=words(tasks) if tasks else None)
    _run(partial(bench_train, base_model(model), examples, args), args.device, output)


def suite(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the records.")],
    model: ModelOption = None,
    preset: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    only: Annotated[str | None, typer.Option(help="Comma-separated names of records. [default: all]")] = None,
    prompts: Annotated[str | None, typer.Option(help="Folder of task folders, for prompts and for training.")] = None,
    bundle: Annotated[str | None, typer.Option(help="Bundle for the servers. [default: random adapters]")] = None,
    vllm_python: Annotated[
        str | None, typer.Option(help="Python of an environment with vLLM. [default: this one]")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds after the warm-up. [default: differs by benchmark]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch. [default: torch's choice]")] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Draw a plot of each, too.")] = False,
) -> None:
    """Run every benchmark in turn: a table, a record and a plot of each.

    On a GPU, the last ones are of the server, with PyTorch and with vLLM (`serve`, `serve_vllm`).
    Example: `dlp-lora bench suite --preset gpu --model Qwen/Qwen2-1.5B --out results/gpu`
    """
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; choose {' or '.join(PRESETS)}")
    try:
        choose_device(PRESETS[preset].device)
    except ValueError as error:
        raise ValueError(f"the preset {preset} needs a GPU, and a PyTorch that can use it: {error}") from error
    benchmarks = all_benchmarks(
        base_model(model),
        PRESETS[preset],
        rounds=rounds,
        threads=threads,
        prompts=prompts,
        bundle=bundle,
        vllm_python=vllm_python,
    )
    chosen = words(only) if only else tuple(benchmarks)
    if unknown := [name for name in chosen if name not in benchmarks]:
        raise ValueError(f"no benchmark {unknown[0]!r}; there are {', '.join(benchmarks)}")
    _check_servers(PRESETS[preset], chosen, vllm_python)
    for name in chosen:
        output = Output(json_file=out / f"{name}.json", plot=out / f"{name}.svg" if plots else None)
        _run(benchmarks[name], PRESETS[preset].device, output)


def _check_servers(preset: Preset, chosen: Sequence[str], vllm_python: str | None) -> None:
    """Checks that the chosen servers can be started, because they are the last benchmarks of many.

    Raises:
        ValueError: if packages are missing.
    """
    from dlp_lora.serve.vllm.process import has_vllm

    servers = [name for name in chosen if name in preset.servers]
    if servers:
        check_serve_extra()
    on_vllm = [name for name in servers if preset.servers[name].backend == "vllm"]
    if on_vllm and not has_vllm(vllm_python):
        others = ",".join(name for name in chosen if name not in on_vllm)
        raise ValueError(
            f"{on_vllm[0]} needs vLLM, which is not installed beside {vllm_python or 'this Python'}: pip install vllm "
            "there, or give --vllm-python the Python of an environment that has it"
            + (f"; to leave it out, choose --only {others}" if others else "")
        )


def _run(measure: Callable[..., dict[str, Any]], device: str, output: Output) -> None:
    choose_device(device)
    if output.plot is not None:
        check_plot(output.plot)
    if output.json_file is not None:
        check_target(output.json_file)
    with progress() as show:
        record = measure(on_progress=show)
    _show(record)
    if output.json_file is not None:
        output.json_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(output.json_file, record, indent=2)
        say(f"wrote {output.json_file}")
    if output.plot is not None:
        plot(record, output.plot)
        say(f"wrote {output.plot}")


def _show(record: dict[str, Any]) -> None:
    settings, machine = record["settings"], record["environment"]
    where = machine["cpu"] if settings["device"] == "cpu" else machine["gpu"]
    what = [f"{key} {settings[key]}" for key in ("batch", "length") if key in settings]
    backend = [record["backend"]] if "backend" in record else []
    title = ", ".join(
        [record["benchmark"], record["model"], *backend, *what, f"{where} ({record['bandwidth_gb_s']} GB/s)"]
    )
    console.print(title, style="italic", highlight=False, markup=False)
    show_table(table_of_record(record))
    for row in record["rows"]:
        if "paths" in row:
            console.print(f"{row['name']}: {Paths.from_dict(row['paths'])}", style="dim", highlight=False, markup=False)


def table_of_record(record: dict[str, Any]) -> Table:
    """The rows of a benchmark as a table; without columns that no row has."""
    rows: list[dict[str, Any]] = record["rows"]
    known = COLUMNS[record["benchmark"]]
    columns = {title: key for title, key in known.items() if any(row.get(key) is not None for row in rows)}
    cells = [tuple(cell(row, key) for key in columns.values()) for row in rows]
    return table_of("", columns, cells, num_labels=sum(key in LABELS for key in columns.values()))


def cell(row: dict[str, Any], key: str) -> str:
    """A number as a table shows it, with its spread if it has one."""
    value = row.get(key)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if f"{key}_min" in row:
        return f"{value:.3f} ({row[f'{key}_min']:.2f}-{row[f'{key}_max']:.2f})"
    if isinstance(value, float):
        return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
