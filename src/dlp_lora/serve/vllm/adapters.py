"""Adapters by mixture: the adapter names for requests to vLLM, and writing and loading their files.

Under `recompute`, answers of one mixture share an adapter, which is named after its content. Under `keep`, each answer
has a separate name and path from its beginning to its end, and its weights are replaced.
"""

import asyncio
import shutil
from pathlib import Path
from typing import Protocol, runtime_checkable

from dlp_lora.bank.mixture_folder import Entry, MixtureFolder, Sources, rewrite_mixture
from dlp_lora.policy import Mixture
from dlp_lora.serve.vllm.replicas import Replica, Replicas


@runtime_checkable
class AnswerAdapters(Protocol):
    """The adapters of one answer; `keeps_name` says whether they all have the same name."""

    keeps_name: bool

    async def prepare(self, replica: Replica, mixture: Mixture) -> str:
        """Prepares a server for a mixture; returns the name of its adapter."""
        ...

    async def close(self) -> None:
        """Notes the end of the answer."""
        ...


class SharedAdapters:
    """Mixtures by content, in one folder, loaded by the servers that need them."""

    def __init__(self, folder: MixtureFolder, replicas: Replicas) -> None:
        self.folder = folder
        self._replicas = replicas
        self._writing: dict[str, asyncio.Lock] = {}

    async def have(self, mixture: Mixture, sources: Sources) -> Entry:
        """Returns a mixture with its files; it stays until it is released.

        Raises:
            AdapterError: if it cannot be written.
        """
        entry = self.folder.claim(mixture, sources)
        try:
            if entry.lock is None:
                async with self._writing.setdefault(entry.name, asyncio.Lock()):
                    await asyncio.to_thread(self.folder.write, entry, mixture, sources)
                self._writing.pop(entry.name, None)
                await self._make_room()
        except BaseException:
            self.folder.release(entry)
            raise
        return entry

    def release(self, entry: Entry) -> None:
        """Releases a mixture for one of its users."""
        self.folder.release(entry)

    async def forget(self, content: str) -> None:
        """Unloads and deletes the unused mixtures that contain an adapter."""
        await self._delete(self.folder.holding(content))

    async def _make_room(self) -> None:
        await self._delete(self.folder.surplus())

    async def _delete(self, entries: list[Entry]) -> None:
        for entry in entries:
            self.folder.delete(entry)
        for entry in entries:
            await asyncio.gather(*(replica.drop(entry.name) for replica in self._replicas))


class ContentAdapters:
    """An answer under `recompute`: each mixture is another adapter, and an empty one is the base model."""

    keeps_name = False

    def __init__(self, shared: SharedAdapters, sources: Sources) -> None:
        self._shared = shared
        self._sources = sources
        self._entry: Entry | None = None
        self._mixture: Mixture | None = None

    async def prepare(self, replica: Replica, mixture: Mixture) -> str:
        """Prepares a server for a mixture; returns the name of its adapter."""
        if not mixture and not (replica.found.needs_zero_adapter and self._sources):
            return replica.found.base
        if self._entry is None or mixture != self._mixture:
            await self.close()
            self._entry, self._mixture = await self._shared.have(mixture, self._sources), mixture
        await replica.have(self._entry.name, str(self._entry.path))
        return self._entry.name

    async def close(self) -> None:
        """Releases the mixture in use."""
        if self._entry is not None:
            self._shared.release(self._entry)
            self._entry = None


class KeptAdapter:
    """An answer under `keep`: one name and one path, whose weights change with its mixture."""

    keeps_name = True

    def __init__(self, folder: Path, name: str, sources: Sources, replicas: Replicas) -> None:
        self._path = folder / name
        self._name = name
        self._sources = sources
        self._replicas = replicas
        self._written: Mixture | None = None
        self._loaded: dict[Replica, Mixture | None] = {}  # None while a server reads it

    async def prepare(self, replica: Replica, mixture: Mixture) -> str:
        """Prepares a server for a mixture; returns the name of its adapter."""
        if mixture != self._written:
            await asyncio.to_thread(rewrite_mixture, self._path, mixture, self._sources)
            self._written = mixture
        if self._loaded.get(replica) != mixture or self._name not in replica.loaded:
            self._loaded[replica] = None
            await replica.reload(self._name, str(self._path))
            self._loaded[replica] = mixture
        return self._name

    async def close(self) -> None:
        """Unloads it and deletes its files."""
        await asyncio.gather(*(replica.drop(self._name) for replica in self._loaded))
        await asyncio.to_thread(shutil.rmtree, self._path, ignore_errors=True)
