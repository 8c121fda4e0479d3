"""JSON lines: questions from standard input, answers to standard output."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from dlp_lora.chat import Chat, text_of
from dlp_lora.errors import PromptError
from dlp_lora.files import parse_json

OPTIONS = {"tools": list, "chat_template_kwargs": dict, "continue_final_message": bool}
"""The keys that a line may have beside messages."""


def questions(prompt: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Returns the prompt of the command line as line 0, or the JSON objects of standard input, one per line.

    Raises:
        ValueError: naming the line, if it is no question.
    """
    if prompt is not None:
        yield 0, {"prompt": prompt}
        return
    for number, line in enumerate(sys.stdin, start=1):
        if number == 1:
            line = line.removeprefix("\ufeff")  # a file that Windows saved
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f'standard input, line {number}: not JSON ({error}); expected {{"prompt": ...}}'
            ) from error
        except ValueError as error:
            raise ValueError(f"standard input, line {number}: {error}") from error
        if not isinstance(record, dict) or not _is_question(record):
            raise ValueError(
                f'standard input, line {number}: expected {{"prompt": "..."}} or {{"messages": [...]}}, '
                f"got {line.strip()[:60]}"
            )
        try:
            for message in record.get("messages", ()):
                text_of(message)
        except PromptError as error:
            raise ValueError(f"standard input, line {number}: {error}") from error
        yield number, record


def prompt_of(record: dict[str, Any], template_kwargs: dict[str, Any], *, is_chat: bool) -> str | Chat:
    """Returns the prompt of a line of JSON with its arguments of the chat template, which win over the options.

    Raises:
        PromptError: if an option is of another kind, or there is one and no chat.
    """
    options = {name: record[name] for name in OPTIONS if record.get(name) is not None}
    for name, value in options.items():
        if not isinstance(value, OPTIONS[name]):
            kind = {list: "a list", dict: "an object", bool: "true or false"}[OPTIONS[name]]
            raise PromptError(f"{name} must be {kind}, got {str(value)[:60]!r}")
    options["chat_template_kwargs"] = {**template_kwargs, **options.get("chat_template_kwargs", {})}
    if "messages" in record:
        return Chat(messages=record["messages"], **options)
    if is_chat:
        return Chat(messages=[{"role": "user", "content": record["prompt"]}], **options)
    if set_options := [name for name, value in options.items() if value]:
        raise PromptError(f"{', '.join(set_options)}: only chats have them; give messages, or --chat")
    return str(record["prompt"])


def print_json(data: Any) -> None:
    """Prints one line of JSON."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _is_question(record: dict[str, Any]) -> bool:
    if not isinstance(record.get("answer", ""), str):
        return False
    if "messages" not in record:
        return isinstance(record.get("prompt"), str)
    messages = record["messages"]
    are_turns = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    )
    return are_turns and bool(messages)
