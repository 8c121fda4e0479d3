"""One row: a request that is answered, where it stands, and the events that its stream is told."""

import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dlp_lora.bank.store import Lease
from dlp_lora.engine.calls import Endings
from dlp_lora.engine.routing import RowRouter
from dlp_lora.engine.trace import Generation
from dlp_lora.policy import Mixture
from dlp_lora.sentences import Segmenter
from dlp_lora.serve.backend import Done, PromptScores, Request, SentenceStart, Times, Token, Usage
from dlp_lora.serve.cache import SpareCache
from dlp_lora.serve.kept import Content
from dlp_lora.serve.sampler import Sampler, logprobs
from dlp_lora.serve.stream import EventStream

State = Literal["queued", "loading", "waiting", "reading", "decoding", "ended", "failed"]


class OneSentence:
    """A segmenter for answers whose mixture stays: it finds no sentence but the first."""

    def push(self, text: str) -> list[int]:
        """Finds no start."""
        return []

    def copy(self) -> Segmenter:
        """Gives itself, as it remembers nothing."""
        return self


@dataclass(eq=False)
class Row:
    """A request and its answer so far. `tokens` are those of the prompt and the answer, `num_prompt` of them the
    prompt's; `contents` says what each token in the KV cache was encoded under.

    It is queued until its prompt is routed; loads adapters; waits until its prompt, or its context under another
    mixture, is read; is read, into a cache of its own; decodes, in the batch's cache; and has ended or failed.
    """

    request: Request
    stream: EventStream
    max_tokens: int
    state: State = "queued"
    tokens: list[int] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    cache: SpareCache | None = None  # while it is read
    lease: Lease | None = None
    content: Content = b""  # of the mixture in force
    planned: list[Content] = field(default_factory=list)  # what `contents` will be when all is read
    num_cached: int = 0  # tokens of the prompt that were kept from another request
    opened_s: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)
        self.num_prompt = len(self.tokens)
        self.router: RowRouter | None = None
        self.sampler: Sampler | None = None
        self.encode_ms = self.fuse_ms = 0.0  # of reading it since its last switch
        self.scores = PromptScores(logprobs=(), top=())
        self._read_s = self._answer_s = self.opened_s
        self._num_sent = 0  # characters
        self._num_started = 0  # sentences
        self._search_from = 0  # characters: stop strings before do not count

    @property
    def num_tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.tokens) - self.num_prompt

    @property
    def has_answer(self) -> bool:
        """Whether the prompt has been read once, and what is read now is its context under another mixture."""
        return self.num_tokens > 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing is to be done for it any more."""
        return self.state in ("ended", "failed")

    @property
    def routed(self) -> RowRouter:
        """Its routing, which has begun."""
        assert self.router is not None
        return self.router

    def leased(self, mixture: Mixture) -> Mixture:
        """Gives a mixture of the row by the names that the bank calls its adapters by now."""
        assert self.lease is not None
        return self.lease.of(mixture)

    def begin(self, router: RowRouter, device: torch.device) -> None:
        """Takes the routing of its prompt."""
        sampling = self.request.sampling
        self.router = router
        ends = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self.request.call.endings.eos_ids)
        self.sampler = Sampler(sampling, self.tokens, ends, device)
        self._announce()

    def begin_reading(self) -> None:
        """Notes that its prompt is read from now on."""
        self.state = "reading"
        if not self.has_answer:
            self._read_s = time.perf_counter()

    def add_prompt_scores(self, logits: Float[Tensor, "seq vocab"]) -> None:
        """Takes the scores that tokens of the prompt were given, chunk by chunk; the last ones are the answer's."""
        num_top = self.request.sampling.num_prompt_logprobs or 0
        first = len(self.contents) - len(logits)
        given, tops = [*self.scores.logprobs], [*self.scores.top]
        if not first:
            given.append(None)
            tops.append({})
        for i, scores in enumerate(logits):
            if first + i + 1 < self.num_prompt:
                logprob, top = logprobs(scores, self.tokens[first + i + 1], num_top)
                given.append(logprob)
                tops.append(top)
        self.scores = PromptScores(logprobs=tuple(given), top=tuple(tops))
        if len(given) == self.num_prompt:
            self.stream.put(self.scores)

    def take(self, token: int, scores: Float[Tensor, " vocab"]) -> bool:
        """Adds the token that was sampled, and routes the sentence that it opens; tells the stream.

        Returns:
            Whether the mixture changed. Where the token ends the answer, the state is "ended".
        """
        assert self.sampler is not None
        sampling, router = self.request.sampling, self.routed
        if not self.has_answer:
            self._answer_s = time.perf_counter()
        self.tokens.append(token)
        self.sampler.add(token)
        logprob, top = (
            logprobs(scores, token, sampling.num_logprobs) if sampling.num_logprobs is not None else (None, {})
        )
        event = Token(id=token, position=self.num_tokens - 1, text="", logprob=logprob, top=top)
        if (end := self._end(token)) is not None:
            self._finish(end, event)
            return False
        switched = router.push(token)
        if self.num_tokens <= sampling.min_tokens:
            self._search_from = len(router.text)
        self._announce()
        self.stream.put(replace(event, text=self._settled()))
        return switched

    def finish_empty(self) -> None:
        """Ends a request whose prompt alone was to be read."""
        self._finish(_End(reason="length"), None)

    def abort(self) -> None:
        """Ends the answer where it is, as its reader asked."""
        self._finish(_End(reason="abort"), None)

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error."""
        self.state = "failed"
        self.lease = None
        self.stream.fail(error)

    def _end(self, token: int) -> "_End | None":
        sampling = self.request.sampling
        is_complete = sampling.grammar is not None and sampling.grammar.accept(token)
        if self.num_tokens > sampling.min_tokens:
            if token in sampling.stop_token_ids:
                return _End(reason="stop", stop=token)
            if (end := self._stop_string(token)) is not None:
                return end
        if is_complete or (token in self.request.call.endings.eos_ids and not sampling.ignore_eos):
            return _End(reason="stop")
        return _End(reason="length") if self.num_tokens >= self.max_tokens else None

    def _stop_string(self, token: int) -> "_End | None":
        stops = self.request.sampling.stop
        if not stops:
            return None
        text = self.routed.text
        whole = text + self.routed.detokenizer.copy().push(token)
        first = max(self._search_from, len(text) - max(map(len, stops)) + 1)
        found = [(at, stop) for stop in stops if (at := whole.find(stop, first)) >= 0]
        if not found:
            return None
        at, stop = min(found, key=lambda pair: pair[0])
        return _End(reason="stop", stop=stop, at=at)

    def _settled(self) -> str:
        """The text that is certain since it was last asked for."""
        text = self.routed.text
        end = len(text) - _begun(text, self.request.sampling.stop, self._search_from)
        piece = text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return piece

    def _announce(self) -> None:
        decisions = self.routed.decisions
        for number in range(self._num_started, len(decisions)):
            decision = decisions[number]
            self.stream.put(
                SentenceStart(
                    number=number,
                    position=decision.start,
                    offset=decision.offset,
                    mixture=decision.mixture,
                    probabilities=decision.probabilities,
                    switched=decision.switched,
                    abstained=decision.abstained,
                    route_ms=decision.route_ms,
                )
            )
        self._num_started = len(decisions)

    def _finish(self, end: "_End", event: Token | None) -> None:
        now = time.perf_counter()
        answer = self.tokens[self.num_prompt :]
        generation = Generation(text="", tokens=(), trace=()) if self.router is None else self.router.generation(answer)
        generation = replace(generation, prompt_tokens=self.request.tokens)
        rest = generation.text[self._num_sent : end.at]
        if event is not None:
            self.stream.put(replace(event, text=rest))
            rest = ""
        read_s = self._read_s if self.state in ("reading", "decoding") or self.has_answer else now
        answer_s = self._answer_s if self.has_answer else now
        self.state = "ended"
        self.lease = None
        self.stream.put(
            Done(
                reason=end.reason,
                stop=end.stop,
                text=rest,
                generation=generation,
                usage=Usage(
                    prompt_tokens=self.num_prompt, completion_tokens=self.num_tokens, cached_tokens=self.num_cached
                ),
                times=Times(queued_s=read_s - self.opened_s, prompt_s=answer_s - read_s, answer_s=now - answer_s),
            )
        )


@dataclass(frozen=True, kw_only=True)
class _End:
    """How an answer ends: `at` is the character before which a stop string begins."""

    reason: Literal["stop", "length", "abort"]
    stop: str | int | None = None
    at: int | None = None


def resolved(request: Request) -> Request:
    """Gives the request with what its sampling says of its call: where no token ends it, or its mixture stays."""
    changes: dict[str, Any] = {"endings": Endings()} if request.sampling.ignore_eos else {}
    if request.sampling.grammar is not None:
        changes |= {"segmenter": OneSentence}
    return replace(request, call=request.call.changed(changes)) if changes else request


def _begun(text: str, stops: tuple[str, ...], first: int) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for n in range(min(longest, len(text) - first), 0, -1):
        if any(stop.startswith(text[len(text) - n :]) for stop in stops):
            return n
    return 0
