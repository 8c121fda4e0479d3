"""The stream of one request: events from a backend's thread in, to the reader's thread or task out."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from dlp_lora.serve.backend import Done, Event


class EventStream:
    """A Stream that a backend feeds with `put`, up to `Done` or `fail`. `on_cancel` is called once, in any thread."""

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._on_cancel = on_cancel
        self._events: deque[Event | BaseException] = deque()
        self._lock = threading.Lock()
        self._has_events = threading.Condition(self._lock)
        self._waiter: asyncio.Future[None] | None = None  # of a waiting task
        self._is_cancelled = False
        self._has_ended = False  # for the reader

    def __iter__(self) -> "EventStream":
        return self

    def __next__(self) -> Event:
        if self._has_ended:
            raise StopIteration
        with self._has_events:
            while not self._events:
                self._has_events.wait()
            event = self._events.popleft()
        return self._passed(event)

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> Event:
        if self._has_ended:
            raise StopAsyncIteration
        while True:
            with self._lock:
                if self._events:
                    event = self._events.popleft()
                    break
                waiter = self._waiter = asyncio.get_running_loop().create_future()
            await waiter
        return self._passed(event)

    def cancel(self) -> None:
        """Ends the request soon, from any thread and at any time."""
        with self._lock:
            if self._is_cancelled:
                return
            self._is_cancelled = True
        self._on_cancel()

    def put(self, event: Event) -> None:
        """Passes an event to the reader."""
        self._hand(event)

    def fail(self, error: BaseException) -> None:
        """Lets the reader raise an error, after the earlier events."""
        self._hand(error)

    def _hand(self, event: Event | BaseException) -> None:
        with self._has_events:
            self._events.append(event)
            self._has_events.notify()
            waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with suppress(RuntimeError):  # the reader's loop is closed
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)

    def _passed(self, event: Event | BaseException) -> Event:
        if isinstance(event, BaseException):
            self._has_ended = True
            raise event
        self._has_ended = isinstance(event, Done)
        return event


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
