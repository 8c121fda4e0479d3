"""Rows: what is known of each row of a batch, tied to the KV cache that holds its tokens.

A row follows its cache wherever that goes: reordered by beam search, copied, cropped, or handed back by the caller with
the next token. Its trace is what a person sees of it: a Sentence each.
"""

import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from dlp_lora.policy import Mixture
from dlp_lora.sentences import Segmenter
from dlp_lora.text import Detokenizer

ROWS = "_dlp_lora_rows"


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One sentence and how it was routed: an entry of a trace.

    `start` and `end` are positions among the generated tokens, or among those of the prompt, padding left out.
    `probabilities` is empty where no router was asked (`fixed`, `disabled`). `switched` is true where the mixture
    differs from the sentence before; `abstained` where the policy chose no adapter, so the base model alone spoke.
    Times are in milliseconds.
    """

    text: str
    start: int
    end: int
    probabilities: dict[str, float]
    mixture: Mixture
    switched: bool
    abstained: bool
    route_ms: float = 0.0
    fuse_ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Gives the sentence as JSON data."""
        return {**self.__dict__, "mixture": dict(self.mixture)}


@dataclass
class Decision:
    """A mixture from some position on, and what led to it."""

    start: int  # in generated tokens
    offset: int  # in characters of the generated text
    mixture: Mixture
    probabilities: dict[str, float] = field(default_factory=dict)
    switched: bool = False
    abstained: bool = False
    route_ms: float = 0.0
    fuse_ms: float = 0.0


@dataclass
class Row:
    """One row of a batch: its prompt with the turns before, what was generated so far and the decisions taken."""

    history: str
    prompt: str
    detokenizer: Detokenizer
    segmenter: Segmenter
    decisions: list[Decision]
    text: str = ""
    num_tokens: int = 0
    ended: bool = False
    prompt_trace: tuple[Sentence, ...] = ()

    @property
    def mixture(self) -> Mixture:
        """The mixture in force."""
        return self.decisions[-1].mixture

    def push(self, token: int) -> list[int]:
        """Adds a generated token; returns the offsets of the sentences it opens."""
        self.num_tokens += 1
        piece = self.detokenizer.push(token)
        if not piece:
            return []
        self.text += piece
        return self.segmenter.push(piece)

    def finish(self, tokens: Sequence[int]) -> None:
        """Adds the tokens that were sampled but never encoded (the last one is not), and any held-back text."""
        for token in tokens[self.num_tokens :]:
            self.push(token)
        self.text += self.detokenizer.flush()

    def copy(self) -> "Row":
        """Returns a copy that goes its own way."""
        return Row(
            self.history,
            self.prompt,
            self.detokenizer.copy(),
            self.segmenter.copy(),
            list(self.decisions),
            self.text,
            self.num_tokens,
            self.ended,
            self.prompt_trace,
        )

    def sentences(self) -> list[Sentence]:
        """The trace so far; its spans tile the tokens, its texts the text."""
        ends = [(d.start, d.offset) for d in self.decisions[1:]] + [(self.num_tokens, len(self.text))]
        return [
            Sentence(
                text=self.text[d.offset : offset],
                start=d.start,
                end=end,
                probabilities=d.probabilities,
                mixture=d.mixture,
                switched=d.switched,
                abstained=d.abstained,
                route_ms=d.route_ms,
                fuse_ms=d.fuse_ms,
            )
            for d, (end, offset) in zip(self.decisions, ends, strict=True)
        ]


@dataclass
class CachedRows:
    """The rows behind one KV cache, and every token in it, padding included."""

    rows: list[Row]
    ids: Tensor  # (batch, seq)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedRows":
        return CachedRows([row.copy() for row in self.rows], self.ids.clone())


def rows_of(cache: Cache | None) -> CachedRows | None:
    """Gives the rows that are tied to a cache."""
    found: CachedRows | None = getattr(cache, ROWS, None)
    return found


def bind(cache: Cache, rows: CachedRows) -> None:
    """Ties rows to a cache, so that whatever reorders the cache reorders them."""
    if not hasattr(cache, ROWS):
        for follow in (reorder_cache, batch_select_indices, batch_repeat_interleave):
            setattr(cache, follow.__name__, types.MethodType(follow, cache))
    setattr(cache, ROWS, rows)


def reorder_cache(cache: Any, beam_idx: Tensor) -> None:
    """Reorders a bound cache and its rows, as beam search does."""
    type(cache).reorder_cache(cache, beam_idx)
    _select(cache, beam_idx)


def batch_select_indices(cache: Any, indices: Tensor) -> None:
    """Selects rows of a bound cache."""
    type(cache).batch_select_indices(cache, indices)
    _select(cache, indices)


def batch_repeat_interleave(cache: Any, repeats: int) -> None:
    """Repeats each row of a bound cache."""
    type(cache).batch_repeat_interleave(cache, repeats)
    _select(cache, torch.arange(len(getattr(cache, ROWS).rows)).repeat_interleave(repeats))


def _select(cache: Any, indices: Tensor) -> None:
    known: CachedRows = getattr(cache, ROWS)
    order = indices.tolist()
    if order != list(range(len(known.rows))):
        setattr(cache, ROWS, CachedRows([known.rows[i].copy() for i in order], known.ids[indices]))
