"""The scheduler: rows in, events out, one pass of the model after the other, all in one thread.

A turn accepts calls of other threads, routes prompts, and runs one pass. The pass gives each row of the batch one
token, and reads at most one chunk of prompts. So a row never waits longer than a chunk and a step. The first token of a
sentence is sampled before the pass that runs under its mixture, so rows are routed between two passes.

If the mixture of a row changes under `kv_policy="recompute"`, the row leaves the batch, and its context is read again.
This comes before new prompts, but every fourth chunk begins with a waiting new prompt. Another thread loads adapters
that are not in memory; their row waits.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dlp_lora.engine.engine import Engine
from dlp_lora.errors import DLPLoRAError, is_out_of_memory
from dlp_lora.policy import Mixture
from dlp_lora.serve.backend import BackendError, ClosedError, Stats
from dlp_lora.serve.cache import SpareCache
from dlp_lora.serve.kept import Content, KeptKV
from dlp_lora.serve.passes import Part, Passes, Scored
from dlp_lora.serve.row import Row

logger = logging.getLogger(__name__)

MAX_AGAIN = 3  # consecutive chunks of contexts that are read again while a new prompt waits


@dataclass(frozen=True, eq=False)
class Work:
    """The work of a pass for some rows: equally many next tokens of each, into the rows' cache."""

    rows: list[Row]
    cache: SpareCache
    num_new: int

    @property
    def is_through(self) -> bool:
        """Whether all tokens of the rows are encoded, so that the next ones can be sampled."""
        return len(self.rows[0].contents) == len(self.rows[0].tokens)

    def part(self) -> Part:
        """The part for the pass, with the adapters' current names; the bank must be locked."""
        spans = [(len(row.contents), len(row.contents) + self.num_new) for row in self.rows]
        first, (_, stop) = self.rows[0], spans[0]
        return Part(
            cache=self.cache,
            tokens=[row.tokens[start:stop] for row, (start, stop) in zip(self.rows, spans, strict=True)],
            mixtures=[row.mixtures(start, stop) for row, (start, stop) in zip(self.rows, spans, strict=True)],
            wants="all" if first.wants_prompt_scores else "last" if stop == len(first.tokens) else "none",
        )


class Scheduler:
    """Answers rows with an engine. `run` needs a separate thread; any thread may call `add`, `cancel` and `stop`.

    `max_batch` rows are answered at once, others wait. `cache_mb` megabytes of KV are stored for later requests.
    """

    def __init__(self, engine: Engine, *, max_batch: int, chunk_tokens: int, cache_mb: float) -> None:
        for name, value in (("max_batch", max_batch), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.engine = engine
        self.max_batch = max_batch
        self.chunk_tokens = chunk_tokens
        self.failure: BaseException | None = None  # that ended the thread
        self._device = engine.device
        self._passes = Passes(engine)
        self._lock = threading.Lock()  # while rows are taken or none is any more
        self._messages: deque[Callable[[], None]] = deque()
        self._awake = threading.Event()
        self._is_stopping = False
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="dlp-lora-loader")
        self._rows: set[Row] = set()  # all that have not ended
        self._active: set[Row] = set()  # those of them that were begun to be read
        self._queued: deque[Row] = deque()
        self._new: deque[Row] = deque()  # their prompts are read, the first one now
        self._again: deque[Row] = deque()  # their contexts are
        self._num_again = 0  # chunks in a row, while a new prompt waits
        self._decoding: list[Row] = []  # as they lie in the batch
        self._batch = SpareCache(num_rows=0, capacity=0)
        self._kept = KeptKV(cache_mb)
        self._counts = dict.fromkeys(("steps", "step_tokens", "read_tokens", "cached_tokens", "switches"), 0)
        self._route_s = self._fuse_s = 0.0

    @property
    def batch_lengths(self) -> tuple[int, ...]:
        """The number of tokens of each row in the batch's KV cache."""
        return tuple(self._batch.lengths)

    @property
    def num_open(self) -> int:
        """The number of rows that have not ended."""
        return len(self._rows)

    def add(self, row: Row) -> None:
        """Takes a row.

        Raises:
            ClosedError: if it was stopped, or has failed.
        """
        with self._lock:
            if self._is_stopping:
                raise ClosedError(f"the scheduler has ended: {self.failure!r}")
            self._rows.add(row)
        self._post(partial(self._queued.append, row))

    def cancel(self, row: Row) -> None:
        """Ends a row soon."""
        self._post(partial(self._abort, row))

    def stop(self, error: BaseException) -> None:
        """Ends all rows with an error, and then the thread."""
        self._post(partial(self._end_all, error))

    def stats(self) -> Stats:
        """Its state and its totals; any thread may read it, so it may be a step old."""
        num_decoding, num_active = len(self._decoding), len(self._active)
        return Stats(
            waiting=max(0, len(self._rows) - num_active),
            reading=max(0, num_active - num_decoding),
            decoding=num_decoding,
            kept_bytes=self._kept.nbytes,
            route_s=self._route_s,
            fuse_s=self._fuse_s,
            **{f"num_{name}": count for name, count in self._counts.items()},
        )

    def run(self) -> None:
        """Works until it is stopped."""
        try:
            while not self._is_stopping:
                if not self.turn():
                    self.wait()
        except BaseException as error:
            logger.exception("the scheduler has ended")
            self.failure = error
            failure = BackendError(f"the scheduler has ended: {type(error).__name__}: {error}")
            failure.__cause__ = error  # which may be one that would end the readers' loop, too
            self._end_all(failure)
            raise
        finally:
            self.close()

    def wait(self, *, timeout_s: float | None = None) -> None:
        """Waits for a call of another thread, or for a loaded adapter."""
        self._awake.wait(timeout_s)
        self._awake.clear()

    def close(self) -> None:
        """Ends its other thread."""
        self._loader.shutdown(wait=False)

    @torch.no_grad()
    def turn(self) -> bool:
        """Does the next work; returns whether there was any."""
        try:
            # A list, because each of them must run.
            return any([self._take_messages(), self._route(), self._run([*self._step(), *self._reads()])])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._begin_afresh(error)
            return True

    def _post(self, message: Callable[[], None]) -> None:
        self._messages.append(message)
        self._awake.set()

    def _take_messages(self) -> bool:
        has_any = bool(self._messages)
        while self._messages:
            self._messages.popleft()()
        return has_any

    def _abort(self, row: Row) -> None:
        if row.has_ended:
            return
        self._withdraw(row)
        row.finish("abort")
        self._forget(row)

    def _end_all(self, error: BaseException) -> None:
        with self._lock:
            self._is_stopping = True
        for row in list(self._rows):
            row.fail(error)
            self._forget(row)
        self._queued.clear()
        self._new.clear()
        self._again.clear()
        self._decoding.clear()
        self._batch.clear()

    def _route(self) -> bool:
        """Routes prompts: one, and more while less than a chunk of them waits to be read."""
        has_any = bool(self._queued)
        num_waiting = sum(len(row.tokens) - len(row.contents) for row in (*self._again, *self._new))
        while self._queued:
            row = self._queued.popleft()
            self._route_row(row)
            num_waiting += len(row.tokens)
            if num_waiting >= self.chunk_tokens:
                break
        return has_any

    def _route_row(self, row: Row) -> None:
        """Routes the prompt of a row, and requests its adapters."""
        request = row.request
        start = time.perf_counter()
        try:
            with self.engine.bank.lock:
                router = self.engine.start_row(
                    row.tokens, call=request.call, prompt=request.prompt, among=request.adapters
                )
                row.lease = self.engine.bank.lease(router.mixtures, follows=True)
            row.begin(router, self._device)
            self._prepare(row)
        except Exception as error:
            self._fail(row, error)
        self._route_s += time.perf_counter() - start

    def _prepare(self, row: Row) -> None:
        """Queues a row for reading, after its adapters are in memory."""
        if self._are_ready(row):
            self._wait(row)
            return
        assert row.lease is not None
        row.state = "loading"
        loading = self._loader.submit(self.engine.bank.prepare, row.lease.names)
        loading.add_done_callback(lambda done: self._post(partial(self._loaded, row, done)))

    def _are_ready(self, row: Row) -> bool:
        """Whether a row's adapters are in memory."""
        assert row.lease is not None
        with self.engine.bank.lock:
            return self.engine.bank.are_ready(row.lease.names)

    def _loaded(self, row: Row, loading: "Future[None]") -> None:
        if row.has_ended:
            return
        try:
            loading.result()
            self._wait(row)
        except Exception as error:  # the adapter may have been replaced since
            self._fail(row, error)

    def _wait(self, row: Row) -> None:
        row.state = "waiting"
        row.content = self._content(row, row.routed.mixture)
        (self._again if row.has_answer else self._new).append(row)

    def _content(self, row: Row, mixture: Mixture) -> Content:
        """The content of a row's mixture; unknown if no KV is stored."""
        if not self._kept.budget:
            return b""
        with self.engine.bank.lock:
            return self.engine.bank.content(row.leased(mixture))

    def _reads(self) -> list[Work]:
        """The waiting rows that are read next, up to one chunk."""
        has_new = bool(self._new) and (self._new[0] in self._active or len(self._active) < self.max_batch)
        is_new_first = has_new and self._num_again >= MAX_AGAIN
        work: list[Work] = []
        room = self.chunk_tokens
        for row in [*self._new, *self._again] if is_new_first else [*self._again, *self._new]:
            if not room or (row not in self._active and len(self._active) >= self.max_batch):
                break
            if row.state != "reading" and not self._begin_reading(row):
                continue
            assert row.cache is not None
            work.append(Work([row], row.cache, min(room, len(row.tokens) - len(row.contents))))
            room -= work[-1].num_new
        has_begun = any(not each.rows[0].has_answer for each in work)
        self._num_again = self._num_again + 1 if has_new and not has_begun else 0
        return work

    def _step(self) -> list[Work]:
        """The rows of the batch, each with its last token."""
        return [Work(list(self._decoding), self._batch, 1)] if self._decoding else []

    def _run(self, work: list[Work]) -> bool:
        """Runs a pass, samples the next tokens, and lets rows join and leave the batch."""
        if not work:
            return False
        try:
            with self.engine.bank.lock:
                done = self._passes.run([each.part() for each in work])
        except Exception as error:
            if len(work) == 1:
                self._break_off(work[0], error)
                return True
            for each in work:  # as the error may be about one of them alone; the batch first, before rows join it
                self._run([each])
            return True
        self._fuse_s += done.fuse_ms / 1e3
        num_tokens = sum(each.num_new * len(each.rows) for each in work)
        for each, scores in zip(work, done.scores, strict=True):
            self._note(each, scores, done, share=each.num_new / num_tokens)
        through = [(each, scores[:, -1]) for each, scores in zip(work, done.scores, strict=True) if each.is_through]
        if through:
            rows = [row for each, _ in through for row in each.rows]
            switched = self._sample(rows, torch.cat([scores for _, scores in through]))
            for each, _ in through:
                self._settle(each, switched)
        return True

    def _note(self, work: Work, scores: Float[Tensor, "rows tokens vocab"], done: Scored, *, share: float) -> None:
        """Adds the work of a pass to rows; each gets a share of its time."""
        work.cache.advance(work.num_new)
        if work.cache is self._batch:
            self._counts["steps"] += 1
            self._counts["step_tokens"] += len(work.rows)
            for row in work.rows:
                row.contents.append(row.content)
                row.routed.charge(fuse_ms=done.fuse_ms)
            return
        (row,) = work.rows
        row.contents += row.planned[len(row.contents) :][: work.num_new]
        row.fuse_ms += done.fuse_ms
        row.encode_ms += share * (done.pass_ms - done.fuse_ms)
        self._counts["read_tokens"] += work.num_new
        if row.wants_prompt_scores:
            row.add_prompt_scores(scores[0])
        if work.is_through:
            (self._again if row.has_answer else self._new).remove(row)
            row.routed.charge(fuse_ms=row.fuse_ms, encode_ms=row.encode_ms if row.has_answer else 0.0)

    def _settle(self, work: Work, switched: Collection[Row]) -> None:
        """Lets rows with a new token join the batch, stay in it, or leave."""
        # Backwards, because the last row takes the number of a row that leaves.
        for i, row in reversed(list(enumerate(work.rows))):
            if not self._goes_on(row, row in switched):
                self._leave(row, work.cache, i)
            elif work.cache is not self._batch:
                self._batch.append(work.cache)
                row.cache = None
                row.state = "decoding"
                self._decoding.append(row)

    def _break_off(self, work: Work, error: Exception) -> None:
        """Ends rows whose pass failed."""
        if work.cache is self._batch:
            self._decoding = []
            self._batch.clear()
            with self.engine.bank.lock:
                self.engine.bank.forget()
        for row in work.rows:
            if work.cache is not self._batch:
                self._withdraw(row)
            self._fail(row, error)

    def _begin_afresh(self, error: Exception) -> None:
        """Ends all begun rows: without memory for a row that joins or leaves, the batch may be half moved."""
        self._decoding = []
        self._batch.clear()
        self._kept.clear()
        with self.engine.bank.lock:
            self.engine.bank.forget()
        for row in list(self._active):
            for rows in (self._new, self._again):
                if row in rows:
                    rows.remove(row)
            if row.has_ended:
                self._forget(row)
            else:
                self._fail(row, error)

    def _begin_reading(self, row: Row) -> bool:
        """Plans the mixtures of a row's tokens, and starts with its stored KV; in case of an error, the row ends."""
        row.begin_reading()
        self._active.add(row)
        try:
            self._plan(row)
        except Exception as error:
            self._withdraw(row)
            self._fail(row, error)
        return not row.has_ended

    def _plan(self, row: Row) -> None:
        row.fuse_ms = row.encode_ms = 0.0
        row.planned = row.contents + [row.content] * (len(row.tokens) - len(row.contents))
        for sentence in row.routed.prompt_trace:
            first = max(sentence.start, len(row.contents))
            content = self._content(row, sentence.mixture)
            row.planned[first : sentence.end] = [content] * max(0, sentence.end - first)
        if row.cache is not None:
            row.cache.reserve(len(row.tokens) - len(row.contents))
            return
        if self._kept.budget and row.request.sampling.num_prompt_logprobs is None:
            # The last token is always encoded, because its scores are needed.
            row.cache = self._kept.find(row.tokens[:-1], row.planned, capacity=len(row.tokens))
        if row.cache is None:
            row.cache = SpareCache(num_rows=1, capacity=len(row.tokens))
        num_tokens = row.cache.lengths[0]
        row.contents = row.planned[:num_tokens]
        if not row.has_answer:
            row.answer.num_cached = num_tokens
            self._counts["cached_tokens"] += num_tokens

    def _sample(self, rows: list[Row], scores: Float[Tensor, "rows vocab"]) -> set[Row]:
        """Gives each row its next token; returns the rows whose mixtures change."""
        scores = scores.float()
        likeliest, are_broken = scores.argmax(dim=-1).tolist(), scores.isnan().any(dim=-1).tolist()
        switched: set[Row] = set()
        for i, row in enumerate(rows):
            if row.answer.max_tokens == 0:
                row.finish("length")
                continue
            sampler = row.sampler
            assert sampler is not None
            try:
                if are_broken[i]:
                    raise BackendError("the model gave scores that are not numbers; its weights or an adapter overflow")
                token = likeliest[i] if sampler.is_argmax else sampler.sample(scores[i])
                start = time.perf_counter()
                with self.engine.bank.lock:  # its adapters must not be removed before they are leased
                    if row.take(token, scores[i]):
                        switched.add(row)
                        row.lease = self.engine.bank.lease(row.routed.mixtures, follows=True)
                self._route_s += time.perf_counter() - start
            except Exception as error:
                self._fail(row, error)
        self._counts["switches"] += len(switched)
        return switched

    def _goes_on(self, row: Row, switched: bool) -> bool:
        """Whether a row can be in the next step, after it was given a token."""
        if row.has_ended or not switched:
            return not row.has_ended
        if row.request.call.settings.kv_policy == "recompute" or not self._are_ready(row):
            return False
        try:
            row.content = self._content(row, row.routed.mixture)
        except Exception as error:
            self._fail(row, error)
        return not row.has_ended

    def _leave(self, row: Row, cache: SpareCache, i: int) -> None:
        """Handles row number `i` of a cache that has ended or must be read again."""
        if not row.has_ended and row.request.call.settings.kv_policy == "keep":
            if cache is self._batch:
                row.cache = cache.take(i, num_tokens=len(row.contents), capacity=len(row.tokens))
        else:
            if row.state != "failed":
                self._kept.keep(row.tokens[: len(row.contents)], row.contents, cache, i)
            row.contents, row.cache = [], None
        if cache is self._batch:
            self._drop(i, is_finite=row.state != "failed")
        if row.has_ended:
            self._forget(row)
            return
        try:
            self._prepare(row)
        except Exception as error:
            self._fail(row, error)

    def _drop(self, i: int, *, is_finite: bool = True) -> None:
        """Takes a row out of the batch."""
        if not is_finite:
            self._batch.wipe(i)
        self._batch.remove(i)
        self._decoding[i] = self._decoding[-1]
        self._decoding.pop()

    def _withdraw(self, row: Row) -> None:
        """Removes a row from its queue or the batch."""
        if row.state == "decoding":
            self._drop(self._decoding.index(row))
        queues: Collection[deque[Row]] = (self._queued, self._new, self._again)
        for rows in queues:
            if row in rows:
                rows.remove(row)

    def _fail(self, row: Row, error: BaseException) -> None:
        """Ends a row with an error; if it is in the batch, the caller drops it."""
        if not isinstance(error, DLPLoRAError):
            logger.error("request %s failed", row.request.id, exc_info=error)
            failure = BackendError(f"the request failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            error = failure
        row.fail(error)
        self._forget(row)

    def _forget(self, row: Row) -> None:
        row.cache = None
        self._rows.discard(row)
        self._active.discard(row)
