"""Rows that are kept on disk as they come: batches of questions in, one JSON line a question out.

The first line is the rows' identity, all that they depend on: what was kept under another is never taken for them.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlp_lora.errors import RecordError

Row = dict[str, Any]


def keep_rows(
    file: Path,
    identity: Mapping[str, Any],
    batches: Sequence[Sequence[Any]],
    compute: Callable[[Sequence[Any]], list[Row]],
    *,
    replace: bool = False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Computes the batches into `file`, or goes on with it; gives all rows, in the batches' order.

    Raises:
        RecordError: if the file was begun under another identity, unless it may be replaced.
    """
    rows = _resume(file, json.loads(json.dumps(identity)), batches, replace=replace)
    num_done = len(rows)
    done = 0
    for batch in batches:
        done += len(batch)
        if done <= num_done:
            continue
        on_batch(done - len(batch), sum(map(len, batches)))
        found = compute(batch)
        with file.open("a", encoding="utf-8") as lines:
            lines.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
        rows += found
    on_batch(done, done)
    return rows


def read_rows(file: Path) -> list[Row]:
    """Reads the rows that a file holds, a torn last line left out."""
    return [row for row in _lines(file) if "identity" not in row] if file.is_file() else []


def write_outputs(file: Path, rows: Iterable[Row]) -> None:
    """Writes rows into a compressed file, all or nothing."""
    aside = file.with_name(f".{file.name}.partial")
    with gzip.open(aside, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    aside.replace(file)


def differences(before: Any, now: Any, key: str = "") -> str:
    """Says in which settings two records of them differ.

    A `model_hash` or `dtype` that was not recorded before, as by earlier versions, is no difference.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [k for k in {**before, **now} if k in before or k not in ("model_hash", "dtype")]
        found = (differences(before.get(k), now.get(k), f"{key}.{k}".lstrip(".")) for k in keys)
        return "; ".join(filter(None, found))
    return "" if before == now else f"{key} was {before!r} and is {now!r}"


def _resume(file: Path, identity: Row, batches: Sequence[Sequence[Any]], *, replace: bool) -> list[Row]:
    """Reads whole batches of an earlier run and cuts off what follows them."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
    lines = list(_lines(file)) if file.is_file() else []
    before = (lines[0].get("identity") or {}) if lines else identity
    changed = differences(before, identity)
    if changed and not replace:
        raise RecordError(f"{file} holds answers under other settings: {changed}; remove it, or write somewhere else")
    rows = [] if changed else lines[1:]
    whole = 0
    for batch in batches:
        if whole + len(batch) > len(rows):
            break
        whole += len(batch)
    rows = rows[:whole]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [{"identity": identity}, *rows])
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
    return rows


def _lines(file: Path) -> Iterator[Row]:
    for line in file.read_bytes().split(b"\n")[:-1]:  # what follows the last was cut short by a kill
        try:
            yield json.loads(line)
        except ValueError:
            return
