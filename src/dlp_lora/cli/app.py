"""The Typer application: which command runs which function, and how errors are shown."""

import logging
import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup
from typer.main import get_group

import dlp_lora
from dlp_lora.cli.bundle import add_task, bundle, remove_task
from dlp_lora.cli.check import check
from dlp_lora.cli.common import console, say, say_error, stderr, to_try
from dlp_lora.cli.demo import demo
from dlp_lora.cli.evaluate import evaluate, reproduce
from dlp_lora.cli.export import export
from dlp_lora.cli.generate import chat, generate
from dlp_lora.cli.learning_curve import learning_curve
from dlp_lora.cli.lm_eval import lm_eval
from dlp_lora.cli.report import report
from dlp_lora.cli.route import route
from dlp_lora.cli.serve import serve
from dlp_lora.cli.tasks import tasks
from dlp_lora.cli.train_adapter import train_adapter, train_adapters
from dlp_lora.cli.train_router import router_from_adapters, router_from_descriptions, train_router
from dlp_lora.errors import DLPLoRAError, is_out_of_memory, reason_of

# These keep their work as they go; the others begin again, or keep it in a file or folder that was named.
RESUMABLE = ("demo", "learning-curve", "reproduce", "train-adapter", "train-adapters")
# Options of train-router that are commands now.
MOVED = {"--from-descriptions": "router-from-descriptions", "--from-adapters": "router-from-adapters"}
LESS_MEMORY = "see docs/gpus.md#how-much-memory, or use shorter texts, smaller batches or a smaller model"
CLOSED_PIPE = 141  # 128 + SIGPIPE, which a shell reports of other programs


class _Commands(TyperGroup):
    """Shows a user's error as one line, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _end_quietly()
        except (DLPLoRAError, ValueError, OSError, MemoryError, RuntimeError) as error:
            is_known = isinstance(error, DLPLoRAError | ValueError | OSError)
            if os.environ.get("DLP_LORA_TRACEBACK") or not (is_known or is_out_of_memory(error)):
                raise
            say_error(str(error) if is_known else f"out of memory: {reason_of(error)}; {LESS_MEMORY}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            goes_on = "; run it again to continue" if ctx.invoked_subcommand in RESUMABLE else ""
            stderr.print(f"interrupted{goes_on}")
            raise typer.Exit(130) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        options = {arg.split("=")[0] for arg in args} & MOVED.keys() if args[:1] == ["train-router"] else set()
        if len(options) == 1:
            (option,) = options
            rest = [arg.removeprefix(f"{option}=") for arg in args[1:] if arg != option]
            say(f"train-router {option} is a command now: {to_try(MOVED[option], *rest)}")
            args = [MOVED[option], *rest]
        return super().resolve_command(ctx, args)


class _Benchmarks(TyperGroup):
    """Imports a command at its first use, because its options come from code that imports torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        self.commands = get_group(_benchmarks()).commands
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self.list_commands(ctx)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Load many LoRA adapters at once; the model picks the right ones, sentence by sentence.",
)
for command in (
    *(generate, chat, route, serve),
    *(bundle, add_task, remove_task, check, export),
    *(train_adapter, train_adapters, train_router, router_from_descriptions, router_from_adapters),
    *(demo, evaluate, learning_curve, reproduce, report, tasks),
):
    app.command("eval" if command is evaluate else None)(command)
app.command(context_settings={"ignore_unknown_options": True})(lm_eval)
app.add_typer(
    typer.Typer(
        cls=_Benchmarks,
        no_args_is_help=True,
        help="Measure speed beside the base model and PEFT, and the accuracy of a router.",
    ),
    name="bench",
)


def _show_version(is_set: bool) -> bool:
    if is_set:
        console.print(f"dlp-lora {dlp_lora.__version__}", highlight=False)
        raise typer.Exit
    return is_set


def main() -> None:
    """Runs the command line."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.showwarning = lambda message, *_: stderr.print(Text("warning:", "yellow"), str(message), markup=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Set here and read by transformers, whose import is left to the commands that need it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    Console.on_broken_pipe = _end_quietly  # type: ignore[assignment]  # of the help, too
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _end_quietly()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options of the program."""


def _benchmarks() -> typer.Typer:
    from dlp_lora.cli import bench, bench_router

    group = typer.Typer()
    for command in (
        *(bench.decode, bench.paths, bench.prefill, bench.switch, bench.bank, bench.routers, bench.peers),
        *(bench.train, bench.serve, bench.soak, bench_router.router, bench.suite),
    ):
        group.command()(command)
    return group


def _end_quietly(_: object = None) -> NoReturn:
    """Ends a command whose output pipe is closed; otherwise Python would report unwritten output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    raise SystemExit(CLOSED_PIPE)
