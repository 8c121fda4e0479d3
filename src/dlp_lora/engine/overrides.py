"""Overrides: what the `with` blocks of an engine change, for the calls made inside them and in this context alone.

A context variable holds them as an immutable tuple, so threads and asyncio tasks each see their own. A block removes
the override that it added, and no other, whatever the order or the context in which blocks are left: resetting the
variable to what it was would bring back what another block has ended meanwhile.
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
    """Stands for an engine in contexts, so that none of them keeps a model alive."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Override:
    """What one block changes of an engine's calls; two of them are never equal."""

    key: EngineKey
    changes: Mapping[str, Any]
    lease: Lease  # on the adapters that it names


@dataclass(frozen=True, eq=False)
class Mark:
    """Stands for a forward pass in the context that ran it; the engine keeps what is known of the pass.

    `runner` is the thread and the task that ran it: a context that was copied afterwards did not.
    """

    runner: tuple[int, object]


_OVERRIDES: ContextVar[tuple[Override, ...]] = ContextVar("dlp_lora_overrides", default=())
# Never written into, as copies of a context share it.
_MARKS: ContextVar[Mapping[EngineKey, Mark]] = ContextVar("dlp_lora_marks", default=MappingProxyType({}))


@contextmanager
def overriding(override: Override) -> Iterator[None]:
    """Adds an override to this context while the block lasts."""
    _OVERRIDES.set((*_OVERRIDES.get(), override))
    try:
        yield
    finally:
        _OVERRIDES.set(tuple(other for other in _OVERRIDES.get() if other is not override))


def is_in_force(override: Override) -> bool:
    """Whether an override holds in this context."""
    return any(other is override for other in _OVERRIDES.get())


def current_call(defaults: Call, key: EngineKey) -> Call:
    """Gives an engine's call in this context: its defaults, changed by each override in turn."""
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
    """Gives the mark of an engine's latest pass that ran here, None if none did."""
    mark = _MARKS.get().get(key)
    return mark if mark is not None and mark.runner == _runner() else None


def _runner() -> tuple[int, object]:
    try:
        task: object = id(asyncio.current_task())
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.get_ident(), task
