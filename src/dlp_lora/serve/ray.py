"""Ray Serve: replicas of the server, which follow the bundle.

    serve run dlp_lora.serve.ray:build_app bundle=bundle/ num_replicas=2

Each replica has an engine, or is a front of vLLM servers; replicas keep nothing between requests. Adapters come with
the bundle: replicas poll its number, and read the bundle again if the number has grown.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp

from dlp_lora.engine.outline import read_outline
from dlp_lora.files import name_of
from dlp_lora.serve.adapters import AdapterManager, BundleMark
from dlp_lora.serve.app import make_app
from dlp_lora.serve.backend import Backend
from dlp_lora.serve.keys import ADMIN_KEY, API_KEY, BACKEND_KEY, Keys
from dlp_lora.serve.logs import LOGGER
from dlp_lora.serve.server import HEALTH_S, VLLM_BATCH, local_service, make_service
from dlp_lora.serve.settings import ServerSettings
from dlp_lora.serve.watch import watch


class RayArgs(BaseModel):
    """The arguments of `serve run`, as NAME=VALUE: a bundle folder that all hosts see, and the number of replicas.

    With `backend_url`, addresses of vLLM servers with commas between them, replicas have no model, and mixtures have at
    most `max_rank` (by default the sum of the three largest). Keys come from the environment of the replicas.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    backend_url: str = ""
    adapter_cache: str | None = None
    max_rank: int | None = None
    served_model_name: str | None = None
    num_replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_ongoing_requests: int = 256
    watch_s: float = 1.0


def build_app(args: RayArgs) -> Any:
    """Makes the application for `serve run` and `serve.run`."""
    from ray import serve

    deployment = serve.deployment(
        serve.ingress(_app_of(args))(),
        name="dlp-lora",
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        health_check_period_s=5,
    )
    return deployment.bind()


def _watch_health(backend: Backend, ended: threading.Event) -> None:
    """Ends the process of a replica whose backend is lost: Ray then starts another one."""
    while not ended.wait(HEALTH_S):
        if (health := backend.health).is_lost:
            LOGGER.error("the replica ends, because it cannot answer any more: %s", health.reason)
            os._exit(1)


def _app_of(args: RayArgs) -> Callable[[], ASGIApp]:
    """Returns a function that makes the application in a replica; the end of its lifespan closes the backend."""

    def build() -> ASGIApp:
        settings = ServerSettings(served_model_name=args.served_model_name, watch_s=args.watch_s, host="0.0.0.0")
        api_key = os.environ.get(API_KEY)
        keys = Keys({api_key: None} if api_key else {}, admin=os.environ.get(ADMIN_KEY))
        name = name_of(args.bundle)
        mark = BundleMark.of(Path(args.bundle))
        if args.backend_url:
            from dlp_lora.serve.vllm.backend import VLLMBackend, VLLMSettings

            outline = read_outline(args.bundle)
            urls = args.backend_url.split(",")
            cache = None if args.adapter_cache is None else Path(args.adapter_cache)
            backend = VLLMBackend(
                outline,
                urls,
                settings=VLLMSettings(adapter_cache=cache, max_rank=args.max_rank, key=os.environ.get(BACKEND_KEY)),
                max_running=VLLM_BATCH * len(urls),
            )
            service = make_service(outline, backend, settings, keys, name=name)
        else:
            import dlp_lora

            engine = dlp_lora.load(args.bundle)
            service = local_service(engine, settings, keys, name=name)
        manager = AdapterManager(service, bundle=mark)
        ended = watch(manager, Path(args.bundle), args.watch_s)
        threading.Thread(
            target=_watch_health, args=(service.backend, ended), name="dlp-lora-health", daemon=True
        ).start()

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            ended.set()
            await asyncio.to_thread(service.backend.close)

        return make_app(service, manager, lifespan=lifespan)

    return build
