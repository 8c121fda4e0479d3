"""How a run was made: a record in, tables of model, data, hardware, versions, times and settings out."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlp_lora.lab.evals.methods import SINGLE, label
from dlp_lora.lab.report.markup import Column, Table, plain
from dlp_lora.lab.report.record import Record

_HARDWARE = ("cpu", "cores", "threads", "gpu")
_TRAINED = {"num_examples": 0, "num_left_out": 0, "seconds": 1, "final_loss": 3}  # with the digits that are printed


def making_table(record: Record) -> Table:
    """What the numbers were made with, and from."""
    environments = record.at("environments") or [record.at("environment") or {}]
    timings = record.at("timings") or {}
    memory = record.at("peak_memory_mb")
    facts = {
        "Model": record.at("model"),
        "Precision": record.at("dtype"),
        "Tasks": _count_tasks(record),
        "Left out": _left_out(record),
        "Answers cut off": _cut_short(record),
        "Data hash": record.at("data", "hash"),
        "Seeds": ", ".join(str(seed) for seed in record.seeds),
        "Hardware": _each(environments, _HARDWARE),
        "Versions": _each(environments, [key for key in environments[0] if key not in _HARDWARE]),
        "Training of the adapters": _training_time(record),
        "Evaluation": ", ".join(f"{label(m)} {duration(s)}" for m, s in timings.items() if s is not None),
        "Peak memory": None if memory is None else f"{memory:,.0f} MB",
        "Outputs": record.at("outputs"),
    }
    return Table(
        title="The run",
        columns=(Column(name=""), Column(name=record.name)),
        rows=tuple((name, str(fact) if fact else None) for name, fact in facts.items()),
        num_labels=2,
    )


def settings_table(record: Record) -> Table:
    """The run's settings, each as JSON."""
    settings = record.at("settings") or record.at("args") or {}
    return Table(
        title="Settings",
        columns=(Column(name="Setting"), Column(name="Value")),
        rows=tuple((name, json.dumps(value, ensure_ascii=False)) for name, value in settings.items()),
        num_labels=2,
        folded=True,
    )


def training_table(record: Record) -> Table:
    """What the training of each adapter took."""
    trained: dict[str, Any] = dict(record.at("training", "adapters") or {})
    if record.at("training", SINGLE):
        trained[label(SINGLE)] = record.at("training", SINGLE)
    rows = [
        (name, *(plain((row or {}).get(key), digits=digits) for key, digits in _TRAINED.items()))
        for name, row in trained.items()
    ]
    return Table(
        title="Training, adapter by adapter",
        columns=tuple(Column(name=name) for name in ("Adapter", "Examples", "Left out", "Seconds", "Final loss")),
        rows=tuple(rows),
        folded=True,
    )


def duration(seconds: float) -> str:
    """A time as people say it: "9.5 s", "12 min", "2 h 05 min"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _each(environments: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> str:
    """What those of these keys are, once for all processes of which they are alike, the last one's first."""
    keys = tuple(keys)
    found = (", ".join(_entry(key, own[key]) for key in keys if own.get(key) is not None) for own in environments)
    return "; before: ".join(dict.fromkeys(found))


def _entry(key: str, value: Any) -> str:
    return (
        f"{value} {key}" if key in ("cores", "threads") else str(value) if key in ("cpu", "gpu") else f"{key} {value}"
    )


def _count_tasks(record: Record) -> str:
    described = (record.at("data", "tasks") or {}).values()
    train, test = (sum((row or {}).get(key) or 0 for row in described) for key in ("num_train", "num_test"))
    return f"{len(record.tasks)}: {train:,} examples to learn from, {test:,} to be scored on"


def _left_out(record: Record) -> str | None:
    """Counts the examples that were not asked or not learned from; None if nobody counted."""
    adapters = record.at("training", "adapters") or {}
    learned = [row["num_left_out"] for row in adapters.values() if row and row.get("num_left_out") is not None]
    asked = record.at("left_out")
    if asked is None and not learned:
        return None
    tasks = ", ".join(f"{task} {count}" for task, count in (asked or {}).items() if count)
    return (
        f"{sum(learned)} examples to learn from, {sum((asked or {}).values())} to be scored on ({tasks or 'no task'})"
    )


def _cut_short(record: Record) -> str | None:
    """Counts the answers that were cut short, by method."""
    found = record.at("cut_short") or {}
    return ", ".join(f"{label(method)} {sum(own.values()):,}" for method, own in found.items()) or None


def _training_time(record: Record) -> str:
    adapters = (record.at("training", "adapters") or {}).values()
    parts = {"own adapters": sum((row or {}).get("seconds") or 0 for row in adapters)}
    parts[label(SINGLE)] = record.at("training", SINGLE, "seconds") or 0
    parts["router"] = record.at("router", "seconds") or 0
    return ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
