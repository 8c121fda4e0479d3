"""Settings of a server, chosen at its start."""

import re
from dataclasses import dataclass
from typing import Annotated

import typer

SERVED_NAME = re.compile(r"[^\s,=]+")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A server's address, its model name and its limits.

    Keys are in `Keys`, so that they are never printed or logged.
    """

    served_model_name: Annotated[
        str | None, typer.Option(help="Model name of the routed model. [default: the bundle folder's name]")
    ] = None
    host: Annotated[str, "Address to listen on; 0.0.0.0 for all."] = "127.0.0.1"
    port: Annotated[int, "Port to listen on; 0 takes any free one."] = 8000
    max_batch: Annotated[
        int | None,
        typer.Option(help="Answers computed at the same time. [default: 16, with vLLM 64 a server, with llama.cpp 4]"),
    ] = None
    max_queue: Annotated[int, "Answers that may wait; more are refused with 503."] = 256
    max_context: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt and its answer. [default: the model's context, with llama.cpp 4096]"),
    ] = None
    chunk_tokens: Annotated[int, "Tokens of a new prompt that one pass reads beside the running answers."] = 256
    cache_mb: Annotated[float, "Megabytes of stored KV of earlier requests, for requests with the same beginning."] = (
        256.0
    )
    max_body_mb: Annotated[float, "Largest body of a request."] = 16.0
    deadline_s: Annotated[float, "Longest time of a request, with its time in the queue."] = 600.0
    shutdown_s: Annotated[float, "How long running requests may continue after SIGTERM."] = 30.0
    watch_s: Annotated[
        float | None,
        typer.Option(help="Look at the bundle so often, and read it again once it was written. [default: never]"),
    ] = None
    adapter_dir: Annotated[
        tuple[str, ...], typer.Option(help="Folders from which adapters may be loaded at run time.")
    ] = ()
    allow_origin: Annotated[
        tuple[str, ...], typer.Option(help="Origins whose web pages may call the server, such as https://chat.example.")
    ] = ()
    allow_host: Annotated[
        tuple[str, ...],
        typer.Option(help="Names that clients may call the server by, behind a proxy. [default: see the docs]"),
    ] = ()

    def __post_init__(self) -> None:
        for name in ("max_batch", "chunk_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_queue", "cache_mb", "shutdown_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("max_body_mb", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.watch_s is not None and not self.watch_s > 0:
            raise ValueError(f"watch_s must be positive, got {self.watch_s}")
        if self.max_context is not None and self.max_context < 2:
            raise ValueError(f"max_context must be at least 2, got {self.max_context}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in 0 to 65535, got {self.port}")
        if self.served_model_name is not None and not SERVED_NAME.fullmatch(self.served_model_name):
            raise ValueError(
                f"the served model name must hold no space, comma or =, got {self.served_model_name!r}; clients write "
                "mixtures with these"
            )
