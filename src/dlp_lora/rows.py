"""Rows: what is known of each row of a batch, tied to the KV cache that holds its tokens.

A row follows its cache wherever that goes: reordered by beam search, copied, cropped, or handed back by the caller with
the next token. Its trace is what a person sees of it: a Sentence each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dlp_lora.policy import Mixture
from dlp_lora.sentences import Segmenter
from dlp_lora.text import Detokenizer

ROWS = "_dlp_lora_rows"
CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before
CACHE_NAME = next(name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One sentence and how it was routed: an entry of a trace.

    `start` and `end` are positions among the generated tokens, or among those of the prompt, padding left out.
    `probabilities` is empty where no router was asked (`fixed`, `disabled`). `switched` is true where the mixture
    differs from the sentence before; `abstained` where the policy chose no adapter: the base model alone went on,
    or with `Switching(unsure="keep")` the mixture in use.
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


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generated answer: its text, its tokens (the last may be end-of-sequence), and its trace by sentence.

    `prompt_trace` is that of a prompt whose sentences were routed each; its positions are among the prompt's tokens.
    """

    text: str
    tokens: tuple[int, ...]
    trace: tuple[Sentence, ...]
    prompt_trace: tuple[Sentence, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Gives the answer as JSON data."""
        traces = {"prompt_trace": self.prompt_trace} if self.prompt_trace else {}
        return {
            "text": self.text,
            **{name: [s.to_dict() for s in trace] for name, trace in {**traces, "trace": self.trace}.items()},
        }


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
    questions: tuple[str, ...] = ()  # of the prompt, if it asks several

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

    def has_read(self, read: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether it has followed an answer to its last token but one; `read` are the tokens that were encoded."""
        n = self.num_tokens
        return len(answer) - 1 <= n <= len(answer) and list(read[:n]) == list(answer[:n])

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
            self.questions,
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


@dataclass(eq=False)
class CachedRows:
    """The rows behind one KV cache, and every token in it, padding included; `kept` says which are none."""

    rows: list[Row]
    ids: Tensor  # (batch, seq)
    kept: Tensor  # (batch, seq)
    alive: "Alive"

    def __post_init__(self) -> None:
        self.alive[id(self)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> "CachedRows":
        return CachedRows([row.copy() for row in self.rows], self.ids.clone(), self.kept.clone(), self.alive)

    def append(self, ids: Tensor, kept: Tensor) -> None:
        """Adds tokens to every row."""
        self.ids, self.kept = torch.cat([self.ids, ids], dim=1), torch.cat([self.kept, kept], dim=1)


Alive = WeakValueDictionary[int, CachedRows]
"""The rows of every KV cache that is still there."""


@dataclass(frozen=True)
class LatestRows:
    """The rows of a forward pass and every token so far, whether or not its KV cache is still there."""

    rows: list[Row]
    ids: Tensor  # (batch, seq)


def adapters_of(alive: Alive) -> set[str]:
    """Names the adapters that rows run with: those of their mixtures, and of the sentences of their prompts."""
    caches = [cached for found in alive.valuerefs() if (cached := found()) is not None]
    rows = [row for cached in caches for row in cached.rows]
    mixtures = [mixture for row in rows for mixture in (row.mixture, *(s.mixture for s in row.prompt_trace))]
    return {name for mixture in mixtures for name in mixture}


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
        setattr(cache, ROWS, CachedRows(rows, known.ids[indices], known.kept[indices], known.alive))
