"""The demo command."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from dlp_lora.cli.common import JsonOption, ModelOption, base_model, console, say, to_try
from dlp_lora.cli.json_lines import print_json
from dlp_lora.cli.progress import progress
from dlp_lora.cli.tables import show_table
from dlp_lora.lab.records.table import Table, table_of

LABELS = {
    "base": "base model",
    "base_chat": "base, chat template",
    "own_adapter": "task's own adapter",
    "dlp": "DLP-LoRA",
}


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; run it again to continue there.")] = Path(
        "demo"
    ),
    model: ModelOption = None,
    seed: Annotated[int, typer.Option(help="Training seed; the questions stay the same.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train four adapters and a router on a small real model, and let them answer together. About 6 minutes.

    Example: `dlp-lora demo --out demo/`
    """
    from dlp_lora.demo import DemoArgs, run_demo

    base = base_model(model)
    args = DemoArgs(seed=seed)
    with progress((*args.tasks, "router", "answers", "two questions")) as show:
        result = run_demo(base, out, args, on_progress=show)
    if as_json:
        print_json({**result.__dict__, "serial": result.serial.__dict__, "bundle": str(result.bundle)})
        return
    for name in result.accuracy:
        _show_answer(next(answer for answer in result.answers if answer["task"] == name))
    _show_two_questions(result.serial)
    show_table(_accuracy_table(result.accuracy))
    show_table(_pairs_table(result.pairs))
    console.print(
        "An answer is right if it has the correct value. The base model gets the prompt in both formats. "
        "DLP-LoRA does not know the task of a prompt.\n"
    )
    say(f"The bundle is in {result.bundle}. Try:")
    say(f"  {to_try('generate', '--bundle', result.bundle, '--show-routing', result.serial.prompt)}")


def _show_answer(answer: dict[str, Any]) -> None:
    title = f"{answer['task']}: {answer['prompt']}"
    rows = [
        (label, "✓" if answer["right"][method] else "✗", " ".join(answer["said"][method].split()))
        for method, label in LABELS.items()
    ]
    show_table(table_of(title, ("", "", "answer"), rows, num_labels=3))


def _show_two_questions(serial: Any) -> None:
    console.print(Text("\nTwo tasks in one prompt:", "bold"), serial.prompt, markup=False)
    rows = []
    for sentence in serial.trace:
        used = ", ".join(f"{name} {weight:.0%}" for name, weight in sentence["mixture"].items()) or "base model"
        best = max(sentence["probabilities"].items(), key=lambda np: np[1])
        rows.append((sentence["text"].strip(), used, f"{best[0]} {best[1]:.1%}"))
    columns = ("sentence", "adapters", "first choice of the router")
    show_table(table_of("DLP-LoRA, sentence by sentence", columns, rows, num_labels=3))
    console.print("The base model says:", Text(f"{' '.join(serial.base.split()) or '(nothing)'}\n", "dim"))


def _accuracy_table(accuracy: dict[str, dict[str, float]]) -> Table:
    mean = {method: sum(row[method] for row in accuracy.values()) / len(accuracy) for method in LABELS}
    rows = [(name, *(f"{row[method]:.0%}" for method in LABELS)) for name, row in {**accuracy, "mean": mean}.items()]
    return table_of("accuracy on held-out prompts, all tasks pooled", ("task", *LABELS.values()), rows)


def _pairs_table(pairs: dict[str, dict[str, float]]) -> Table:
    keys = ("first_routed", "first_right", "second_routed", "second_right")
    columns = ("way", "1st to its adapter", "1st right", "2nd to its adapter", "2nd right")
    rows = [(way, *(f"{row[key]:.0%}" for key in keys)) for way, row in pairs.items()]
    return table_of("prompts of two questions, DLP-LoRA, by how the context is encoded", columns, rows)
