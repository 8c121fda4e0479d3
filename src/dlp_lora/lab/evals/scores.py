"""Scores: answers in, numbers with intervals out, for one task, a pool of tasks, or the difference of two methods.

Fractions are 0..1; BLEU is sacrebleu's 0..100. A pool's score is the mean over its tasks. Intervals are 95 % bootstrap
intervals over the questions, drawn again within each task; for a difference both methods keep the same questions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dlp_lora.lab.evals.bootstrap import draws, interval
from dlp_lora.lab.evals.metrics import bleu_letters_each, bleu_of, bleu_statistics, exact_match, rouge_each
from dlp_lora.lab.records.run import Difference, Interval
from dlp_lora.tasks.task import Task


@dataclass(frozen=True)
class Values:
    """Each question's contribution to one metric for one task, and the function from the sums to a number."""

    each: Float[np.ndarray, "questions parts"]
    score_of: Callable[[Float[np.ndarray, "draws parts"]], Float[np.ndarray, " draws"]]

    @property
    def score(self) -> float:
        """The metric over all questions."""
        return float(self.score_of(self.each.sum(axis=0, keepdims=True))[0])

    def resampled(self, draws: Int[np.ndarray, "draws questions"]) -> Float[np.ndarray, " draws"]:
        """The metric over each draw of questions."""
        return self.score_of(self.each[draws].sum(axis=1))


ValuesByTask = dict[str, dict[str, Values]]
"""Values by task, then metric."""


def tabulate(
    rows: Iterable[Mapping[str, Any]], tasks: Mapping[str, Task], kinds: Mapping[str, str], *, forced: bool = False
) -> ValuesByTask:
    """Gathers the answers of one method by task, in the order of the questions.

    For teacher-forced answers (`forced`), the BLEU of the paper's code is added to sacrebleu's.
    """
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    return {
        name: _values(sorted(by_task[name], key=lambda row: int(row["index"])), tasks[name], kinds[name], forced)
        for name in tasks
        if name in by_task
    }


def scores(table: ValuesByTask) -> dict[str, dict[str, float]]:
    """Each task's metrics."""
    return {name: {metric: round(v.score, 5) for metric, v in own.items()} for name, own in table.items()}


def intervals(table: ValuesByTask) -> dict[str, dict[str, Interval]]:
    """Each task's metrics as (low, high)."""
    return {
        name: {metric: interval(_resampled([v])).rounded() for metric, v in own.items()} for name, own in table.items()
    }


def pooled(table: ValuesByTask, names: Sequence[str]) -> tuple[dict[str, float], dict[str, Interval]]:
    """The metrics that all of the named tasks have, as means over the tasks, with their intervals.

    A task without answers is left out, and so is one that the table does not have.
    """
    values = _pools(table, names)
    means = {metric: round(float(np.mean([v.score for v in own])), 5) for metric, own in values.items()}
    return means, {metric: interval(_resampled(own)).rounded() for metric, own in values.items()}


def difference(ours: ValuesByTask, theirs: ValuesByTask, names: Sequence[str]) -> dict[str, Difference]:
    """The pooled metrics of one method less another's, on the same questions."""
    names = [name for name in names if name in ours and name in theirs]
    a, b = _pools(ours, names), _pools(theirs, names)
    return {
        metric: Difference(
            value=round(float(np.mean([x.score - y.score for x, y in zip(a[metric], b[metric], strict=True)])), 5),
            interval=interval(_resampled(a[metric]) - _resampled(b[metric])).rounded(),
        )
        for metric in a
        if metric in b and all(len(x.each) == len(y.each) for x, y in zip(a[metric], b[metric], strict=True))
    }


def _values(rows: Sequence[Mapping[str, Any]], task: Task, kind: str, forced: bool) -> dict[str, Values]:
    examples = [task.test[row["index"]] for row in rows]
    texts = [row["text"].strip() for row in rows]
    if kind == "mcq":
        found = {"accuracy": _means([exact_match(t, e.accepted) for t, e in zip(texts, examples, strict=True)])}
        likely = [
            (e.choices or ())[int(np.argmax(row["likelihoods"]))] in e.accepted
            for row, e in zip(rows, examples, strict=True)
            if "likelihoods" in row
        ]
        if likely:  # of the questions that have choices; a record counts the others
            found["accuracy_loglik"] = _means(likely)
        return found
    references = [e.accepted for e in examples]
    rouge = rouge_each(texts, references)
    return {
        "bleu": Values(np.array(bleu_statistics(texts, references), dtype=float), bleu_of),
        **({"bleu_letters": _means(bleu_letters_each(texts, references))} if forced else {}),
        "rouge1": _means([r.rouge1 for r in rouge]),
        "rougeL": _means([r.rougeL for r in rouge]),
    }


def _means(each: Sequence[float]) -> Values:
    return Values(np.array(each, dtype=float)[:, None] / len(each), lambda sums: sums[:, 0])


def _pools(table: ValuesByTask, names: Sequence[str]) -> dict[str, list[Values]]:
    own = [table[name] for name in names if name in table]
    if not own:
        return {}
    return {metric: [values[metric] for values in own] for metric in own[0] if all(metric in v for v in own)}


def _resampled(values: Sequence[Values]) -> Float[np.ndarray, " draws"]:
    means: Float[np.ndarray, " draws"] = np.mean(
        [v.resampled(drawn) for v, drawn in zip(values, draws(*(len(v.each) for v in values)), strict=True)], axis=0
    )
    return means
