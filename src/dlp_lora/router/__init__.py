"""The router: what has been said in, a probability per adapter name out (section 3.1, Eq. 3).

A router reads text only and never sees the language model. Each of these is one kind, told apart by the `type` in its
folder: MiniMLP (the paper's plugin), EncoderRouter (the paper's ablation) and PrototypeRouter (no training).
`dlp_lora.engine.arrow` holds the one that reads adapters instead of texts, and `load_router` reads any of them.
"""

from dlp_lora.router.context import Calibration, Context, Encoded, Router
from dlp_lora.router.encoder import EncoderRouter, TextEncoder
from dlp_lora.router.folder import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, folder_hash, router_hash, router_type
from dlp_lora.router.mini_mlp import MiniMLP, MiniMLPConfig
from dlp_lora.router.prototypes import PrototypeRouter
from dlp_lora.router.tokenizer import load_tokenizer

__all__ = [
    "CONFIG_FILE",
    "TOKENIZER_FILE",
    "WEIGHTS_FILE",
    "Calibration",
    "Context",
    "Encoded",
    "EncoderRouter",
    "MiniMLP",
    "MiniMLPConfig",
    "PrototypeRouter",
    "Router",
    "TextEncoder",
    "folder_hash",
    "load_tokenizer",
    "router_hash",
    "router_type",
]
