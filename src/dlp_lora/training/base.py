"""The base model for training, in the precision that its hardware is fast at."""

import hashlib
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.engine.loading import load_model


def load_base(
    model: str | Path, *, dtype: torch.dtype | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a base model for training, in the dtype of `training_dtype` unless one is given; `kwargs` are those of
    `load_model`.

    Raises:
        ModelError: if it cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(model, dtype=dtype or training_dtype(device), device=device, **kwargs)


@cache
def training_dtype(device: str) -> torch.dtype:
    """Gives the dtype to train a frozen base in: bfloat16 where the hardware multiplies it, and no slower than float32.

    CPUs with instructions for bfloat16 but without AMX may take twice as long as in float32 (docs/log.md); a product
    in each tells, timed once on one thread.
    """
    if device == "cuda":
        return torch.bfloat16
    if not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    narrow, wide = _seconds_of_products(torch.bfloat16, torch.float32)
    return torch.float32 if narrow > 1.2 * wide else torch.bfloat16


def _seconds_of_products(*dtypes: torch.dtype) -> list[float]:
    """How long the tokens of a small batch times a layer's weight take on the CPU in each dtype, at best."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where the machine is busy
    try:
        seconds: list[list[float]] = [[] for _ in dtypes]
        for _ in range(16):  # in turns, so that a busy moment hits all
            for dtype, own in zip(dtypes, seconds, strict=True):
                x, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                own.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(num_threads)
    return [min(own) for own in seconds]


NUM_SAMPLES = 64  # of each parameter


def model_hash(model: PreTrainedModel) -> str:
    """A hash of values out of every parameter: the same for the same weights, whatever float they were loaded in.

    Of a model with adapters attached, it is that of the model below them.
    """
    found = hashlib.sha256()
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    for name, parameter in sorted(parameters.items()):
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // NUM_SAMPLES)].cpu()
        sample = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample
        found.update(f"{name} {list(parameter.shape)} {sample.tolist()}".encode())
    return found.hexdigest()[:16]
