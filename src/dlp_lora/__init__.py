"""Many LoRA adapters, one model, nobody picking: sentence-level dynamic LoRA fusion (DLP-LoRA, arXiv 2410.01497)."""

from dlp_lora.arrow import ArrowRouter
from dlp_lora.engine import Engine, Generation
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
from dlp_lora.load import load, load_router
from dlp_lora.policy import FusionPolicy, Mixture, Only, Switching, Threshold, TopK, TopP, Uniform
from dlp_lora.router import Context, EncoderRouter, MiniMLP, PrototypeRouter, Router
from dlp_lora.rows import Sentence
from dlp_lora.sentences import Segmenter, SentenceSegmenter
from dlp_lora.streaming import Piece

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
