"""Commands that answer: generate, chat, route."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dlp_lora.cli.app import (
    BundleOption,
    EngineOptions,
    JsonOption,
    ModelOption,
    PolicyOption,
    RouterOption,
    app,
    base_model,
    base_of,
    console,
    open_engine,
    print_json,
    read_json_lines,
    stderr,
)
from dlp_lora.cli.options import with_options

if TYPE_CHECKING:
    from dlp_lora import Sentence

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green")


@app.command()
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
    """Answer a prompt, choosing adapters anew at every sentence.

    Examples: `dlp-lora generate --bundle demo/bundle "Convert 3 kilometres to metres." --show-routing`, or
    `dlp-lora generate --bundle demo/bundle < prompts.jsonl > answers.jsonl` with lines `{"prompt": "..."}` or
    `{"messages": [{"role": "user", "content": "..."}]}`.
    """
    engine = open_engine(engine_options, need_router=fixed is None)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": seed is not None, "seed": seed}
    from contextlib import nullcontext

    from dlp_lora.errors import PromptError

    records = [(0, {"prompt": prompt})] if prompt is not None else read_json_lines()
    with engine.fixed(parse_mixture(fixed)) if fixed is not None else nullcontext():
        for number, record in records:
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


@app.command()
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


@app.command()
def route(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; without it, JSON lines are read from stdin.")
    ] = None,
    router: RouterOption = None,
    bundle: BundleOption = None,
    model: ModelOption = None,
    p: PolicyOption = None,
) -> None:
    """Say which adapters a prompt would use, without loading a language model (but for a router made from adapters).

    Reads lines `{"prompt": ...}` or `{"messages": [...]}`, optionally with `"history"`, what was said before the
    prompt, and `"answer"`, what was answered so far (or a last message of the assistant). Prints one line each with
    `probs` (among the adapters), `mixture`, `confidence`, `fits` (the probability that any of them does) and
    `abstained`. Example: `echo '{"prompt": "Convert 3 km to metres."}' | dlp-lora route --router router/`
    """
    from dlp_lora.engine.bundle import FILES, check_names, read_bundle
    from dlp_lora.engine.loading import load_model, load_router
    from dlp_lora.errors import BundleError
    from dlp_lora.files import local_folder
    from dlp_lora.policy import Switching, TopP, choose, policy_from_dict, with_p
    from dlp_lora.router import questions, router_type

    if (router is None) == (bundle is None):
        raise ValueError("give --router or --bundle, and not both")
    policy: Any = TopP()
    is_whole, unsure = False, Switching().unsure
    if bundle is not None:
        parts = read_bundle(local_folder(bundle, files=FILES, error=BundleError))
        if parts.router is None:
            raise ValueError(f"{bundle} has no router; train one with train-router")
        router, policy = parts.router, policy_from_dict(parts.policy)
        is_whole, unsure = parts.prompt_routing == "whole", Switching(**parts.switching).unsure
    policy = policy if p is None else with_p(policy, p)
    router = router or Path()
    base = None
    if router_type(router) == "arrow":
        base = load_model(base_model(model) if bundle is None else base_of(parts, model))[0]
    chooser = load_router(router, base=base)
    if bundle is not None:
        check_names(chooser.names, list(parts.adapters))

    def read(contexts: Sequence[Any]) -> list[dict[str, float]]:
        return [dict(zip(chooser.names, row, strict=True)) for row in chooser.probabilities(contexts).tolist()]

    for _, record in [(0, {"prompt": prompt})] if prompt is not None else read_json_lines():
        context = _context(record)
        row = read([context])[0] if is_whole else questions.route(read, context)
        probs, mixture = choose(policy, row, unsure)
        print_json(
            {
                "probs": probs,
                "mixture": dict(mixture),
                "confidence": max(probs.values()),
                "fits": sum(row.values()),
                "abstained": not mixture,
            }
        )


def _context(record: dict[str, Any]) -> Any:
    from dlp_lora.router import Context
    from dlp_lora.sentences import split

    messages = list(record.get("messages", ()))
    begun = messages.pop()["content"] if len(messages) > 1 and messages[-1].get("role") == "assistant" else ""
    turns = [message["content"] for message in messages] or [record["prompt"]]
    given = {"history": record.get("history", ""), "answer": record.get("answer", begun)}
    for text in (*given.values(), *turns):
        if not isinstance(text, str):
            raise ValueError(f"prompt, messages, history and answer must be strings, got {text!r}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"prompt, messages, history and answer must be Unicode, got half a character in {text!r}")
    history = "\n".join(filter(None, [given["history"], *turns[:-1]]))
    # Read as while a model writes: the sentence that was begun last, after those before it.
    sentences = split(given["answer"]) or [""]
    return Context(turns[-1], "".join(sentences[:-1]), sentences[-1], history)


def routing_table(trace: tuple["Sentence", ...], *, of: str = "sentence") -> Table:
    """A table of sentences with the adapters they used."""
    table = Table(show_lines=False, pad_edge=False)
    table.add_column(of, overflow="fold")
    table.add_column("adapters", style="cyan")
    table.add_column("route + fuse", justify="right", style="dim")
    for sentence in trace:
        used = ", ".join(f"{name} {weight:.0%}" for name, weight in sentence.mixture.items()) or "base model"
        if sentence.abstained:
            used += " (none fits)"
        cost = f"{sentence.route_ms + sentence.fuse_ms:.1f} ms"
        table.add_row(escape(sentence.text.strip()), escape(used), cost)
    return table


def parse_mixture(text: str) -> dict[str, float]:
    """Reads "math=0.6,units=0.4"; a name alone has weight 1, and nothing at all is the base model."""
    mixture: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = part.partition("=")
        if name.strip() in mixture:
            raise ValueError(f"{name.strip()!r} stands in the mixture twice; give each adapter one weight")
        try:
            mixture[name.strip()] = float(weight or 1)
        except ValueError as error:
            raise ValueError(f'{part!r} is not NAME=WEIGHT; write for example "math=0.6,units=0.4"') from error
    return mixture


def _ask() -> str:
    try:
        if sys.stdin.isatty():
            return console.input("[bold]> [/]").strip()
        return sys.stdin.readline().strip()
    except EOFError:
        stderr.print()
        return ""
