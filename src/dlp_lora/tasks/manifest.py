"""The manifest of a data directory: facts about its tasks in `manifest.json`, and the kind of each task."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dlp_lora.errors import TaskError
from dlp_lora.files import parse_json
from dlp_lora.tasks.catalog import CATALOG, Kind
from dlp_lora.tasks.task import Task

MANIFEST_FILE = "manifest.json"
MAX_SHORT_ANSWER = 60
"""The largest number of characters of a free answer that is scored by equality."""


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """The manifest's facts about one task, all optional."""

    paper_name: str | None = None
    kind: Kind | None = None
    chance: float | None = None
    """Accuracy on the test examples of picking an option at random."""
    majority: float | None = None
    """Accuracy on the test examples of always giving the most common training answer."""
    stand_in: str | None = None
    """The name of the data that replaces the paper's."""


def read_manifest(data: str | Path) -> dict[str, TaskInfo]:
    """Reads the manifest of a data directory, by task; empty if there is no manifest.

    Unknown keys are ignored, here and in each task's entry.

    Raises:
        TaskError: if the manifest differs from the format in docs/data-format.md.
    """
    file = Path(data) / MANIFEST_FILE
    if not file.is_file():
        return {}
    try:
        manifest = parse_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise TaskError(f"{file} cannot be read ({error.strerror}); check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{file}: not JSON ({error}); expected one object; correct or remove it") from error
    tasks = manifest.get("tasks") if isinstance(manifest, dict) else None
    if not isinstance(tasks, dict):
        raise TaskError(f'{file} has no "tasks"; expected {{"tasks": {{name: {{"kind": ...}}}}}}; add or remove it')
    return {name: _info(file, name, entry) for name, entry in tasks.items()}


def kind_of(task: Task, manifest: Mapping[str, TaskInfo] | None = None) -> Kind:
    """Whether a task is scored by accuracy ("mcq") or by BLEU and ROUGE ("qa").

    The manifest decides, then the catalog. For other tasks: "mcq" if every example has choices, or every answer
    is one line of at most `MAX_SHORT_ANSWER` characters.
    """
    info = (manifest or {}).get(task.name)
    if info is not None and info.kind is not None:
        return info.kind
    if task.name in CATALOG:
        return CATALOG[task.name].kind
    examples = (*task.train, *task.test)
    has_choices = all(example.choices for example in examples)
    is_short = all(len(e.answer) <= MAX_SHORT_ANSWER and "\n" not in e.answer.strip() for e in examples)
    return "mcq" if has_choices or is_short else "qa"


def _info(file: Path, name: str, entry: object) -> TaskInfo:
    if not isinstance(entry, dict):
        raise TaskError(f'{file}: the entry of {name!r} is {entry!r}; expected an object such as {{"kind": "qa"}}')
    kind = entry.get("kind")
    if kind is not None and kind not in get_args(Kind):
        raise TaskError(f"{file}: the kind of {name!r} is {kind!r}; expected 'mcq' or 'qa'; correct or remove it")
    return TaskInfo(
        paper_name=_text(file, name, entry, "paper_name"),
        stand_in=_text(file, name, entry, "stand_in"),
        kind=kind,
        chance=_share(file, name, entry, "random_guess_accuracy_test"),
        majority=_share(file, name, entry, "majority_answer_accuracy_test"),
    )


def _text(file: Path, name: str, entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise TaskError(f"{file}: the {key} of {name!r} is {value!r}; expected a string; put it in quotes")
    return value


def _share(file: Path, name: str, entry: Mapping[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise TaskError(f"{file}: the {key} of {name!r} is {value!r}; expected a number from 0 to 1")
    return float(value)
