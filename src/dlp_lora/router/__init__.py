"""The router: text in, a probability per adapter name out (section 3.1, Eq. 3).

These routers read only text and never run the language model: MiniMLP (the paper's plugin), EncoderRouter (the paper's
ablation) and PrototypeRouter (no training). The `type` in a router's folder names its kind. `dlp_lora.engine.arrow` has
a router that reads the adapters, and `load_router` reads any of them.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlp_lora.router.context import Calibration, Context, Encoded, Measured, Router, listed
from dlp_lora.router.folder import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, folder_hash, router_hash, router_type
from dlp_lora.router.mini_mlp import MiniMLP, MiniMLPConfig
from dlp_lora.router.tokenizer import load_tokenizer

__all__ = [
    "CONFIG_FILE",
    "TOKENIZER_FILE",
    "WEIGHTS_FILE",
    "Calibration",
    "Context",
    "Encoded",
    "EncoderRouter",
    "Measured",
    "MiniMLP",
    "MiniMLPConfig",
    "PrototypeRouter",
    "Router",
    "TextEncoder",
    "folder_hash",
    "listed",
    "load_text_router",
    "load_tokenizer",
    "router_hash",
    "router_type",
]

# Encoders import transformers, which takes seconds, so these names are imported at their first use.
_ENCODERS = {"EncoderRouter": "encoder", "TextEncoder": "encoder", "PrototypeRouter": "prototypes"}

if TYPE_CHECKING:
    from dlp_lora.router.encoder import EncoderRouter as EncoderRouter
    from dlp_lora.router.encoder import TextEncoder as TextEncoder
    from dlp_lora.router.prototypes import PrototypeRouter as PrototypeRouter
else:

    def __getattr__(name: str) -> Any:
        if name not in _ENCODERS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(import_module(f"{__name__}.{_ENCODERS[name]}"), name)
        return globals()[name]


def load_text_router(path: str | Path) -> Router:
    """Reads a router folder of any type that reads text alone, without a base model.

    Raises:
        RouterError: if a file is missing or damaged, or the router is of another type or a later version.
    """
    match router_type(path):
        case "encoder":
            from dlp_lora.router.encoder import EncoderRouter

            return EncoderRouter.from_pretrained(path)
        case "prototypes":
            from dlp_lora.router.prototypes import PrototypeRouter

            return PrototypeRouter.from_pretrained(path)
        case _:
            return MiniMLP.from_pretrained(path)
