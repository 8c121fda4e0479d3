"""One row: a request with its answer, and its state in the scheduler."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dlp_lora.bank.store import Lease
from dlp_lora.engine.routing import RowRouter
from dlp_lora.policy import Mixture
from dlp_lora.serve.answer_builder import AnswerBuilder
from dlp_lora.serve.backend import PromptScores, Request
from dlp_lora.serve.cache import SpareCache
from dlp_lora.serve.kept import Content
from dlp_lora.serve.sampler import Sampler, logprobs

State = Literal["queued", "loading", "waiting", "reading", "decoding", "ended", "failed"]


@dataclass(eq=False)
class Row:
    """A request whose answer is built from the scores of passes; `contents` has the content of the mixture of each
    token in the KV cache.

    Its states: it is queued until its prompt is routed; loads adapters; waits for reading its prompt, or its context
    under another mixture; is read, into a separate cache; decodes, in the batch's cache; and has ended or failed.
    """

    answer: AnswerBuilder
    state: State = "queued"
    contents: list[Content] = field(default_factory=list)
    cache: SpareCache | None = None  # while it is read
    lease: Lease | None = None
    content: Content = b""  # of the current mixture
    planned: list[Content] = field(default_factory=list)  # `contents` after all is read

    def __post_init__(self) -> None:
        self.sampler: Sampler | None = None
        self.encode_ms = self.fuse_ms = 0.0  # of reading it since its last switch
        self.scores = PromptScores(logprobs=(), top=())

    @property
    def request(self) -> Request:
        """The request."""
        return self.answer.request

    @property
    def tokens(self) -> list[int]:
        """The tokens of the prompt and of the answer so far."""
        return self.answer.tokens

    @property
    def has_answer(self) -> bool:
        """Whether the prompt was read before, and its context is now read under another mixture."""
        return self.answer.num_tokens > 0

    @property
    def has_ended(self) -> bool:
        """Whether it has ended or failed."""
        return self.state in ("ended", "failed")

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether the prompt's scores are needed, and it is read the first time."""
        return self.request.sampling.num_prompt_logprobs is not None and not self.has_answer

    @property
    def routed(self) -> RowRouter:
        """Its routing, after its start."""
        return self.answer.routed

    def leased(self, mixture: Mixture) -> Mixture:
        """Returns a mixture of the row with the adapters' current names in the bank."""
        assert self.lease is not None
        return self.lease.of(mixture)

    def mixtures(self, start: int, stop: int) -> list[Mixture]:
        """Returns the mixture of each token from `start` to `stop`, with names as by `leased`."""
        mixtures = [self.leased(self.routed.mixture)] * (stop - start)
        for sentence in self.routed.prompt_trace:
            for place in range(max(sentence.start, start), min(sentence.end, stop)):
                mixtures[place - start] = self.leased(sentence.mixture)
        return mixtures

    def begin(self, router: RowRouter, device: torch.device) -> None:
        """Stores the routing of its prompt."""
        self.sampler = Sampler(self.request.sampling, self.tokens, self.answer.end_ids, device)
        self.answer.begin(router)

    def begin_reading(self) -> None:
        """Notes that reading its prompt begins."""
        self.state = "reading"
        self.answer.begin_reading()

    def add_prompt_scores(self, logits: Float[Tensor, "seq vocab"]) -> None:
        """Adds the scores of the prompt's tokens, chunk by chunk; the last ones are for the answer."""
        num_top = self.request.sampling.num_prompt_logprobs or 0
        num_prompt = self.answer.num_prompt
        first = len(self.contents) - len(logits)
        given, tops = [*self.scores.logprobs], [*self.scores.top]
        if not first:
            given.append(None)
            tops.append({})
        for i, scores in enumerate(logits):
            if first + i + 1 < num_prompt:
                logprob, top = logprobs(scores, self.tokens[first + i + 1], num_top)
                given.append(logprob)
                tops.append(top)
        self.scores = PromptScores(logprobs=tuple(given), top=tuple(tops))
        if len(given) == num_prompt:
            self.answer.add_prompt_scores(self.scores)

    def take(self, token: int, scores: Float[Tensor, " vocab"]) -> bool:
        """Adds a sampled token with its scores; returns whether the mixture changed."""
        assert self.sampler is not None
        self.sampler.add(token)
        num_top = self.request.sampling.num_logprobs
        logprob, top = (None, {}) if num_top is None else logprobs(scores, token, num_top)
        switched = self.answer.take(token, logprob=logprob, top=top)
        if self.answer.has_ended:
            self._end("ended")
        return switched

    def finish(self, reason: Literal["length", "abort"]) -> None:
        """Ends the answer here: only its prompt was needed, or its reader cancelled it."""
        self.answer.finish(reason)
        self._end("ended")

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error."""
        self.answer.fail(error)
        self._end("failed")

    def _end(self, state: State) -> None:
        self.state = state
        self.lease = None
