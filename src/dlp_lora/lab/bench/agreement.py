"""Refuses to measure paths that compute different things: how fast a wrong answer comes says nothing."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.helpers import rescale_adapter_scale
from torch import Tensor
from transformers import Cache

from dlp_lora.engine.cache import cache_argument, cache_of, rows_of
from dlp_lora.engine.engine import Engine
from dlp_lora.engine.routing import RowRouter
from dlp_lora.errors import DLPLoRAError
from dlp_lora.policy import FusionPolicy, Mixture

# In bfloat16, two paths of SmolLM2-135M that round differently are 3 % apart, as much as a small random adapter changes
# the logits. So adapters are made louder until they change them by this share, and of that change, paths may differ by:
MIN_EFFECT = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.3}
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.33}
SCALES = tuple(2.0**i for i in range(5, 12))


@dataclass(frozen=True)
class Twin:
    """A model that must give the engine's results under these weights, which are for each row or for all."""

    model: Any
    mixtures: Mapping[str, float] | list[dict[str, float]]
    inputs: Mapping[str, Any] = field(default_factory=dict)  # further arguments


@torch.no_grad()
def check_paths(
    engine: Engine,
    base: Any,
    inputs: Mapping[str, Tensor],
    twins: Mapping[str, Twin] | None = None,
    *,
    under: Callable[[Any], AbstractContextManager[Any]] | None = None,
    make_cache: Callable[[], Cache] | None = None,
) -> None:
    """Compares the logits of the prompts' last tokens and of a decoding step behind them: disabled, the engine gives
    the base's to the bit; fused, its twins' but for rounding.

    Args:
        under: how the engine takes up a mixture; `engine.fixed` unless given.
        make_cache: the cache that the engine and the base fill, if not the default one.

    Raises:
        DLPLoRAError: if they differ.
    """
    under, min_effect = under or engine.fixed, MIN_EFFECT[base.dtype]
    expected = _logits(base, inputs, make_cache)
    with engine.disabled():
        if not torch.equal(_logits(engine.model, inputs, make_cache), expected):
            raise DLPLoRAError(
                "the engine with its adapters disabled differs from the base model; no figures are given"
            )
    for name, twin in (twins or {}).items():
        scale, theirs = _scaled(twin, inputs, expected, min_effect)
        with under(_times(twin.mixtures, scale)):
            error = _distance(_logits(engine.model, inputs, make_cache), theirs)
        change = max(min_effect, _distance(expected, theirs))
        if not error <= TOLERANCE[base.dtype] * change:  # nor if it is not a number
            raise DLPLoRAError(
                f"{name} and the engine under the same mixture differ by {error:.1%} of the logits, "
                f"which it changes by {change:.1%}; no figures are given"
            )


@torch.no_grad()
def check_sentences(engine: Engine, base: Any, inputs: Mapping[str, Tensor]) -> None:
    """Compares prompts routed by sentence with their sentences read one after the other, each under its own mixture:
    what `check_paths` compares with twins. The prompts are not padded.

    Raises:
        DLPLoRAError: if they differ.
    """
    expected, min_effect, policy = _logits(base, inputs)[:, :1], MIN_EFFECT[base.dtype], engine.policy
    for scale in SCALES:
        scaled = partial(_choose, policy, scale)
        with engine.using(prompt_routing="sentences", policy=scaled):
            output = engine.model(**inputs, use_cache=True, logits_to_keep=1)
        found = output.logits.float()
        if not _distance(expected, found) < min_effect:
            break
    rows = rows_of(cache_of(output)).rows  # type: ignore[union-attr]
    apart = torch.cat([_sentence_by_sentence(engine, *each) for each in zip(inputs["input_ids"], rows, strict=True)])
    error, change = _distance(found, apart), max(min_effect, _distance(expected, apart))
    if not error <= TOLERANCE[base.dtype] * change:
        raise DLPLoRAError(
            f"prompts routed by sentence differ from their sentences one by one by {error:.1%} of the logits, "
            f"which the adapters change by {change:.1%}; no figures are given"
        )


def _choose(policy: FusionPolicy, scale: float, probabilities: Mapping[str, float]) -> Mixture:
    return Mixture(_times(policy(probabilities), scale))


def _sentence_by_sentence(engine: Engine, ids: Int[Tensor, " seq"], row: RowRouter) -> Float[Tensor, "1 1 vocab"]:
    end = row.prompt_trace[-1].end if row.prompt_trace else 0
    parts = [(s.start, s.end, s.mixture) for s in row.prompt_trace] + [(end, len(ids), row.mixture)]
    output: Any = None
    for start, end, mixture in parts:
        cache = None if output is None else cache_of(output)
        with engine.fixed(mixture), engine.using(kv_policy="keep"):
            output = engine.model(ids[None, start:end], **cache_argument(cache), use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits
    return logits.float()


def _scaled(twin: Twin, inputs: Mapping[str, Tensor], base: Tensor, min_effect: float) -> tuple[float, Tensor]:
    """The scale at which a twin's adapters change the logits by `min_effect`, and its logits then."""
    inputs = {**inputs, **twin.inputs}
    if not twin.mixtures:
        return 1.0, _logits(twin.model, inputs)
    for scale in SCALES:
        with rescale_adapter_scale(twin.model, scale):
            logits = _logits(twin.model, inputs)
        if not _distance(base, logits) < min_effect:
            break
    return scale, logits


def _times(mixtures: Mapping[str, float] | list[dict[str, float]], scale: float) -> Any:
    if isinstance(mixtures, Mapping):
        return {name: scale * weight for name, weight in mixtures.items()}
    return [_times(mixture, scale) for mixture in mixtures]


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _logits(
    model: Any, inputs: Mapping[str, Any], make_cache: Callable[[], Cache] | None = None
) -> Float[Tensor, "batch 2 vocab"]:
    """Those of the last token of each prompt, and of one more behind it on the cache."""
    cache = None if make_cache is None else make_cache()
    read = model(**inputs, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    ids, mask = inputs["input_ids"][:, -1:], inputs.get("attention_mask")
    masks = {} if mask is None else {"attention_mask": torch.cat([mask, torch.ones_like(ids)], dim=1)}
    more = {**inputs, **masks, "input_ids": ids, **cache_argument(cache_of(read))}
    return torch.cat([read.logits, model(**more, use_cache=True).logits], dim=1).float()
