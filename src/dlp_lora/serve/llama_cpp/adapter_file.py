"""Adapters for llama.cpp: a PEFT adapter in, a GGUF file with the same LoRA out.

In the GGUF file of a Llama-like model, the rows of q and k have another order than in transformers: llama.cpp rotates
pairs of neighbouring rows, and transformers rotates the halves of a head. So the rows of B are permuted, too. Which
models have this order comes from llama.cpp's conversion:
https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dlp_lora.bank.peft_format import Adapter
from dlp_lora.errors import AdapterError, ModelError

PERMUTED = frozenset({"granite", "llama", "mistral", "smollm3"})
PLAIN = frozenset({"gemma", "gemma2", "gemma3_text", "olmo2", "phi3", "qwen2", "qwen3"})


def check_model_type(model_type: str) -> None:
    """Checks that adapters of a type of models can be converted.

    Raises:
        ModelError: if the order of its rows in GGUF files is unknown here.
    """
    if model_type not in PERMUTED | PLAIN:
        known = ", ".join(sorted(PERMUTED | PLAIN))
        raise ModelError(
            f"adapters of models of type {model_type!r} cannot be converted for llama.cpp, only those of {known}; use "
            "the local backend or vLLM"
        )


def layer_names(adapter: Adapter, config: Any, architecture: str) -> Mapping[str, str]:
    """Returns llama.cpp's names of the layers that an adapter changes.

    Args:
        config: of the base model.
        architecture: llama.cpp's name of the base model's architecture.

    Raises:
        AdapterError: if llama.cpp has no such layer.
        ModelError: if the architecture is unknown.
    """
    import gguf

    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in architectures:
        raise ModelError(f"the GGUF file has the architecture {architecture!r}, which the package gguf does not know")
    known = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)
    names = {module: known.get_name(module) for module in adapter.modules}
    if unknown := [module for module, name in names.items() if name is None]:
        raise AdapterError(f"{adapter.path} changes {unknown[0]}, which llama.cpp does not have; use another backend")
    return {module: str(name) for module, name in names.items()}


def write_gguf(path: Path, adapter: Adapter, config: Any, *, architecture: str) -> None:
    """Writes an adapter, with its weights, as a GGUF file.

    The scaling is folded into B. The file has an alpha of 0, so llama.cpp multiplies only with the mixture's weight.

    Raises:
        AdapterError, ModelError: as `layer_names`.
    """
    import gguf

    names = layer_names(adapter, config, architecture)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for module, lora in adapter.modules.items():
        b = lora.b.float() * lora.scaling
        kind = names[module].rsplit(".", 1)[-1]
        if config.model_type in PERMUTED and kind in heads:
            b = permuted(b, heads[kind])
        writer.add_tensor(f"{names[module]}.weight.lora_a", lora.a.float().contiguous().numpy())
        writer.add_tensor(f"{names[module]}.weight.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(rows: Tensor, num_heads: int) -> Tensor:
    """Puts the rows of q or k into llama.cpp's order: in each head, the two halves alternate."""
    shape = rows.shape
    return rows.reshape(num_heads, 2, shape[0] // num_heads // 2, shape[1]).swapaxes(1, 2).reshape(shape)
