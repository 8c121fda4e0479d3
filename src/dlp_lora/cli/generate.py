"""Commands that answer: generate, chat."""

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dlp_lora.cli.common import EngineOptions, JsonOption, console, open_engine, stderr
from dlp_lora.cli.json_lines import print_json, questions
from dlp_lora.cli.options import mixture_of, with_options
from dlp_lora.errors import PromptError

if TYPE_CHECKING:
    from dlp_lora import Sentence

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green")


@with_options
def generate(
    engine_options: EngineOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; without it, JSON lines are read from stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    fixed: Annotated[
        str | None, typer.Option(help='Use this mixture instead of the router: "math=0.6,units=0.4".')
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed instead of greedily.")] = None,
    show_routing: Annotated[bool, typer.Option(help="Show which sentence used which adapters.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt, choosing adapters again at every sentence.

    Examples: `dlp-lora generate --bundle demo/bundle "Convert 3 kilometres to metres." --show-routing`, or
    `dlp-lora generate --bundle demo/bundle < prompts.jsonl > answers.jsonl` with lines `{"prompt": "..."}` or
    `{"messages": [{"role": "user", "content": "..."}]}`.
    """
    engine = open_engine(engine_options, need_router=fixed is None)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": seed is not None, "seed": seed}
    with engine.fixed(mixture_of(fixed)) if fixed is not None else nullcontext():
        for number, record in questions(prompt):
            source: Any = record.get("messages") or record["prompt"]
            if chat and isinstance(source, str):
                source = [{"role": "user", "content": source}]
            try:
                answer = engine.generate(source, **options)
            except PromptError as error:
                raise PromptError(f"standard input, line {number}: {error}" if number else str(error)) from error
            if as_json or prompt is None:
                print_json({**record, **answer.to_dict()})
                continue
            if show_routing:
                if answer.prompt_trace:
                    console.print(routing_table(answer.prompt_trace, of="prompt's sentence"))
                console.print(routing_table(answer.trace))
            else:
                typer.echo(answer.text.strip())  # not the console, which turns tabs into spaces


@with_options
def chat(
    engine_options: EngineOptions,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template and no memory: each line is a prompt.")] = False,
) -> None:
    """Chat in the terminal; the answer's colour is its heaviest adapter. An empty line or Ctrl-D ends it.

    Example: `dlp-lora chat --bundle demo/bundle`
    """
    engine = open_engine(engine_options)
    colours = dict(zip(engine.bank.names, COLOURS * len(engine.bank), strict=False))
    console.print("  ".join(f"[{colour}]■ {escape(name)}[/]" for name, colour in colours.items()) + "  ■ base model")
    messages: list[dict[str, str]] = []
    while line := _ask():
        messages = [*([] if raw else messages), {"role": "user", "content": line}]
        text = ""
        for piece in engine.stream(line if raw else messages, max_new_tokens=max_new_tokens):
            text += piece
            top = next(iter(piece.mixture), "")
            console.print(escape(piece), style=colours.get(top, "default"), end="", highlight=False, soft_wrap=True)
        console.print()
        messages.append({"role": "assistant", "content": text})


def routing_table(trace: tuple["Sentence", ...], *, of: str = "sentence") -> Table:
    """A table of sentences with the adapters they used."""
    table = Table(show_lines=False, pad_edge=False)
    table.add_column(of, overflow="fold")
    table.add_column("adapters", style="cyan")
    table.add_column("route + fuse + encode", justify="right", style="dim")
    for sentence in trace:
        used = ", ".join(f"{name} {weight:.0%}" for name, weight in sentence.mixture.items()) or "base model"
        if sentence.abstained:
            used += " (none fits)"
        cost = f"{sentence.route_ms + sentence.fuse_ms + sentence.encode_ms:.1f} ms"
        table.add_row(escape(sentence.text.strip()), escape(used), cost)
    return table


def _ask() -> str:
    try:
        if sys.stdin.isatty():
            return console.input("[bold]> [/]").strip()
        return sys.stdin.readline().strip()
    except EOFError:
        stderr.print()
        return ""
