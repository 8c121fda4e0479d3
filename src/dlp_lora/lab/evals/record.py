"""The numbers of a record: tables of scored answers in, JSON data out, for one seed or several."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlp_lora.lab.evals.bootstrap import bootstrap
from dlp_lora.lab.evals.methods import MAIN, SINGLE
from dlp_lora.lab.evals.scores import Table, difference, intervals, pooled, scores, tabulate
from dlp_lora.tasks.task import Task


def compared(tables: Mapping[str, Table], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Scores and intervals of each method, and of the pools of choice and of free tasks.

    And the differences, on the same questions, of dlp from the other main methods and of all others from dlp.
    """
    groups = composites_of(tables, kinds)
    means = {g: {m: pooled(table, names) for m, table in tables.items()} for g, names in groups.items()}
    pairs = [("dlp", other) for other in ("oracle", "base", SINGLE)]
    pairs += [(name, "dlp") for name in tables if name not in MAIN]
    pairs = [pair for pair in pairs if set(pair) <= tables.keys()]
    return {
        "scores": {name: scores(table) for name, table in tables.items()},
        "intervals": {name: intervals(table) for name, table in tables.items()},
        "composites": {g: {m: found[0] for m, found in own.items()} for g, own in means.items()},
        "composite_intervals": {g: {m: found[1] for m, found in own.items()} for g, own in means.items()},
        "differences": {
            f"{a} - {b}": {g: difference(tables[a], tables[b], names) for g, names in groups.items()} for a, b in pairs
        },
    }


def teacher_forced_scores(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Mapping[str, Task], kinds: Mapping[str, str]
) -> dict[str, Any]:
    """What the methods' teacher-forced answers score, by task and pooled, under names that say so."""
    tables = {name: tabulate(own, tasks, kinds, forced=True) for name, own in rows.items()}
    means = {
        pool: {name: pooled(table, names) for name, table in tables.items()}
        for pool, names in composites_of(tables, kinds).items()
    }
    return {
        "teacher_forced": {name: scores(table) for name, table in tables.items()},
        "teacher_forced_intervals": {name: intervals(table) for name, table in tables.items()},
        "teacher_forced_composites": {p: {m: found[0] for m, found in own.items()} for p, own in means.items()},
        "teacher_forced_composite_intervals": {
            p: {m: found[1] for m, found in own.items()} for p, own in means.items()
        },
    }


def composites_of(tables: Mapping[str, Table], kinds: Mapping[str, str]) -> dict[str, list[str]]:
    """The tasks that are pooled: those of choice and the free ones that every method has answers to.

    A pool is called after its size, and after its kind too where both are of one size.
    """
    answered = [name for name in kinds if all(name in table for table in tables.values())]
    by_kind = {kind: [name for name in answered if kinds[name] == kind] for kind in ("mcq", "qa")}
    are_alike = len(by_kind["mcq"]) == len(by_kind["qa"])
    return {f"composite-{len(own)}" + are_alike * f"-{kind}": own for kind, own in by_kind.items() if own}


def without_choices(tasks: Sequence[Task], kinds: Mapping[str, str]) -> dict[str, int]:
    """How many test questions are left out of accuracy by likelihood, by task: those without choices beside others."""
    counts = {t.name: sum(not e.choices for e in t.test) for t in tasks if kinds[t.name] == "mcq"}
    return {t.name: n for t in tasks if 0 < (n := counts.get(t.name, 0)) < len(t.test)}


def merged(records: Sequence[dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """One record out of the seeds': mean scores, intervals that hold every seed's, all else as the first has it."""
    first = records[0]
    if len(records) == 1:
        return first
    forced = tuple(key for key in first if key.startswith("teacher_forced"))
    kept = ("scores", "intervals", "composites", "composite_intervals", "differences", "serial", *forced)
    by_seed = {str(seed): record["scores"] for seed, record in zip(seeds, records, strict=True)}
    return {**first, **{key: _mean([record[key] for record in records]) for key in kept}, "by_seed": by_seed}


def _mean(trees: Sequence[Any]) -> Any:
    if isinstance(trees[0], dict):
        keys = dict.fromkeys(key for tree in trees for key in tree)  # one seed's serial prompts may all be too long
        return {key: _mean([tree[key] for tree in trees if key in tree]) for key in keys}
    if isinstance(trees[0], list | tuple):
        return [min(low for low, _ in trees), max(high for _, high in trees)]
    return round(sum(trees) / len(trees), 5)


def serial_scores(rows: Sequence[dict[str, Any]], n: int) -> dict[str, Any]:
    """`accuracy_later` is that of the questions after the first, which only a switch gives to their own adapter.

    `cut` is the share of prompts that were answered apart, `seconds` is the time a question took.
    """
    right = np.array([row["right"] for row in rows], dtype=float).reshape(-1, n)  # (prompts, questions)
    return {
        "accuracy": round(float(right.mean()), 5),
        "interval": list(bootstrap(right.mean(axis=1)).rounded()),
        "accuracy_later": round(float(right[:, 1:].mean()), 5),
        "interval_later": list(bootstrap(right[:, 1:].mean(axis=1)).rounded()),
        "routed": round(float(np.mean([row["routed"] for row in rows])), 5),
        "num_questions": len(rows),
        "seconds": round(float(np.mean([row["seconds"] for row in rows])), 4),
        "cut": round(float(np.mean([row["is_cut"] for row in rows])), 5),
    }
