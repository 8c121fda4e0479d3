"""Many LoRA adapters, one model, nobody picking: sentence-level dynamic LoRA fusion (DLP-LoRA, arXiv 2410.01497)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "AdapterError",
    "ArrowRouter",
    "BundleError",
    "Context",
    "DLPLoRAError",
    "EncoderRouter",
    "Engine",
    "FusionPolicy",
    "Generation",
    "MiniMLP",
    "Mixture",
    "ModelError",
    "Only",
    "Piece",
    "PromptError",
    "PrototypeRouter",
    "Router",
    "RouterError",
    "Segmenter",
    "Sentence",
    "SentenceSegmenter",
    "Switching",
    "TaskError",
    "Threshold",
    "TopK",
    "TopP",
    "TrainingError",
    "Uniform",
    "load",
    "load_router",
]

if TYPE_CHECKING:
    from dlp_lora.arrow import ArrowRouter
    from dlp_lora.engine import Engine
    from dlp_lora.errors import (
        AdapterError,
        BundleError,
        DLPLoRAError,
        ModelError,
        PromptError,
        RouterError,
        TaskError,
        TrainingError,
    )
    from dlp_lora.loading import load, load_router
    from dlp_lora.policy import FusionPolicy, Mixture, Only, Switching, Threshold, TopK, TopP, Uniform
    from dlp_lora.router import Context, EncoderRouter, MiniMLP, PrototypeRouter, Router
    from dlp_lora.rows import Generation, Sentence
    from dlp_lora.sentences import Segmenter, SentenceSegmenter
    from dlp_lora.streaming import Piece
else:
    # torch and transformers take seconds to import: a name is looked for when it is asked for, in light modules first.
    _HOMES = ("errors", "policy", "sentences", "rows", "router", "streaming", "arrow", "engine", "loading")

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        homes = (vars(import_module(f"{__name__}.{home}")) for home in _HOMES)
        globals()[name] = next(home[name] for home in homes if name in home)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
