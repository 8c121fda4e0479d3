"""Commands that make routers: train-router, router-from-descriptions, router-from-adapters."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dlp_lora.cli.common import (
    DataOption,
    JsonOption,
    ModelHubOptions,
    ModelOption,
    OutOption,
    base_model,
    console,
    say,
    to_try,
)
from dlp_lora.cli.json_lines import print_json
from dlp_lora.cli.options import with_options, words
from dlp_lora.cli.progress import progress, working
from dlp_lora.cli.tables import show_table
from dlp_lora.files import check_replaceable, check_writable
from dlp_lora.lab.records.table import table_of

TasksOption = Annotated[str | None, typer.Option("--tasks", help="Comma-separated task names. [default: all]")]


@with_options
def train_router(
    data: DataOption,
    out: OutOption,
    hub_options: ModelHubOptions,
    tasks: TasksOption = None,
    router_kind: Annotated[str | None, typer.Option(help="mini-mlp or encoder. [default: mini-mlp]")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Encoder that --router-kind encoder trains: folder or hub id, such as albert/albert-base-v2. "
            "[default: ALBERT's shape and random weights]"
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer: folder or hub id. [default: the model's]")] = None,
    model: ModelOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the texts.")] = None,
    coverage: Annotated[
        float | None, typer.Option(help="Share of the tasks' texts that must fit some adapter. [default: 0.99]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of initialisation, order and augmentation. [default: 0]")
    ] = None,
    routed: Annotated[
        Path | None,
        typer.Option(help="Learn from this routing log, too: lines with text (--log-text) and a corrected `adapter`."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a router on the task folders' texts; report held-out accuracy, confusion and calibration.

    The hub's options apply to the model, or to --tokenizer or --encoder if you pass one. Without task folders, see
    `router-from-descriptions` and `router-from-adapters`. Example:
    `dlp-lora train-router --data data/ --out router/`
    """
    from dlp_lora.errors import RouterError
    from dlp_lora.lab.records.environment import environment
    from dlp_lora.router import CONFIG_FILE, load_tokenizer
    from dlp_lora.router.encoder import FILES
    from dlp_lora.tasks.hub import read_data
    from dlp_lora.training.routed import read_routed
    from dlp_lora.training.router import REPORT_FILE, RouterTrainingArgs, train_router_into

    if encoder is not None and tokenizer is not None:
        raise ValueError("an encoder has its own tokenizer; leave --tokenizer or --encoder out")
    check_replaceable(out, CONFIG_FILE)
    check_writable(out.parent)
    given = hub_options.given()
    if encoder is not None and given:
        encoder, given = str(hub_options.folder(encoder, files=FILES, error=RouterError)), {}
    options = {"kind": router_kind, "encoder": encoder, "epochs": epochs, "coverage": coverage, "seed": seed}
    settings: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    args = RouterTrainingArgs(**settings)
    examples = read_data(data, names=words(tasks) if tasks else None)
    lessons = [] if routed is None else read_routed(routed, [task.name for task in examples])
    with progress(["router"]) as show:
        report = train_router_into(
            out,
            examples,
            load_tokenizer(tokenizer or encoder or base_model(model), **given),
            args,
            about={"environment": environment()},
            routed=lessons,
            on_progress=show,
        )
    if as_json:
        print_json(report.to_dict())
        return
    _show_report(report)
    say(f"wrote {out} (the whole confusion table is in {out / REPORT_FILE})")


def router_from_descriptions(
    descriptions: Annotated[Path, typer.Argument(help='JSON file, {"adapter": "description" or ["example", ...]}.')],
    out: OutOption,
    encoder: Annotated[
        str | None, typer.Option(help="Sentence encoder: folder or hub id. [default: all-MiniLM-L6-v2 from PyPI]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a router from a description or a few examples of each adapter, without training.

    Example: `dlp-lora router-from-descriptions adapters.json --out router/`
    """
    from dlp_lora.router import CONFIG_FILE, PrototypeRouter
    from dlp_lora.router.encoder import default_encoder
    from dlp_lora.router.prototypes import read_descriptions

    check_replaceable(out, CONFIG_FILE)
    router = PrototypeRouter.from_texts(read_descriptions(descriptions), encoder or default_encoder())
    router.save_pretrained(out)
    _show_made(router.names, "prototypes", router.temperature, out, as_json=as_json)


@with_options
def router_from_adapters(
    hub_options: ModelHubOptions,
    adapters: Annotated[Path, typer.Argument(help="Folder of PEFT adapter folders, for the base --model.")],
    out: OutOption,
    model: ModelOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the texts that the base model makes up.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a router from the adapters alone; it uses their weights and runs the base model.

    Example: `dlp-lora router-from-adapters adapters/ --model M --out router/`
    """
    from dlp_lora.engine.arrow import ArrowRouter
    from dlp_lora.engine.loading import load_model
    from dlp_lora.router import CONFIG_FILE, load_tokenizer

    check_replaceable(out, CONFIG_FILE)
    base = base_model(model)
    with working("reading the adapters against the base model"):
        options = hub_options.given()
        router = ArrowRouter.from_adapters(
            adapters, load_model(base, **options)[0], load_tokenizer(base, **options), seed=seed
        )
    router.save_pretrained(out)
    _show_made(router.names, "arrow", router.temperature, out, as_json=as_json)


def _show_report(report: Any) -> None:
    prompts = "test prompts" if report.measured_on == "test" else "training prompts that were held out"
    console.print(
        f"{report.num_parameters:,} parameters, trained in {report.seconds:.0f} s\n"
        f"held-out accuracy {report.accuracy:.2%} on {report.num_test:,} {prompts} of {len(report.names)} tasks\n"
        f"calibration error {report.ece:.2%} (before temperature {report.temperature:.2f}: {report.ece_before:.2%})"
    )
    rows = [
        (name, f"{accuracy:.1%}", ", ".join(f"{other} {n}" for other, n in mistakes.items()))
        for name, accuracy, mistakes in report.mistakes()
    ]
    if rows:
        title = f"confusion: {prompts} that went to another task"
        show_table(table_of(title, ("task", "accuracy", "went to"), rows, num_labels=3))
    else:
        console.print("no prompt went to another task")


def _show_made(names: tuple[str, ...], kind: str, temperature: float, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"type": kind, "names": names, "temperature": temperature})
    else:
        console.print(f"{len(names)} adapters: {', '.join(names)}; temperature {temperature:.2g}", markup=False)
        say(f"wrote {out}; see what it does: {to_try('route', 'a prompt', '--router', out)}")
