"""Streaming: passes the text of one row piece by piece from the generating thread to the reading one."""

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
    """A piece of streamed text, with its `mixture` and the number of its `sentence`."""

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
    """The pieces of one answer; the model runs in a thread, which starts with the first piece.

    `generation` is the answer with its trace, even if the stream was not read to its end. The model stops if the stream
    is closed or left as a context manager, and soon if it is deleted.
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

        `finish` makes the answer from the rows, one per question of the prompt, and their tokens.
        """
        # The thread refers to the parts of the stream and not to the stream, so that a deleted stream is closed.
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
        if event is None:
            raise StopIteration
        try:
            raise event
        finally:
            del event  # its traceback holds this frame: together they would keep the KV cache

    @property
    def generation(self) -> Generation:
        """The answer. If the stream is still running, this closes it, and the answer has the text so far.

        Raises:
            ValueError: if the stream never started, or failed before its first token.
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
            # As after `generate`, the stream's pass is the latest of this context, or one without a trace.
            self._controller.note_pass(self._streamer.rows or None)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Without waiting: the garbage collector may call it in a thread that holds the lock which the model waits for.
        if hasattr(self, "_streamer"):
            self._streamer.stopped = True


class PieceStreamer(BaseStreamer):
    """Passes text from the generating thread to the reading one, one token late.

    A token's mixture is known after the model has encoded it, which is when the next token arrives. If there are
    several rows, one per question of a prompt, a row waits until those before it have ended.
    """

    def __init__(self, controller: Controller, endings: Endings, num_rows: int = 1) -> None:
        self.queue: queue.Queue[Piece | BaseException | None] = queue.Queue()
        self.stopped = False
        self.rows: tuple[RowRouter, ...] = ()  # as far as they have read
        self._tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._controller = controller
        self._endings = endings
        self._special_ids = frozenset(controller.tokenizer.all_special_ids)
        self._padding = endings.pad_ids & self._special_ids
        self._has_prompt = False
        self._turn = self._num_sent = self._num_sentences = 0  # of the row in turn

    @property
    def answers(self) -> list[list[int]]:
        """The tokens of each row, without padding."""
        return self._endings.trim(self._tokens, self._special_ids)

    def put(self, value: Tensor) -> None:
        if not self._has_prompt:
            self._has_prompt = True  # the first call brings the prompt
            return
        self._controller.check_installed()
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
        """Passes on the new text of the row in turn, and of the next rows if it has ended."""
        while self._turn < len(rows) - 1 and self._has_ended(rows[self._turn]):
            row = rows[self._turn].copy()
            row.finish(self.answers[self._turn])
            self._send_text(row, row.text + line_break_after(row.text))
            self._turn, self._num_sent = self._turn + 1, 0
            self._num_sentences += len(row.decisions)
        self._send_text(rows[self._turn], rows[self._turn].text)

    def _has_ended(self, row: RowRouter) -> bool:
        is_padded = self._endings.has_others and row.num_tokens > 0 and row.tokens[-1] in self._padding
        return row.ended or is_padded

    def _send_text(self, row: RowRouter, text: str) -> None:
        """Passes on the new text of a row, cut at its sentences."""
        ends = [*(decision.offset for decision in row.decisions[1:]), len(text)]
        for number, (decision, end) in enumerate(zip(row.decisions, ends, strict=True)):
            if piece := text[self._num_sent : end]:
                self.queue.put(Piece.of(piece, decision.mixture, self._num_sentences + number))
                self._num_sent = end


class Abandoned(StoppingCriteria):  # type: ignore[misc]
    """Stops generation when its stream is closed."""

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
