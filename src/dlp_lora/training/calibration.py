"""Calibration: a router's confidence compared with its accuracy."""

import numpy as np
from jaxtyping import Bool, Float

NUM_BINS = 15


def reliability(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> list[dict[str, float]]:
    """Of each of 15 equal bins of confidence that is not empty: mean confidence, accuracy, share of all samples."""
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    return [
        {
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(right[bins == b].mean()),
            "share": float((bins == b).mean()),
        }
        for b in np.unique(bins)
    ]


def calibration_error(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> float:
    """The expected calibration error (ECE): the mean gap between confidence and accuracy over the bins."""
    return sum(b["share"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(confidence, right))
