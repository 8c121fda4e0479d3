"""Rows tied to the KV cache that holds their tokens, which they follow wherever it goes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dlp_lora.bank.store import Lease
from dlp_lora.engine.trace import Row

ROWS = "_dlp_lora_rows"

CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before

CACHE_NAME = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)


@dataclass(eq=False)
class CachedRows:
    """The rows behind one KV cache, and every token in it, padding included; `kept` says which are none.

    `lease` keeps the adapters that the rows run with.
    """

    rows: list[Row]
    ids: Tensor  # (batch, seq)
    kept: Tensor  # (batch, seq)
    lease: Lease

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedRows":
        return CachedRows([row.copy() for row in self.rows], self.ids.clone(), self.kept.clone(), self.lease)

    def append(self, ids: Tensor, kept: Tensor) -> None:
        """Adds tokens to every row."""
        self.ids, self.kept = torch.cat([self.ids, ids], dim=1), torch.cat([self.kept, kept], dim=1)


@dataclass(frozen=True)
class LatestRows:
    """The rows of a forward pass and every token so far, whether or not its KV cache is still there."""

    rows: list[Row]
    ids: Tensor  # (batch, seq)


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """The keyword argument that gives a forward pass its KV cache, as this version of transformers names it."""
    return {CACHE_NAME: cache}


def cache_among(values: Iterable[Any]) -> Cache | None:
    """The KV cache among the arguments or the outputs of a forward pass, whatever its name."""
    return next((value for value in values if isinstance(value, Cache)), None)


def cache_of(output: Any) -> Cache | None:
    """The KV cache that a forward pass left in its output."""
    return cache_among(output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ())


def rows_of(cache: Cache | None) -> CachedRows | None:
    """Gives the rows that are tied to a cache."""
    found: CachedRows | None = getattr(cache, ROWS, None)
    return found


def bind(cache: Cache, rows: CachedRows) -> None:
    """Ties rows to a cache, so that whatever reorders the cache reorders them."""
    if not isinstance(cache, Followed):
        # Methods of the instance would refer to it, and its memory would stay until the next garbage collection.
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

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        """Repeats each row of the cache."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        _select(self, torch.arange(len(getattr(self, ROWS).rows)).repeat_interleave(repeats))


@cache
def _followed(kind: type) -> type:
    return type(kind.__name__, (Followed, kind), {})


def _select(cache: Any, indices: Tensor) -> None:
    known: CachedRows = getattr(cache, ROWS)
    order = indices.tolist()
    if order != list(range(len(known.rows))):
        rows = [known.rows[i].copy() for i in order]
        setattr(cache, ROWS, CachedRows(rows, known.ids[indices], known.kept[indices], known.lease))
