"""The vLLM backend: one or several ordinary vLLM servers with the base model answer requests.

This process routes, finds sentences and stop strings; a thread with an event loop reads the streams of all answers.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from dlp_lora.bank.check import check_fits
from dlp_lora.bank.limits import Limits, Within
from dlp_lora.bank.mixture_folder import MixtureFolder, Source, read_source
from dlp_lora.engine.calls import Call
from dlp_lora.engine.outline import Outline
from dlp_lora.errors import AdapterError, DLPLoRAError
from dlp_lora.policy import Mixture, RoutingSettings
from dlp_lora.serve.answer_builder import AnswerBuilder, OneSentence, resolved
from dlp_lora.serve.backend import BackendError, ClosedError, Health, Request, Stats
from dlp_lora.serve.prompt_router import OutlinePromptRouter
from dlp_lora.serve.room import check_places, room_for
from dlp_lora.serve.stream import EventStream
from dlp_lora.serve.vllm.adapters import AnswerAdapters, ContentAdapters, KeptAdapter, SharedAdapters
from dlp_lora.serve.vllm.answering import Answering, Counts
from dlp_lora.serve.vllm.check import ProbeAdapter, check
from dlp_lora.serve.vllm.client import RefusedError, VLLMClient
from dlp_lora.serve.vllm.replicas import Replica, Replicas

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VLLMSettings:
    """The settings for vLLM servers.

    Args:
        adapter_cache: a folder that both sides see; by default one in memory, for servers on this machine.
        adapter_cache_mb: megabytes of unused mixtures that are kept there.
        max_rank: of a mixture; by default the sum of the three largest ranks.
        timeout_s: the longest silence of a server during a request.
        targets: the ends of the names of the layers for which the servers have slots; None for all.
        poll_s: seconds between checks of the servers.
        key: the servers' key.
    """

    adapter_cache: Path | None = None
    adapter_cache_mb: float = 2048.0
    max_rank: int | None = None
    timeout_s: float = 120.0
    targets: frozenset[str] | None = None
    poll_s: float = 2.0
    key: str | None = None


class VLLMBackend:
    """A Backend with vLLM servers that serve the base model of an outline.

    Args:
        outline: of the model, its adapters and their router.
        urls: of the servers.
        max_running: largest number of requests at the servers.
        max_queue: largest number of further requests that wait.
        ended: says why the servers ended for good, if they are processes that did.

    Raises:
        AdapterError: if an adapter cannot be read, or has a larger rank than the limit of mixtures.
        ModelError: if a server cannot answer for this bundle.
        UnavailableError: if none of the servers can be reached.
    """

    def __init__(
        self,
        outline: Outline,
        urls: Sequence[str],
        *,
        settings: VLLMSettings = VLLMSettings(),  # frozen
        max_running: int = 64,
        max_queue: int = 256,
        ended: Callable[[], str] | None = None,
    ) -> None:
        if not urls:
            raise ValueError("give the address of at least one vLLM server")
        self.outline = outline
        self._sources = _read_sources(outline)
        self.limits = Limits(max_rank=_max_rank(self._sources, settings.max_rank), rank_of=self._rank_of)
        self._folder = MixtureFolder(
            settings.adapter_cache,
            base=_identity(outline),
            layout=outline.layout,
            budget_mb=settings.adapter_cache_mb,
        )
        self._targets = settings.targets
        self._max_running = max_running
        self.max_open = max_running + max_queue
        self._lock = threading.Lock()  # of what other threads ask
        self._routing = threading.RLock()  # of the router and the adapters' names
        self.prompt_router = OutlinePromptRouter(
            outline, self._sources.keys(), lock=self._routing, limited=self._limited
        )
        self._ended = ended
        self._open: dict[AnswerBuilder, asyncio.Task[None]] = {}
        self._num_open = 0
        self._is_closing = False
        self._counts = Counts()
        probe = self._write_probe()
        self._replicas = Replicas(
            [
                Replica(
                    VLLMClient(url, key=settings.key, timeout_s=settings.timeout_s),
                    partial(check, outline=outline, probe=probe, num_running=-(-max_running // len(urls))),
                    probe,
                )
                for url in urls
            ],
            poll_s=settings.poll_s,
        )
        self._shared = SharedAdapters(self._folder, self._replicas)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dlp-lora-vllm", daemon=True)
        self._thread.start()
        try:
            self._wait_for(self._start())
        except BaseException:
            self.close()
            raise
        contexts = [outline.max_context, *(replica.found.max_context for replica in self._replicas.up)]
        self.max_context = min(context for context in contexts if context is not None)

    @property
    def program(self) -> str:
        """The program that computes the tokens, with its release, of each server that can answer."""
        return ", ".join(sorted({f"vLLM {replica.found.version}" for replica in self._replicas.up})) or "vLLM"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self._sources)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the servers for their owner."""
        return tuple(f"{replica.url}: {note}" for replica in self._replicas.up for note in replica.found.notes)

    @property
    def health(self) -> Health:
        """Whether it can answer."""
        if self._is_closing:
            return Health(is_alive=False, reason="the server is closing")
        if self._ended is not None and (reason := self._ended()):
            return Health(is_alive=False, reason=reason, is_lost=True)
        if not self._replicas.up:
            return Health(is_alive=False, reason=f"no backend can answer: {self._replicas.reason}")
        return Health(is_alive=True)

    def stats(self) -> Stats:
        """Its state and its totals. A step is a group of tokens that came at once."""
        counts = self._counts
        running = [answer for answer in list(self._open) if answer.is_read]
        num_decoding = sum(answer.num_tokens > 0 for answer in running)
        return Stats(
            waiting=max(0, self._num_open - len(running)),
            reading=len(running) - num_decoding,
            decoding=num_decoding,
            kept_bytes=0,
            num_steps=counts.chunks,
            num_step_tokens=counts.tokens,
            num_read_tokens=counts.read_tokens,
            num_cached_tokens=counts.cached_tokens,
            num_switches=counts.switches,
            route_s=counts.route_s,
            fuse_s=counts.fuse_s,
        )

    def open(self, request: Request) -> EventStream:
        """Takes a request, as `open_all` does."""
        return self.open_all([request])[0]

    def open_all(self, requests: Sequence[Request]) -> list[EventStream]:
        """Takes requests, all of them or none.

        Raises:
            PromptError: if a prompt is empty or does not fit into the model's context with `max_tokens`.
            ValueError: if these servers do not support one.
            QueueFullError, ClosedError: if it has no room for all of them now.
        """
        rooms = [room_for(each, max_context=self.max_context, vocab_size=self.outline.vocab_size) for each in requests]
        followed = [self._followed(request) for request in requests]
        with self._lock:
            if self._is_closing:
                raise ClosedError("the server is closing")
            check_places(len(requests), self._num_open, self.max_open)
            self._num_open += len(requests)
        return [self._add(request, max_tokens) for request, max_tokens in zip(followed, rooms, strict=True)]

    def _followed(self, request: Request) -> Request:
        """Returns a request as the servers can follow it.

        Raises:
            ValueError: if they cannot.
        """
        self._check_followed(request.call.settings)
        request = resolved(request)
        changes: dict[str, Any] = {}
        if request.sampling.presence_penalty:
            changes["segmenter"] = OneSentence  # vLLM forgets which tokens it saw
        request = replace(request, call=self._limited(request.call).changed(changes))
        if (grammar := request.sampling.grammar) is not None:
            request = replace(request, sampling=replace(request.sampling, grammar=_Followed(grammar.schema)))
        return request

    def _add(self, request: Request, max_tokens: int) -> EventStream:
        stream = EventStream(lambda: self._call(self._cancel, answer))
        answer = AnswerBuilder(request, stream, max_tokens)
        self._call(self._begin, answer)
        return stream

    def check_adapter(self, path: str | Path, name: str) -> None:
        """Checks a folder that may become an adapter, whether its name is taken or not.

        Raises:
            AdapterError: if it cannot be read, does not fit, or the servers have no room for it.
        """
        check_fits(self.outline.layout, path, name)
        self._read(path, name)

    def put_adapters(self, folders: Mapping[str, str | Path]) -> None:
        """Adds adapters, or replaces those of their names, after every server has loaded all of them.

        Raises:
            AdapterError: if one cannot be read or loaded.
        """
        self._wait_for(self._put({name: self._read(path, name) for name, path in folders.items()}))

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter; running requests keep it.

        Raises:
            AdapterError: if there is none of this name.
        """
        self._wait_for(self._remove(name))

    def close(self, *, drain_s: float = 0.0) -> None:
        """Takes no more requests, waits so long for running ones, and ends the others with a ClosedError."""
        with self._lock:
            self._is_closing = True
        deadline = time.monotonic() + drain_s
        while self._num_open and time.monotonic() < deadline:
            time.sleep(0.01)
        if not self._thread.is_alive():
            return
        self._wait_for(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.close()

    def _read(self, path: str | Path, name: str) -> Source:
        source = read_source(path, name, self.outline.layout)
        if source.rank > self.limits.max_rank:
            raise AdapterError(
                f"{path} has rank {source.rank}, and this server takes {self.limits.max_rank}; start it with "
                f"--max-rank {source.rank}"
            )
        if self._targets is not None and (others := source.targets - self._targets):
            raise AdapterError(
                f"{path} changes {', '.join(sorted(others))}, for which vLLM was started without slots; put the "
                "adapter into the bundle and start the server again"
            )
        return source

    async def _start(self) -> None:
        self._places = asyncio.Semaphore(self._max_running)
        self._changing = asyncio.Lock()  # the adapters
        await self._replicas.start()
        self._watch = asyncio.create_task(self._replicas.watch())

    async def _end(self) -> None:
        tasks = list(self._open.values())
        for answer, task in list(self._open.items()):
            if not answer.has_ended:
                answer.fail(ClosedError("the server is closing"))
                task.cancel()
        if (watch := getattr(self, "_watch", None)) is not None:
            watch.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self._replicas))
        with suppress(RuntimeError):
            await self._loop.shutdown_default_executor()

    async def _put(self, sources: Mapping[str, Source]) -> None:
        async with self._changing:
            for name in sources:
                await self._load(name, sources)
            replaced = [self._sources[name] for name in sources if name in self._sources]
            with self._routing:
                self._sources.update(sources)
            await self._forget(replaced)

    async def _remove(self, name: str) -> None:
        async with self._changing:
            if name not in self._sources:
                raise AdapterError(f"no adapter {name!r}; there are {', '.join(sorted(self._sources)) or 'none'}")
            with self._routing:
                gone = self._sources.pop(name)
            await self._forget([gone])

    async def _load(self, name: str, sources: Mapping[str, Source]) -> None:
        """Loads an adapter in every server that can answer.

        Raises:
            AdapterError: if one cannot load it.
        """
        entry = await self._shared.have(Mixture({name: 1.0}), sources)
        try:
            able = self._replicas.up
            done = await asyncio.gather(
                *(replica.have(entry.name, str(entry.path)) for replica in able), return_exceptions=True
            )
            if failed := [error for error in done if isinstance(error, BaseException)]:
                raise AdapterError(f"{name}: not every backend could load it: {failed[0]}") from failed[0]
        finally:
            self._shared.release(entry)

    async def _forget(self, gone: Iterable[Source]) -> None:
        """Unloads the unused mixtures of adapters that no name has any more."""
        there = {source.content for source in self._sources.values()}
        for content in {source.content for source in gone} - there:
            await self._shared.forget(content)

    def _begin(self, answer: AnswerBuilder) -> None:
        task = self._open[answer] = self._loop.create_task(self._answer(answer))
        task.add_done_callback(lambda _: self._free(answer))  # also if it is cancelled before it runs

    def _cancel(self, answer: AnswerBuilder) -> None:
        """Ends an answer; one that has ended may still unload its adapter."""
        if (task := self._open.get(answer)) is not None and not answer.has_ended:
            answer.finish("abort")
            task.cancel()

    def _free(self, answer: AnswerBuilder) -> None:
        del self._open[answer]
        with self._lock:
            self._num_open -= 1

    async def _answer(self, answer: AnswerBuilder) -> None:
        try:
            async with self._places:
                request = answer.request
                sources = dict(self._sources)  # an answer keeps its adapters
                started = time.perf_counter()
                router = self.prompt_router.start_row(
                    request.tokens, call=request.call, prompt=request.prompt, among=request.among(sources)
                )
                self._counts.route_s += time.perf_counter() - started
                answer.begin(router)
                adapters = self._adapters_of(answer, sources)
                await Answering(answer, adapters, self._replicas, self._counts, self._routing).run()
        except Exception as error:
            if not answer.has_ended:
                answer.fail(_as_backend_error(error))

    def _adapters_of(self, answer: AnswerBuilder, sources: dict[str, Source]) -> AnswerAdapters:
        request = answer.request
        # With one mixture, both policies are the same.
        may_switch = request.call.mixtures is None and request.call.segmenter is not OneSentence
        if request.call.settings.kv_policy == "keep" and may_switch and sources:
            return KeptAdapter(self._folder.path, f"keep-{uuid4().hex}", sources, self._replicas)
        return ContentAdapters(self._shared, sources)

    def _limited(self, call: Call) -> Call:
        """Returns a call whose mixtures fit into the servers' slots.

        Raises:
            ValueError: if a fixed mixture has too large a rank.
        """
        if call.mixtures is not None:
            self._check_known(call.mixtures)
            return call.changed({"mixtures": tuple(map(self.limits.check, call.mixtures))})
        policy = call.settings.policy
        return call if isinstance(policy, Within) else call.changed({"policy": Within(policy, self.limits)})

    def _check_known(self, mixtures: Iterable[Mixture]) -> None:
        if unknown := sorted({name for mixture in mixtures for name in mixture} - self._sources.keys()):
            raise AdapterError(f"no adapter {unknown[0]!r}; there are {', '.join(sorted(self._sources)) or 'none'}")

    def _check_followed(self, settings: RoutingSettings) -> None:
        """Checks that the servers can follow routing settings.

        Raises:
            ValueError: if they cannot.
        """
        if settings.prompt_routing == "sentences":
            raise ValueError(
                "prompt_routing: vLLM encodes a prompt under one mixture, so 'sentences' cannot be followed; use "
                "'questions' or 'whole'"
            )
        if settings.kv_policy == "keep" and (unable := [r for r in self._replicas.up if not r.found.tells_cached]):
            raise ValueError(
                f"kv_policy: {unable[0].url} does not say how much it keeps (--enable-prefix-caching, "
                "--enable-prompt-tokens-details); use 'recompute'"
            )

    def _rank_of(self, name: str) -> int:
        source = self._sources.get(name)
        return 0 if source is None else source.rank  # removed a moment ago

    def _write_probe(self) -> ProbeAdapter:
        """Writes the adapter for checks of servers."""
        module, (d_in, d_out) = self._a_module()
        path = self._folder.write_probe(module, d_in=d_in, d_out=d_out, rank=self.limits.max_rank)
        return ProbeAdapter(name=path.name, path=str(path), max_rank=self.limits.max_rank)

    def _a_module(self) -> tuple[str, tuple[int, int]]:
        """A module that adapters change, because vLLM cannot adapt every module."""
        for source in self._sources.values():
            for module, lora in source.adapter.modules.items():
                return module, (lora.a.shape[1], lora.b.shape[0])
        return next(iter(self.outline.layout.items()))

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it all answers
            self._loop.call_soon_threadsafe(function, *args)

    def _wait_for(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The needs of an outline's adapters: the largest rank of a mixture, and the ends of the names of their layers."""

    max_rank: int
    targets: frozenset[str]

    @classmethod
    def of(cls, outline: Outline, max_rank: int | None = None) -> "Needs":
        """The needs of an outline; the default of `max_rank` is the sum of the three largest ranks.

        Raises:
            ValueError: if a single adapter has a larger rank.
        """
        sources = _read_sources(outline)
        targets = frozenset[str]().union(*(source.targets for source in sources.values()))
        return cls(max_rank=_max_rank(sources, max_rank), targets=targets)


def _max_rank(sources: Mapping[str, Source], max_rank: int | None) -> int:
    ranks = sorted((source.rank for source in sources.values()), reverse=True)
    if max_rank is None:
        return sum(ranks[:3]) or 1
    if ranks and max_rank < ranks[0]:
        name = max(sources, key=lambda name: sources[name].rank)
        raise ValueError(f"max_rank is {max_rank}, and the adapter {name!r} alone has rank {ranks[0]}")
    return max_rank


def _read_sources(outline: Outline) -> dict[str, Source]:
    return {name: read_source(folder, name, outline.layout) for name, folder in outline.adapters.items()}


@dataclass(frozen=True)
class _Followed:
    """A grammar that the servers follow."""

    schema: Any

    def mask(self, scores: Any) -> None:
        """Does nothing: the servers have the scores."""

    def accept(self, token: int) -> bool:
        """The server ends the answer."""
        return False


def _identity(outline: Outline) -> str:
    """A key that identifies the base model."""
    marks = outline.base.fingerprint
    return outline.source if marks is None else f"{marks.tensors} {marks.values}"


def _as_backend_error(error: Exception) -> Exception:
    if isinstance(error, RefusedError) and error.is_about_request:
        logger.warning("a request was refused: %s", error)
        return ValueError(f"vLLM refuses the request: {error.reason}")
    if isinstance(error, DLPLoRAError | ValueError):
        return error
    failure = BackendError(f"the request failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
