"""The numbers of a record: tables of scored answers in, parts of a record out, for one seed or several."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from dlp_lora.lab.evals.bootstrap import bootstrap
from dlp_lora.lab.evals.methods import MAIN, SINGLE
from dlp_lora.lab.evals.scores import ValuesByTask, difference, intervals, pooled, scores, tabulate
from dlp_lora.lab.records.run import (
    Compared,
    Difference,
    Interval,
    RouterRecord,
    RunRecord,
    Serial,
    TeacherForced,
    Trained,
    Training,
)
from dlp_lora.tasks.task import Task


def compared(tables: Mapping[str, ValuesByTask], kinds: Mapping[str, str]) -> Compared:
    """Scores and intervals of each method, and of the pools of choice and of free tasks.

    And the differences, on the same questions, of dlp from the other main methods and of all others from dlp.
    """
    groups = composites_of(tables, kinds)
    means = {g: {m: pooled(table, names) for m, table in tables.items()} for g, names in groups.items()}
    pairs = [("dlp", other) for other in ("oracle", "base", SINGLE)]
    pairs += [(name, "dlp") for name in tables if name not in MAIN]
    pairs = [pair for pair in pairs if set(pair) <= tables.keys()]
    return Compared(
        scores={name: scores(table) for name, table in tables.items()},
        intervals={name: intervals(table) for name, table in tables.items()},
        composites={g: {m: found[0] for m, found in own.items()} for g, own in means.items()},
        composite_intervals={g: {m: found[1] for m, found in own.items()} for g, own in means.items()},
        differences={
            f"{a} - {b}": {g: difference(tables[a], tables[b], names) for g, names in groups.items()} for a, b in pairs
        },
    )


def teacher_forced_scores(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Mapping[str, Task], kinds: Mapping[str, str]
) -> TeacherForced:
    """The scores of the methods' teacher-forced answers, by task and pooled."""
    tables = {name: tabulate(own, tasks, kinds, forced=True) for name, own in rows.items()}
    means = {
        pool: {name: pooled(table, names) for name, table in tables.items()}
        for pool, names in composites_of(tables, kinds).items()
    }
    return TeacherForced(
        teacher_forced={name: scores(table) for name, table in tables.items()},
        teacher_forced_intervals={name: intervals(table) for name, table in tables.items()},
        teacher_forced_composites={p: {m: found[0] for m, found in own.items()} for p, own in means.items()},
        teacher_forced_composite_intervals={p: {m: found[1] for m, found in own.items()} for p, own in means.items()},
    )


def composites_of(tables: Mapping[str, ValuesByTask], kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """The tasks that are pooled: those of choice and the free ones that every method has answers to.

    A pool is named after its size, and also after its kind if both kinds have the same size.
    """
    answered = [name for name in kinds if all(name in table for table in tables.values())]
    by_kind = {kind: [name for name in answered if kinds[name] == kind] for kind in ("mcq", "qa")}
    are_alike = len(by_kind["mcq"]) == len(by_kind["qa"])
    return {f"composite-{len(own)}" + are_alike * f"-{kind}": own for kind, own in by_kind.items() if own}


def without_choices(tasks: Sequence[Task], kinds: Mapping[str, str]) -> dict[str, int]:
    """How many test questions are left out of accuracy by likelihood, by task: those without choices beside others."""
    counts = {t.name: sum(not e.choices for e in t.test) for t in tasks if kinds[t.name] == "mcq"}
    return {t.name: n for t in tasks if 0 < (n := counts.get(t.name, 0)) < len(t.test)}


def merged(records: Sequence[RunRecord], seeds: Sequence[int]) -> RunRecord:
    """One record out of the seeds': mean scores, times and counts, and intervals that hold every seed's.

    The router's `confusion` counts the prompts of all seeds; all else is as the first has it.
    """
    first = records[0]
    if len(records) == 1:
        return first
    averaged = [f.name for kind in (Compared, TeacherForced) for f in fields(kind)]
    averaged += ["serial", "timings", "training", "router"]
    by_seed = {str(seed): record.scores for seed, record in zip(seeds, records, strict=True)}
    means = {name: _mean([getattr(record, name) for record in records]) for name in averaged}
    if (router := means["router"]) is not None:
        confusions = [record.router.confusion for record in records if record.router]
        summed = {task: _sum_of([own.get(task, {}) for own in confusions]) for task in router.confusion}
        means["router"] = replace(router, confusion=summed)
    cut = {name: [record.cut_short.get(name, {}) for record in records] for name in first.cut_short}
    means["cut_short"] = {name: _mean_count(own) for name, own in cut.items()}
    means["serial_left_out"] = _mean_count([record.serial_left_out for record in records])
    return replace(first, **means, by_seed=by_seed)


def _sum_of(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sums of counts that are left out where they are zero."""
    return {key: sum(own.get(key, 0) for own in counts) for key in dict.fromkeys(key for own in counts for key in own)}


def _mean_count(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: round(total / len(counts), 5) for key, total in _sum_of(counts).items()}


def _mean(found: Sequence[Any]) -> Any:
    first = found[0]
    if None in found:
        return None
    if isinstance(first, Mapping):
        keys = dict.fromkeys(key for own in found for key in own)  # one seed's serial prompts may all be too long
        return {key: _mean([own[key] for own in found if key in own]) for key in keys}
    if isinstance(first, Interval):
        return Interval(min(low for low, _ in found), max(high for _, high in found))
    if isinstance(first, Difference | Serial | RouterRecord | Training | Trained):
        return type(first)(**{f.name: _mean([getattr(own, f.name) for own in found]) for f in fields(first)})
    return round(sum(found) / len(found), 5)


def serial_scores(by_method: Mapping[str, Sequence[dict[str, Any]]], n: int) -> dict[str, Serial]:
    """The scores of each method's answers to the same prompts of `n` questions."""
    return {name: _serial(rows, n, by_method.get("alone", ())) for name, rows in by_method.items()}


def _serial(rows: Sequence[dict[str, Any]], n: int, alone: Sequence[dict[str, Any]]) -> Serial:
    right, other = (
        np.array([row["right"] for row in own], dtype=float).reshape(-1, n)  # (prompts, questions)
        for own in (rows, alone)
    )
    less = (right - other).mean(axis=1) if len(other) and rows is not alone else None

    def share(key: str, digits: int = 5) -> float:
        return round(float(np.mean([row[key] for row in rows])), digits)

    return Serial(
        accuracy=share("right"),
        interval=bootstrap(right.mean(axis=1)).rounded(),
        accuracy_later=round(float(right[:, 1:].mean()), 5),
        interval_later=bootstrap(right[:, 1:].mean(axis=1)).rounded(),
        difference=None
        if less is None
        else Difference(value=round(float(less.mean()), 5), interval=bootstrap(less).rounded()),
        routed=share("routed"),
        num_questions=len(rows),
        seconds=share("seconds", 4),
        cut=share("is_cut"),
    )
