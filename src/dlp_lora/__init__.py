"""Many LoRA adapters, one model: sentence-level dynamic LoRA fusion (DLP-LoRA, arXiv 2410.01497)."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# torch and transformers take seconds to import, so a name is imported at its first use.
_HOMES = {
    "engine.arrow": "ArrowRouter",
    "engine.engine": "Engine",
    "engine.loading": "load load_router",
    "engine.routing_log": "RoutingLog",
    "engine.streaming": "Piece Stream",
    "engine.trace": "Generation Sentence",
    "errors": "AdapterError BundleError DLPLoRAError ModelError PromptError RouterError TaskError TrainingError",
    "policy": "FusionPolicy Mixture Only RoutingSettings Switching Threshold TopK TopP Uniform",
    "router": "Context EncoderRouter MiniMLP PrototypeRouter Router",
    "sentences": "Segmenter SentenceSegmenter",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    __version__: str
    from dlp_lora.engine.arrow import ArrowRouter as ArrowRouter
    from dlp_lora.engine.engine import Engine as Engine
    from dlp_lora.engine.loading import load as load
    from dlp_lora.engine.loading import load_router as load_router
    from dlp_lora.engine.routing_log import RoutingLog as RoutingLog
    from dlp_lora.engine.streaming import Piece as Piece
    from dlp_lora.engine.streaming import Stream as Stream
    from dlp_lora.engine.trace import Generation as Generation
    from dlp_lora.engine.trace import Sentence as Sentence
    from dlp_lora.errors import AdapterError as AdapterError
    from dlp_lora.errors import BundleError as BundleError
    from dlp_lora.errors import DLPLoRAError as DLPLoRAError
    from dlp_lora.errors import ModelError as ModelError
    from dlp_lora.errors import PromptError as PromptError
    from dlp_lora.errors import RouterError as RouterError
    from dlp_lora.errors import TaskError as TaskError
    from dlp_lora.errors import TrainingError as TrainingError
    from dlp_lora.policy import FusionPolicy as FusionPolicy
    from dlp_lora.policy import Mixture as Mixture
    from dlp_lora.policy import Only as Only
    from dlp_lora.policy import RoutingSettings as RoutingSettings
    from dlp_lora.policy import Switching as Switching
    from dlp_lora.policy import Threshold as Threshold
    from dlp_lora.policy import TopK as TopK
    from dlp_lora.policy import TopP as TopP
    from dlp_lora.policy import Uniform as Uniform
    from dlp_lora.router import Context as Context
    from dlp_lora.router import EncoderRouter as EncoderRouter
    from dlp_lora.router import MiniMLP as MiniMLP
    from dlp_lora.router import PrototypeRouter as PrototypeRouter
    from dlp_lora.router import Router as Router
    from dlp_lora.sentences import Segmenter as Segmenter
    from dlp_lora.sentences import SentenceSegmenter as SentenceSegmenter
else:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return version("dlp-lora")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
