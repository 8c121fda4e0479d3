"""The serve command."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dlp_lora.cli.answerer import LlamaOptions, check_unused, llama_backend
from dlp_lora.cli.common import EngineOptions, HubOptions, check_serve_extra, open_engine, open_outline, say
from dlp_lora.cli.options import with_options
from dlp_lora.cli.progress import starting
from dlp_lora.files import name_of
from dlp_lora.serve.settings import ServerSettings

if TYPE_CHECKING:
    from dlp_lora.serve.keys import Keys
    from dlp_lora.serve.service import Service

BackendName = Literal["local", "vllm", "llama.cpp"]
STARTED = ("vllm_python", "vllm_max_loras", "vllm_args")  # options of a vLLM server that the command starts
LLAMA_BATCH = 4  # requests that llama.cpp answers at once


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """The keys of clients and of the admin. Others on the machine can read keys on a command line."""

    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send; better in DLP_LORA_API_KEY.", show_default=False)
    ] = None
    keys: Annotated[
        Path | None, typer.Option(help='File of keys: {"key": ["adapter", ...], "another key": null (all)}.')
    ] = None
    admin_key: Annotated[
        str | None,
        typer.Option(help="Key that manages adapters; better in DLP_LORA_ADMIN_KEY.", show_default=False),
    ] = None


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """The backend that computes the answers."""

    backend: Annotated[
        BackendName, typer.Option(help="The program that computes the tokens: PyTorch, vLLM servers, or llama.cpp.")
    ] = "local"
    backend_url: Annotated[
        tuple[str, ...],
        typer.Option(help="Addresses of vLLM servers with the base model. [default: this command starts and ends one]"),
    ] = ()
    adapter_cache: Annotated[
        Path | None,
        typer.Option(help="Folder for mixtures that server and vLLM see under one path. [default: in memory]"),
    ] = None
    adapter_cache_mb: Annotated[float, "Megabytes of mixtures that are kept there."] = 2048.0
    max_rank: Annotated[
        int | None, typer.Option(help="Largest rank of a mixture in vLLM. [default: sum of the three largest]")
    ] = None
    backend_timeout_s: Annotated[float, "How long a vLLM server may say nothing to a request."] = 120.0
    vllm_python: Annotated[
        str | None, typer.Option(help="Python of an environment with vLLM, to start it. [default: this one]")
    ] = None
    vllm_max_loras: Annotated[int, "Mixtures that a vLLM server started here computes at once."] = 16
    vllm_args: Annotated[
        str,
        typer.Option(
            help="More arguments for a vLLM server started here: '--tensor-parallel-size 2'.", show_default=False
        ),
    ] = ""


@with_options
def serve(
    engine_options: EngineOptions,
    hub_options: HubOptions,
    backend_options: BackendOptions,
    llama_options: LlamaOptions,
    key_options: KeyOptions,
    settings: ServerSettings,
) -> None:
    """Answer over HTTP with OpenAI's API, and a playground at /; needs the extra `serve`.

    Examples: `dlp-lora serve --bundle demo/bundle`, or on vLLM
    `dlp-lora serve --bundle demo/bundle --backend vllm --backend-url http://localhost:8001`
    """
    check_serve_extra()
    from dlp_lora.serve.adapters import BundleMark
    from dlp_lora.serve.logs import log_as_json
    from dlp_lora.serve.server import listen
    from dlp_lora.serve.server import serve as run

    keys = keys_of(key_options)
    listener = listen(settings)
    bundle = engine_options.bundle
    name = name_of(bundle or engine_options.adapters or "dlp-lora")
    folder = None if bundle is None else Path(bundle)
    mark = BundleMark.of(folder) if folder is not None and folder.is_dir() else None
    if settings.watch_s is not None and mark is None:
        raise ValueError("--watch-s looks at a bundle's folder; give one with --bundle")
    with _service(engine_options, hub_options, backend_options, llama_options, settings, keys, name) as service:
        log_as_json()
        run(
            service,
            bundle=mark,
            listener=listener,
            on_ready=lambda address: say(f"the playground is at {address}/, the API at {address}/v1"),
        )


@contextmanager
def _service(
    engine_options: EngineOptions,
    hub_options: HubOptions,
    options: BackendOptions,
    llama_options: LlamaOptions,
    settings: ServerSettings,
    keys: "Keys",
    name: str,
) -> "Iterator[Service]":
    """Makes what answers; what it starts for that ends with the block."""
    from dlp_lora.serve.heap import limit_products
    from dlp_lora.serve.keys import BACKEND_KEY
    from dlp_lora.serve.server import VLLM_BATCH, local_service, make_service

    if options.backend != "vllm":
        default = replace(BackendOptions(), backend=options.backend)
        if changed := [f.name for f in fields(default) if getattr(options, f.name) != getattr(default, f.name)]:
            raise ValueError(f"--{changed[0].replace('_', '-')} is for --backend vllm")
    if options.backend != "llama.cpp":
        check_unused(llama_options)
    _check_read(options, settings)
    if options.backend == "local":
        limit_products()
        engine = open_engine(engine_options, hub_options, need_router=False)
        yield local_service(engine, settings, keys, name=name)
        return
    outline = open_outline(engine_options, hub_options)
    if options.backend == "llama.cpp":
        with llama_backend(
            outline,
            llama_options,
            max_batch=settings.max_batch or LLAMA_BATCH,
            max_queue=settings.max_queue,
            max_context=settings.max_context,
            chunk_tokens=settings.chunk_tokens,
        ) as llama:
            yield make_service(outline, llama, settings, keys, name=name)
        return
    from dlp_lora.serve.vllm.backend import Needs, VLLMBackend, VLLMSettings
    from dlp_lora.serve.vllm.process import VLLMFlags, slot_bytes, slot_rank, vllm_server

    needs = Needs.of(outline, options.max_rank)
    key = os.environ.get(BACKEND_KEY)
    ended = None
    with ExitStack() as stack:
        urls = options.backend_url
        if not urls:
            flags = VLLMFlags(
                python=options.vllm_python,
                max_loras=options.vllm_max_loras,
                max_context=settings.max_context,
                arguments=options.vllm_args,
            )
            rank = slot_rank(needs.max_rank)
            size = slot_bytes(outline.layout, needs.targets, rank=rank, num_slots=flags.max_loras) / 2**30
            say(f"vLLM's {flags.max_loras} slots of rank {rank} take {size:.2f} GB in 16 bits")
            with starting("starting vLLM") as on_line:
                server = stack.enter_context(
                    vllm_server(outline, flags, targets=needs.targets, max_rank=needs.max_rank, on_line=on_line)
                )
            urls, key, ended = (server.url,), server.key, server.ended
        backend = VLLMBackend(
            outline,
            urls,
            settings=VLLMSettings(
                adapter_cache=options.adapter_cache,
                adapter_cache_mb=options.adapter_cache_mb,
                max_rank=needs.max_rank,
                timeout_s=options.backend_timeout_s,
                targets=None if options.backend_url else needs.targets,
                key=key,
            ),
            max_running=settings.max_batch or VLLM_BATCH * len(urls),
            max_queue=settings.max_queue,
            ended=ended,
        )
        stack.callback(backend.close)
        for note in backend.notes:
            say(f"warning: {note}")
        yield make_service(outline, backend, settings, keys, name=name)


def _check_read(options: BackendOptions, settings: ServerSettings) -> None:
    """Checks that the backend reads all options that are set.

    Raises:
        ValueError: if it does not read one.
    """
    backend, default = options.backend, ServerSettings()
    for name, readers in {"cache_mb": ["local"], "chunk_tokens": ["local", "llama.cpp"]}.items():
        if backend not in readers and getattr(settings, name) != getattr(default, name):
            raise ValueError(f"--{name.replace('_', '-')} is for --backend {' or '.join(readers)}")
    if options.backend_url:
        started = [name for name in STARTED if getattr(options, name) != getattr(BackendOptions(), name)]
        started += ["max_context"] * (settings.max_context is not None)
        if started:
            option = started[0].replace("_", "-")
            raise ValueError(f"--{option} is for a vLLM server that this command starts, not for one of --backend-url")


def keys_of(options: KeyOptions) -> "Keys":
    """Reads keys from the command line, the environment and a file.

    Raises:
        ValueError: if the file holds no keys, or one has two meanings.
    """
    from dlp_lora.serve.keys import ADMIN_KEY, API_KEY, Keys, read_keys

    users = {} if options.keys is None else read_keys(options.keys)
    api_key = options.api_key or os.environ.get(API_KEY)
    if api_key in users:
        raise ValueError("the key of --api-key is also in the file of --keys; remove one of them")
    if api_key:
        users[api_key] = None
    return Keys(users, admin=options.admin_key or os.environ.get(ADMIN_KEY))
