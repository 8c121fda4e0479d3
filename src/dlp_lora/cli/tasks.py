"""The command that lists tasks."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dlp_lora.cli.common import JsonOption, console
from dlp_lora.cli.json_lines import print_json
from dlp_lora.cli.tables import show_table
from dlp_lora.lab.records.table import table_of

METRIC_NAMES = {"accuracy": "accuracy", "bleu": "BLEU", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}


def tasks(
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="List the tasks of this folder instead of the catalog.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the paper's 26 tasks and their composites, or the task folders of a data directory.

    Every command that takes `--data` reads the catalog's tasks from the Hugging Face hub with `--data hub`. Example:
    `dlp-lora tasks --data data/`
    """
    from dlp_lora.tasks.hub import is_hub

    if data is None or is_hub(data):
        _list_catalog(as_json=as_json)
    else:
        _list_folders(data, as_json=as_json)


def _list_catalog(*, as_json: bool) -> None:
    from dlp_lora.tasks import CATALOG, COMPOSITES

    if as_json:
        catalog = [{**asdict(task), "metrics": task.metrics} for task in CATALOG.values()]
        print_json({"tasks": catalog, "composites": COMPOSITES})
        return
    rows = []
    for task in CATALOG.values():
        # The configuration of a BIG-bench task is its name and "_zero_shot": said once, below.
        source = task.source.dataset if task.source.bigbench else str(task.source)
        rows.append((task.name, task.paper_name, task.kind, _metrics(task.metrics), source))
    show_table(table_of("", ("task", "paper", "kind", "scored by", "source"), rows, num_labels=5))
    console.print("hails/bigbench has each BIG-bench task under its name and _zero_shot.")
    console.print("composite-9: all of kind qa; composite-17: all of kind mcq; composite-26: all.")


def _list_folders(data: Path, *, as_json: bool) -> None:
    from dlp_lora.lab.evals.chance import described
    from dlp_lora.tasks import METRICS, TaskInfo, kind_of, read_manifest, read_tasks

    manifest = read_manifest(data)
    rows: list[dict[str, Any]] = []
    for task in read_tasks(data):
        kind = kind_of(task, manifest)
        info = described(task, manifest.get(task.name, TaskInfo()), kind)
        rows.append({
            "name": task.name,
            "paper_name": info.paper_name,
            "kind": kind,
            "metrics": METRICS[kind],
            "num_train": len(task.train),
            "num_test": len(task.test),
            "chance": info.chance,
            "majority": info.majority,
        })  # fmt: skip
    if as_json:
        print_json({"tasks": rows})
        return
    columns = ("task", "paper", "kind", "scored by", "train", "test", "chance", "majority")
    cells = [
        (
            *(row["name"], row["paper_name"] or "", row["kind"], _metrics(row["metrics"])),
            *(f"{row['num_train']:,}", f"{row['num_test']:,}", _share(row["chance"]), _share(row["majority"])),
        )
        for row in rows
    ]
    show_table(table_of("", columns, cells, num_labels=4))


def _metrics(metrics: tuple[str, ...]) -> str:
    return ", ".join(METRIC_NAMES[metric] for metric in metrics)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
