"""Training from a routing log: the lines that a person has corrected in, samples out."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from dlp_lora.errors import TrainingError
from dlp_lora.files import parse_json
from dlp_lora.router import Context
from dlp_lora.training.contexts import Sample

logger = logging.getLogger(__name__)


def read_routed(path: str | Path, names: Sequence[str]) -> list[Sample]:
    """Reads a log of `RoutingLog`: each text once, with the index in `names` of the adapter that its line names.

    Lines for the base model (`adapter` is null) are left out, because a router learns only adapters.

    Raises:
        TrainingError: naming the line, if it has no text or an unknown adapter, or if the same text has two adapters.
    """
    path = Path(path)
    adapters: dict[Context, tuple[str, int]] = {}
    num_base = 0
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        context, adapter = _routed(line, where=f"{path}:{number}")
        if adapter is None:
            num_base += 1
            continue
        if adapter not in names:
            raise TrainingError(f"{path}:{number}: there is no task {adapter!r}; there are {', '.join(names)}")
        before, first = adapters.setdefault(context, (adapter, number))
        if before != adapter:
            raise TrainingError(
                f"{path}:{number}: the same text has the adapter {adapter!r} here and {before!r} on line {first}; "
                "correct one of them"
            )
    if num_base:
        logger.warning("%s: left out %d lines without an adapter", path, num_base)
    if not adapters:
        raise TrainingError(f"{path} has no line with a text and an adapter; log with --log-text")
    return [Sample(context, names.index(adapter)) for context, (adapter, _) in adapters.items()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise TrainingError(f"{path} cannot be read: {reason}; expected the file of --log-routing") from error


def _routed(line: str, *, where: str) -> tuple[Context, str | None]:
    try:
        record = parse_json(line)
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise TrainingError(f"{where}: not JSON ({error}); expected a line of --log-routing") from error
    if not isinstance(record, dict) or "adapter" not in record:
        raise TrainingError(f'{where}: no "adapter"; expected a line of --log-routing')
    text, adapter = record.get("text"), record["adapter"]
    if adapter is not None and not isinstance(adapter, str):
        raise TrainingError(f'{where}: "adapter" is {adapter!r}; expected a name, or null for the base model')
    if text is None:
        raise TrainingError(f"{where}: the line has no text to learn from; log with --log-text")
    names = ("prompt", "answer", "sentence", "history")
    if not isinstance(text, dict) or not all(isinstance(text.get(name, ""), str) for name in names):
        raise TrainingError(f'{where}: "text" is {str(text)[:60]!r}; expected {", ".join(names)} as strings')
    return Context(**{name: text.get(name, "") for name in names}), adapter
