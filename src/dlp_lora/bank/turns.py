"""A fair lock: a waiting thread gets it before the thread that has just released it."""

import threading
from types import TracebackType


class TurnLock:
    """A reentrant lock: a thread that takes it again lets waiting threads go first.

    A plain lock goes to the running thread, so a thread that takes it pass after pass would block others for long.
    """

    def __init__(self) -> None:
        self._next = threading.Lock()  # held by the thread whose turn is next
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    @property
    def is_awaited(self) -> bool:
        """Whether a thread waits for it."""
        return self._next.locked()

    def __enter__(self) -> "TurnLock":
        if self._owner != threading.get_ident():
            with self._next:
                self._lock.acquire()
            self._owner = threading.get_ident()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
