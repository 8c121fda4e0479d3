"""The llama.cpp backend: requests in, answers from a GGUF file out, in a separate thread of this process.

A context of llama.cpp has one mixture at a time: adapters with scales. Sequences with equal mixtures decode together,
and others take turns. At a switch, `keep` leaves the KV as it is, and `recompute` reads the context again.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig

from dlp_lora.bank.check import check_fits
from dlp_lora.bank.mixture_folder import Source
from dlp_lora.engine.outline import Outline
from dlp_lora.errors import AdapterError, DLPLoRAError, ModelError
from dlp_lora.serve.answer_builder import AnswerBuilder, resolved
from dlp_lora.serve.backend import BackendError, ClosedError, Health, Request, Stats
from dlp_lora.serve.llama_cpp.adapter_file import check_model_type
from dlp_lora.serve.llama_cpp.library import LlamaContext, check_runs
from dlp_lora.serve.llama_cpp.mixtures import Mixtures
from dlp_lora.serve.llama_cpp.slot import Slot
from dlp_lora.serve.prompt_router import OutlinePromptRouter
from dlp_lora.serve.room import check_places, room_for
from dlp_lora.serve.sampler import Sampler
from dlp_lora.serve.stream import EventStream

logger = logging.getLogger(__name__)

# Quantisation changes log-probabilities by less; those of another model differ by more.
MAX_MEAN_DIFFERENCE = 0.5
MAX_CONTEXT = 4096  # tokens of a sequence by default, because llama.cpp reserves the KV of all sequences


class LlamaCppBackend:
    """A Backend with a GGUF file of an outline's base model.

    Args:
        outline: of the model, its adapters and their router.
        gguf: the file.
        max_batch: largest number of requests that are answered at once.
        max_queue: largest number of further requests that wait.
        max_context: largest number of tokens of a prompt and its answer.
        chunk_tokens: number of a prompt's tokens that are read in one pass.
        num_threads: number of threads that compute; by default PyTorch's.
        num_gpu_layers: number of layers in GPU memory.

    Raises:
        ModelError: if llama.cpp does not run here, or the file has another model.
        AdapterError: if an adapter cannot be read.
    """

    def __init__(
        self,
        outline: Outline,
        gguf: Path,
        *,
        max_batch: int = 4,
        max_queue: int = 256,
        max_context: int | None = None,
        chunk_tokens: int = 256,
        num_threads: int | None = None,
        num_gpu_layers: int = 0,
    ) -> None:
        self.outline = outline
        config: Any = AutoConfig.from_pretrained(outline.source, trust_remote_code=False).get_text_config()
        check_model_type(config.model_type)
        check_runs(gguf)
        max_context = min(n for n in (outline.max_context, max_context or MAX_CONTEXT) if n is not None)
        self._context = LlamaContext(
            gguf,
            max_context=max_context,
            max_sequences=max_batch,
            num_threads=num_threads or torch.get_num_threads(),
            chunk_tokens=chunk_tokens,
            num_gpu_layers=num_gpu_layers,
        )
        self.max_context = min(max_context, self._context.num_context)
        self.mixtures = Mixtures(self._context, config)
        self._sources: dict[str, Source] = {}
        try:
            self._check_model(gguf)
            for name, path in outline.adapters.items():
                self._sources[name] = self.mixtures.read(path, name, outline)
        except BaseException:
            self._context.close()
            raise
        self.max_open = max_batch + max_queue
        # Of the adapters, the router and the messages. The thread takes it again while it handles a message.
        self._lock = threading.RLock()
        self.prompt_router = OutlinePromptRouter(outline, self._sources.keys(), lock=self._lock)
        self._awake = threading.Event()
        self._messages: deque[Callable[[], None]] = deque()
        self._open: set[Slot] = set()
        self._queued: deque[Slot] = deque()
        self._reading: deque[Slot] = deque()
        self._decoding: deque[Slot] = deque()  # the one that has waited longest first
        self._free = list(range(max_batch))
        self._is_closing = self._is_stopping = False
        self._counts = dict.fromkeys(("steps", "step_tokens", "read_tokens", "cached_tokens", "switches"), 0)
        self._route_s = self._fuse_s = 0.0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dlp-lora-llama-cpp", daemon=True)
        self._thread.start()

    @property
    def program(self) -> str:
        """The program that computes the tokens, with its release."""
        return f"llama-cpp-python {version('llama-cpp-python')}"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self._sources)

    @property
    def health(self) -> Health:
        """Whether it can answer."""
        if self._is_closing:
            return Health(is_alive=False, reason="the server is closing")
        if self._failure is not None:
            return Health(is_alive=False, reason=f"llama.cpp's thread has ended: {self._failure!r}", is_lost=True)
        return Health(is_alive=True)

    def stats(self) -> Stats:
        """Its state and its totals."""
        num_reading, num_decoding = len(self._reading), len(self._decoding)
        return Stats(
            waiting=max(0, len(self._open) - num_reading - num_decoding),
            reading=num_reading,
            decoding=num_decoding,
            kept_bytes=0,
            route_s=self._route_s,
            fuse_s=self._fuse_s,
            **{f"num_{name}": count for name, count in self._counts.items()},
        )

    def open(self, request: Request) -> EventStream:
        """Takes a request, as `open_all` does."""
        return self.open_all([request])[0]

    def open_all(self, requests: Sequence[Request]) -> list[EventStream]:
        """Takes requests, all of them or none.

        Raises:
            PromptError: if a prompt is empty or does not fit into the model's context with `max_tokens`.
            ValueError: if the logit bias names an unknown token.
            AdapterError: if a mixture names an unknown adapter.
            QueueFullError, ClosedError: if it has no room for all of them now.
        """
        rooms = [room_for(each, max_context=self.max_context, vocab_size=self._context.vocab_size) for each in requests]
        with self._lock:
            if not (health := self.health).is_alive:
                raise ClosedError(health.reason)
            check_places(len(requests), len(self._open), self.max_open)
            fixed = {name for each in requests for mixture in each.call.mixtures or () for name in mixture}
            if unknown := sorted(fixed - self._sources.keys()):
                raise self._unknown(unknown[0])
            return [self._add(request, max_tokens) for request, max_tokens in zip(requests, rooms, strict=True)]

    def _add(self, request: Request, max_tokens: int) -> EventStream:
        stream = EventStream(lambda: self._post(partial(self._abort, slot)))
        slot = Slot(AnswerBuilder(resolved(request), stream, max_tokens), dict(self._sources))
        self._open.add(slot)
        self._post(partial(self._queued.append, slot))
        return stream

    def check_adapter(self, path: str | Path, name: str) -> None:
        """Checks a folder that may become an adapter, whether its name is taken or not.

        Raises:
            AdapterError: if it cannot be read or does not fit.
        """
        check_fits(self.outline.layout, path, name)
        self.mixtures.read(path, name, self.outline)

    def put_adapters(self, folders: Mapping[str, str | Path]) -> None:
        """Adds adapters from folders of this machine, or replaces those of their names, while requests run.

        Raises:
            AdapterError: if one cannot be read or does not fit.
        """
        sources = {name: self.mixtures.read(path, name, self.outline) for name, path in folders.items()}
        with self._lock:
            self._sources.update(sources)
            self._post(self._free_unused)

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter; running requests keep it.

        Raises:
            AdapterError: if there is none of this name.
        """
        with self._lock:
            if name not in self._sources:
                raise self._unknown(name)
            del self._sources[name]
            self._post(self._free_unused)

    def close(self, *, drain_s: float = 0.0) -> None:
        """Takes no more requests, waits so long for running ones, and ends the others with a ClosedError."""
        with self._lock:
            self._is_closing = True
        deadline = time.monotonic() + drain_s
        while self._thread.is_alive() and self._open and time.monotonic() < deadline:
            time.sleep(0.01)
        self._is_stopping = True
        self._awake.set()
        self._thread.join()

    def _unknown(self, name: str) -> AdapterError:
        return AdapterError(f"no adapter {name!r}; there are {', '.join(sorted(self._sources)) or 'none'}")

    def _check_model(self, gguf: Path) -> None:
        """Checks that the file has the outline's base model, with the probe of the bundle if there is one."""
        probe, vocab_size = self.outline.base.probe, self._context.vocab_size
        if vocab_size < len(self.outline.tokenizer):
            raise ModelError(
                f"{gguf} has another model than {self.outline.source!r}: it knows {vocab_size} tokens, and the "
                f"tokenizer {len(self.outline.tokenizer)}; give another GGUF file"
            )
        if probe is None:
            return
        scores: list[Tensor] = []
        for first in range(0, len(probe.tokens), self._context.chunk_tokens):
            chunk = probe.tokens[first : first + self._context.chunk_tokens]
            scores += self._context.decode([(0, first + i, token, True) for i, token in enumerate(chunk)])
        self._context.forget(0)
        logprobs = [float(row.log_softmax(dim=-1)[t]) for row, t in zip(scores, probe.tokens[1:], strict=False)]
        differences = [abs(a - b) for a, b in zip(logprobs, probe.logprobs, strict=True)]
        mean = sum(differences) / len(differences)
        if not mean <= MAX_MEAN_DIFFERENCE:  # true for NaN, too
            raise ModelError(
                f"{gguf} has another model than {self.outline.base.name!r}: its log-probabilities of a test sentence "
                f"differ by {mean:.2f} on average, and {MAX_MEAN_DIFFERENCE} is the limit; give another GGUF file"
            )

    def _post(self, message: Callable[[], None]) -> None:
        self._messages.append(message)
        self._awake.set()

    @torch.no_grad()
    def _run(self) -> None:
        error: DLPLoRAError = ClosedError("the server is closing")
        try:
            while not self._is_stopping:
                # A list, because each of them must run.
                if not any([self._take_messages(), self._begin_next(), self._read_next(), self._step()]):
                    self._awake.wait()
                    self._awake.clear()
        except BaseException as failure:
            logger.exception("llama.cpp's thread has ended")
            self._failure = failure
            error = BackendError(f"llama.cpp's thread has ended: {type(failure).__name__}: {failure}")
            error.__cause__ = failure
            raise
        finally:
            with self._lock:  # a request is taken before this, or refused after it
                self._take_messages()
                for slot in self._open:
                    slot.answer.fail(error)
                self._open.clear()
            self._context.close()

    def _take_messages(self) -> bool:
        has_any = bool(self._messages)
        while self._messages:
            self._messages.popleft()()
        return has_any

    def _abort(self, slot: Slot) -> None:
        if slot in self._open:
            slot.answer.finish("abort")
            self._leave(slot)

    def _free_unused(self) -> None:
        with self._lock:
            self.mixtures.free_unused([self._sources, *(slot.sources for slot in self._open)])

    def _begin_next(self) -> bool:
        """Routes the prompt of a waiting request, if there is room in the batch."""
        if not self._queued or not self._free:
            return False
        slot = self._queued.popleft()
        answer, request = slot.answer, slot.answer.request
        start = time.perf_counter()
        try:
            router = self.prompt_router.start_row(
                request.tokens, call=request.call, prompt=request.prompt, among=request.among(slot.sources)
            )
            slot.sampler = Sampler(request.sampling, slot.tokens, answer.end_ids, torch.device("cpu"))
            answer.begin(router)
        except Exception as error:
            self._fail(slot, error)
            return True
        self._route_s += time.perf_counter() - start
        slot.place = self._free.pop()
        answer.begin_reading()
        self._reading.append(slot)
        return True

    def _read_next(self) -> bool:
        """Reads a chunk of a prompt, or of a context that is read again."""
        if not self._reading:
            return False
        slot = self._reading[0]
        try:
            scores = self._read(slot)
            if slot.is_read:
                self._reading.popleft()
                self._decoding.append(slot)
                self._finish_reading(slot, scores)
        except Exception as error:
            self._fail(slot, error)
        return True

    def _read(self, slot: Slot) -> Float[Tensor, "wanted vocab"]:
        """Encodes the next tokens of one mixture, at most a chunk."""
        first = slot.num_read
        mixture = slot.mixture_at(first)
        last = min(first + self._context.chunk_tokens, len(slot.tokens))
        last = next((i for i in range(first, last) if slot.mixture_at(i) != mixture), last)
        started = time.perf_counter()
        self.mixtures.apply(mixture, slot.sources)
        applied = time.perf_counter()
        wants_all, end = slot.wants_prompt_scores, len(slot.tokens) - 1
        scores = self._context.decode(
            [(slot.sequence, i, slot.tokens[i], wants_all or i == end) for i in range(first, last)]
        )
        slot.num_read = last
        slot.fuse_ms += (applied - started) * 1e3
        slot.encode_ms += (time.perf_counter() - applied) * 1e3
        self._fuse_s += applied - started
        self._counts["read_tokens"] += last - first
        if wants_all:
            slot.add_prompt_scores(scores)
        return scores

    def _finish_reading(self, slot: Slot, scores: Float[Tensor, "wanted vocab"]) -> None:
        answer = slot.answer
        answer.routed.charge(fuse_ms=slot.fuse_ms, encode_ms=slot.encode_ms if answer.num_tokens else 0.0)
        if answer.max_tokens == 0:
            answer.finish("length")
            self._leave(slot)
        else:
            self._sample(slot, scores[-1])

    def _step(self) -> bool:
        """Decodes a token of the sequence that has waited longest, and of all with the same mixture."""
        if not self._decoding:
            return False
        parts = self._decoding[0].parts
        group = [slot for slot in self._decoding if slot.parts == parts]
        started = time.perf_counter()
        try:
            self.mixtures.apply(group[0].answer.routed.mixture, group[0].sources)
            applied = time.perf_counter()
            scores = self._context.decode([(s.sequence, s.num_read, s.tokens[-1], True) for s in group])
        except Exception as error:
            for slot in group:
                self._fail(slot, error)
            return True
        self._fuse_s += applied - started
        self._counts["steps"] += 1
        self._counts["step_tokens"] += len(group)
        for slot, row in zip(group, scores, strict=True):
            slot.num_read += 1
            slot.answer.routed.charge(fuse_ms=(applied - started) * 1e3)
            self._decoding.remove(slot)
            self._decoding.append(slot)
            try:
                self._sample(slot, row)
            except Exception as error:
                self._fail(slot, error)
        return True

    def _sample(self, slot: Slot, scores: Float[Tensor, " vocab"]) -> None:
        """Gives a decoding slot its next token; it may end, or be read again."""
        start = time.perf_counter()
        with self._lock:
            switched = slot.take(scores)
        self._route_s += time.perf_counter() - start
        if slot.answer.has_ended:
            self._leave(slot)
        elif switched:
            self._counts["switches"] += 1
            if slot.answer.request.call.settings.kv_policy == "recompute":
                self._read_again(slot)

    def _read_again(self, slot: Slot) -> None:
        """Lets the context of a slot be read again, before the prompts of other slots."""
        self._decoding.remove(slot)
        self._context.forget(slot.sequence)
        slot.num_read = 0
        slot.encode_ms = slot.fuse_ms = 0.0
        self._reading.appendleft(slot)

    def _leave(self, slot: Slot) -> None:
        """Frees the place of a slot that has ended."""
        for slots in (self._queued, self._reading, self._decoding):
            if slot in slots:
                slots.remove(slot)
        if slot.place is not None:
            self._context.forget(slot.place)
            self._free.append(slot.place)
            slot.place = None
        with self._lock:
            self._open.discard(slot)
            self._free_unused()

    def _fail(self, slot: Slot, error: Exception) -> None:
        if not isinstance(error, DLPLoRAError):
            logger.error("request %s failed", slot.answer.request.id, exc_info=error)
            failure = BackendError(f"the request failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            error = failure
        slot.answer.fail(error)
        self._leave(slot)
