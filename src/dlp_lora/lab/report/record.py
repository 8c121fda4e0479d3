"""The record of a run for a report: look-ups in points of 100. What was not measured is None."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from dlp_lora.lab.evals.methods import main_first
from dlp_lora.lab.records.run import RECORD_FILE, ByTask, RunRecord, TaskRecord, read_run
from dlp_lora.lab.records.table import Measure
from dlp_lora.lab.report.paper import SPELLINGS

METRICS = {
    "accuracy": "Accuracy",
    "accuracy_loglik": "Accuracy by likelihood",
    "bleu": "BLEU",
    "bleu_letters": "BLEU of letters",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
}
QA_METRICS = ("bleu", "rouge1", "rougeL")


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
    run: RunRecord

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run.name or self.run.bundle or self.path.resolve().parent.name

    @property
    def model(self) -> str:
        """The base model's name."""
        return self.run.model or "an unnamed model"

    @cached_property
    def tasks(self) -> tuple[RecordedTask, ...]:
        """All tasks that are described or scored."""
        described, scored = self.run.data.tasks, dict[str, set[str]]()
        for by_task in self.run.scores.values():
            for task, by_metric in by_task.items():
                if by_metric:
                    scored.setdefault(task, set()).update(by_metric)
        return tuple(
            _recorded_task(name, described.get(name, TaskRecord()), scored.get(name, set()))
            for name in dict.fromkeys([*described, *scored])
        )

    def tasks_of(self, kind: str) -> tuple[RecordedTask, ...]:
        """The tasks of a kind: "mcq" or "qa"."""
        return tuple(task for task in self.tasks if task.kind == kind)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that have scores: the main ones first, the others as recorded."""
        return main_first(self.run.scores)

    def scored(self, tasks: Iterable[RecordedTask]) -> tuple[RecordedTask, ...]:
        """Those of the tasks that some method has a score on: one without test questions has none."""
        return tuple(task for task in tasks if any(own.get(task.name) for own in self.run.scores.values()))

    def measure(self, method: str, task: str, metric: str) -> Measure | None:
        """A method's score on a task, in its bootstrap interval, widened to the extremes of the seeds."""
        intervals = (at(self.run.intervals, method, task, metric), _extremes(self.seed_means(method, [task], metric)))
        return measure_of(at(self.run.scores, method, task, metric), _hull(*intervals), metric)

    def teacher_forced(self, method: str, task: str, metric: str) -> Measure | None:
        """A method's teacher-forced score on a task, in its bootstrap interval."""
        interval = at(self.run.teacher_forced_intervals, method, task, metric)
        return measure_of(at(self.run.teacher_forced, method, task, metric), interval, metric)

    def mean(self, method: str, tasks: Iterable[str], metric: str) -> Measure | None:
        """A method's mean score over tasks; None unless it has one on each of them."""
        names = tuple(tasks)
        found = [self.measure(method, task, metric) for task in names]
        measures = [measure for measure in found if measure is not None]
        if not measures or len(measures) < len(found):
            return None
        value = fmean(measure.value for measure in measures)
        # Where it is a composite's score, it has that composite's interval.
        for name in self.run.composites:
            composite = self.composite(name, method, metric) if size_of(name) == len(names) else None
            if composite and composite.interval and math.isclose(composite.value, value, abs_tol=0.01):
                return composite
        if self.run.intervals.get(method):
            return mean(measures)
        spread = _extremes(self.seed_means(method, names, metric))
        return Measure(value=value, interval=_pair(spread, points(metric)) if spread else None)

    def composite(self, composite: str, method: str, metric: str) -> Measure | None:
        """A method's score on the pooled examples of several tasks."""
        interval = at(self.run.composite_intervals, composite, method, metric)
        return measure_of(at(self.run.composites, composite, method, metric), interval, metric)

    def difference(self, pair: str, composite: str, metric: str) -> Measure | None:
        """A paired difference, such as "dlp - oracle"."""
        found = at(self.run.differences, pair, composite, metric)
        return found and measure_of(found.value, found.interval, metric)

    @property
    def seed_notes(self) -> tuple[str, ...]:
        """Says of numbers that they are means over the seeds, if there are several."""
        seeds = ", ".join(self.run.by_seed)
        return (f"Means over the seeds {seeds}.",) if len(self.run.by_seed) > 1 else ()

    def seed_means(self, method: str, tasks: Sequence[str], metric: str) -> list[float | None]:
        """A method's mean score over tasks, as recorded, for each seed."""
        by_seed = [[at(own, method, task, metric) for task in tasks] for own in self.run.by_seed.values()]
        return [fmean(values) if values and None not in values else None for values in by_seed]


def read_record(path: str | Path) -> Record:
    """Reads a record: a JSON file, or a folder that holds record.json.

    Raises:
        RecordError: if it is missing, damaged or of a later format.
    """
    path = Path(path)
    return Record(path=path / RECORD_FILE if path.is_dir() else path, run=read_run(path))


def at(found: Any, *keys: str) -> Any:
    """What stands under a path of keys, or None."""
    for key in keys:
        found = (found or {}).get(key)
    return found


def metrics_of(by_method: Mapping[str, ByTask], task: str) -> list[str]:
    """The metrics that any method has on a task."""
    return list(dict.fromkeys(metric for by_task in by_method.values() for metric in by_task.get(task, ())))


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


def measure_of(value: float | None, interval: Sequence[float] | None, metric: str) -> Measure | None:
    """A recorded number, which may be missing, in points of 100."""
    if value is None:
        return None
    return Measure(value=value * points(metric), interval=_pair(interval, points(metric)) if interval else None)


def _pair(interval: Sequence[float], scale: float) -> tuple[float, float]:
    low, high = interval
    return low * scale, high * scale


def _hull(*intervals: Sequence[float] | None) -> Sequence[float] | None:
    known = [interval for interval in intervals if interval]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def _extremes(values: Iterable[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if len(known) > 1 else None


def _recorded_task(name: str, task: TaskRecord, metrics: set[str]) -> RecordedTask:
    return RecordedTask(
        name=name,
        kind=task.kind or ("qa" if metrics & set(QA_METRICS) else "mcq"),
        paper_name=SPELLINGS.get(task.paper_name or "", task.paper_name),
        chance=None if task.chance is None else 100 * task.chance,
        majority=None if task.majority is None else 100 * task.majority,
    )
