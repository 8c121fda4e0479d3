"""Streaming: the text of one row, handed piece by piece from the generating thread to the one that reads."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dlp_lora.engine.calls import Endings
from dlp_lora.engine.controller import Controller
from dlp_lora.engine.routing import RowRouter
from dlp_lora.engine.trace import Generation
from dlp_lora.policy import Mixture


class Piece(str):
    """A piece of streamed text; `mixture` is what it was generated under, `sentence` its sentence's number."""

    mixture: Mixture
    sentence: int

    __slots__ = ("mixture", "sentence")

    @classmethod
    def of(cls, text: str, mixture: Mixture, sentence: int) -> "Piece":
        """Makes a piece."""
        piece = cls(text)
        piece.mixture, piece.sentence = mixture, sentence
        return piece


class Stream(Iterator[Piece]):
    """The pieces of one answer as they come; the model runs in a thread, from the first piece on.

    `generation` is the answer with its trace, whether the stream was read to its end or left early. A stream that is
    closed, used as a context manager or dropped stops the model.
    """

    def __init__(
        self,
        generate: Callable[..., None],
        controller: Controller,
        endings: Endings,
        stopping_criteria: Sequence[StoppingCriteria] = (),
    ) -> None:
        """Makes a stream in a copy of this context; `generate` runs the model with a streamer and criteria to stop."""
        # The thread refers to the parts of the stream but not to the stream, so that one that is dropped is closed.
        self._controller = controller
        self._endings = endings
        self._streamer = PieceStreamer(controller)
        self._context = copy_context()
        stopping = StoppingCriteriaList([*stopping_criteria, Abandoned(self._streamer)])
        self._thread = threading.Thread(
            target=self._context.run, args=(_generate, generate, self._streamer, stopping), daemon=True
        )
        self._is_started = self._has_ended = False

    def __next__(self) -> Piece:
        if self._has_ended:
            raise StopIteration
        if not self._is_started:
            self._is_started = True
            self._thread.start()
        event = self._streamer.queue.get()
        if isinstance(event, Piece):
            return event
        self.close()
        if event is not None:
            raise event
        raise StopIteration

    @property
    def generation(self) -> Generation:
        """The answer; of a stream that is still running, what it has written by now, and the stream is closed.

        Raises:
            ValueError: if the stream was never begun, or failed before its first token.
        """
        self.close()
        row = self._streamer.row
        if row is None:
            raise ValueError("the stream has no answer: it was closed before its first token")
        special = self._controller.tokenizer.all_special_ids
        return row.generation(self._endings.trim(self._streamer.tokens, special))

    def close(self) -> None:
        """Stops the model and waits for it."""
        if self._has_ended:
            return
        self._has_ended = self._streamer.stopped = True
        if self._is_started:
            self._thread.join()
            # As after `generate`, this context's latest pass is that of the stream, or one without a trace.
            row = self._streamer.row
            self._controller.note_pass(None if row is None else [row])

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread") and not self._has_ended:
            self._streamer.stopped = True
            if self._is_started and threading.current_thread() is not self._thread:
                self._thread.join()


class PieceStreamer(BaseStreamer):
    """Hands text from the generating thread to the reading one, a token after it was sampled.

    A token's mixture is known once the model has encoded it, which is when the next one arrives.
    """

    def __init__(self, controller: Controller) -> None:
        self.queue: queue.Queue[Piece | BaseException | None] = queue.Queue()
        self.stopped = False
        self.row: RowRouter | None = None  # as far as it has read
        self.tokens: list[int] = []
        self._controller = controller
        self._has_prompt = False
        self._num_sent = 0

    def put(self, value: Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True  # the first call brings the prompt
            return
        (self.row,) = self._controller.latest or (None,)
        self._send(self.row)
        self.tokens.append(int(value))

    def end(self) -> None:
        if self.row is None:
            return
        row = self.row.copy()
        row.finish(self.tokens)
        self._send(row)

    def _send(self, row: RowRouter | None) -> None:
        if row is not None and len(row.text) > self._num_sent:
            self.queue.put(Piece.of(row.text[self._num_sent :], row.mixture, len(row.decisions) - 1))
            self._num_sent = len(row.text)


class Abandoned(StoppingCriteria):  # type: ignore[misc]
    """Ends generation when nobody reads its stream any more."""

    def __init__(self, streamer: PieceStreamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._streamer.stopped, device=input_ids.device)


def _generate(generate: Callable[..., None], streamer: PieceStreamer, stopping: StoppingCriteriaList) -> None:
    try:
        generate(streamer=streamer, stopping_criteria=stopping)
        streamer.queue.put(None)
    except BaseException as error:
        streamer.queue.put(error)
