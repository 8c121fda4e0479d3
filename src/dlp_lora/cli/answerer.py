"""The part of the commands generate and chat that answers: PyTorch in this process, or llama.cpp."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

import typer

from dlp_lora.cli.common import EngineOptions, HubOptions, open_engine, open_outline
from dlp_lora.cli.progress import working

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dlp_lora import Engine, Generation, Stream
    from dlp_lora.engine.outline import Outline
    from dlp_lora.serve.answerer import AnswerStream
    from dlp_lora.serve.llama_cpp.backend import LlamaCppBackend


@dataclass(frozen=True, kw_only=True)
class LlamaOptions:
    """The base model in llama.cpp."""

    gguf: Annotated[
        Path | None, typer.Option(help="GGUF file of the base model, for llama.cpp. [default: the default model's]")
    ] = None
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of llama.cpp. [default: PyTorch's]")] = None
    gpu_layers: Annotated[int, "Layers that llama.cpp puts on a GPU, if it was built for one."] = 0


@dataclass(frozen=True, kw_only=True)
class AnswererOptions(LlamaOptions):
    """The program that computes the answers."""

    backend: Annotated[
        Literal["local", "llama.cpp"], typer.Option(help="The program that computes the tokens: PyTorch, or llama.cpp.")
    ] = "local"


@runtime_checkable
class Answerer(Protocol):
    """Answers prompts."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...

    @property
    def max_context(self) -> int: ...

    def generate(
        self,
        prompt: Any,
        /,
        *,
        max_new_tokens: int,
        mixture: Mapping[str, float] | None = None,
        do_sample: bool | None = None,
        seed: int | None = None,
    ) -> "Generation": ...

    def stream(self, prompt: Any, /, *, max_new_tokens: int) -> "Stream | AnswerStream": ...


@contextmanager
def open_answerer(
    engine_options: EngineOptions, hub_options: HubOptions, options: AnswererOptions, *, need_router: bool = True
) -> Iterator[Answerer]:
    """Loads the program that answers, for the block."""
    if options.backend == "local":
        check_unused(options)
        yield EngineAnswerer(open_engine(engine_options, hub_options, need_router=need_router))
        return
    from dlp_lora.serve.answerer import BackendAnswerer

    outline = open_outline(engine_options, hub_options, need_router=need_router)
    with llama_backend(outline, options, max_batch=1) as backend:
        yield BackendAnswerer(outline, backend)


def check_unused(options: LlamaOptions) -> None:
    """Checks that no option of llama.cpp is set, for another backend.

    Raises:
        ValueError: if one is set.
    """
    default = LlamaOptions()
    for name in (field.name for field in fields(LlamaOptions)):
        if getattr(options, name) != getattr(default, name):
            raise ValueError(f"--{name.replace('_', '-')} is for --backend llama.cpp")


def llama_backend(outline: "Outline", options: LlamaOptions, **settings: Any) -> "closing[LlamaCppBackend]":
    """Starts llama.cpp with the base model of an outline; it ends with the block.

    Raises:
        ModelError: if llama.cpp does not run here, or the file has another model.
        ValueError: if the outline does not have the default model, and the options name no file.
    """
    from dlp_lora.default_model import NAME, default_gguf
    from dlp_lora.serve.llama_cpp.backend import LlamaCppBackend

    gguf = options.gguf
    if gguf is None:
        if Path(outline.source).name != NAME:
            raise ValueError(
                f"--backend llama.cpp needs the base model {outline.source!r} as a GGUF file; give it with --gguf FILE"
            )
        gguf = default_gguf()
    with working("starting llama.cpp"):
        return closing(
            LlamaCppBackend(outline, gguf, num_threads=options.threads, num_gpu_layers=options.gpu_layers, **settings)
        )


class EngineAnswerer:
    """An engine as an Answerer."""

    def __init__(self, engine: "Engine") -> None:
        from dlp_lora.engine.prompts import context_of

        self.names = engine.bank.names
        self.tokenizer = engine.tokenizer
        self.max_context = context_of(engine.model)
        self.generate: Any = engine.generate
        self.stream: Any = engine.stream
