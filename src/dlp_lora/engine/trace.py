"""Rows: what is known of each row of a batch, tied to the KV cache that holds its tokens.

A row follows its cache wherever that goes: reordered by beam search, copied, cropped, or handed back by the caller with
the next token. Its trace is what a person sees of it: a Sentence each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dlp_lora.engine.text import Detokenizer
from dlp_lora.policy import Mixture
from dlp_lora.sentences import Segmenter


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
