"""Answers: the streams of a request in, pieces of text out; at the end, in any case, the rows are freed."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import islice

from dlp_lora.errors import AdapterChangedError, AdapterError
from dlp_lora.serve.apart import in_order
from dlp_lora.serve.backend import BackendError, Done, PromptScores, SentenceStart, Stream, Token
from dlp_lora.serve.cutter import SentenceCutter
from dlp_lora.serve.errors import APIError, unavailable
from dlp_lora.serve.logs import LOGGER
from dlp_lora.serve.metrics import Meter
from dlp_lora.serve.service import Asked, Service

KEEPALIVE_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text of one sentence with its `tokens`; the first piece has the `sentence`."""

    text: str
    sentence: SentenceStart | None = None
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of an answer, and the number of its characters."""

    done: Done
    num_characters: int


Item = Piece | PromptScores | Ended


class Answers:
    """The answers to one request, read together. Use it as a context manager: its end frees running answers."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._service = service
        self._asked = asked
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[tuple[int, Item | BaseException]] = asyncio.Queue()
        self._since_s = time.perf_counter()
        self.num_prompt = self.num_answer = self.num_cached = 0  # tokens

    async def __aenter__(self) -> "Answers":
        self._service.num_running += 1
        try:
            requests = [request for each in self._asked.answers for request in each]
            opened = iter(self._service.backend.open_all(requests))
            self._streams = [in_order(list(islice(opened, len(each)))) for each in self._asked.answers]
        except AdapterError as error:
            await self.__aexit__()
            raise self._told(error) from error
        except BaseException:
            await self.__aexit__()
            raise
        self._tasks = [asyncio.create_task(self._read(i, stream)) for i, stream in enumerate(self._streams)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._service.num_running -= 1
        for stream in self._streams:
            stream.cancel()
        for task in self._tasks:
            task.cancel()

    async def items(self) -> AsyncIterator[tuple[int, Item] | None]:
        """Yields the pieces of all answers, with their numbers; None if there was none for a while.

        Raises:
            APIError: if the time is up.
            DLPLoRAError: if an answer failed.
        """
        num_left = len(self._streams)
        while num_left:
            left_s = self._since_s + self._asked.deadline_s - time.perf_counter()
            if left_s <= 0:
                self._service.metrics.aborted.labels("deadline").inc()
                raise APIError(
                    504,
                    f"the answer took longer than {self._asked.deadline_s:g} s; request a shorter one, or allow more "
                    "time (dlp.deadline_s, or --deadline-s at the server's start)",
                    type="server_error",
                    code="deadline_exceeded",
                )
            if self._queue.empty():
                try:
                    index, item = await asyncio.wait_for(self._queue.get(), min(KEEPALIVE_S, left_s))
                except TimeoutError:
                    yield None
                    continue
            else:
                index, item = self._queue.get_nowait()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Ended):
                num_left -= 1
            yield index, item

    async def whole(self) -> list[tuple[list[Piece], PromptScores | None, Ended]]:
        """Returns all answers when they are finished."""
        pieces: list[list[Piece]] = [[] for _ in self._streams]
        scores: list[PromptScores | None] = [None] * len(self._streams)
        ends: dict[int, Ended] = {}
        async for got in self.items():
            match got:
                case (index, Piece() as piece):
                    pieces[index].append(piece)
                case (index, PromptScores() as score):
                    scores[index] = score
                case (index, Ended() as ended):
                    ends[index] = ended
        return [(pieces[i], scores[i], ends[i]) for i in range(len(pieces))]

    async def _read(self, index: int, stream: Stream) -> None:
        service = self._service
        meter = Meter(service.metrics, self._asked.choice.label, lambda: service.backend.adapters, self._since_s)
        cutter, tokens = SentenceCutter(), list[Token]()
        try:
            async for event in stream:
                match event:
                    case SentenceStart():
                        cutter.begin(event)
                    case PromptScores():
                        self._put(index, event)
                    case Token():
                        meter.token()
                        self.num_answer += 1
                        tokens.append(event)
                        tokens = self._cut(index, cutter, event.text, tokens)
                    case Done():
                        tokens = self._cut(index, cutter, event.text, tokens)
                        if tokens:
                            self._put(index, Piece(text="", tokens=tuple(tokens)))
                        meter.done(event)
                        self._count(event)
                        self._put(index, Ended(done=event, num_characters=cutter.num_sent))
        except asyncio.CancelledError:
            raise
        except AdapterError as error:
            self._queue.put_nowait((index, self._told(error)))
        except BaseException as error:
            self._queue.put_nowait((index, error))

    def _cut(self, index: int, cutter: SentenceCutter, text: str, tokens: list[Token]) -> list[Token]:
        """Passes on the pieces of a text; returns the tokens that are still without text."""
        parts = list(cutter.cut(text))
        for i, (part, sentence) in enumerate(parts):
            is_last = i == len(parts) - 1
            self._put(index, Piece(text=part, sentence=sentence, tokens=tuple(tokens) if is_last else ()))
        return [] if parts else tokens

    def _told(self, error: AdapterError) -> APIError | BackendError:
        """The error for the client: an adapter was removed since the request was checked, or its files have changed."""
        mixtures = self._asked.answers[0][0].call.mixtures or ()
        gone = sorted({name for mixture in mixtures for name in mixture} - set(self._service.backend.adapters))
        if gone:
            return self._service.names.unknown(gone[0], set(self._asked.visible) - set(gone))
        if isinstance(error, AdapterChangedError):
            LOGGER.warning("the files of an adapter changed on disk", extra={"adapter": error.name})
            return unavailable(
                f"the files of the adapter {error.name!r} changed on disk since the server read them; POST /v1/reload, "
                "or loading the adapter again, takes them in",
                "adapter_changed",
            )
        failure = BackendError(str(error))
        failure.__cause__ = error
        return failure

    def _put(self, index: int, item: Item) -> None:
        self._queue.put_nowait((index, item))

    def _count(self, done: Done) -> None:
        self.num_prompt += done.usage.prompt_tokens
        self.num_cached += done.usage.cached_tokens
