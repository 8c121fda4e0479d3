"""The settings of a run on disk: what a later call may add to them, and what it may not change."""

from collections.abc import Collection
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dlp_lora.errors import RecordError
from dlp_lora.files import as_json, write_json
from dlp_lora.kept import differences, read_kept
from dlp_lora.lab.evals.answers import data_hash
from dlp_lora.lab.records.run import FORMAT
from dlp_lora.lab.reproduce.args import ReproduceArgs
from dlp_lora.tasks import Task

GROWING = ("methods", "seeds", "serial")


def settings_of(model: str | Path, tasks: list[Task], args: ReproduceArgs) -> dict[str, Any]:
    """The settings as JSON data."""
    return {
        "format": FORMAT,
        "model": Path(str(model)).name,
        "data": data_hash(tasks),
        "args": as_json(asdict(args)),
    }


def grown(out: Path, args: ReproduceArgs, *, given: Collection[str] = GROWING) -> ReproduceArgs:
    """The arguments with the methods, seeds and lengths of serial prompts that the run in `out` already has.

    Those that are not `given` are the run's own, if there is one: a default adds nothing to it.
    """
    before = _kept(out).get("args", {})

    def united(key: str) -> tuple[Any, ...]:
        asked = getattr(args, key) if key in given or key not in before else ()
        return tuple(dict.fromkeys((*before.get(key, ()), *asked)))

    own: dict[str, Any] = {key: united(key) for key in GROWING}
    return replace(args, **own)


def added(out: Path, args: ReproduceArgs) -> str:
    """What these arguments add to the run in `out`; "" if there is none, or nothing."""
    before = _kept(out).get("args")
    new = {key: [x for x in getattr(args, key) if x not in (before or {}).get(key, ())] for key in GROWING}
    return ", ".join(f"{key} {' '.join(map(str, own))}" for key, own in new.items() if own) if before else ""


def check_settings(out: Path, settings: dict[str, Any], defaults: Any) -> None:
    """Checks that a run in `out` has the same settings, as far as they are given, but for what may grow.

    Args:
        defaults: the dataclass of `settings["args"]`; its values count where an earlier version had no such setting.

    Raises:
        RecordError: naming what is different.
    """
    before = {key: value for key, value in _kept(out).items() if key in settings}
    if not before:
        return
    if changed := differences(_fixed(before, defaults), _fixed(settings, defaults)):
        raise RecordError(f"{out} holds a run with other settings: {changed}; choose another --out")


def kept_dtype(out: Path) -> torch.dtype | None:
    """The dtype that the run in `out` was begun in: on another machine, another one might be faster."""
    name = _kept(out).get("dtype")
    return None if name is None else getattr(torch, name)


def keep_settings(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of the run in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", settings)


def _kept(out: Path) -> dict[str, Any]:
    return read_kept(out / "settings.json")


def _fixed(settings: dict[str, Any], defaults: Any) -> dict[str, Any]:
    args = _filled(settings["args"], defaults)
    return {**settings, "args": {key: value for key, value in args.items() if key not in GROWING}}


def _filled(args: dict[str, Any], defaults: Any) -> dict[str, Any]:
    found = {**as_json(asdict(defaults)), **args}
    for part in fields(defaults):
        if is_dataclass(value := getattr(defaults, part.name)) and isinstance(found[part.name], dict):
            found[part.name] = _filled(found[part.name], value)
    return found
