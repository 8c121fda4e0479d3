"""Refuses to measure paths that compute different things: how fast a wrong answer comes says nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from torch import Tensor

from dlp_lora.engine import Engine
from dlp_lora.errors import DLPLoRAError

# In bfloat16, two paths of SmolLM2-135M that round differently are 3 % apart, as much as a small random adapter changes
# the logits. So adapters are made louder until they change them by this share, and of that change, paths may differ by:
HEARD = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.33}
LOUDNESS = tuple(2.0**i for i in range(5, 12))


@dataclass(frozen=True)
class Twin:
    """A model that must compute what the engine does under these weights, given for each row or for all at once."""

    model: Any
    mixtures: Mapping[str, float] | list[dict[str, float]]
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what it is given besides


@torch.no_grad()
def check_paths(
    engine: Engine, base: Any, inputs: Mapping[str, Tensor], twins: Mapping[str, Twin] | None = None
) -> None:
    """Compares the last tokens' logits: disabled, the engine gives the base's to the bit; fused, its twins' but for
    rounding.

    Raises:
        DLPLoRAError: if they differ.
    """
    expected, heard = _logits(base, inputs), HEARD[base.dtype]
    with engine.disabled():
        if not torch.equal(_logits(engine.model, inputs), expected):
            raise DLPLoRAError(
                "the engine with its adapters disabled differs from the base model; no figures are given"
            )
    for name, twin in (twins or {}).items():
        loudness, theirs = _aloud(twin, inputs, expected, heard)
        with engine.fixed(_times(twin.mixtures, loudness)):
            error = _distance(_logits(engine.model, inputs), theirs)
        change = max(heard, _distance(expected, theirs))
        if not error <= TOLERANCE[base.dtype] * change:  # nor if it is not a number
            raise DLPLoRAError(
                f"{name} and the engine under the same mixture differ by {error:.1%} of the logits, "
                f"which it changes by {change:.1%}; no figures are given"
            )


def _aloud(twin: Twin, inputs: Mapping[str, Tensor], base: Tensor, heard: float) -> tuple[float, Tensor]:
    """How much louder a twin's adapters have to be to be heard, and its logits then."""
    inputs = {**inputs, **twin.inputs}
    if not twin.mixtures:
        return 1.0, _logits(twin.model, inputs)
    for loudness in LOUDNESS:
        with rescale_adapter_scale(twin.model, loudness):
            logits = _logits(twin.model, inputs)
        if not _distance(base, logits) < heard:
            break
    return loudness, logits


def _times(mixtures: Mapping[str, float] | list[dict[str, float]], loudness: float) -> Any:
    if isinstance(mixtures, Mapping):
        return {name: loudness * weight for name, weight in mixtures.items()}
    return [_times(mixture, loudness) for mixture in mixtures]


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs, logits_to_keep=1).logits
    return logits.float()
