"""Backends: a request in, a stream of events out. This is all that the HTTP front knows of what answers.

A request is token ids, how its answer is routed, and how its tokens are sampled. Its stream gives a `SentenceStart`
before the first token of each sentence, a `Token` for each token, and `Done` at the end. A failure is raised by the
stream, from whichever event on.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from dlp_lora.engine.calls import Call
from dlp_lora.engine.routing import Prompt
from dlp_lora.engine.trace import Generation
from dlp_lora.errors import DLPLoRAError
from dlp_lora.policy import Mixture


class BackendError(DLPLoRAError):
    """A request that a backend could not answer; what led to it is the cause."""


class QueueFullError(BackendError):
    """As many requests wait as may; try again later."""


class ClosedError(BackendError):
    """The backend is closing or closed: it takes no request, and cuts those that outlast the time to drain."""


class UnavailableError(BackendError):
    """What computes the answers is not there now; try again in a moment."""


@runtime_checkable
class Grammar(Protocol):
    """Where one answer stands in a grammar; only the backend calls it, from one thread. A backend with grammars of
    its own follows the schema instead.
    """

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema that the answer follows."""
        ...

    def mask(self, scores: Float[Tensor, " vocab"]) -> None:
        """Sets the scores of the tokens that may not come next to minus infinity, in place."""
        ...

    def accept(self, token: int) -> bool:
        """Adds the token that came; gives whether the answer is complete, so that nothing may follow."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one answer are sampled, and where it ends.

    Scores are changed in this order: logit bias, repetition penalty (of prompt and answer), frequency and presence
    penalties (of the answer), temperature, top-k, top-p, min-p. A `temperature` of 0 is greedy; a `top_k` of 0, a
    `top_p` of 1 and a `min_p` of 0 leave all tokens. A `seed` gives the same answer whatever else runs.

    An answer ends with a token that ends it (`Call.endings`, unless `ignore_eos`; `stop_token_ids`), where its text
    holds one of `stop`, or after `max_tokens`; None goes on to the end of the model's context, and 0 reads the prompt
    alone. Before `min_tokens` it ends with none of the former. The text of a stream ends before the stop string.

    `num_logprobs` asks for the log-probability of each token and of so many most likely ones, `num_prompt_logprobs`
    for those of the prompt's tokens, by the model's own scores, before any of the above; None asks for none.
    While a `grammar` holds, the mixture of the prompt stays for the whole answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        at_least = {"temperature": 0, "top_k": 0, "max_tokens": 0, "min_tokens": 0}
        at_least |= {"num_logprobs": 0, "num_prompt_logprobs": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # true for NaN, too
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to a backend.

    `call` says how the answer is routed: settings, router, segmenter, endings; with `mixtures` of one mixture, it is
    fixed. `adapters` are those that the router may choose among, None for all that there are. `prompt` is what the
    router reads; None takes it from the tokens.
    """

    tokens: tuple[int, ...]
    call: Call
    sampling: Sampling = Sampling()
    prompt: Prompt | None = None
    adapters: frozenset[str] | None = None
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class SentenceStart:
    """A sentence of the answer opens; the next `Token` is its first.

    `position` counts the tokens of the answer before it, `offset` the characters: the text of the token that opens a
    sentence may hold the end of the one before. The other fields are those of `trace.Sentence`, as far as known yet.
    """

    number: int
    position: int
    offset: int
    mixture: Mixture
    probabilities: Mapping[str, float]
    switched: bool
    abstained: bool
    route_ms: float


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """The log-probability of each token of the prompt given those before it, None for the first; and of the most
    likely ones there, by token id, the likeliest first. It comes before the first token.
    """

    logprobs: tuple[float | None, ...]
    top: tuple[Mapping[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of the answer, and the text that is certain since: none while a character is not complete or a stop
    string may have begun. The texts of a stream concatenate to the answer.

    `top` are the log-probabilities of the most likely tokens, by token id, the likeliest first.
    """

    id: int
    position: int
    text: str
    logprob: float | None = None
    top: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How many tokens a request took; `cached_tokens` of the prompt's were not encoded, as their KV was kept."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Times:
    """How many seconds a request waited, how long its prompt was read, and how long it was answered."""

    queued_s: float
    prompt_s: float
    answer_s: float


@dataclass(frozen=True, kw_only=True)
class Done:
    """The end of a stream.

    `reason` is "stop" (`stop` is the string or the token id that it was, None for an end-of-sequence token or the end
    of a grammar), "length", or "abort" after `cancel`. `text` is what was held back until now.
    `generation` is what `Engine.generate` would have given: its text goes on to the last token, stop strings included.
    """

    reason: Literal["stop", "length", "abort"]
    stop: str | int | None
    text: str
    generation: Generation
    usage: Usage
    times: Times


Event = SentenceStart | PromptScores | Token | Done


@runtime_checkable
class Stream(Protocol):
    """The events of one request as they come, to one reader: a thread iterates it, or a task does with `async for`.

    After `Done` it ends. It raises the DLPLoRAError that ended the request instead.
    """

    def __iter__(self) -> Iterator[Event]: ...

    def __next__(self) -> Event: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    def cancel(self) -> None:
        """Ends the request soon, from any thread and at any time; a `Done` with the reason "abort" follows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a backend does now, and has done since it was made (`num_...`, `..._s`)."""

    waiting: int  # requests whose prompt is not begun
    reading: int  # rows whose prompt is read, or whose context is under another mixture
    decoding: int  # rows that a step gives a token
    kept_bytes: int  # of the KV of finished rows
    num_steps: int
    num_step_tokens: int  # that steps gave: by num_steps, the mean batch
    num_read_tokens: int  # that were encoded otherwise: prompts, and contexts again
    num_cached_tokens: int  # of prompts, that were not encoded
    num_switches: int
    route_s: float
    fuse_s: float


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether a backend can answer, and if not, why."""

    is_alive: bool
    reason: str = ""


@runtime_checkable
class Backend(Protocol):
    """Answers requests; all methods may be called from any thread, and none waits for the model, but `close`."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that there are."""
        ...

    @property
    def max_context(self) -> int:
        """How many tokens a prompt and its answer may have."""
        ...

    @property
    def health(self) -> Health:
        """Whether it can answer."""
        ...

    def stats(self) -> Stats:
        """What it does now, and has done."""
        ...

    def open(self, request: Request) -> Stream:
        """Takes a request.

        Raises:
            PromptError: if the prompt is empty or does not fit into the model's context with `max_tokens`.
            QueueFullError, ClosedError: if it takes none now.
        """
        ...

    def check_adapter(self, path: str | Path, name: str) -> None:
        """Checks a folder that may become an adapter, whether its name is taken or not.

        Raises:
            AdapterError: if it cannot be read or does not fit.
        """
        ...

    def add_adapter(self, path: str | Path, name: str) -> None:
        """Adds an adapter from a folder of this machine, while requests run; takes as long as to read it.

        Raises:
            AdapterError: if it cannot be read or does not fit, or its name is taken.
        """
        ...

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter; requests that run with it keep it.

        Raises:
            AdapterError: if there is none of this name.
        """
        ...

    def close(self, *, drain_s: float = 0.0) -> None:
        """Takes no more requests, waits so long for those that run, and ends the others with a ClosedError."""
        ...
