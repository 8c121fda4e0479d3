"""KV caches: the rows that are tied to one, and rows of one that are encoded again.

A row follows its cache, even if the cache is reordered by beam search, copied, cropped, or passed again with the next
token.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache as cached
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, cache_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

from dlp_lora.bank.store import Lease
from dlp_lora.engine.routing import RowRouter

ROWS = "_dlp_lora_rows"
CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before
CACHE_NAME = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)

# The arguments to make another layer of the same kind. A subclass may store its tensors in another way.
_LAYERS: Mapping[str, tuple[str, ...]] = {
    "DynamicLayer": (),
    "DynamicSlidingWindowLayer": ("sliding_window",),
    "StaticLayer": ("max_cache_len",),
    "StaticSlidingWindowLayer": ("max_cache_len", "sliding_window"),
    "DummyLayer": (),
    "LinearAttentionLayer": ("number_of_states",),
    "LinearAttentionAndFullAttentionLayer": ("number_of_states",),
    "LinearAttentionAndSlidingWindowAttentionLayer": ("sliding_window", "number_of_states"),
    "LinearAttentionAndStaticFullAttentionLayer": ("max_cache_len", "number_of_states"),
    "LinearAttentionAndStaticSlidingWindowAttentionLayer": ("max_cache_len", "sliding_window", "number_of_states"),
}


@dataclass(eq=False)
class CachedRows:
    """The rows of one KV cache, and all its tokens with padding; `kept` is false for padding.

    `others` are the images and other arguments of the prompts' pass, None if they no longer belong to the rows.
    """

    rows: list[RowRouter]
    ids: Tensor  # (batch, seq)
    kept: Tensor  # (batch, seq)
    lease: Lease | None = None  # on the rows' adapters
    others: Mapping[str, Any] | None = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedRows":
        rows = [row.copy() for row in self.rows]
        return CachedRows(rows, self.ids.clone(), self.kept.clone(), self.lease, self.others)

    def append(self, ids: Tensor, kept: Tensor) -> None:
        """Adds tokens to every row."""
        self.ids, self.kept = torch.cat([self.ids, ids], dim=1), torch.cat([self.kept, kept], dim=1)


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """The name of the keyword argument for the KV cache in this version of transformers."""
    return {CACHE_NAME: cache}


def cache_among(values: Iterable[Any]) -> Cache | None:
    """The KV cache among the arguments or the outputs of a forward pass, whatever its name."""
    return next((value for value in values if isinstance(value, Cache)), None)


def cache_of(output: Any) -> Cache | None:
    """The KV cache in the output of a forward pass."""
    return cache_among(output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ())


def rows_of(cache: Cache | None) -> CachedRows | None:
    """Gives the rows that are tied to a cache."""
    rows: CachedRows | None = getattr(cache, ROWS, None)
    return rows


def bind(cache: Cache, rows: CachedRows) -> None:
    """Ties rows to a cache, so that they are reordered with it."""
    if not isinstance(cache, Followed):
        # Methods on the instance would refer to it and keep its memory until the next garbage collection.
        kind: Any = type(cache)
        cache.__class__ = _followed(kind)
    setattr(cache, ROWS, rows)


class Followed:
    """A KV cache whose rows follow it."""

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        """Reorders the cache and its rows, as beam search does."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        _select(self, beam_idx)

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        """Selects rows of the cache."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        _select(self, indices)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy has copies of the rows."""
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(deepcopy(vars(self), memo))
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle saves the original cache without rows, which belong to an engine."""
        kind = type(self).__mro__[2]
        return object.__new__, (kind,), {name: value for name, value in vars(self).items() if name != ROWS}

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        """Repeats each row of the cache."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        _select(self, torch.arange(len(getattr(self, ROWS).rows)).repeat_interleave(repeats))


def check_rewritable(cache: Cache | None) -> None:
    """Checks that rows of a cache can be encoded again and written back.

    Raises:
        ValueError: if some layer does not store each row as plain tensors.
    """
    if cache is None:
        return
    kinds = [type(layer).__name__ for layer in cache.layers]
    if getattr(cache, "offloading", False):
        kinds = [f"offloaded {kind}" for kind in kinds]
    if strange := next((kind for kind in kinds if kind not in _LAYERS), None):
        raise ValueError(
            f"kv_policy='recompute' writes rows of the KV cache again, which a {type(cache).__name__} of {strange}s "
            "does not allow; leave cache_implementation out, or use kv_policy='keep'"
        )


def empty_like(cache: Cache) -> Cache:
    """Makes an empty cache with the same kinds of layers."""
    return Cache(layers=[_empty_layer(layer) for layer in cache.layers])


def as_wide_as(cache: Cache, mask: Tensor) -> Tensor:
    """Pads a mask of tokens to the length of a static cache, as `generate` does, because Bloom builds its biases from
    it.

    Linear attention multiplies its inputs by the mask, so there the mask keeps their width.
    """
    if any(hasattr(layer, "conv_states") for layer in cache.layers):
        return mask
    num_places = max((getattr(layer, "max_cache_len", None) or 0 for layer in cache.layers), default=0)
    return F.pad(mask, (0, max(num_places - mask.shape[1], 0)))


def write_rows(cache: Cache, rows: Sequence[int], source: Cache, *, source_rows: Sequence[int]) -> None:
    """Writes rows of one cache (`source_rows` of `source`) over rows of another of equal length, in place."""
    for layer, other in zip(cache.layers, source.layers, strict=True):
        for target, new in zip(_tensors(layer), _tensors(other), strict=True):
            with torch.inference_mode(target.is_inference()):
                new = new.to(target.device)[list(source_rows)]
                target.index_copy_(0, torch.tensor(rows, device=target.device), new)


@cached
def _followed(kind: type) -> type:
    return type(kind.__name__, (Followed, kind), {})


def _tensors(layer: Any) -> list[Tensor]:
    """The tensors of a cache's layer with a row axis: keys, values, and the states of linear attention."""
    tensors = [getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states")]
    each = [part for value in tensors for part in (value.values() if isinstance(value, dict) else [value])]
    return [part for part in each if part is not None]


def _empty_layer(layer: Any) -> Any:
    kind = type(layer).__name__
    # A static layer without a named window has a window of its length.
    values = {"sliding_window": getattr(layer, "sliding_window", None) or getattr(layer, "max_cache_len", None)}
    values |= {name: getattr(layer, name) for name in _LAYERS[kind] if hasattr(layer, name)}
    return getattr(cache_utils, kind)(**{name: values[name] for name in _LAYERS[kind] if name in values})


def _select(cache: Any, indices: Tensor) -> None:
    known: CachedRows = getattr(cache, ROWS)
    order = indices.tolist()
    if order != list(range(len(known.rows))):
        rows = [known.rows[i].copy() for i in order]
        # Images belong to rows, but it is not known to which.
        others = None if known.others != {} else known.others
        setattr(cache, ROWS, CachedRows(rows, known.ids[indices], known.kept[indices], known.lease, others))
