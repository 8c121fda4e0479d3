"""Overrides: the changes of an engine's `with` blocks, for calls inside the block and its context.

A context variable has them as an immutable tuple, so threads and asyncio tasks do not see each other's. Blocks may end
in any order, and each removes only its override. A reset of the variable could bring back the override of a block that
has ended.
"""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from dlp_lora.bank.store import Lease
from dlp_lora.engine.calls import Call


class EngineKey:
    """Represents an engine in contexts, so that no context keeps a model alive."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Override:
    """The changes of one block to an engine's calls; two overrides are never equal."""

    key: EngineKey
    changes: Mapping[str, Any]
    lease: Lease  # on the adapters that it names


@dataclass(frozen=True, eq=False)
class Mark:
    """Represents a forward pass in its context; the engine stores the rows of the pass.

    `runner` is the thread and the task that ran it, which distinguishes the context from later copies.
    """

    runner: tuple[int, object]


_OVERRIDES: ContextVar[tuple[Override, ...]] = ContextVar("dlp_lora_overrides", default=())
# Never changed in place, because copies of a context share it.
_MARKS: ContextVar[Mapping[EngineKey, Mark]] = ContextVar("dlp_lora_marks", default=MappingProxyType({}))


@contextmanager
def overriding(override: Override) -> Iterator[None]:
    """Adds an override to this context until the block ends."""
    _OVERRIDES.set((*_OVERRIDES.get(), override))
    try:
        yield
    finally:
        _OVERRIDES.set(tuple(other for other in _OVERRIDES.get() if other is not override))


def is_in_force(override: Override) -> bool:
    """Whether an override applies to this context."""
    return any(other is override for other in _OVERRIDES.get())


def current_call(defaults: Call, key: EngineKey) -> Call:
    """Returns an engine's call in this context: its defaults, changed by each override in turn."""
    call = defaults
    for override in _OVERRIDES.get():
        if override.key is key:
            call = call.changed(override.changes)
    return call


def mark_pass(key: EngineKey) -> Mark:
    """Marks that an engine runs a forward pass in this context."""
    mark = Mark(_runner())
    marks = WeakKeyDictionary(_MARKS.get())
    marks[key] = mark
    _MARKS.set(marks)
    return mark


def latest_mark(key: EngineKey) -> Mark | None:
    """Returns the mark of an engine's latest pass in this context, or None."""
    mark = _MARKS.get().get(key)
    return mark if mark is not None and mark.runner == _runner() else None


def _runner() -> tuple[int, object]:
    try:
        task: object = id(asyncio.current_task())
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.get_ident(), task
