"""The bench commands."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dlp_lora.cli.app import DataOption, ModelOption, RouterOption, app, base_model, console, progress_bar, stderr

bench = typer.Typer(no_args_is_help=True, help="Measure speed side by side with the base model and PEFT.")
app.add_typer(bench, name="bench")

NumAdaptersOption = Annotated[int, typer.Option(min=1, help="Adapters in the bank.")]
SelectedOption = Annotated[int, typer.Option(min=1, help="Adapters fused at a time.")]
TargetsOption = Annotated[str, typer.Option(help='Adapted modules, comma-separated, or "all-linear".')]
BatchOption = Annotated[int, typer.Option(min=1, help="Prompts at once.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")]
DtypesOption = Annotated[str, typer.Option(help="Comma-separated.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: its own choice]")]
JsonFileOption = Annotated[Path | None, typer.Option("--json", help="Write the record to this file, too.")]


@bench.command()
def decode(
    model: ModelOption = None,
    num_adapters: NumAdaptersOption = 26,
    selected: SelectedOption = 3,
    target_modules: TargetsOption = "q_proj,v_proj",
    batch: BatchOption = 1,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens a run generates.")] = 64,
    rounds: RoundsOption = 9,
    dtypes: DtypesOption = "bfloat16,float32",
    threads: ThreadsOption = None,
    json_file: JsonFileOption = None,
) -> None:
    """Time per generated token over the base model, with sentence switching live.

    Example: `dlp-lora bench decode --json results/decode.json`
    """
    from dlp_lora.bench.decode import DecodeArgs, bench_decode

    args = DecodeArgs(
        num_adapters=num_adapters,
        selected=selected,
        target_modules=tuple(target_modules.split(",")),
        batch=batch,
        new_tokens=new_tokens,
        rounds=rounds,
        dtypes=tuple(dtypes.split(",")),
        threads=threads,
    )
    with _rounds() as on_round:
        record = bench_decode(base_model(model), args, on_round=on_round)
    columns = {
        "variant": "name",
        "dtype": "dtype",
        "ms/token": "ms_per_token",
        "over base": "ratio",
        "over stacked": "ratio_over_stacked",
        "first token, ms": "ttft_ms",
        "tokens/s": "tokens_per_s",
    }
    _show(record, columns, f"batch {batch}, {target_modules}", json_file)
    for dtype, cost in record["switch"].items():
        console.print(f"{dtype}: router {cost['router_ms']:.2f} ms, whole switch {cost['switch_ms']:.2f} ms a sentence")


@bench.command()
def prefill(
    model: ModelOption = None,
    num_adapters: NumAdaptersOption = 26,
    selected: SelectedOption = 3,
    target_modules: TargetsOption = "q_proj,v_proj",
    batch: BatchOption = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    rounds: RoundsOption = 9,
    dtypes: DtypesOption = "bfloat16,float32",
    threads: ThreadsOption = None,
    json_file: JsonFileOption = None,
) -> None:
    """Time to read prompts over the base model, routing and fusing included.

    Example: `dlp-lora bench prefill --batch 4 --length 512`
    """
    from dlp_lora.bench.prefill import PrefillArgs, bench_prefill

    args = PrefillArgs(
        num_adapters=num_adapters,
        selected=selected,
        target_modules=tuple(target_modules.split(",")),
        batch=batch,
        length=length,
        rounds=rounds,
        dtypes=tuple(dtypes.split(",")),
        threads=threads,
    )
    with _rounds() as on_round:
        record = bench_prefill(base_model(model), args, on_round=on_round)
    columns = {"variant": "name", "dtype": "dtype", "ms": "ms", "over base": "ratio"}
    _show(record, columns, f"batch {batch}, {length} tokens", json_file)


@bench.command()
def bank(
    model: ModelOption = None,
    sizes: Annotated[str, typer.Option(help="Adapters in the bank, comma-separated.")] = "1,5,10,20,50,100",
    selected: SelectedOption = 3,
    rounds: RoundsOption = 7,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    threads: ThreadsOption = None,
    json_file: JsonFileOption = None,
) -> None:
    """Time per generated token as the bank grows (the paper's Table 6).

    Example: `dlp-lora bench bank --sizes 1,10,100`
    """
    from dlp_lora.bench.bank import BankArgs, bench_bank

    args = BankArgs(
        sizes=tuple(map(int, sizes.split(","))), selected=selected, rounds=rounds, dtype=dtype, threads=threads
    )
    with _rounds() as on_round:
        record = bench_bank(base_model(model), args, on_round=on_round)
    columns = {
        "variant": "name",
        "ms/token": "ms_per_token",
        "over base": "ratio",
        "share of parameters": "share_of_parameters",
        "switch, ms": "switch_ms",
        "load, s": "load_s",
    }
    _show(record, columns, dtype, json_file)


@bench.command()
def peers(
    model: ModelOption = None,
    num_adapters: NumAdaptersOption = 8,
    selected: SelectedOption = 2,
    methods: Annotated[str | None, typer.Option(help="Semicolon-separated names. [default: all]")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens a run generates.")] = 32,
    rounds: RoundsOption = 5,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    threads: ThreadsOption = None,
    json_file: JsonFileOption = None,
) -> None:
    """Time per generated token of every peer: PEFT's ways, and other papers' methods as we wrote them (Table 7).

    Example: `dlp-lora bench peers --methods "peft, arrow;meteora (ours)"`
    """
    from dlp_lora.bench.peers import PeersArgs, bench_peers

    args = PeersArgs(
        num_adapters=num_adapters,
        selected=selected,
        methods=tuple(methods.split(";")) if methods else (),
        new_tokens=new_tokens,
        rounds=rounds,
        dtype=dtype,
        threads=threads,
    )
    with _rounds() as on_round:
        record = bench_peers(base_model(model), args, on_round=on_round)
    columns = {
        "variant": "name",
        "ms/token": "ms_per_token",
        "over base": "ratio",
        "first token, ms": "ttft_ms",
        "held, MB": "held_mb",
        "memory over base": "memory_ratio",
    }
    _show(record, columns, f"{num_adapters} adapters, {selected} at a time, {dtype}", json_file)


@bench.command()
def train(
    data: DataOption,
    model: ModelOption = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Comma-separated task names. [default: all]")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Training examples of each task.")] = 48,
    rounds: RoundsOption = 3,
    threads: ThreadsOption = None,
    json_file: JsonFileOption = None,
) -> None:
    """Training speed against the plain transformers Trainer with PEFT, on the same samples.

    Example: `dlp-lora bench train --data data/ --tasks gsm8k,winowhy`
    """
    from dlp_lora.bench.train import TrainArgs, bench_train
    from dlp_lora.tasks.hub import read_data

    found = read_data(data, names=tasks.split(",") if tasks else None)
    args = TrainArgs(num_samples=num_samples, rounds=rounds, threads=threads)
    with _rounds() as on_round:
        record = bench_train(base_model(model), found, args, on_round=on_round)
    columns = {
        "variant": "name",
        "task": "task",
        "samples/s": "samples_per_s",
        "speed-up": "speedup",
        "mean loss": "mean_loss",
    }
    _show(record, columns, f"{num_samples} samples a task", json_file)


@bench.command("router")
def router_command(
    data: DataOption,
    extra: Annotated[
        str | None, typer.Option(help="Folder of task folders that the router is not to know: out of domain, scale.")
    ] = None,
    router: RouterOption = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer: folder or hub id. [default: the router's, else the model's]")
    ] = None,
    model: ModelOption = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Comma-separated task names. [default: all]")] = None,
    only: Annotated[str | None, typer.Option(help="Comma-separated scenarios. [default: all]")] = None,
    per_task: Annotated[int | None, typer.Option(min=1, help="Test questions of a task, at most.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples and of training.")] = 0,
    threads: ThreadsOption = None,
    json_file: JsonFileOption = None,
    report: Annotated[Path | None, typer.Option(help="Folder to write a page with pictures to; needs --json.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder to keep trained routers in, for a run that goes on. [default: nowhere]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin the record anew.")] = False,
) -> None:
    """What a router gets right, how sure it is and what it costs, from whole prompts to single sentences.

    Without --router one is trained on the tasks. Interrupted, the same command goes on with the scenarios that the
    record has not. Examples: `dlp-lora bench router --data data/ --json router.json`, or
    `dlp-lora bench router --data data/ --router router/ --only prompts,serial`
    """
    import torch

    from dlp_lora.bench.router import RouterBenchArgs, Setting, bench_router, read_trained
    from dlp_lora.router import load_tokenizer
    from dlp_lora.tasks.hub import read_data
    from dlp_lora.tasks.manifest import read_manifest
    from dlp_lora.training.router import RouterTrainingArgs

    if report is not None and json_file is None:
        raise ValueError("--report is written from the record; give --json, too")
    if threads is not None:
        torch.set_num_threads(threads)
    given: dict[str, Any] = {"seed": seed, "per_task": per_task}
    args = RouterBenchArgs(
        training=RouterTrainingArgs(seed=seed), **{key: value for key, value in given.items() if value is not None}
    )
    with _rounds() as on_step:
        setting = Setting(
            read_data(data, names=tasks.split(",") if tasks else None),
            load_tokenizer(tokenizer or router or base_model(model)),
            args,
            router=read_trained(router) if router else None,
            extra=read_data(extra) if extra else (),
            manifest=read_manifest(data),
            folder=work,
            on_step=on_step,
        )
        record = bench_router(setting, only=only.split(",") if only else (), file=json_file, overwrite=overwrite)
    _show_router(record)
    if json_file is not None:
        stderr.print(f"wrote {json_file}")
    if report is not None and json_file is not None:
        from dlp_lora.report import write_report

        stderr.print(f"wrote {write_report(json_file, report).html}")


@contextmanager
def _rounds() -> Iterator[Callable[[str, int, int], None]]:
    with progress_bar() as progress:
        bars: dict[str, Any] = {}

        def on_round(scenario: str, done: int, total: int) -> None:
            if scenario not in bars:
                bars[scenario] = progress.add_task(scenario, total=total, note="")
            progress.update(bars[scenario], completed=done, total=total)

        yield on_round


def _show(record: dict[str, Any], columns: dict[str, str], what: str, json_file: Path | None) -> None:
    title = f"{record['benchmark']}, {record['model']}, {what}, {record['environment']['cpu']}"
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("variant", "dtype") else "right")
    for row in record["rows"]:
        cells = {key: row.get(key, "–") for key in columns.values()}
        for key in ("ratio", "speedup"):
            if key in cells:
                cells[key] = f"{row[key]:.3f} ({row[key + '_min']:.2f}-{row[key + '_max']:.2f})"
        table.add_row(*(str(cell) for cell in cells.values()))
    console.print(table)
    if json_file is not None:
        from dlp_lora.folders import write_text

        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(json_file, json.dumps(record, indent=2) + "\n")
        stderr.print(f"wrote {json_file}")


def _show_router(record: dict[str, Any]) -> None:
    table = Table(title=f"router, {len(record['data']['tasks'])} tasks, {record['environment']['cpu']}")
    for column in ("scenario", "of", "found"):
        table.add_column(column)
    for name, found in record["scenarios"].items():
        for what, value in _findings(found):
            table.add_row(name, what, value)
    console.print(table)
    targets = Table(title="targets")
    for column in ("target", "bound", "found", ""):
        targets.add_column(column, justify="right" if column in ("bound", "found") else "left")
    for target in record["targets"]:
        if target["value"] is not None:
            sign = "≥" if target["at_least"] else "≤"
            met = "met" if target["met"] else "[red]missed[/]"
            targets.add_row(target["name"], f"{sign} {target['bound']:g}", f"{target['value']:g}", met)
    console.print(targets)


def _findings(found: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The accuracies of a scenario, with their intervals, and the numbers beside them."""
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float | str)}
    if "interval" in found:
        low, high = found["interval"]
        numbers["accuracy"] = f"{numbers['accuracy']:.2%} ({low:.1%} to {high:.1%})"
    if numbers:
        yield path, ", ".join(f"{key} {value}" for key, value in numbers.items())
    for key, value in found.items():
        if isinstance(value, dict) and key not in ("by_task", "confusion", "reliability"):
            yield from _findings(value, f"{path} {key}".strip())
