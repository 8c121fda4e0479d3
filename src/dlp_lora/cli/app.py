"""The Typer application, how it shows errors, and the options that several commands share."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup
from typer.main import get_group

from dlp_lora.errors import DLPLoRAError
from dlp_lora.policy import PromptRouting

if TYPE_CHECKING:
    from dlp_lora import Engine
    from dlp_lora.engine.bundle import Bundle

console = Console(emoji=False)  # ":a:" in an answer is no emoji
stderr = Console(stderr=True, emoji=False)
# What keeps its work as it goes; the others begin anew.
RESUMABLE = ("demo", "reproduce", "train-adapter", "train-adapters")


class _Commands(TyperGroup):
    """Shows an error that a user can mend as one line, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (DLPLoRAError, ValueError, OSError) as error:
            if os.environ.get("DLP_LORA_TRACEBACK"):
                raise
            stderr.print(f"[bold red]error:[/] {_escape(' '.join(str(error).split()))}", soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            goes_on = "; the same command goes on where it stopped" if ctx.invoked_subcommand in RESUMABLE else ""
            stderr.print(f"interrupted{goes_on}")
            raise typer.Exit(130) from None


class _Benchmarks(TyperGroup):
    """Finds its commands when they are asked for: their options come from code that imports torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        from dlp_lora.cli import bench_router  # noqa: F401  # and it, those of cli/bench.py

        self.commands = get_group(bench).commands
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self.list_commands(ctx)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Many LoRA adapters, one model, nobody picking: sentence-level dynamic LoRA fusion.",
)
bench = typer.Typer(
    cls=_Benchmarks,
    no_args_is_help=True,
    help="Measure speed side by side with the base model and PEFT, and what a router gets right.",
)
app.add_typer(bench, name="bench")

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Base model: folder or hub id. [default: SmolLM2-135M-Instruct]")
]
DataOption = Annotated[
    str, typer.Option("--data", "-d", help='Folder of task folders (docs/data-format.md), or "hub" for the catalog.')
]
AdaptersOption = Annotated[Path | None, typer.Option("--adapters", "-a", help="Folder of PEFT adapter folders.")]
RouterOption = Annotated[Path | None, typer.Option("--router", "-r", help="Router folder.")]
BundleOption = Annotated[
    str | None, typer.Option("--bundle", "-b", help="Bundle: folder or hub id, instead of the three.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
PolicyOption = Annotated[
    float | None, typer.Option("--p", help="Fuse the most likely adapters up to this probability. [default: 0.6]")
]
PromptRoutingOption = Annotated[
    PromptRouting | None,
    typer.Option(
        "--prompt-routing",
        help="What is routed: the prompt as one text, its questions in turn, or its sentences. [default: questions]",
    ),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... [default: cpu]")]
PrepackOption = Annotated[
    bool, typer.Option("--prepack", help="Faster tokens on a CPU for a second copy of the linear layers' weights.")
]
BudgetOption = Annotated[
    float | None, typer.Option("--budget-mb", help="Keep adapters on disk, and so many megabytes of them in memory.")
]


def main() -> None:
    """Runs the command line."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.showwarning = lambda message, *_: stderr.print(f"[yellow]warning:[/] {_escape(str(message))}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Set here and read by transformers, whose import is left to the commands that need it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _add_commands()
    app()


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engine a command runs: a bundle, or its parts."""

    bundle: BundleOption = None
    model: ModelOption = None
    adapters: AdaptersOption = None
    router: RouterOption = None
    p: PolicyOption = None
    prompt_routing: PromptRoutingOption = None
    device: DeviceOption = None
    prepack: PrepackOption = False
    budget_mb: BudgetOption = None


def open_engine(options: EngineOptions, *, need_router: bool = True) -> "Engine":
    """Loads the engine that the options describe."""
    from dlp_lora import load
    from dlp_lora.policy import with_p

    settings: dict[str, Any] = {
        "prompt_routing": options.prompt_routing,
        "device": options.device,
        "prepack": options.prepack,
        "budget_mb": options.budget_mb,
    }
    if options.device is not None:
        check_device(options.device)
    if options.bundle is not None:
        if options.adapters is not None or options.router is not None:
            raise ValueError("--bundle holds adapters and router; leave --adapters and --router out")
        engine = load(options.bundle, base_model=options.model, **settings)
    elif options.adapters is None or (options.router is None and need_router):
        raise ValueError("give --bundle, or --adapters and --router")
    else:
        engine = load(base_model(options.model), adapters=options.adapters, router=options.router, **settings)
    if options.p is not None:
        engine.policy = with_p(engine.policy, options.p)
    return engine


def base_model(model: str | None) -> str:
    """The base model that was named, else the embedded default one."""
    from dlp_lora.default_model import default_model

    if model is not None:
        return model
    with stderr.status("preparing the default model (once: about 40 s)"):
        return str(default_model())


def base_of(bundle: "Bundle", model: str | None) -> str:
    """The base model that was named, else the bundle's.

    Raises:
        BundleError: if neither is.
    """
    from dlp_lora.errors import BundleError

    if not (named := model or bundle.base_model):
        raise BundleError("the bundle was saved from a model without a name; give --model")
    return named


def say(text: str) -> None:
    """Prints a line on standard error as it is: paths may look like markup."""
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Prints one line of JSON."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def read_json_lines() -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads JSON objects from standard input, one a line, with the line's number."""
    for number, line in enumerate(sys.stdin, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f'standard input, line {number}: not JSON ({error}); expected {{"prompt": ...}}'
            ) from error
        if not isinstance(record, dict) or not _is_question(record):
            raise ValueError(
                f'standard input, line {number}: expected {{"prompt": "..."}} or {{"messages": [...]}}, '
                f"got {line.strip()[:60]}"
            )
        yield number, record


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=stderr) as progress:
        yield progress


def check_device(device: str) -> None:
    """Raises a ValueError if a device cannot be used."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a CPU build of torch asserts that there is a GPU
        raise ValueError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _is_question(record: dict[str, Any]) -> bool:
    if not isinstance(record.get("answer", ""), str):
        return False
    if "messages" not in record:
        return isinstance(record.get("prompt"), str)
    messages = record["messages"]
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _add_commands() -> None:
    # Each adds its commands to the app.
    from dlp_lora.cli import adapters, demo, harness, report, reproduce, run, tasks, train  # noqa: F401
