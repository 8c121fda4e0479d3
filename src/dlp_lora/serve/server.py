"""The server: a backend and settings in, a process that answers until a signal ends it."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from dlp_lora.engine.engine import Engine
from dlp_lora.engine.outline import Outline
from dlp_lora.serve.adapters import AdapterManager, BundleMark
from dlp_lora.serve.app import make_app
from dlp_lora.serve.backend import Backend, BackendError
from dlp_lora.serve.grammar import Grammars
from dlp_lora.serve.heap import trim_regularly
from dlp_lora.serve.keys import Keys
from dlp_lora.serve.local import LocalBackend
from dlp_lora.serve.logs import LOGGER
from dlp_lora.serve.names import ModelNames
from dlp_lora.serve.prompts import PromptEncoder
from dlp_lora.serve.sampler import defaults_of
from dlp_lora.serve.service import Service
from dlp_lora.serve.settings import ServerSettings
from dlp_lora.serve.watch import watch

LOCAL_BATCH = 16  # requests that are answered at once
VLLM_BATCH = 64  # that each vLLM server gets at once
FLUSH_S = 5  # for answers that were cut to reach their clients
POLL_S = 0.02
HEALTH_S = 2  # between two looks at the backend


def local_service(engine: Engine, settings: ServerSettings, keys: Keys, *, name: str) -> Service:
    """Makes the service of an engine in this process; `name` is its model name for clients."""
    backend = LocalBackend(
        engine,
        max_batch=settings.max_batch or LOCAL_BATCH,
        max_queue=settings.max_queue,
        max_context=settings.max_context,
        chunk_tokens=settings.chunk_tokens,
        cache_mb=settings.cache_mb,
    )
    return make_service(Outline.of(engine), backend, settings, keys, name=name)


def make_service(
    outline: Outline,
    backend: Backend,
    settings: ServerSettings,
    keys: Keys,
    *,
    name: str,
) -> Service:
    """Makes the service of a backend; `name` is its model name for clients.

    Raises:
        APIError: if an adapter's name is the served one.
    """
    vocab_size = outline.vocab_size
    service = Service(
        backend=backend,
        call=outline.call,
        encoder=PromptEncoder(outline.tokenizer, max_context=backend.max_context, vocab_size=vocab_size),
        grammars=Grammars(outline.tokenizer, vocab_size, sorted(outline.call.endings.eos_ids)),
        names=ModelNames(settings.served_model_name or name),
        settings=settings,
        keys=keys,
        sampling_defaults=defaults_of(outline.generation_config),
        root=outline.source,
    )
    for adapter in backend.adapters:
        service.names.check_free(adapter)
    return service


def serve(
    service: Service,
    *,
    bundle: BundleMark | None = None,
    listener: socket.socket | None = None,
    on_ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Answers requests until SIGTERM or SIGINT; running requests may finish. A second signal ends the process at once.

    Args:
        service: what answers.
        bundle: the mark of its folder, if it is of one, so that it can be read again.
        listener: from `listen`; made here by default.
        on_ready: gets the address.

    Raises:
        BackendError: if the backend is lost, so that whoever runs the process can start another one.
    """
    settings, keys = service.settings, service.keys
    listener = listener or listen(settings)
    manager = AdapterManager(service, folders=settings.adapter_dir, bundle=bundle)
    if not keys.has_users and not listener.getsockname()[0].startswith("127."):
        LOGGER.warning("everybody who reaches this address may ask: there is no key")
    app = make_app(service, manager)
    if bundle is not None and settings.watch_s is not None:
        watch(manager, bundle.bundle.path, settings.watch_s)
    trim_regularly()
    with contextlib.suppress(KeyboardInterrupt):
        _Server(app, service, lambda: on_ready(address_of(listener))).run(sockets=[listener])
    if (health := service.backend.health).is_lost:
        raise BackendError(f"the server has ended, because it cannot answer any more: {health.reason}")


def listen(settings: ServerSettings) -> socket.socket:
    """Binds the address of a server, before the model is loaded.

    Raises:
        OSError: if the address is in use, or does not belong to this machine.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except OSError as error:
        raise OSError(f"the server cannot listen on {settings.host}, port {settings.port}: {error}") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The address of a listener for a browser."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Uvicorn, but a signal first lets running answers finish."""

    def __init__(self, app: ASGIApp, service: Service, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=FLUSH_S,
            timeout_keep_alive=30,
            lifespan="off",
            timeout_notify=HEALTH_S,
            callback_notify=self._check_backend,
        )
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal, and ends at the second."""
        if self._service.is_draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._service.is_draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    async def _check_backend(self) -> None:
        """Ends the server if its backend is lost."""
        self.should_exit = self.should_exit or self._service.backend.health.is_lost

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        service, loop = self._service, asyncio.get_running_loop()
        LOGGER.info("closing", extra={"num_running": service.num_running})
        deadline = loop.time() + service.settings.shutdown_s
        while service.num_running and loop.time() < deadline:
            await asyncio.sleep(POLL_S)
        backend: Backend = service.backend
        await asyncio.to_thread(backend.close)
        while service.num_running and loop.time() < deadline + FLUSH_S:
            await asyncio.sleep(POLL_S)
        self.should_exit = True
