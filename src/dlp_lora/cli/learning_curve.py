"""The command learning-curve."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dlp_lora.cli.common import DataOption, JsonOption, ModelOption, base_model, say
from dlp_lora.cli.json_lines import print_json
from dlp_lora.cli.options import whole_numbers, words
from dlp_lora.cli.progress import progress
from dlp_lora.cli.tables import show_table
from dlp_lora.lab.records.table import table_of


def learning_curve(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Task names, comma-separated.")],
    model: ModelOption = None,
    epochs: Annotated[str, typer.Option(help="Lengths to compare, comma-separated.")] = "1,2,3,5",
    single_epochs: Annotated[str, typer.Option(help="Lengths of the one LoRA on all tasks; 0: none.")] = "1,3",
    learning_rates: Annotated[str, typer.Option(help="Peak learning rates, comma-separated.")] = "5e-4,2e-3",
    held_out: Annotated[int, typer.Option(min=1, help="Training questions per task that are held out.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Choose epochs and learning rate on held-out training questions, for adapters and for one LoRA on all tasks.

    After an interruption, run it again to continue. Example:
    `dlp-lora learning-curve --data data/ --out runs/curve --tasks winowhy,object_counting`
    """
    from dlp_lora.lab.reproduce.curve import CurveArgs
    from dlp_lora.lab.reproduce.curve import learning_curve as run
    from dlp_lora.tasks.hub import read_data
    from dlp_lora.tasks.manifest import read_manifest

    single = tuple(n for n in whole_numbers("single-epochs", single_epochs) if n)
    args = CurveArgs(
        epochs=tuple(whole_numbers("epochs", epochs)),
        single_epochs=single,
        single_r=CurveArgs().single_r if single else 0,
        learning_rates=tuple(float(rate) for rate in words(learning_rates)),
        held_out=held_out,
    )
    examples = read_data(data, names=words(tasks))
    with progress() as show:
        record = run(base_model(model), examples, out, args, infos=read_manifest(data), on_progress=show)
    result = json.loads(record.read_text(encoding="utf-8"))
    say(f"wrote {record}")
    if as_json:
        print_json(result)
        return
    rows = []
    for row in result["rows"]:
        own = [f"{100 * scores.get('accuracy', scores.get('rougeL')):.1f}" for scores in row["scores"].values()]
        rows.append((row["kind"], f"{row['learning_rate']:g}", str(row["epochs"]), *own, f"{100 * row['mean']:.1f}"))
    show_table(table_of("", ("adapters", "learning rate", "epochs", *result["kinds"], "mean"), rows, num_labels=3))
