"""The PEFT adapter format: a folder in, checked LoRA weights out; and one written.

`adapter_folder.py` decides what is read or refused; this module reads the weights.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlp_lora.bank.adapter_config import base_model_of, other_base
from dlp_lora.bank.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from dlp_lora.bank.adapter_folder import AdapterFolder, LoraEntry, changes_nothing, not_finite, read_folder
from dlp_lora.bank.base_copies import BaseCopy
from dlp_lora.bank.tensor_file import TensorFile
from dlp_lora.errors import AdapterError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class LoraWeights:
    """One LoRA of one linear layer: its delta is `scaling * b @ a`, in PEFT's orientation.

    The paper writes A as (d_in, r) and B as (r, d_out), the transposes of these.
    """

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    scaling: float

    @property
    def rank(self) -> int:
        """The rank of this layer's LoRA; layers of one adapter may differ (rank_pattern)."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """One trained LoRA: its weights by module path of the base model, and its folder."""

    name: str
    modules: Mapping[str, LoraWeights]
    config: Mapping[str, Any]
    path: Path
    # Copies of base weights in the folder, by their names in the base; `attach` compares them.
    base_copies: Mapping[str, BaseCopy] = field(default_factory=dict)
    # The keys of each module's weights in the folder.
    entries: Mapping[str, LoraEntry] = field(default_factory=dict)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory, not only their shapes."""
        return not any(lora.a.is_meta for lora in self.modules.values())

    def without_weights(self) -> "Adapter":
        """The same adapter as `read_adapter(..., weights=False)` gives it."""
        if not self.is_loaded:
            return self
        shapes = {
            module: LoraWeights(a=_no_weights(*lora.a.shape), b=_no_weights(*lora.b.shape), scaling=lora.scaling)
            for module, lora in self.modules.items()
        }
        return replace(self, modules=shapes)

    def with_weights(self) -> "Adapter":
        """The same adapter with its weights in memory, read from its folder if they are not.

        Raises:
            AdapterError: if its folder cannot be read or has changed.
        """
        if self.is_loaded:
            return self
        if not self.entries:
            raise AdapterError(f"the adapter {self.name!r} was never in a folder: its weights cannot be read again")
        return replace(self, modules=_weights(self.path, self.entries))

    @property
    def base_model(self) -> str | None:
        """The base model that the adapter names."""
        return base_model_of(self.config)


def read_adapter(
    path: str | Path,
    name: str | None = None,
    *,
    weights: bool = True,
    layout: Mapping[str, tuple[int, int]] | None = None,
    stacklevel: int = 1,
) -> Adapter:
    """Reads one PEFT adapter folder; without `weights`, only settings and shapes, as tensors of the meta device.

    With the `layout` of a base model (`attach.linear_layers`), it is read as PEFT reads it for this model: renamed
    layers are found, and modules that the settings leave out are not applied. Warnings name the ignored parts.

    Raises:
        AdapterError: if a file is missing or damaged, or the adapter cannot be fused exactly.
    """
    folder = read_folder(path, name, layout=layout)
    adapter = _adapter(folder, weights=weights)
    notes = folder.notes
    if weights and not any(lora.b.float().any() for lora in adapter.modules.values()):
        notes += (changes_nothing(folder.path),)
    for note in notes:
        warnings.warn(note, stacklevel=1 + stacklevel)
    return adapter


def read_base_copies(adapter: Adapter) -> dict[str, Tensor]:
    """Reads the copies of base weights in an adapter's folder, by their names in the base model."""
    if not adapter.base_copies:
        return {}
    with safe_open(adapter.path / WEIGHTS_FILE, framework="pt") as file:
        return {name: file.get_tensor(copy.key) for name, copy in adapter.base_copies.items()}


def check_base_copies(adapter: Adapter, tensor: Callable[[str], Tensor | None]) -> None:
    """Compares an adapter's copies of base weights with the model's, if `tensor` returns these by name.

    Raises:
        AdapterError: if they differ from the model's, or were trained and cannot be compared.
    """
    for name, copy in read_base_copies(adapter).items():
        weight = tensor(name)
        about = adapter.base_copies[name]
        if weight is None:
            if about.is_trained:
                raise AdapterError(f"{about.reason} (the base model's weight cannot be read to compare it)")
            continue
        if about.rows is not None:
            rows = [row for row in about.rows if row < weight.shape[0]]
            weight = weight[rows] if len(rows) == len(about.rows) else weight[:0]
        if not _is_same(copy, weight):
            raise AdapterError(about.reason)


def check_base_name(adapter: Adapter, base: str, *, strict: bool = False, stacklevel: int = 1) -> None:
    """Warns if an adapter names another base model than `base`.

    Raises:
        AdapterError: instead of the warning, if `strict`.
    """
    message = other_base(adapter.path, adapter.config, base)
    if not message:
        return
    if strict:
        raise AdapterError(f"{message}; load without strict=True if they are the same model")
    warnings.warn(f"{message}; if its shapes fit, it is used", stacklevel=1 + stacklevel)


def write_adapter(
    path: str | Path, modules: Mapping[str, LoraWeights], *, base_model: str | None = None, rank: int
) -> None:
    """Writes LoRA weights as an ordinary PEFT adapter folder of one uniform rank.

    Each layer's scaling is folded into B and lower ranks are padded with zeros, so `lora_alpha = r = rank`
    and any engine that reads PEFT adapters gives the same delta.
    """
    path = Path(path)
    for module, lora in modules.items():
        if lora.rank > rank:
            raise ValueError(f"{module} has rank {lora.rank}, which does not fit into rank={rank}; raise it")
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for module, lora in modules.items():
        pad = rank - lora.rank
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.nn.functional.pad(
            lora.a, (0, 0, 0, pad)
        ).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.nn.functional.pad(
            lora.b * lora.scaling, (0, pad)
        ).contiguous()
    save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _adapter(folder: AdapterFolder, *, weights: bool) -> Adapter:
    modules = (
        _weights(folder.path, folder.loras)
        if weights
        else {
            module: LoraWeights(
                a=_no_weights(lora.rank, lora.d_in), b=_no_weights(lora.d_out, lora.rank), scaling=lora.scaling
            )
            for module, lora in folder.loras.items()
        }
    )
    return Adapter(
        name=folder.name,
        modules=modules,
        config=folder.config,
        path=folder.path,
        base_copies=folder.base_copies,
        entries=folder.loras,
    )


def _weights(path: Path, entries: Mapping[str, LoraEntry]) -> dict[str, LoraWeights]:
    file = TensorFile(path / WEIGHTS_FILE)
    loras = {}
    for module, entry in entries.items():
        shapes = {entry.key_a: (entry.rank, entry.d_in), entry.key_b: (entry.d_out, entry.rank)}
        if any(key not in file.tensors or file.tensors[key].shape != shape for key, shape in shapes.items()):
            raise AdapterError(f"{path} was written again since it was read; remove the adapter and add it")
        a, b = (_tensor(file, key) for key in shapes)
        for key, tensor in zip(shapes, (a, b), strict=True):
            if not torch.isfinite(tensor.float()).all():  # float: PyTorch has no isfinite for some 8-bit types
                raise AdapterError(not_finite(path, key))
        loras[module] = LoraWeights(a=a, b=b, scaling=entry.scaling)
    return loras


def _tensor(file: TensorFile, key: str) -> Tensor:
    # Not by `safe_open(..., framework="pt")`, which in safetensors 0.8 loses 57 bytes of memory with each tensor.
    info = file.tensors[key]
    return torch.frombuffer(file.read(key), dtype=_DTYPES[info.dtype]).view(info.shape)


def _is_same(copy: Tensor, weight: Tensor) -> bool:
    if copy.shape != weight.shape:
        return False
    copy = copy.to(weight.device)
    # A base in 16 bits and its copy in 32, or the other way round, are one base.
    return torch.equal(copy.to(weight.dtype), weight) or torch.equal(copy, weight.to(copy.dtype))


@lru_cache
def _no_weights(*shape: int) -> Tensor:
    # Thousands of adapters have few shapes between them.
    return torch.empty(shape, device="meta")
