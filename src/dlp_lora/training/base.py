"""The base model for training, in the precision that is fast on its hardware."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.engine.loading import load_model
from dlp_lora.training.cpu import training_dtype

NUM_SAMPLES = 64  # of each parameter


def load_base(
    model: str | Path, *, dtype: torch.dtype | None = None, cpu_tricks: bool = True, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a base model for training, by default in the dtype of `training_dtype`; `kwargs` are those of `load_model`.

    Without `cpu_tricks`, it is float32 on a CPU.

    Raises:
        ModelError: if it cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = training_dtype(device) if cpu_tricks or device != "cpu" else torch.float32
    return load_model(model, dtype=dtype, device=device, **kwargs)


def dtype_of(model: PreTrainedModel) -> str:
    """The name of the model's dtype, as records have it."""
    return str(model.dtype).removeprefix("torch.")


def model_hash(model: PreTrainedModel) -> str:
    """A hash of some values of every parameter; it does not depend on the dtype of the loaded weights.

    For a model with adapters, it is the hash of the model below them.
    """
    found = hashlib.sha256()
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    for name, parameter in sorted(parameters.items()):
        values = parameter.detach().reshape(-1)
        sample = values[:: max(1, values.numel() // NUM_SAMPLES)].cpu()
        sample = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample
        found.update(f"{name} {list(parameter.shape)} {sample.tolist()}".encode())
    return found.hexdigest()[:16]
