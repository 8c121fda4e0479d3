"""Backends: a request in, a stream of events out. The HTTP front knows only this interface.

A request has token ids, and the settings of routing and sampling. Its stream has a `SentenceStart` before the first
token of each sentence, a `Token` for each token, and `Done` at the end. If the request fails, the stream raises the
error.
"""

from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
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
from dlp_lora.serve.prompt_router import PromptRouter


class BackendError(DLPLoRAError):
    """A request that a backend could not answer; `__cause__` has the error."""


class QueueFullError(BackendError):
    """The queue is full; try again later."""


class ClosedError(BackendError):
    """The backend is closing or closed: it takes no requests, and ends those that run longer than the drain time."""


class UnavailableError(BackendError):
    """The vLLM servers are not available now; try again in a moment."""


@runtime_checkable
class Grammar(Protocol):
    """The state of one answer in a grammar; only the backend calls it, from one thread. A backend with other grammars
    uses the schema instead.
    """

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema that the answer follows."""
        ...

    def mask(self, scores: Float[Tensor, " vocab"]) -> None:
        """Sets the scores of the tokens that may not come next to minus infinity, in place."""
        ...

    def accept(self, token: int) -> bool:
        """Adds a token; returns whether the answer is complete, so that no token may follow."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling of one answer's tokens, and the conditions of its end.

    Scores are changed in this order: logit bias, repetition penalty (of prompt and answer), frequency and presence
    penalties (of the answer), temperature, top-k, top-p, min-p. A `temperature` of 0 is greedy; a `top_k` of 0, a
    `top_p` of 1 and a `min_p` of 0 keep all tokens. With a `seed`, the answer does not depend on other requests.

    An answer ends with an ending token (`Call.endings`, unless `ignore_eos`; `stop_token_ids`), with one of the `stop`
    strings, or after `max_tokens`. With None it may use the model's whole context, and with 0 only the prompt is read.
    Ending tokens and stop strings count only after `min_tokens`. The text of a stream ends before the stop string.

    `num_logprobs` adds the log-probability of each token and of so many most likely ones, `num_prompt_logprobs` the
    same for the prompt's tokens. They use the model's scores before the changes above. With a `grammar`, the mixture of
    the prompt stays for the whole answer.
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

    `call` has the settings of routing: settings, router, segmenter, endings; if it has `mixtures`, with one mixture,
    this one is fixed. The router may choose among `adapters`, or all with None. `prompt` is the router's context; with
    None it comes from the tokens.
    """

    tokens: tuple[int, ...]
    call: Call
    sampling: Sampling = Sampling()
    prompt: Prompt | None = None
    adapters: frozenset[str] | None = None
    id: str = ""

    def among(self, held: Collection[str]) -> frozenset[str]:
        """The adapters that the router may choose, of those that the answer holds from its start to its end."""
        return frozenset(held) if self.adapters is None else self.adapters & frozenset(held)


@dataclass(frozen=True, kw_only=True)
class SentenceStart:
    """A sentence of the answer begins; the next `Token` is its first.

    `position` is the number of the answer's tokens before it, `offset` the number of characters: the first token's text
    may begin with the end of the sentence before. The other fields are those of `trace.Sentence` that are known.
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
    """The log-probability of each token of the prompt after those before it, None for the first; and of the most likely
    ones there, by token id, the likeliest first. It comes before the first token.
    """

    logprobs: tuple[float | None, ...]
    top: tuple[Mapping[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of the answer, and its text. The text is empty if a character is not complete or may begin a stop
    string; it then comes with a later token. Together, the texts of a stream are the answer.

    `top` are the log-probabilities of the most likely tokens, by token id, the likeliest first.
    """

    id: int
    position: int
    text: str
    logprob: float | None = None
    top: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The numbers of a request's tokens; `cached_tokens` of the prompt's came from stored KV."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Times:
    """The seconds that a request waited, that reading its prompt took, and that answering took."""

    queued_s: float
    prompt_s: float
    answer_s: float


@dataclass(frozen=True, kw_only=True)
class Done:
    """The end of a stream.

    `reason` is "stop", "length", or "abort" after `cancel`. With "stop", `stop` is the string or the token id, or None
    for an end-of-sequence token or the end of a grammar. `text` is the text that was held back. `generation` is the
    result of `Engine.generate`: its text includes stop strings.
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
    """The events of one request, for one reader: a thread iterates it, or a task does with `async for`.

    It ends after `Done`, or raises the DLPLoRAError that ended the request.
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
    """A backend's state, and its totals since it was made (`num_...`, `..._s`)."""

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
    """Whether a backend can answer, and if not, why; and whether it never will again."""

    is_alive: bool
    reason: str = ""
    is_lost: bool = False


@runtime_checkable
class Backend(Protocol):
    """Answers requests; all methods may be called from any thread, and none waits for the model, but `close`."""

    @property
    def program(self) -> str:
        """The program that computes the tokens, with its release."""
        ...

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        ...

    @property
    def max_context(self) -> int:
        """The largest number of tokens of a prompt and its answer."""
        ...

    @property
    def max_open(self) -> int:
        """The largest number of requests that run or wait."""
        ...

    @property
    def prompt_router(self) -> PromptRouter:
        """Routes prompts as the backend does, without answers."""
        ...

    @property
    def health(self) -> Health:
        """Whether it can answer."""
        ...

    def stats(self) -> Stats:
        """Its state and its totals."""
        ...

    def open(self, request: Request) -> Stream:
        """Takes a request, as `open_all` does."""
        ...

    def open_all(self, requests: Sequence[Request]) -> Sequence[Stream]:
        """Takes requests, all of them or none.

        Raises:
            PromptError: if a prompt is empty or does not fit into the model's context with `max_tokens`.
            QueueFullError, ClosedError: if it has no room for all of them now.
        """
        ...

    def check_adapter(self, path: str | Path, name: str) -> None:
        """Checks a folder that may become an adapter, whether its name is taken or not.

        Raises:
            AdapterError: if it cannot be read or does not fit.
        """
        ...

    def put_adapters(self, folders: Mapping[str, str | Path]) -> None:
        """Adds adapters from folders of this machine, while requests run; takes as long as to read them.

        Each replaces another one of its name, which running requests keep. The adapters change at once when all new
        ones can be used; until then, and in case of an error, requests get the old ones.

        Raises:
            AdapterError: if one cannot be read or does not fit.
        """
        ...

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter; running requests keep it.

        Raises:
            AdapterError: if there is none of this name.
        """
        ...

    def close(self, *, drain_s: float = 0.0) -> None:
        """Takes no more requests, waits so long for running ones, and ends the others with a ClosedError."""
        ...
