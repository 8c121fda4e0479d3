"""Bootstrap: each example's contribution in, 95 % intervals out.

Whoever asks gets the same draws of as many examples: that pairs methods that answered the same questions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from dlp_lora.lab.records.run import Interval

NUM_RESAMPLES = 1000


def bootstrap(
    values: Sequence[float] | Num[np.ndarray, "examples *parts"],
    statistic: Callable[[Any], float] = np.mean,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The interval of a statistic of examples."""
    values = np.asarray(values)
    (drawn,) = draws(len(values), num_resamples=num_resamples, seed=seed)
    return interval([statistic(values[own]) for own in drawn])


def draws(*sizes: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> list[Int[np.ndarray, "resamples _"]]:
    """Draws examples with replacement, as many as there are: for groups of these sizes, each by itself.

    Raises:
        ValueError: if one is empty.
    """
    if 0 in sizes:
        raise ValueError("no values to resample; expected at least one")
    rng = np.random.default_rng(seed)
    return [rng.integers(0, size, size=(num_resamples, size)) for size in sizes]


def interval(resampled: Sequence[float] | Float[np.ndarray, " resamples"]) -> Interval:
    """The middle 95 % of a statistic of resampled examples."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(low), float(high))
