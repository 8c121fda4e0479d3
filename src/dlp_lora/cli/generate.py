"""Commands that answer: generate, chat."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dlp_lora.chat import Chat, Message
from dlp_lora.cli.answerer import Answerer, AnswererOptions, open_answerer
from dlp_lora.cli.common import EngineOptions, HubOptions, JsonOption, TemplateOption, console, say, say_error, stderr
from dlp_lora.cli.json_lines import print_json, prompt_of, questions
from dlp_lora.cli.options import json_object, with_options
from dlp_lora.cli.tables import show_table
from dlp_lora.errors import DLPLoRAError, PromptError
from dlp_lora.lab.records.table import Table, table_of
from dlp_lora.policy import mixture_of

if TYPE_CHECKING:
    from dlp_lora import Sentence, Stream
    from dlp_lora.serve.answerer import AnswerStream

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta", "bright_green")


@with_options
def generate(
    engine_options: EngineOptions,
    hub_options: HubOptions,
    answerer_options: AnswererOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; without it, JSON lines are read from stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt in the chat template.")] = False,
    chat_template_kwargs: TemplateOption = None,
    fixed: Annotated[
        str | None, typer.Option(help='Use this mixture instead of the router: "math=0.6,units=0.4".')
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed instead of greedily.")] = None,
    show_routing: Annotated[bool, typer.Option(help="Show which sentence used which adapters.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt; adapters are chosen at every sentence.

    Examples: `dlp-lora generate --bundle demo/bundle "Convert 3 kilometres to metres." --show-routing`, or
    `dlp-lora generate --bundle demo/bundle < prompts.jsonl > answers.jsonl` with lines `{"prompt": "..."}` or
    `{"messages": [{"role": "user", "content": "..."}]}`, with `tools`, `chat_template_kwargs` and
    `continue_final_message` beside messages.
    """
    template = json_object("chat-template-kwargs", chat_template_kwargs)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": seed is not None, "seed": seed}
    if fixed is not None:
        options["mixture"] = mixture_of(fixed)
    with open_answerer(engine_options, hub_options, answerer_options, need_router=fixed is None) as answerer:
        for number, record in questions(prompt):
            try:
                answer = answerer.generate(prompt_of(record, template, is_chat=chat), **options)
            except PromptError as error:
                raise PromptError(f"standard input, line {number}: {error}" if number else str(error)) from error
            if as_json or prompt is None:
                print_json({**record, **answer.to_dict()})
                continue
            if show_routing:
                if answer.prompt_trace:
                    show_table(routing_table(answer.prompt_trace, of="prompt's sentence"))
                show_table(routing_table(answer.trace))
            else:
                typer.echo(answer.text.strip())  # not the console, which turns tabs into spaces


@with_options
def chat(
    engine_options: EngineOptions,
    hub_options: HubOptions,
    answerer_options: AnswererOptions,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template and no memory: each line is a prompt.")] = False,
    chat_template_kwargs: TemplateOption = None,
) -> None:
    """Chat in the terminal; the answer's colour is its heaviest adapter.

    Ctrl-C stops an answer; an empty line or Ctrl-D ends the chat. If the model's context is full, the oldest
    messages are left out.

    Example: `dlp-lora chat --bundle demo/bundle`
    """
    template = json_object("chat-template-kwargs", chat_template_kwargs)
    if raw and template:
        raise ValueError("--raw uses no chat template; leave --chat-template-kwargs out")
    with open_answerer(engine_options, hub_options, answerer_options) as answerer:
        names = answerer.names
        colours = dict(zip(names, COLOURS * len(names), strict=False))
        console.print(Text.assemble(*((f"■ {name}  ", colour) for name, colour in colours.items()), "■ base model"))
        messages: list[Message] = []
        while line := _ask():
            question: Message = {"role": "user", "content": line}
            try:
                if raw:
                    say_answer(answerer.stream(line, max_new_tokens=max_new_tokens), colours)
                    continue
                turn = Chat(messages=[*messages, question], chat_template_kwargs=template)
                turn, room = _fitting(answerer, turn, max_new_tokens)
                text = say_answer(answerer.stream(turn, max_new_tokens=room), colours)
            except (DLPLoRAError, ValueError, RuntimeError) as error:  # of this answer; the next may go well
                say_error(str(error))
                continue
            if text:
                messages = [*turn.messages, {"role": "assistant", "content": text}]


def say_answer(stream: "Stream | AnswerStream", colours: Mapping[str, str]) -> str:
    """Prints an answer while it is generated; Ctrl-C stops it. Returns the printed text."""
    text = ""
    with stream:
        try:
            for piece in stream:
                text += piece
                colour = colours.get(next(iter(piece.mixture), ""), "default")
                console.print(piece, style=colour, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            stream.close()
            console.print(" [dim](stopped)[/]", end="")
        finally:
            console.print()
    return text


def _fitting(answerer: Answerer, chat: Chat, max_new_tokens: int) -> tuple[Chat, int]:
    """Drops the oldest turns until an answer has room in the model's context, half of it at most, and says so; returns
    the room.
    """
    from dlp_lora.engine.prompts import encode_prompt, fitting

    context = answerer.max_context
    fitted = fitting(answerer.tokenizer, chat, max_tokens=context - min(max_new_tokens, context // 2))
    if dropped := len(chat.messages) - len(fitted.messages):
        say(f"the model's context of {context} tokens is full: the {dropped} oldest messages are left out")
    # A long question gets a short answer rather than none.
    num_left = context - len(encode_prompt(answerer.tokenizer, fitted).tokens)
    if num_left < 1:
        raise PromptError(f"the question alone fills the model's context of {context} tokens; ask a shorter one")
    return fitted, min(max_new_tokens, num_left)


def routing_table(trace: tuple["Sentence", ...], *, of: str = "sentence") -> Table:
    """A table of sentences with their adapters."""
    rows = []
    for sentence in trace:
        used = ", ".join(f"{name} {weight:.0%}" for name, weight in sentence.mixture.items()) or "base model"
        if sentence.abstained:
            used += " (none fits)"
        cost = f"{sentence.route_ms + sentence.fuse_ms + sentence.encode_ms:.1f} ms"
        rows.append((sentence.text.strip(), used, cost))
    return table_of("", (of, "adapters", "route + fuse + encode"), rows, num_labels=2)


def _ask() -> str:
    try:
        if sys.stdin.isatty():
            return console.input("[bold]> [/]").strip()
        return sys.stdin.readline().strip()
    except EOFError:
        stderr.print()
        return ""
