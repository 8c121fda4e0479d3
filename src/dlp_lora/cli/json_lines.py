"""JSON lines: questions from standard input, answers to standard output."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from dlp_lora.files import parse_json


def questions(prompt: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Gives the prompt of the command line as line 0, or without one the JSON objects of standard input, one a line.

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
        yield number, record


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
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
