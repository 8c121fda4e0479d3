"""The record of a run: record.json in, look-ups in the units that are shown out.

Any method, task or metric may be missing from a record: a look-up then gives None. What is there must be well formed.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from dlp_lora.errors import RecordError
from dlp_lora.lab.evals.methods import main_first
from dlp_lora.lab.report.paper import SPELLINGS

FORMAT = 1
RECORD_FILE = "record.json"
METRICS = {
    "accuracy": "Accuracy",
    "accuracy_loglik": "Accuracy by likelihood",
    "bleu": "BLEU",
    "bleu_letters": "BLEU of letters",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
}
QA_METRICS = ("bleu", "rouge1", "rougeL")

_NUMBER, _PAIR, _TEXT, _EACH = "a finite number", "a list [low, high]", "a string", "*"
_BY_TASK = {_EACH: {_EACH: _NUMBER}}
_TRAINED = {"seconds": _NUMBER, "final_loss": _NUMBER, "num_examples": _NUMBER, "num_left_out": _NUMBER}
_SERIAL = {
    "accuracy": _NUMBER,
    "interval": _PAIR,
    "accuracy_later": _NUMBER,
    "interval_later": _PAIR,
    "routed": _NUMBER,
    "num_questions": _NUMBER,
}
# What is looked up, by place; null stands for "missing" everywhere, and other keys may be there.
_SHAPE: Mapping[str, Any] = {
    "name": _TEXT,
    "model": _TEXT,
    "dtype": _TEXT,
    "settings": {},
    "environment": {},
    "environments": [{}],
    "data": {
        "hash": _TEXT,
        "tasks": {
            _EACH: {"paper_name": _TEXT, "kind": _TEXT, "chance": _NUMBER, "majority": _NUMBER, "stand_in": _TEXT}
        },
    },
    "scores": {_EACH: _BY_TASK},
    "intervals": {_EACH: {_EACH: {_EACH: _PAIR}}},
    "composites": {_EACH: _BY_TASK},
    "composite_intervals": {_EACH: {_EACH: {_EACH: _PAIR}}},
    "differences": {_EACH: {_EACH: {_EACH: {"value": _NUMBER, "interval": _PAIR}}}},
    "teacher_forced": {_EACH: _BY_TASK},
    "teacher_forced_intervals": {_EACH: {_EACH: {_EACH: _PAIR}}},
    "teacher_forced_composites": {_EACH: _BY_TASK},
    "teacher_forced_composite_intervals": {_EACH: {_EACH: {_EACH: _PAIR}}},
    "serial": {_EACH: {_EACH: _SERIAL}},
    "router": {
        "accuracy": _NUMBER,
        "ece": _NUMBER,
        "num_parameters": _NUMBER,
        "seconds": _NUMBER,
        "confusion": _BY_TASK,
    },
    "training": {"adapters": {_EACH: _TRAINED}, "lora-r64": _TRAINED},
    "left_out": {_EACH: _NUMBER},
    "cut_short": {_EACH: {_EACH: _NUMBER}},
    "timings": {_EACH: _NUMBER},
    "peak_memory_mb": _NUMBER,
    "conversation": {
        "prompt": _TEXT,
        "text": _TEXT,
        "trace": [{"text": _TEXT, "probabilities": {_EACH: _NUMBER}, "mixture": {_EACH: _NUMBER}}],
    },
    "larger": {"model": _TEXT, "seconds": _NUMBER, "scores": _BY_TASK, "pooled_intervals": {_EACH: _PAIR}},
    "seeds": [_NUMBER],
    "by_seed": {_EACH: {_EACH: _BY_TASK}},
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number in points of 100, and the interval that it lies in."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class RecordedTask:
    """A task of the record; chance and majority are the accuracies, in points, of answering without a model."""

    name: str
    kind: str
    paper_name: str | None = None
    chance: float | None = None
    majority: float | None = None

    @property
    def label(self) -> str:
        """The short name that the paper uses, where the task is one of its own."""
        return self.paper_name or self.name


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run found, and on what."""

    path: Path
    data: Mapping[str, Any]

    def at(self, *keys: str) -> Any:
        """What stands under a path of keys, or None."""
        found: Any = self.data
        for key in keys:
            found = (found or {}).get(key)
        return found

    @property
    def name(self) -> str:
        """The run's name."""
        return self.at("name") or self.path.parent.name

    @property
    def model(self) -> str:
        """The base model's name."""
        return self.at("model") or "an unnamed model"

    @cached_property
    def tasks(self) -> tuple[RecordedTask, ...]:
        """All tasks that are described or scored."""
        described: dict[str, Any] = self.at("data", "tasks") or {}
        scored: dict[str, set[str]] = {}
        for by_task in (self.at("scores") or {}).values():
            for task, by_metric in (by_task or {}).items():
                if by_metric:
                    scored.setdefault(task, set()).update(by_metric)
        return tuple(
            _recorded_task(name, described.get(name) or {}, scored.get(name, set()))
            for name in dict.fromkeys([*described, *scored])
        )

    def tasks_of(self, kind: str) -> tuple[RecordedTask, ...]:
        """The tasks of a kind: "mcq" or "qa"."""
        return tuple(task for task in self.tasks if task.kind == kind)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that have scores: the main ones first, the others as recorded."""
        return main_first(self.at("scores") or ())

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the run."""
        return tuple(int(seed) for seed in self.at("seeds") or ())

    def scored(self, tasks: Iterable[RecordedTask]) -> tuple[RecordedTask, ...]:
        """Those of the tasks that some method has a score on: one without test questions has none."""
        by_method = [by_task or {} for by_task in (self.at("scores") or {}).values()]
        return tuple(task for task in tasks if any(by_task.get(task.name) for by_task in by_method))

    def measure(self, method: str, task: str, metric: str) -> Measure | None:
        """A method's score on a task, in its bootstrap interval, widened to the extremes of the seeds."""
        value = self.at("scores", method, task, metric)
        if value is None:
            return None
        seeds = self.seed_means(method, [task], metric)
        return _measure(value, _hull(self.at("intervals", method, task, metric), _extremes(seeds)), metric)

    def teacher_forced(self, method: str, task: str, metric: str) -> Measure | None:
        """A method's teacher-forced score on a task, in its bootstrap interval."""
        value = self.at("teacher_forced", method, task, metric)
        if value is None:
            return None
        return _measure(value, self.at("teacher_forced_intervals", method, task, metric), metric)

    def mean(self, method: str, tasks: Iterable[str], metric: str) -> Measure | None:
        """A method's mean score over tasks; None unless it has one on each of them."""
        names = tuple(tasks)
        found = [self.measure(method, task, metric) for task in names]
        measures = [measure for measure in found if measure is not None]
        if not measures or len(measures) < len(found):
            return None
        value = fmean(measure.value for measure in measures)
        # Where it is a composite's score, it has that composite's interval.
        for name in self.at("composites") or ():
            composite = self.composite(name, method, metric) if size_of(name) == len(names) else None
            if composite and composite.interval and math.isclose(composite.value, value, abs_tol=0.01):
                return composite
        if self.at("intervals", method):
            return mean(measures)
        spread = _extremes(self.seed_means(method, names, metric))
        return Measure(value=value, interval=_pair(spread, points(metric)) if spread else None)

    def composite(self, composite: str, method: str, metric: str) -> Measure | None:
        """A method's score on the pooled examples of several tasks."""
        value = self.at("composites", composite, method, metric)
        if value is None:
            return None
        return _measure(value, self.at("composite_intervals", composite, method, metric), metric)

    def difference(self, pair: str, composite: str, metric: str) -> Measure | None:
        """A paired difference, such as "dlp - oracle"."""
        found = self.at("differences", pair, composite, metric) or {}
        if found.get("value") is None:
            return None
        return _measure(found["value"], found.get("interval"), metric)

    def seed_means(self, method: str, tasks: Sequence[str], metric: str) -> list[float | None]:
        """A method's mean score over tasks, as recorded, for each seed."""
        by_seed = [
            [self.at("by_seed", seed, method, task, metric) for task in tasks] for seed in self.at("by_seed") or ()
        ]
        return [fmean(values) if values and None not in values else None for values in by_seed]


def read_record(path: str | Path) -> Record:
    """Reads a record: a JSON file, or a folder that holds record.json.

    Raises:
        RecordError: if it is missing, damaged or of a later format.
    """
    path = Path(path)
    file = path / RECORD_FILE if path.is_dir() else path
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
    _check(data, _SHAPE, place="", file=file)
    return Record(path=file, data=data)


def mean(measures: Sequence[Measure]) -> Measure:
    """The mean of independent measures.

    Its interval follows from theirs: distances from the means add up as squares (MOVER, Zou and Donner 2008).
    """
    value = fmean(measure.value for measure in measures)
    intervals = [measure.interval for measure in measures if measure.interval is not None]
    if len(intervals) < len(measures):
        return Measure(value=value)
    below = math.hypot(*(m.value - low for m, (low, _) in zip(measures, intervals, strict=True)))
    above = math.hypot(*(high - m.value for m, (_, high) in zip(measures, intervals, strict=True)))
    return Measure(value=value, interval=(value - below / len(measures), value + above / len(measures)))


def points(metric: str) -> float:
    """What turns a metric's recorded number into points of 100; sacrebleu gives points already."""
    return 1.0 if metric == "bleu" else 100.0


def size_of(composite: str) -> int | None:
    """How many tasks a composite pools, by its name: "composite-17", or "composite-3-mcq" beside "composite-3-qa"."""
    size = composite.removeprefix("composite-").partition("-")[0]
    return int(size) if size.isdecimal() else None


def _measure(value: float, interval: Sequence[float] | None, metric: str) -> Measure:
    scale = points(metric)
    return Measure(value=value * scale, interval=_pair(interval, scale) if interval else None)


def _pair(interval: Sequence[float], scale: float) -> tuple[float, float]:
    low, high = interval
    return low * scale, high * scale


def _hull(*intervals: Sequence[float] | None) -> Sequence[float] | None:
    known = [interval for interval in intervals if interval]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def _extremes(values: Iterable[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if len(known) > 1 else None


def _recorded_task(name: str, described: Mapping[str, Any], metrics: set[str]) -> RecordedTask:
    paper_name, chance, majority = (described.get(key) for key in ("paper_name", "chance", "majority"))
    return RecordedTask(
        name=name,
        kind=described.get("kind") or ("qa" if metrics & set(QA_METRICS) else "mcq"),
        paper_name=SPELLINGS.get(paper_name or "", paper_name),
        chance=None if chance is None else 100 * chance,
        majority=None if majority is None else 100 * majority,
    )


def _check(found: Any, shape: Any, *, place: str, file: Path) -> None:
    if found is None:
        return
    if isinstance(shape, str):
        if not _is(shape, found):
            raise _damaged(file, place, found, shape)
    elif isinstance(shape, list):
        if not isinstance(found, list):
            raise _damaged(file, place, found, "a list")
        for i, item in enumerate(found):
            _check(item, shape[0], place=f"{place}[{i}]", file=file)
    else:
        if not isinstance(found, dict):
            raise _damaged(file, place, found, "an object")
        for key, value in found.items():
            if (expected := shape.get(key, shape.get(_EACH))) is not None:
                _check(value, expected, place=f"{place}.{key}".lstrip("."), file=file)


def _is(shape: str, found: Any) -> bool:
    if shape == _NUMBER:
        return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    if shape == _PAIR:
        return (
            isinstance(found, list)
            and len(found) == 2
            and all(_is(_NUMBER, x) for x in found)
            and found == sorted(found)
        )
    return isinstance(found, str)


def _damaged(file: Path, place: str, found: Any, expected: str) -> RecordError:
    shown = json.dumps(found)
    shown = shown if len(shown) <= 40 else shown[:40] + "..."
    return RecordError(f"{file}: {place} is {shown}; expected {expected}; make the record again")
