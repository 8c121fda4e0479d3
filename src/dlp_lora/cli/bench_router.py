"""The command `bench router`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dlp_lora.cli.common import DataOption, ModelOption, RouterOption, base_model, say
from dlp_lora.cli.options import words
from dlp_lora.cli.progress import progress
from dlp_lora.cli.tables import show_table
from dlp_lora.files import check_target
from dlp_lora.lab.records.table import table_of


def router(
    data: DataOption,
    extra: Annotated[
        str | None, typer.Option(help="Folder of task folders that the router must not know: foreign texts, scale.")
    ] = None,
    router_folder: RouterOption = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer: folder or hub id. [default: the router's, else the model's]")
    ] = None,
    model: ModelOption = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Comma-separated task names. [default: all]")] = None,
    only: Annotated[str | None, typer.Option(help="Comma-separated scenarios. [default: all]")] = None,
    per_task: Annotated[
        int | None, typer.Option(min=1, help="Largest number of test questions per task. [default: 100]")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Sentence encoder of routers without training. [default: the installed one]")
    ] = None,
    adapters: Annotated[
        str | None, typer.Option(help="Folder of the tasks' adapters for --model, for routers that read adapters.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples and of training.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: torch's choice]")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record to this file, too.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder to write a page with pictures to; needs --json.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for trained routers, so that a stopped run continues. [default: none]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start the record again.")] = False,
) -> None:
    """Measure the accuracy, calibration and speed of a router, from whole prompts to single sentences.

    Without --router it trains one on the tasks. After an interruption, run it again: it continues with the scenarios
    that the record lacks. Examples: `dlp-lora bench router --data data/ --json router.json`, or
    `dlp-lora bench router --data data/ --router router/ --only prompts,serial`
    """
    import torch

    from dlp_lora.lab.evals.router import RouterBenchArgs, Setting, bench_router, read_trained
    from dlp_lora.router import load_tokenizer
    from dlp_lora.tasks.hub import read_data
    from dlp_lora.tasks.manifest import read_manifest
    from dlp_lora.training.router import RouterTrainingArgs

    if report is not None and json_file is None:
        raise ValueError("--report is written from the record; give --json, too")
    if json_file is not None:
        check_target(json_file)
    if threads is not None:
        torch.set_num_threads(threads)
    options: dict[str, Any] = {"seed": seed, "per_task": per_task, "encoder": encoder, "adapters": adapters}
    if adapters is not None:
        options["model"] = model
    args = RouterBenchArgs(
        training=RouterTrainingArgs(seed=seed), **{key: value for key, value in options.items() if value is not None}
    )
    with progress() as show:
        setting = Setting(
            read_data(data, names=words(tasks) if tasks else None),
            load_tokenizer(tokenizer or router_folder or base_model(model)),
            args,
            router=read_trained(router_folder) if router_folder else None,
            extra=read_data(extra) if extra else (),
            manifest=read_manifest(data),
            folder=work,
            on_progress=show,
        )
        record = bench_router(setting, only=words(only) if only else (), file=json_file, overwrite=overwrite)
    _show_router(record)
    if json_file is not None:
        say(f"wrote {json_file}")
    if report is not None and json_file is not None:
        from dlp_lora.lab.report import write_report

        say(f"wrote {write_report(json_file, report).html}")


def _show_router(record: dict[str, Any]) -> None:
    title = f"router, {len(record['data']['tasks'])} tasks, {record['environment']['cpu']}"
    rows = [(name, *finding) for name, results in record["scenarios"].items() for finding in _findings(results)]
    show_table(table_of(title, ("scenario", "of", "found"), rows, num_labels=3))
    targets = [
        (
            t["name"],
            "met" if t["met"] else "missed",
            f"{'≥' if t['at_least'] else '≤'} {t['bound']:g}",
            f"{t['value']:g}",
        )
        for t in record["targets"]
        if t["value"] is not None
    ]
    show_table(table_of("targets", ("target", "", "bound", "found"), targets, num_labels=2))


def _findings(results: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The accuracies of a scenario, with their intervals, and the numbers beside them."""
    numbers = {key: value for key, value in results.items() if isinstance(value, int | float | str)}
    if "interval" in results:
        low, high = results["interval"]
        numbers["accuracy"] = f"{numbers['accuracy']:.2%} ({low:.1%} to {high:.1%})"
    if numbers:
        yield path, ", ".join(f"{key} {value}" for key, value in numbers.items())
    for key, value in results.items():
        if isinstance(value, dict) and key not in ("by_task", "confusion", "reliability"):
            yield from _findings(value, f"{path} {key}".strip())
