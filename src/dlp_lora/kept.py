"""Files from which a stopped run continues: JSON files, and rows of results, one JSON line per question.

The first line of a file of rows is its identity: all settings that the rows depend on. Rows with another identity are
never used.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlp_lora.errors import RecordError
from dlp_lora.files import as_json, json_line, write_json, write_lines
from dlp_lora.progress import OnProgress, Progress, unseen

NOT_RECORDED = ("model_hash", "dtype", "cpu_tricks")  # by earlier versions

Row = dict[str, Any]


def read_kept(file: Path, *keys: str) -> dict[str, Any]:
    """Reads the JSON object that an earlier run wrote to a file; an empty one if there is no such file.

    Raises:
        RecordError: naming the file, if it is damaged or lacks one of the `keys`.
    """
    if not file.is_file():
        return {}
    (data,) = _objects(file, [read_json(file)], keys)
    return data


def read_kept_list(file: Path, *keys: str) -> list[dict[str, Any]]:
    """As `read_kept`, for a list of such objects; an empty list if there is no such file."""
    if not file.is_file():
        return []
    data = read_json(file)
    return _objects(file, data if isinstance(data, list) else [data], keys)


class Kept:
    """Values by name in a JSON file, with their identity (all settings they depend on); another identity starts empty.

    Raises:
        RecordError: naming the file, if it is damaged.
    """

    def __init__(self, file: Path, identity: Any) -> None:
        self.file, self.identity = file, as_json(identity)
        before = read_kept(file)
        is_same = not differences(before.pop("identity", None), self.identity)
        self.values: dict[str, Any] = before if is_same else {}

    def put(self, **values: Any) -> None:
        """Adds values, or replaces those of the same names, and writes the file."""
        self.values |= values
        write_json(self.file, {"identity": self.identity, **self.values})


def read_json(file: Path) -> Any:
    """Reads JSON that an earlier run wrote.

    Raises:
        RecordError: naming the file, if it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{file} is damaged ({error}); remove it, and it is made again") from error


def _objects(file: Path, objects: list[Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    for one in objects:
        if not isinstance(one, dict):
            raise RecordError(f"{file} is damaged (expected a JSON object); remove it, and it is made again")
        if missing := [key for key in keys if key not in one]:
            raise RecordError(f"{file} is damaged (it has no {', '.join(missing)}); remove it, and it is made again")
    return objects


def keep_rows(
    file: Path,
    identity: Mapping[str, Any],
    batches: Sequence[Sequence[Any]],
    compute: Callable[[Sequence[Any]], list[Row]],
    *,
    replace: bool = False,
    on_progress: OnProgress = unseen,
) -> list[Row]:
    """Computes the batches that `file` lacks and writes them there; returns all rows, in the batches' order.

    Raises:
        RecordError: if the file was begun under another identity, unless it may be replaced, or a line is damaged.
    """
    rows = _resume(file, as_json(identity), batches, replace=replace)
    num_done = len(rows)
    done = 0
    for batch in batches:
        done += len(batch)
        if done <= num_done:
            continue
        on_progress(Progress(file.stem, done - len(batch), sum(map(len, batches))))
        new = compute(batch)
        with file.open("ab") as lines:
            lines.write(b"".join(map(json_line, new)))
        rows += new
    on_progress(Progress(file.stem, done, done))
    return rows


def read_rows(file: Path) -> list[Row]:
    """Reads the rows of a file, without a last line that was cut off.

    Raises:
        RecordError: naming the line, if another one is damaged.
    """
    return [row for row in _lines(file) if "identity" not in row] if file.is_file() else []


def differences(before: Any, now: Any, key: str = "") -> str:
    """Lists the settings in which two records differ.

    Settings that earlier versions did not record are no difference.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [k for k in {**before, **now} if k in before or k not in NOT_RECORDED]
        parts = (differences(before.get(k), now.get(k), f"{key}.{k}".lstrip(".")) for k in keys)
        return "; ".join(filter(None, parts))
    return "" if before == now else f"{key} was {before!r} and is {now!r}"


def _resume(file: Path, identity: Row, batches: Sequence[Sequence[Any]], *, replace: bool) -> list[Row]:
    """Reads whole batches of an earlier run and cuts off an incomplete last one."""
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
    write_lines(file, [{"identity": identity}, *rows])
    return rows


def _lines(file: Path) -> Iterator[Row]:
    # A kill may have cut the last line short.
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{file}:{number} is damaged ({error}); remove the line and those after it") from error
        if not isinstance(row, dict):
            raise RecordError(f"{file}:{number} is damaged (expected a JSON object); remove it and those after it")
        yield row
