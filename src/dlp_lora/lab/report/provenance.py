"""How a run was made: a record in, tables of model, data, hardware, versions, times and settings out."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlp_lora.lab.evals.methods import SINGLE, label
from dlp_lora.lab.records.table import Table, plain, table_of
from dlp_lora.lab.report.record import Record

_HARDWARE = ("cpu", "cores", "threads", "gpu")
_TRAINED = {"num_examples": 0, "num_left_out": 0, "seconds": 1, "final_loss": 3}  # with the digits that are printed


def making_table(record: Record) -> Table:
    """What the numbers were made with, and from."""
    run = record.run
    environments = run.environments or (run.environment,)
    facts = {
        "Model": run.model,
        "Precision": run.dtype,
        "Tasks": _count_tasks(record),
        "Left out": _left_out(record),
        "Answers cut off": ", ".join(f"{label(m)} {_count(sum(own.values()))}" for m, own in run.cut_short.items()),
        "Data hash": run.data.hash,
        "Seeds": ", ".join(map(str, run.seeds)),
        "Hardware": _each(environments, _HARDWARE),
        "Versions": _each(environments, [key for key in environments[0] if key not in _HARDWARE]),
        "Training of the adapters": _training_time(record),
        "Evaluation": ", ".join(f"{label(method)} {duration(seconds)}" for method, seconds in run.timings.items()),
        "Peak memory": None if run.peak_memory_mb is None else f"{run.peak_memory_mb:,.0f} MB",
        "Outputs": run.outputs,
    }
    return table_of(
        "The run",
        ("", record.name),
        ((k, fact or None) for k, fact in facts.items()),
        notes=("Of several seeds, times and cut answers are means.",) if len(run.by_seed) > 1 else (),
        num_labels=2,
    )


def settings_table(record: Record) -> Table:
    """The run's settings, each as JSON."""
    settings = record.run.settings or record.run.args
    rows = [(name, json.dumps(value, ensure_ascii=False)) for name, value in settings.items()]
    return table_of("Settings", ("Setting", "Value"), rows, num_labels=2, folded=True)


def training_table(record: Record) -> Table:
    """What the training of each adapter took."""
    trained = dict(record.run.training.adapters)
    if record.run.training.single:
        trained[label(SINGLE)] = record.run.training.single
    rows = [
        (name, *(plain(getattr(row, key), digits=digits) for key, digits in _TRAINED.items()))
        for name, row in trained.items()
    ]
    columns = ("Adapter", "Examples", "Left out", "Seconds", "Final loss")
    return table_of("Training, adapter by adapter", columns, rows, notes=record.seed_notes, folded=True)


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


def _count(number: float) -> str:
    return f"{number:,.1f}".removesuffix(".0")


def _count_tasks(record: Record) -> str:
    described = record.run.data.tasks.values()
    counts = {
        "to learn from": [row.num_train for row in described if row.num_train is not None],
        "to be scored on": [row.num_test for row in described if row.num_test is not None],
    }
    examples = ", ".join(f"{sum(own):,} {what}" for what, own in counts.items() if own)
    return f"{len(record.tasks)}" + (f"; examples: {examples}" if examples else "")


def _left_out(record: Record) -> str | None:
    """Counts the examples that were not asked or not learned from; None if nobody counted."""
    adapters, asked = record.run.training.adapters.values(), record.run.left_out
    learned = [row.num_left_out for row in adapters if row.num_left_out is not None]
    if asked is None and not learned:
        return None
    counts = {task: count for task, count in (asked or {}).items() if count}
    tasks = ", ".join(f"{task} {count}" for task, count in counts.items()) or "no task"
    return f"{_count(sum(learned))} examples to learn from, {sum(counts.values())} to be scored on ({tasks})"


def _training_time(record: Record) -> str:
    run = record.run
    parts = {
        "own adapters": sum(row.seconds or 0 for row in run.training.adapters.values()),
        label(SINGLE): run.training.single and run.training.single.seconds,
        "router": run.router and run.router.seconds,
    }
    return ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
