"""One answer, built token by token: tokens in, the events of its stream out."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dlp_lora.engine.calls import Endings
from dlp_lora.engine.routing import RowRouter
from dlp_lora.engine.trace import Generation
from dlp_lora.sentences import Segmenter
from dlp_lora.serve.backend import Done, PromptScores, Request, SentenceStart, Times, Token, Usage
from dlp_lora.serve.stream import EventStream


class OneSentence:
    """A segmenter for answers with one mixture: it finds no further sentence."""

    def push(self, text: str) -> list[int]:
        """Finds no start."""
        return []

    def copy(self) -> Segmenter:
        """Returns itself, because it has no state."""
        return self


@dataclass(eq=False)
class AnswerBuilder:
    """The answer to a request so far. `tokens` are the prompt's and the answer's; `num_prompt` is the number of the
    prompt's tokens, and `num_cached` of these came from stored KV.
    """

    request: Request
    stream: EventStream
    max_tokens: int
    num_cached: int = 0
    has_ended: bool = False
    opened_s: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.tokens)
        self.num_prompt = len(self.tokens)
        self.router: RowRouter | None = None
        self._read_s: float | None = None
        self._answer_s: float | None = None
        self._num_sent = 0  # characters
        self._num_started = 0  # sentences
        self._search_from = 0  # characters: stop strings before do not count

    @property
    def num_tokens(self) -> int:
        """The number of tokens in the answer."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_read(self) -> bool:
        """Whether reading its prompt has begun."""
        return self._read_s is not None

    @property
    def routed(self) -> RowRouter:
        """Its routing, after its start."""
        assert self.router is not None
        return self.router

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end it."""
        sampling = self.request.sampling
        return sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self.request.call.endings.eos_ids)

    def begin(self, router: RowRouter) -> None:
        """Stores the routing of its prompt, and sends the start of its first sentence to the stream."""
        self.router = router
        self._announce()

    def begin_reading(self) -> None:
        """Notes that reading its prompt begins."""
        if self._read_s is None:
            self._read_s = time.perf_counter()

    def add_prompt_scores(self, scores: PromptScores) -> None:
        """Sends the prompt's log-probabilities to the stream."""
        self.stream.put(scores)

    def take(self, token: int, *, logprob: float | None = None, top: Mapping[int, float] | None = None) -> bool:
        """Adds a sampled token, routes the sentence that it begins, and sends both to the stream.

        Returns:
            Whether the mixture changed. If the token ends the answer, `has_ended` becomes true.
        """
        if self._answer_s is None:
            self._answer_s = time.perf_counter()
        self.tokens.append(token)
        event = Token(id=token, position=self.num_tokens - 1, text="", logprob=logprob, top=top or {})
        if (end := self._end(token)) is not None:
            self._finish(end, event)
            return False
        switched = self.routed.push(token)
        if self.num_tokens <= self.request.sampling.min_tokens:
            self._search_from = len(self.routed.text)
        self._announce()
        self.stream.put(replace(event, text=self._settled()))
        return switched

    def finish(self, reason: Literal["stop", "length", "abort"]) -> None:
        """Ends the answer here: it has its full length, or its reader cancelled it."""
        self._finish(_End(reason=reason), None)

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error."""
        self.has_ended = True
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
        matches = [(at, stop) for stop in stops if (at := whole.find(stop, first)) >= 0]
        if not matches:
            return None
        at, stop = min(matches, key=lambda pair: pair[0])
        return _End(reason="stop", stop=stop, at=at)

    def _settled(self) -> str:
        """The text that has become certain since the last call."""
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
        answer_s = now if self._answer_s is None else self._answer_s
        read_s = now if self._read_s is None else self._read_s
        self.has_ended = True
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
    """The end of an answer: `at` is the offset of a stop string."""

    reason: Literal["stop", "length", "abort"]
    stop: str | int | None = None
    at: int | None = None


def resolved(request: Request) -> Request:
    """Applies the request's sampling to its call: no token ends it (`ignore_eos`), or its mixture stays (grammar)."""
    changes: dict[str, Any] = {"endings": Endings()} if request.sampling.ignore_eos else {}
    if request.sampling.grammar is not None:
        changes |= {"segmenter": OneSentence}
    return replace(request, call=request.call.changed(changes)) if changes else request


def _begun(text: str, stops: tuple[str, ...], first: int) -> int:
    """The number of characters at the end of a text that may begin a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for n in range(min(longest, len(text) - first), 0, -1):
        if any(stop.startswith(text[len(text) - n :]) for stop in stops):
            return n
    return 0
