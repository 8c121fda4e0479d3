"""Replicas: several vLLM servers of one model; each request gets one that can answer."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from dlp_lora.errors import DLPLoRAError
from dlp_lora.serve.vllm.check import Checked, ProbeAdapter
from dlp_lora.serve.vllm.client import LostError, UpstreamError, VLLMClient

logger = logging.getLogger(__name__)

Check = Callable[[VLLMClient], Awaitable[Checked]]


@dataclass(eq=False)
class Replica:
    """One server: the results of its check, and its adapters. `reason` is set if it gets no requests."""

    client: VLLMClient
    check: Check
    mark: ProbeAdapter  # of this check: it has it as long as it is the same process
    checked: Checked | None = None
    reason: str = "not checked yet"
    num_running: int = 0
    loaded: dict[str, str] = field(default_factory=dict)  # paths by name
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)
    _loads: set["asyncio.Task[None]"] = field(default_factory=set)
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        """Its address."""
        return self.client.url

    @property
    def is_up(self) -> bool:
        """Whether it gets requests."""
        return not self.reason

    @property
    def found(self) -> Checked:
        """The results of its check."""
        assert self.checked is not None
        return self.checked

    async def verify(self) -> None:
        """Checks it completely, because it may be another process or another model.

        Raises:
            LostError, ModelError: if it cannot answer; it then gets no requests.
        """
        async with self._checking:
            self.loaded.clear()
            try:
                self.checked = await self.check(self.client)
            except DLPLoRAError as error:
                self.reason = str(error)
                raise
            self.loaded[self.mark.name] = self.mark.path
            self.reason = ""
            logger.info("the backend %s is ready: vLLM %s", self.url, self.checked.version)

    def lose(self, error: BaseException) -> None:
        """Notes its failure; it gets no requests until its next check."""
        if self.is_up:
            logger.warning("the backend %s is not used: %s", self.url, error)
        self.reason = str(error)

    async def have(self, name: str, path: str) -> None:
        """Loads an adapter in it, unless it has it.

        Raises:
            UpstreamError: if this fails.
        """
        if self.loaded.get(name) == path:
            return
        load = asyncio.create_task(self._load(name, path))
        self._loads.add(load)
        load.add_done_callback(self._loads.discard)
        await asyncio.shield(load)  # of a load that is cancelled half-way, nobody would know whether the server has it

    async def _load(self, name: str, path: str) -> None:
        async with self._locks.setdefault(name, asyncio.Lock()):
            if self.loaded.get(name) != path:
                await self.client.load(name, path)
                self.loaded[name] = path

    async def reload(self, name: str, path: str) -> None:
        """Lets it read an adapter with new files again."""
        if self.loaded.pop(name, None) is not None:
            await self.client.unload(name)
        await self.have(name, path)

    async def drop(self, name: str) -> None:
        """Unloads an adapter, if it can be reached."""
        async with self._locks.setdefault(name, asyncio.Lock()):  # it may still be loading
            if self.loaded.pop(name, None) is not None:
                with suppress(UpstreamError):
                    await self.client.unload(name)
        self._locks.pop(name, None)

    async def close(self) -> None:
        """Unloads all adapters, if it can be reached."""
        await asyncio.gather(*self._loads, return_exceptions=True)
        if self.is_up:
            for name in [*self.loaded]:
                await self.drop(name)
        await self.client.close()


class Replicas:
    """All servers, in turn; they are checked every `poll_s` seconds."""

    def __init__(self, replicas: Collection[Replica], *, poll_s: float) -> None:
        self._replicas = list(replicas)
        self._poll_s = poll_s
        self._turn = 0

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    @property
    def up(self) -> list[Replica]:
        """Those that get requests."""
        return [replica for replica in self._replicas if replica.is_up]

    @property
    def reason(self) -> str:
        """The reason if no server gets requests."""
        return "; ".join(replica.reason for replica in self._replicas if not replica.is_up)

    def next(self, *, but: Collection[Replica] = ()) -> Replica:
        """Returns the next server that can answer, in turn; one of `but` only if there is no other.

        Raises:
            LostError: if there is none.
        """
        able = self.up
        if not able:
            raise LostError(f"no backend can answer: {self.reason}")
        preferred = [replica for replica in able if replica not in but] or able
        self._turn += 1
        return preferred[self._turn % len(preferred)]

    async def start(self) -> None:
        """Checks all of them.

        Raises:
            ModelError: if one cannot answer for this bundle.
            LostError: if none can be reached.
        """
        results = await asyncio.gather(*(replica.verify() for replica in self), return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException) and not isinstance(error, LostError):
                raise error
        if not self.up:
            raise LostError(self.reason)
        for replica in self:
            if not replica.is_up:
                logger.warning("the backend %s is not there yet: %s", replica.url, replica.reason)

    async def watch(self) -> None:
        """Polls them forever: a server that was away, or is another process, is checked again."""
        while True:
            await asyncio.sleep(self._poll_s)
            await asyncio.gather(*map(self._look_after, self))

    async def _look_after(self, replica: Replica) -> None:
        try:
            if replica.is_up and await self._is_same(replica):
                return
            if await replica.client.is_healthy():
                await replica.verify()
        except Exception as error:  # whatever it answers, the others are watched on
            replica.lose(error)

    async def _is_same(self, replica: Replica) -> bool:
        """Whether it is still the checked process: another one does not have the adapter of the check."""
        return replica.mark.name in {model.name for model in await replica.client.models()}
