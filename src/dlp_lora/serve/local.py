"""The local backend: the engine of this process answers requests; a scheduler in a separate thread batches them."""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from dlp_lora.bank.check import check_fits
from dlp_lora.engine.engine import Engine
from dlp_lora.engine.prompts import context_of
from dlp_lora.serve.answer_builder import AnswerBuilder, resolved
from dlp_lora.serve.backend import ClosedError, Health, Request, Stats
from dlp_lora.serve.cache import check_layers
from dlp_lora.serve.room import check_places, room_for
from dlp_lora.serve.row import Row
from dlp_lora.serve.scheduler import Scheduler
from dlp_lora.serve.stream import EventStream


class LocalBackend:
    """A Backend with an engine, whose model and bank then belong to its scheduler.

    Args:
        max_batch: largest number of requests that are answered at once.
        max_queue: largest number of further requests that wait.
        max_context: largest number of tokens of a prompt and its answer; by default the model's limit.
        chunk_tokens: number of a prompt's tokens that are read in one pass.
        cache_mb: megabytes of stored KV of earlier requests.

    Raises:
        ModelError: if the model's cache stores anything other than keys and values.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 16,
        max_queue: int = 256,
        max_context: int | None = None,
        chunk_tokens: int = 256,
        cache_mb: float = 256.0,
    ) -> None:
        check_layers(engine.model)
        self.engine = engine
        self.max_context = min(context_of(engine.model), max_context or context_of(engine.model))
        self._vocab_size = cast(nn.Embedding, engine.model.get_input_embeddings()).num_embeddings
        self._scheduler = Scheduler(engine, max_batch=max_batch, chunk_tokens=chunk_tokens, cache_mb=cache_mb)
        self.max_open = max_batch + max_queue
        self._lock = threading.Lock()
        self._is_closing = False
        self._thread = threading.Thread(target=self._scheduler.run, name="dlp-lora-scheduler", daemon=True)
        self._thread.start()

    @property
    def program(self) -> str:
        """The program that computes the tokens, with its release."""
        return f"PyTorch {torch.__version__}"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return self.engine.bank.names

    @property
    def prompt_router(self) -> Engine:
        """The engine."""
        return self.engine

    @property
    def health(self) -> Health:
        """Whether it can answer."""
        if self._is_closing:
            return Health(is_alive=False, reason="the server is closing")
        if not self._thread.is_alive():
            return Health(is_alive=False, reason=f"the scheduler has ended: {self._scheduler.failure!r}", is_lost=True)
        return Health(is_alive=True)

    def stats(self) -> Stats:
        """Its state and its totals."""
        return self._scheduler.stats()

    def open(self, request: Request) -> EventStream:
        """Takes a request, as `open_all` does."""
        return self.open_all([request])[0]

    def open_all(self, requests: Sequence[Request]) -> list[EventStream]:
        """Takes requests, all of them or none.

        Raises:
            PromptError: if a prompt is empty or does not fit into the model's context with `max_tokens`.
            ValueError: if the logit bias names an unknown token.
            QueueFullError, ClosedError: if it has no room for all of them now.
        """
        rooms = [room_for(each, max_context=self.max_context, vocab_size=self._vocab_size) for each in requests]
        with self._lock:
            if not (health := self.health).is_alive:
                raise ClosedError(health.reason)
            check_places(len(requests), self._scheduler.num_open, self.max_open)
            return [self._add(request, max_tokens) for request, max_tokens in zip(requests, rooms, strict=True)]

    def _add(self, request: Request, max_tokens: int) -> EventStream:
        stream = EventStream(lambda: self._scheduler.cancel(row))
        row = Row(AnswerBuilder(resolved(request), stream, max_tokens))
        self._scheduler.add(row)
        return stream

    def check_adapter(self, path: str | Path, name: str) -> None:
        """Checks a folder that may become an adapter, whether its name is taken or not."""
        check_fits(self.engine.bank.base, path, name)

    def put_adapters(self, folders: Mapping[str, str | Path]) -> None:
        """Adds adapters from folders of this machine, or replaces those of their names, while requests run."""
        self.engine.put_adapters(folders)

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter; running requests keep it."""
        self.engine.remove_adapter(name)

    def close(self, *, drain_s: float = 0.0) -> None:
        """Takes no more requests, waits so long for running ones, and ends the others with a ClosedError."""
        with self._lock:
            self._is_closing = True
        deadline = time.monotonic() + drain_s
        while self._thread.is_alive() and self._scheduler.num_open and time.monotonic() < deadline:
            time.sleep(0.01)
        self._scheduler.stop(ClosedError("the server is closing"))
        self._thread.join()
