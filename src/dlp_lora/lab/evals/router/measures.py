"""Measures: a router's results for samples in, numbers out. Accuracies, rates and errors are fractions, 0 to 1."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dlp_lora.engine.routing import hold
from dlp_lora.engine.trace import Decision
from dlp_lora.lab.evals.bootstrap import bootstrap
from dlp_lora.policy import Mixture, Switching
from dlp_lora.training.calibration import calibration_error

NUM_POINTS = 50
COVERAGE = 0.95  # of the in-domain texts, at which false routes are counted


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A router's results for `n` samples; a label is the index of the right name.

    A score says how surely a text belongs to any of the tasks: the router's score, else its highest probability.
    """

    names: tuple[str, ...]
    labels: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n adapters"]  # among the adapters: rows sum to 1
    fits: Float[np.ndarray, " n"]  # the probability that any of them does
    scores: Float[np.ndarray, " n"]

    @property
    def chosen(self) -> Int[np.ndarray, " n"]:
        """The index of the most likely name."""
        found: Int[np.ndarray, " n"] = self.probabilities.argmax(axis=1)
        return found

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        """Whether the most likely name is the right one."""
        found: Bool[np.ndarray, " n"] = self.chosen == self.labels
        return found

    @property
    def confidence(self) -> Float[np.ndarray, " n"]:
        """The highest probability."""
        found: Float[np.ndarray, " n"] = self.probabilities.max(axis=1)
        return found


def pooled(readings: Sequence[Reading]) -> Reading:
    """Several readings of one router as one."""
    return Reading(
        names=readings[0].names,
        labels=np.concatenate([r.labels for r in readings]),
        probabilities=np.concatenate([r.probabilities for r in readings]),
        fits=np.concatenate([r.fits for r in readings]),
        scores=np.concatenate([r.scores for r in readings]),
    )


def accuracy(right: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None = None) -> dict[str, Any]:
    """The share that is right, with its 95 % interval; samples of one group are drawn together.

    Raises:
        ValueError: if there is no sample.
    """
    if groups is None:
        spread = bootstrap(right.astype(float))
    else:
        parts = np.stack([np.bincount(groups, right), np.bincount(groups)], axis=1)
        spread = bootstrap(parts, lambda drawn: float(drawn[:, 0].sum() / drawn[:, 1].sum()))
    return {"accuracy": rounded(right.mean()), "interval": list(spread.rounded()), "num": len(right)}


def summary(reading: Reading) -> dict[str, Any]:
    """Accuracy with its interval, by task, and how well the confidence fits. `routed` is the share of samples of which
    the router says that some adapter fits; `right_and_routed` those of them that went to the right one.
    """
    routed = reading.fits > 0.5
    own = {
        reading.names[label]: rounded(reading.right[reading.labels == label].mean())
        for label in np.unique(reading.labels).tolist()
    }
    return {
        **accuracy(reading.right),
        "mean_over_tasks": rounded(np.mean(list(own.values()))),
        "routed": rounded(routed.mean()),
        "right_and_routed": rounded((reading.right & routed).mean()),
        "by_task": own,
        "ece": rounded(calibration_error(reading.confidence, reading.right)),
    }


def confusion(reading: Reading) -> dict[str, dict[str, int]]:
    """How many samples of each task went to which; nothing where none did."""
    counts: dict[str, dict[str, int]] = {}
    for label, choice in sorted(zip(reading.labels.tolist(), reading.chosen.tolist(), strict=True)):
        row = counts.setdefault(reading.names[label], {})
        row[reading.names[choice]] = row.get(reading.names[choice], 0) + 1
    return counts


def auroc(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> float:
    """How often a text that belongs scores above one that does not; a tie counts half."""
    found = np.sort(outside)
    below, upto = np.searchsorted(found, inside, side="left"), np.searchsorted(found, inside, side="right")
    return float((below + upto).mean() / 2 / len(outside))


def false_route_rate(
    inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"], coverage: float = COVERAGE
) -> float:
    """The share of texts that do not belong and are routed all the same, if `coverage` of those that do are."""
    return float((outside >= _threshold(inside, coverage)).mean())


def abstention(reading: Reading, outside: Float[np.ndarray, " m"] | None = None) -> list[dict[str, float | None]]:
    """Coverage, accuracy of routed samples, and false routes, for thresholds from strict to none."""
    points = []
    for coverage in np.linspace(1 / NUM_POINTS, 1, NUM_POINTS):
        threshold = _threshold(reading.scores, coverage)
        routed = reading.scores >= threshold
        points.append(
            {
                "coverage": rounded(routed.mean()),
                "accuracy": rounded(reading.right[routed].mean()),
                "false_routes": None if outside is None else rounded((outside >= threshold).mean()),
            }
        )
    return points


def delays(right: Sequence[bool], changed: Sequence[bool]) -> list[int]:
    """After each change of task, how many sentences pass before the first right one; all of them if there is none."""
    starts = [i for i, is_change in enumerate(changed) if is_change]
    stretches = [right[start:end] for start, end in pairwise([*starts, len(right)])]
    return [next((i for i, is_right in enumerate(own) if is_right), len(own)) for own in stretches]


def held(
    probabilities: Float[np.ndarray, "sentences adapters"], num_tokens: Sequence[int], switching: Switching
) -> list[int]:
    """The adapter in use at each sentence of one text, as an engine that switches so would have it."""
    names = [str(i) for i in range(probabilities.shape[1])]
    in_use, since = Mixture({names[probabilities[0].argmax()]: 1.0}), 0
    used: list[int] = []
    for row, length in zip(probabilities, num_tokens, strict=True):
        if used and since >= switching.min_tokens:
            since = 0
            likeliest = Mixture({names[row.argmax()]: 1.0})
            decision = Decision(mixture=likeliest, probabilities=dict(zip(names, row.tolist(), strict=True)))
            in_use = hold(in_use, decision, switching).mixture
        since += length
        used.append(int(next(iter(in_use))))
    return used


def rounded(value: float | np.floating[Any]) -> float:
    """A number as records have it."""
    return round(float(value), 5)


def _threshold(inside: Float[np.ndarray, " n"], coverage: float) -> float:
    # The score that at least this share reaches: no interpolation, so that ties fall on one side.
    kept = max(1, int(np.ceil(coverage * len(inside) - 1e-9)))
    return float(np.sort(inside)[len(inside) - kept])
