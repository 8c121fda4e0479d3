"""Streaming: the text of one row, handed piece by piece from the generating thread to the one that reads."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from dlp_lora.engine.cache import LatestRows
from dlp_lora.engine.controller import Controller
from dlp_lora.engine.trace import Row
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


class PieceStreamer(BaseStreamer):
    """Hands text from the generating thread to the reading one, a token after it was sampled.

    A token's mixture is known once the model has encoded it, which is when the next one arrives.
    """

    def __init__(self, controller: Controller) -> None:
        self.queue: queue.Queue[Piece | BaseException | None] = queue.Queue()
        self.stopped = False
        self._controller = controller
        self._tokens: list[int] | None = None
        self._told = 0

    def pieces(self, generate: Callable[[], None]) -> Iterator[Piece]:
        """Runs `generate` in a thread and yields the pieces as they come; leaving early stops it."""

        def run() -> None:
            try:
                generate()
                self.queue.put(None)
            except BaseException as error:
                self.queue.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (event := self.queue.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.stopped = True
            thread.join()

    def put(self, value: Tensor) -> None:
        if self._tokens is None:
            self._tokens = []  # the first call brings the prompt
            return
        self._tell(cast(LatestRows, self._controller.latest).rows[0])
        self._tokens.append(int(value))

    def end(self) -> None:
        row = cast(LatestRows, self._controller.latest).rows[0].copy()
        row.finish(self._tokens or [])
        self._tell(row)

    def _tell(self, row: Row) -> None:
        if len(row.text) > self._told:
            self.queue.put(Piece.of(row.text[self._told :], row.mixture, len(row.decisions) - 1))
            self._told = len(row.text)


class Abandoned(StoppingCriteria):  # type: ignore[misc]
    """Ends generation when nobody reads its stream any more."""

    def __init__(self, streamer: PieceStreamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._streamer.stopped, device=input_ids.device)
