"""The store of adapters: names in, stacked weights out, within a budget of memory.

It lists the adapters, keeps the most recently used ones in memory, and reads others from their folders. A computation
has a lease on its adapters: a leased adapter that is removed stays until the lease ends.
"""

import gc
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from dlp_lora.bank.adapter_files import check_unchanged, files_stamp
from dlp_lora.bank.layout import Layout, Place, StackedLora
from dlp_lora.bank.peft_format import Adapter
from dlp_lora.errors import AdapterError
from dlp_lora.policy import Mixture


class Lease:
    """Keeps adapters in use as long as a reference to it exists.

    If it `follows`, the holder must fuse `of(mixture)`, so that another adapter may take the name of a removed one. A
    copy is the same lease.
    """

    __slots__ = ("__weakref__", "_moved", "follows", "names")

    def __init__(self, names: Iterable[str], *, follows: bool = False) -> None:
        self.names = frozenset(names)
        self.follows = follows
        self._moved: dict[str, str] = {}

    def of(self, mixture: Mixture) -> Mixture:
        """Returns a mixture with the current names of the leased adapters."""
        return Mixture({self._moved.get(name, name): w for name, w in mixture.items()}) if self._moved else mixture

    def move(self, name: str, key: str) -> None:
        """Notes the new name of an adapter."""
        self._moved[name] = key
        self.names = self.names - {name} | {key}

    def __copy__(self) -> "Lease":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Lease":
        return self

    def __repr__(self) -> str:
        return f"Lease({', '.join(sorted(self.names))})"


@dataclass
class Entry:
    """One adapter of the store."""

    adapter: Adapter  # its shapes; the weights are in `stacked`
    ranks: Mapping[Place, int]
    number: int  # adapters are counted as they are added
    stamp: tuple[tuple[int, int], ...] | None  # of its files when it was added
    is_on_disk: bool  # its weights may go, and are read again
    stacked: Mapping[Place, StackedLora] | None = None
    digest: bytes | None = None  # of its numbers

    @property
    def is_ready(self) -> bool:
        """Whether it is in memory and its digest is known."""
        return self.stacked is not None and self.digest is not None

    @property
    def rank(self) -> int:
        """Its rank, all places together."""
        return sum(self.ranks.values())

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes now."""
        return sum(lora.nbytes for lora in (self.stacked or {}).values())


class AdapterStore:
    """Adapters by name, each stored once, as `layout` stacks them.

    With a `budget_mb`, adapters that were read without their weights stay on disk. They are loaded when they are
    needed, and replace the least recently used ones, leased ones last.
    """

    def __init__(self, layout: Layout, *, budget_mb: float | None = None) -> None:
        if budget_mb is not None and budget_mb <= 0:
            raise ValueError(f"budget_mb must be positive, got {budget_mb}")
        self.budget_mb = budget_mb
        self.num_misses = 0  # adapters that had to be loaded
        self.adapters: dict[str, Adapter] = {}  # their shapes, in the order they were added
        self._layout = layout
        self._entries: dict[str, Entry] = {}  # also of removed adapters that are leased
        self._loaded: dict[str, Entry] = {}  # those in memory, the least recently used first
        self._leases: WeakSet[Lease] = WeakSet()
        self._numbers = count()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The adapters in memory, the least recently used first."""
        return tuple(self._loaded)

    def entry_for(self, adapter: Adapter, *, replace: bool = False) -> Entry:
        """Makes the entry of an adapter for `enter`. The adapters do not change, so an error leaves them as they are.

        Raises:
            AdapterError: if it does not fit the layout; its name is taken, and it does not `replace` the other; or
                another adapter of its name is leased to one that does not follow.
        """
        name = adapter.name
        if name in self.adapters and not replace:
            raise AdapterError(f"two adapters are named {name!r} (the second: {adapter.path}); rename one")
        self._layout.check(adapter)
        self._drop_removed()
        if not self._may_change(name):
            gc.collect()  # rows of a call that failed may only wait for this
            self._drop_removed()
        if not self._may_change(name):
            raise AdapterError(
                f"rows still run with the {'' if name in self.adapters else 'removed '}adapter {name!r}; let them end "
                f"and drop their KV caches, or add {adapter.path} under another name"
            )
        stamp = None
        with suppress(OSError):  # one that was never in a folder
            stamp = files_stamp(adapter.path)
        return Entry(
            adapter=adapter.without_weights(),
            ranks=self._layout.ranks(adapter),
            number=next(self._numbers),
            stamp=stamp,
            is_on_disk=not adapter.is_loaded,
            stacked=self._layout.stack(adapter) if adapter.is_loaded else None,
        )

    def enter(self, entries: Iterable[Entry]) -> None:
        """Adds adapters; each replaces another of its name, which stays in memory until its last lease ends."""
        for entry in entries:
            name = entry.adapter.name
            if name in self.adapters:
                self._keep_leased(name)
            if name in self._entries:
                self._make_way(name)
            self.adapters[name] = entry.adapter
            self._entries[name] = entry
            if entry.stacked is not None:
                self._loaded[name] = entry

    def remove(self, name: str) -> None:
        """Removes an adapter; if it is leased, it stays in memory until its last lease ends.

        Raises:
            AdapterError: if there is none of this name.
        """
        if name not in self.adapters:
            raise self._unknown(name)
        self._keep_leased(name)
        del self.adapters[name]
        self._drop_removed()

    def lease(self, names: Iterable[str], *, follows: bool = False) -> Lease:
        """Keeps adapters, even removed ones, as long as a reference to the returned lease exists.

        Raises:
            AdapterError: if there is no adapter of a name.
        """
        self._drop_removed()
        lease = Lease(names, follows=follows)
        for name in lease.names:
            self.entry(name)
        self._leases.add(lease)
        return lease

    def leased(self) -> set[str]:
        """The leased adapters."""
        return {name for lease in self._leases for name in lease.names}

    def entry(self, name: str) -> Entry:
        """The entry of an adapter, also of a removed one that is leased.

        Raises:
            AdapterError: if there is none of this name.
        """
        if name not in self._entries:
            raise self._unknown(name)
        return self._entries[name]

    def load(self, names: Sequence[str]) -> list[Mapping[Place, StackedLora]]:
        """Returns the stacked weights of adapters, and marks them as the most recently used.

        Raises:
            AdapterError: if one cannot be read, or its files were written since it was added.
        """
        self._drop_removed()
        for name in names:
            entry = self.entry(name)
            if entry.stacked is None:
                entry.stacked = self.read(entry)
                self.num_misses += 1
            self._loaded.pop(name, None)
            self._loaded[name] = entry
        self._make_room(names)
        return [stacked for name in names if (stacked := self._entries[name].stacked) is not None]

    def read(self, entry: Entry) -> Mapping[Place, StackedLora]:
        """Returns the stacked weights of an adapter, from its folder if necessary; changes nothing.

        Raises:
            AdapterError: if it cannot be read, or its files were written since it was added.
        """
        stacked = entry.stacked
        if stacked is None:
            try:
                adapter = entry.adapter.with_weights()
            finally:  # files that were written again have other weights, or explain the error
                check_unchanged(entry.adapter.path, entry.adapter.name, entry.stamp)
            stacked = self._layout.stack(adapter)
        return stacked

    def put(self, entry: Entry, stacked: Mapping[Place, StackedLora], digest: bytes) -> None:
        """Stores the result of `read` in memory, unless the adapter is gone."""
        entry.digest = digest
        name = next((name for name, other in self._entries.items() if other is entry), None)
        if name is None:
            return
        if entry.stacked is None:
            entry.stacked = stacked
            self.num_misses += 1
        self._loaded.pop(name, None)
        self._loaded[name] = entry
        self._make_room([name])

    def digest(self, name: str) -> bytes:
        """The digest of an adapter's numbers.

        Raises:
            AdapterError: if it cannot be read.
        """
        entry = self.entry(name)
        if entry.digest is None:
            entry.digest = content_digest(self.read(entry))
        return entry.digest

    def loaded_among(self, names: Iterable[str]) -> list[str]:
        """The adapters among these that are in memory."""
        self._drop_removed()
        return [name for name in names if name in self._loaded]

    def check_files(self, name: str) -> None:
        """Checks that an adapter's folder is unchanged, so that it may be read or copied again.

        Raises:
            AdapterChangedError: if it has changed.
        """
        entry = self.entry(name)
        check_unchanged(entry.adapter.path, entry.adapter.name, entry.stamp)

    def place(self, *, dtype: torch.dtype, device: torch.device) -> None:
        """Moves the weights in memory; later ones are read to the same dtype and device."""
        self._layout.dtype, self._layout.device = dtype, device
        for entry in self._loaded.values():
            stacked = entry.stacked or {}
            entry.stacked = {
                place: StackedLora(lora.a.to(device, dtype), lora.b.to(device, dtype))
                for place, lora in stacked.items()
            }

    def tensors(self) -> list[Tensor]:
        """The weights in memory."""
        loras = [lora for entry in self._loaded.values() for lora in (entry.stacked or {}).values()]
        return [tensor for lora in loras for tensor in (lora.a, lora.b)]

    def _keep_leased(self, name: str) -> None:
        """Loads an adapter that is leased, because its files may go, too; it then stays in memory."""
        if name in self.leased():
            with suppress(AdapterError):  # the error comes when it is needed again
                self.load([name])
        self._entries[name].is_on_disk = False

    def _make_way(self, name: str) -> None:
        """Gives an adapter another name if it is leased, and forgets it otherwise."""
        leases = [lease for lease in self._leases if name in lease.names]
        entry = self._entries.pop(name)
        key = f"{name} (removed, {entry.number})"
        is_loaded = self._loaded.pop(name, None) is not None
        if not leases:
            return
        self._entries[key] = entry
        if is_loaded:
            self._loaded[key] = entry
        for lease in leases:
            lease.move(name, key)

    def _make_room(self, names: Sequence[str]) -> None:
        """Drops adapters beyond the budget, but not these."""
        if self.budget_mb is None:
            return
        excess = sum(entry.nbytes for entry in self._loaded.values()) - self.budget_mb * 2**20
        if excess <= 0:
            return
        leased = self.leased()
        idle = [name for name, entry in self._loaded.items() if entry.is_on_disk and name not in names]
        for name in sorted(idle, key=leased.__contains__):  # otherwise rows in turn would evict each other's adapters
            if excess <= 0:
                return
            entry = self._loaded.pop(name)
            excess -= entry.nbytes
            entry.stacked = None

    def _may_change(self, name: str) -> bool:
        """Whether every lease of an adapter follows to another of its name."""
        return all(lease.follows for lease in self._leases if name in lease.names)

    def _drop_removed(self) -> None:
        """Forgets removed adapters without a lease."""
        if len(self._entries) == len(self.adapters):
            return
        for name in self._entries.keys() - self.adapters.keys() - self.leased():
            del self._entries[name]
            self._loaded.pop(name, None)

    def _unknown(self, name: str) -> AdapterError:
        return AdapterError(f"no adapter {name!r}; there are {', '.join(sorted(self.adapters)) or 'none'}")


def content_digest(stacked: Mapping[Place, StackedLora]) -> bytes:
    """Computes a digest of an adapter's numbers and their places."""
    digest = hashlib.sha256()
    for place in sorted(stacked):
        for tensor in (stacked[place].a, stacked[place].b):
            digest.update(repr((place, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).flatten().numpy().data)
    return digest.digest()
