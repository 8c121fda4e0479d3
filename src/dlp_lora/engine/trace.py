"""Traces: for each sentence of an answer, its adapters, the probabilities and the times."""

from dataclasses import dataclass, field
from typing import Any

from dlp_lora.policy import Mixture


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One sentence with its routing: an entry of a trace.

    `start` and `end` are positions among the generated tokens, or among those of the prompt, padding left out.
    `probabilities` is empty if no router ran (`fixed`, `disabled`). `switched` is true if the mixture differs from that
    of the sentence before. `abstained` is true if the policy chose no adapter: then the base model continued, or with
    `Switching(unsure="keep")` the mixture in use. Times are in milliseconds; `encode_ms` is for encoding the context
    again, which "recompute" does at a switch. `kept_tokens` is for backends that keep only whole blocks of the context:
    the number of tokens that a switch under "keep" has kept.
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
    encode_ms: float = 0.0
    kept_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Gives the sentence as JSON data."""
        data = {**self.__dict__, "mixture": dict(self.mixture)}
        if self.kept_tokens is None:
            del data["kept_tokens"]
        return {**data, "left_out": list(self.mixture.left_out)} if self.mixture.left_out else data


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generated answer: its text, its tokens (the last may be end-of-sequence), and its trace by sentence.

    `prompt_trace` is the trace of a prompt that is routed by sentences; its positions are among the prompt's tokens.
    `prompt_tokens` are the tokens that the model read. An answer to questions apart has `parts`, one answer per
    question: its text joins theirs with line breaks, its tokens and trace are theirs in order, and `prompt_tokens` are
    only in the parts.
    """

    text: str
    tokens: tuple[int, ...]
    trace: tuple[Sentence, ...]
    prompt_trace: tuple[Sentence, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    parts: tuple["Generation", ...] = ()

    @property
    def num_prompt_tokens(self) -> int:
        """The number of tokens that the model read before its answer, in the contexts of all parts."""
        return sum(part.num_prompt_tokens for part in self.parts) if self.parts else len(self.prompt_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Gives the answer as JSON data."""
        traces = {"prompt_trace": self.prompt_trace} if self.prompt_trace else {}
        return {
            "text": self.text,
            **{name: [s.to_dict() for s in trace] for name, trace in {**traces, "trace": self.trace}.items()},
            **({"parts": [part.to_dict() for part in self.parts]} if self.parts else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A mixture from some position on, with its decision; `fuse_ms` is None until it is fused."""

    start: int = 0  # in generated tokens
    offset: int = 0  # in characters of the generated text
    mixture: Mixture
    probabilities: dict[str, float] = field(default_factory=dict)
    switched: bool = False
    abstained: bool = False
    route_ms: float = 0.0
    fuse_ms: float | None = None
    encode_ms: float = 0.0
    kept_tokens: int | None = None

    def sentence(self, text: str, start: int, end: int) -> Sentence:
        """Returns the sentence of this decision."""
        return Sentence(
            text=text,
            start=start,
            end=end,
            probabilities=self.probabilities,
            mixture=self.mixture,
            switched=self.switched,
            abstained=self.abstained,
            route_ms=self.route_ms,
            fuse_ms=self.fuse_ms or 0.0,
            encode_ms=self.encode_ms,
            kept_tokens=self.kept_tokens,
        )
