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

from dlp_lora.engine.apart import line_break_after
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
        finish: Callable[[Sequence[RowRouter], Sequence[list[int]]], Generation],
        controller: Controller,
        endings: Endings,
        stopping_criteria: Sequence[StoppingCriteria] = (),
        *,
        num_rows: int = 1,
    ) -> None:
        """Makes a stream in a copy of this context; `generate` runs the model with a streamer and criteria to stop.

        `finish` makes the answer from the rows, one a question of the prompt, and their tokens.
        """
        # The thread refers to the parts of the stream but not to the stream, so that one that is dropped is closed.
        self._controller = controller
        self._finish = finish
        self._streamer = PieceStreamer(controller, endings, num_rows)
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
        if not self._streamer.rows:
            raise ValueError("the stream has no answer: it was closed before its first token")
        return self._context.copy().run(self._finish, self._streamer.rows, self._streamer.answers)

    def close(self) -> None:
        """Stops the model and waits for it."""
        if self._has_ended:
            return
        self._has_ended = self._streamer.stopped = True
        if self._is_started:
            self._thread.join()
            # As after `generate`, this context's latest pass is that of the stream, or one without a trace.
            self._controller.note_pass(self._streamer.rows or None)

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

    A token's mixture is known once the model has encoded it, which is when the next one arrives. Of several rows, the
    questions of one prompt, a row is handed on when those before it have ended.
    """

    def __init__(self, controller: Controller, endings: Endings, num_rows: int = 1) -> None:
        self.queue: queue.Queue[Piece | BaseException | None] = queue.Queue()
        self.stopped = False
        self.rows: tuple[RowRouter, ...] = ()  # as far as they have read
        self._tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._controller = controller
        self._endings = endings
        self._special_ids = frozenset(controller.tokenizer.all_special_ids)
        self._has_prompt = False
        self._turn = self._num_sent = self._num_sentences = 0  # of which row, how much of it, sentences before it

    @property
    def answers(self) -> list[list[int]]:
        """The tokens of each row, without what pads them."""
        return [self._endings.trim(tokens, self._special_ids) for tokens in self._tokens]

    def put(self, value: Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True  # the first call brings the prompt
            return
        self.rows = self._controller.latest or ()
        if self.rows:
            self._send(self.rows)
        for tokens, token in zip(self._tokens, value.reshape(-1).tolist(), strict=True):
            tokens.append(token)

    def end(self) -> None:
        if not self.rows:
            return
        rows = [row.copy() for row in self.rows]
        for row, tokens in zip(rows, self.answers, strict=True):
            row.finish(tokens)
            row.ended = True
        self._send(rows)

    def _send(self, rows: Sequence[RowRouter]) -> None:
        """Hands on what is new of the row whose turn it is, and of those that follow if it has ended."""
        while True:
            row = rows[self._turn]
            is_done = row.ended and self._turn < len(rows) - 1
            text = row.text + (line_break_after(row.text) if is_done else "")
            if len(text) > self._num_sent:
                number = self._num_sentences + len(row.decisions) - 1
                self.queue.put(Piece.of(text[self._num_sent :], row.mixture, number))
                self._num_sent = len(text)
            if not is_done:
                return
            self._turn, self._num_sent = self._turn + 1, 0
            self._num_sentences += len(row.decisions)


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
