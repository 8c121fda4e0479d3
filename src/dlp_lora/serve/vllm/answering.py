"""Answering one request: its tokens come from vLLM's streams, and a stream ends when the mixture changes.

The first token of a sentence comes from a stream under the old mixture. Later tokens of this stream are dropped, and
the prompt with the answer up to that token is sent again under the new mixture. Under `recompute` this is another
adapter, with separate blocks in vLLM's prefix cache. Under `keep` it is the same name and path with other weights: vLLM
identifies blocks by name and path, so the context's blocks stay as they are.

vLLM runs ahead of its reader. Under `keep` it must not complete a block of the cache with dropped tokens, because a
later request could find this block. So a request ends at the end of a block, and another one continues.
"""

import asyncio
import logging
import time
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from typing import Any

from dlp_lora.errors import ModelError
from dlp_lora.serve.answer_builder import AnswerBuilder
from dlp_lora.serve.backend import BackendError, PromptScores, QueueFullError
from dlp_lora.serve.vllm.adapters import AnswerAdapters
from dlp_lora.serve.vllm.bodies import body_of
from dlp_lora.serve.vllm.client import BusyError, Chunk, FailedError, GoneError, LostError
from dlp_lora.serve.vllm.replicas import Replica, Replicas

logger = logging.getLogger(__name__)

BUSY_S = 30.0  # how long a running answer waits for a place
PAUSE_S = 0.2
MAX_GONE = 2  # how often an adapter may be missing for one request


@dataclass
class Counts:
    """The totals of a backend."""

    chunks: int = 0
    tokens: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    switches: int = 0
    route_s: float = 0.0
    fuse_s: float = 0.0


@dataclass(eq=False)
class Answering:
    """One answer. `run` yields it token by token. `routing` is the lock of the router, which other threads ask, too."""

    answer: AnswerBuilder
    adapters: AnswerAdapters
    replicas: Replicas
    counts: Counts
    routing: AbstractContextManager[object]
    replica: Replica | None = None
    _failed: set[Replica] = field(default_factory=set)
    _num_requests: int = 0

    @property
    def can_go_on(self) -> bool:
        """Whether another request may continue the answer: vLLM forgets the state of a grammar and the seen tokens."""
        sampling = self.answer.request.sampling
        return not self.answer.num_tokens or (sampling.grammar is None and not sampling.presence_penalty)

    async def run(self) -> None:
        """Answers.

        Raises:
            BackendError: if no server can; QueueFullError if they are all busy.
        """
        busy_since: float | None = None
        busy: set[Replica] = set()
        num_gone = 0
        try:
            while not self.answer.has_ended:
                try:
                    replica = await self._request(busy)
                except BusyError as error:
                    assert self.replica is not None
                    busy.add(self.replica)
                    self.replica = None
                    busy_since = time.monotonic() if busy_since is None else busy_since
                    await self._wait_for_place(busy, busy_since, error)
                except GoneError as error:
                    num_gone += 1
                    if num_gone > MAX_GONE:
                        raise BackendError(f"an adapter goes as soon as it is loaded: {error}") from error
                    await self._find_again(error)
                except (LostError, FailedError) as error:
                    await self._move(error)
                else:
                    busy_since, num_gone = None, 0
                    busy.clear()
                    self.replica = replica if replica.is_up else None
        finally:
            await self.adapters.close()

    async def _request(self, busy: set[Replica]) -> Replica:
        """Sends one request for the rest of the answer, and takes the tokens until the mixture changes."""
        answer, replica = self.answer, self.replica
        if replica is None:
            replica = self.replica = self.replicas.next(but=self._failed | busy)
        started = time.perf_counter()
        name = await self.adapters.prepare(replica, answer.routed.mixture)
        fused = time.perf_counter()
        self.counts.fuse_s += fused - started
        body = body_of(answer, name)
        sampling = answer.request.sampling
        answer.begin_reading()
        if sampling.num_prompt_logprobs is not None and not self._num_requests:
            await self._score_prompt(replica, body, sampling.num_prompt_logprobs)
        self._num_requests += 1
        if answer.max_tokens == 0:
            answer.finish("length")
            return replica
        self.counts.read_tokens += len(answer.tokens)
        charge = _Charge(answer, fuse_ms=(fused - started) * 1e3, since_s=fused)
        if self.adapters.keeps_name:
            if answer.num_tokens and charge.is_due:
                # Only the first token: a stream reports the number of cached tokens only at its end.
                chunk, _ = await replica.client.complete(_shortened(body, 1))
                charge.write(kept_tokens=chunk.cached_tokens or 0)
                if self._take(chunk):
                    return replica
                body = body_of(answer, name)
            block_size = replica.found.block_size
            assert block_size is not None
            body = _shortened(body, block_size - len(answer.tokens) % block_size)
        body["stream_options"] = {"include_usage": True}
        end = answer.num_tokens + body["max_tokens"]
        async with aclosing(replica.client.stream(body)) as chunks:
            async for chunk in chunks:
                charge.write()
                if chunk.finish_reason is None:
                    if self._take(chunk):
                        return replica
                    continue
                # How many tokens came from the cache stands behind the last one, and in the answer's end.
                async for rest in chunks:
                    if rest.cached_tokens is not None and self._num_requests == 1:
                        answer.num_cached = rest.cached_tokens
                        self.counts.cached_tokens += rest.cached_tokens
                is_cut = self._take(chunk)
                if not is_cut and not (chunk.finish_reason == "length" and answer.num_tokens == end):
                    self._finish(chunk.finish_reason)
        return replica

    def _take(self, chunk: Chunk) -> bool:
        """Adds tokens; returns whether later ones must be dropped."""
        answer, num_top = self.answer, self.answer.request.sampling.num_logprobs
        self.counts.chunks += 1
        for i, token in enumerate(chunk.tokens):
            self.counts.tokens += 1
            logprob = chunk.logprobs[i] if num_top is not None else None
            top = dict(list(chunk.tops[i].items())[:num_top]) if num_top and chunk.tops else {}
            started = time.perf_counter()
            with self.routing:
                switched = answer.take(token, logprob=logprob, top=top)
            self.counts.route_s += time.perf_counter() - started
            self.counts.switches += switched
            if answer.has_ended or switched:
                return True
        return False

    def _finish(self, reason: str) -> None:
        """Ends an answer that vLLM has ended for another reason, such as a shorter context."""
        if reason not in ("stop", "length"):
            raise LostError(f"vLLM ended an answer with {reason!r}")
        self.answer.finish("stop" if reason == "stop" else "length")

    async def _score_prompt(self, replica: Replica, body: dict[str, Any], num_top: int) -> None:
        if replica.found.breaks_on_prompt_scores:
            raise ValueError(f"vLLM {replica.found.version} fails on log-probabilities of prompts; leave echo out")
        _, choice = await replica.client.complete({**_shortened(body, 1), "prompt_logprobs": num_top})
        rows = choice["prompt_logprobs"]
        logprobs: list[float | None] = [None]
        tops: list[dict[int, float]] = [{}]
        for token, row in zip(self.answer.request.tokens[1:], rows[1:], strict=True):
            scores = {int(id_): float(score["logprob"]) for id_, score in row.items()}
            logprobs.append(scores[token])
            tops.append(dict(sorted(scores.items(), key=lambda pair: -pair[1])[:num_top]))
        self.answer.add_prompt_scores(PromptScores(logprobs=tuple(logprobs), top=tuple(tops)))

    async def _wait_for_place(self, busy: set[Replica], since_s: float, error: BusyError) -> None:
        if any(replica not in busy for replica in self.replicas.up):
            return  # another one may have a place
        if not self.answer.num_tokens:
            raise QueueFullError(f"all backends are busy; try again later ({error})") from error
        if time.monotonic() - since_s > BUSY_S:
            raise BackendError(f"the answer cannot go on, as all backends stay busy: {error}") from error
        busy.clear()
        await asyncio.sleep(PAUSE_S)

    async def _find_again(self, error: GoneError) -> None:
        """Checks a server that has lost an adapter, because it may be another process or model."""
        replica = self.replica
        assert replica is not None
        logger.warning("%s; it is checked again", error)
        try:
            await replica.verify()
        except (ModelError, LostError) as why:
            await self._move(why)

    async def _move(self, error: Exception) -> None:
        """Continues with another server, or the same if it is the only one and answers; once per answer."""
        replica, self.replica = self.replica, None
        if replica is not None:
            if isinstance(error, LostError) and not await replica.client.is_healthy():
                replica.lose(error)
            if not self._failed and self.can_go_on:
                self._failed.add(replica)
                logger.warning("an answer of %d tokens goes on elsewhere: %s", self.answer.num_tokens, error)
                return
        if isinstance(error, BackendError):
            raise error
        raise BackendError(str(error)) from error


@dataclass
class _Charge:
    """Notes the time of a mixture at its first token, once."""

    answer: AnswerBuilder
    fuse_ms: float
    since_s: float

    @property
    def is_due(self) -> bool:
        """Whether the mixture is new and its time is not noted yet."""
        decisions = self.answer.routed.decisions
        return decisions[-1].fuse_ms is None and (decisions[-1].switched or len(decisions) == 1)

    def write(self, *, kept_tokens: int | None = None) -> None:
        """Notes the time."""
        if self.is_due:
            encode_ms = (time.perf_counter() - self.since_s) * 1e3 if self.answer.num_tokens else 0.0
            self.answer.routed.charge(fuse_ms=self.fuse_ms, encode_ms=encode_ms, kept_tokens=kept_tokens)


def _shortened(body: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """A request for at most so many tokens."""
    num_tokens = max(1, min(num_tokens, body["max_tokens"]))
    return {**body, "max_tokens": num_tokens, "min_tokens": min(num_tokens, body["min_tokens"])}
