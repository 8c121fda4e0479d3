"""The record of a run as dataclasses: results and environment; only this module reads and writes its JSON.

What was not measured is null or empty, or not there; what is there must be well formed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin

from dlp_lora.errors import RecordError
from dlp_lora.files import write_json

FORMAT = 1
RECORD_FILE = "record.json"

ByTask = Mapping[str, Mapping[str, float]]
"""Scores by task, then metric."""


class Interval(NamedTuple):
    """A 95 % interval, as of a bootstrap."""

    low: float
    high: float

    def rounded(self) -> "Interval":
        """The interval as records have it."""
        return Interval(round(self.low, 5), round(self.high, 5))


IntervalsByTask = Mapping[str, Mapping[str, Interval]]


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """The facts about a task; chance and majority are the accuracies of answers without a model."""

    kind: str | None = None
    paper_name: str | None = None
    num_train: float | None = None
    num_test: float | None = None
    chance: float | None = None
    majority: float | None = None
    stand_in: str | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """The tasks, and a hash of their examples."""

    hash: str | None = None
    tasks: Mapping[str, TaskRecord] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric of one method less another's, on the same questions."""

    value: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Scores of methods with intervals, by task and pooled, and the differences of pairs of methods."""

    scores: Mapping[str, ByTask] = field(default_factory=dict)
    intervals: Mapping[str, IntervalsByTask] = field(default_factory=dict)
    composites: Mapping[str, ByTask] = field(default_factory=dict)  # by pool, then method
    composite_intervals: Mapping[str, IntervalsByTask] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Mapping[str, Difference]]] = field(default_factory=dict)  # by pair, pool


@dataclass(frozen=True, kw_only=True)
class TeacherForced:
    """The scores of teacher-forced answers, with names that say so."""

    teacher_forced: Mapping[str, ByTask] = field(default_factory=dict)
    teacher_forced_intervals: Mapping[str, IntervalsByTask] = field(default_factory=dict)
    teacher_forced_composites: Mapping[str, ByTask] = field(default_factory=dict)
    teacher_forced_composite_intervals: Mapping[str, IntervalsByTask] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answered(Compared, TeacherForced):
    """The scores of answers, the numbers of cut ones and of those without choices, and the seconds."""

    cut_short: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by method, then task
    without_choices: Mapping[str, float] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Serial:
    """Prompts of several questions: shares that are right, right after the first one, and routed to their task.

    `difference` is that of `accuracy` from the accuracy of `alone`: each question asked by itself. `cut` is the share
    of prompts that were answered apart, `seconds` is the time a question took.
    """

    accuracy: float | None = None
    interval: Interval | None = None
    accuracy_later: float | None = None
    interval_later: Interval | None = None
    difference: Difference | None = None
    routed: float | None = None
    num_questions: float | None = None
    seconds: float | None = None
    cut: float | None = None


@dataclass(frozen=True, kw_only=True)
class RouterRecord:
    """A router's accuracy and cost; `confusion` counts test prompts by task, then by its first choice."""

    accuracy: float | None = None
    ece: float | None = None
    num_parameters: float | None = None
    seconds: float | None = None
    temperature: float | None = None
    confusion: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The time and settings of an adapter's training."""

    seconds: float | None = None
    final_loss: float | None = None
    num_examples: float | None = None
    num_left_out: float | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """The adapters that were trained, one a task and one for all."""

    adapters: Mapping[str, Trained] = field(default_factory=dict)
    single: Trained | None = field(default=None, metadata={"json": "lora-r64"})


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """A sentence of an answer, with its mixture and probabilities."""

    text: str = ""
    start: float | None = None
    end: float | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    mixture: Mapping[str, float] = field(default_factory=dict)
    switched: bool = False
    abstained: bool = False
    route_ms: float | None = None
    fuse_ms: float | None = None
    encode_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A prompt of several tasks and its answer, sentence by sentence."""

    prompt: str = ""
    text: str = ""
    trace: tuple[Spoken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Larger:
    """The scores of a larger model without adapters."""

    model: str | None = None
    seconds: float | None = None
    left_out: Mapping[str, float] | None = None
    scores: ByTask = field(default_factory=dict)
    pooled_intervals: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunRecord(Answered):
    """The results of a run of `reproduce`, or of an evaluation of a bundle, with the environment."""

    format: int = FORMAT
    name: str | None = None
    bundle: str | None = None
    model: str | None = None
    model_hash: str | None = None
    dtype: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)  # their hashes, by name
    router_hash: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    environments: tuple[Mapping[str, Any], ...] = ()
    peak_memory_mb: float | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    data: Data = Data()
    left_out: Mapping[str, float] | None = None
    serial: Mapping[str, Mapping[str, Serial]] = field(default_factory=dict)  # by length, then method
    serial_left_out: Mapping[str, float] = field(default_factory=dict)
    serial_skipped: Mapping[str, float] = field(default_factory=dict)
    router: RouterRecord | None = None
    training: Training = Training()
    conversation: Conversation | None = None
    by_seed: Mapping[str, Mapping[str, ByTask]] = field(default_factory=dict)
    larger: Larger | None = None
    outputs: str | None = None


def read_run(path: str | Path) -> RunRecord:
    """Reads a record: a JSON file, or a folder that holds record.json.

    Raises:
        RecordError: if it is missing, damaged or of a later format.
    """
    file = Path(path) / RECORD_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise RecordError(f"no record {file}; expected the JSON that `dlp-lora reproduce` writes; check the path")
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{file} is not JSON in UTF-8 ({error}); expected a whole record; make it again") from error
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise RecordError(f"{file} is no record: expected a JSON object with a 'format'; check the path")
    if data["format"] != FORMAT:
        raise RecordError(f"{file} has record format {data['format']}; this version reads {FORMAT}; upgrade dlp-lora")
    try:
        record: RunRecord = from_json(RunRecord, data)
    except ValueError as error:
        raise RecordError(f"{file}: {error}; make the record again") from error
    return record


def write_run(file: Path, record: RunRecord) -> None:
    """Writes a record, whole or not at all."""
    write_json(file, to_json(record))


def to_json(record: Any) -> Any:
    """A dataclass of a record as JSON data."""
    if is_dataclass(record):
        return {_key(f): to_json(getattr(record, f.name)) for f in fields(record)}
    if isinstance(record, Mapping):
        return {key: to_json(value) for key, value in record.items()}
    return [to_json(value) for value in record] if isinstance(record, list | tuple) else record


def from_json(kind: Any, data: Any, place: str = "") -> Any:
    """Makes a value of such a type of JSON data; keys that mean nothing to it are passed over.

    Raises:
        ValueError: naming the place, if the data are not well formed.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if isinstance(kind, UnionType):
        (kind,) = (part for part in parts if part is not NoneType)
        return from_json(kind, data, place)
    if kind is Any:
        return data
    if kind is Interval:
        is_pair = isinstance(data, list) and len(data) == 2 and all(map(_is_number, data))
        _check(is_pair and data[0] <= data[1], place, data, "a list [low, high]")
        return Interval(*data)
    if origin is tuple:
        _check(isinstance(data, list), place, data, "a list")
        return tuple(from_json(parts[0], value, f"{place}[{i}]") for i, value in enumerate(data))
    if is_dataclass(kind) or origin is Mapping:
        _check(isinstance(data, dict), place, data, "an object")
        there = {key: value for key, value in data.items() if value is not None or Any in parts}
        if origin is Mapping:
            return {key: from_json(parts[1], value, f"{place}.{key}".lstrip(".")) for key, value in there.items()}
        known = [f for f in fields(kind) if _key(f) in there]
        return kind(**{f.name: from_json(f.type, there[_key(f)], f"{place}.{_key(f)}".lstrip(".")) for f in known})
    if kind in (int, float):
        _check(_is_number(data), place, data, "a finite number")
    else:
        _check(isinstance(data, kind), place, data, {str: "a string", bool: "true or false"}[kind])
    return data


def _key(field: Field[Any]) -> str:
    return str(field.metadata.get("json", field.name))


def _is_number(data: Any) -> bool:
    return isinstance(data, int | float) and not isinstance(data, bool) and math.isfinite(data)


def _check(is_right: bool, place: str, data: Any, expected: str) -> None:
    if not is_right:
        shown = json.dumps(data)
        raise ValueError(f"{place} is {shown if len(shown) <= 40 else shown[:40] + '...'}; expected {expected}")
