"""A PEFT adapter folder, read without torch: its settings, the names and shapes of its LoRAs, and its refusal.

An adapter is refused, with the reason, if it cannot be written as `W + scaling * B A`: then no mixture of it is exact.
The weights decide: a setting without effect on them is no reason for a refusal. A LoRA is applied to the modules to
which PEFT applies it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlp_lora.bank.adapter_config import base_model_of, idle_patterns, rank_and_scaling, read_config
from dlp_lora.bank.adapter_files import check_adapter_name, weights_file
from dlp_lora.bank.adapter_keys import sorted_keys
from dlp_lora.bank.adapter_modules import adapted_modules, check_shapes
from dlp_lora.bank.base_copies import BaseCopy, base_copies, check_extras
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.tensor_file import TensorFile
from dlp_lora.errors import AdapterError
from dlp_lora.files import name_of


@dataclass(frozen=True, kw_only=True)
class LoraEntry:
    """One LoRA of a folder: the keys of its weights, with its rank and scaling from the settings."""

    key_a: str
    key_b: str
    rank: int
    d_in: int
    d_out: int
    scaling: float


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """The content of a folder, by the module of the base model that each LoRA changes."""

    name: str
    path: Path
    config: Mapping[str, Any]
    file: TensorFile
    loras: Mapping[str, LoraEntry]
    base_copies: Mapping[str, BaseCopy] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def base_model(self) -> str | None:
        """The base model that the adapter names."""
        return base_model_of(self.config)


def read_folder(
    path: str | Path, name: str | None = None, *, layout: BaseLayers | Mapping[str, Any] | None = None
) -> AdapterFolder:
    """Reads one adapter folder for the base model of a layout; without a layout, only by its names.

    Raises:
        AdapterError: if a file is missing or damaged, or the adapter cannot be fused exactly.
    """
    path = Path(path)
    name = check_adapter_name(name_of(path) if name is None else name, path)
    config, notes = read_config(path)
    file = TensorFile(weights_file(path))
    layout = layout if isinstance(layout, BaseLayers) or layout is None else BaseLayers(layout)
    keys = sorted_keys(path, file, layout)
    notes += keys.notes
    modules = adapted_modules(path, config, file, keys, layout, notes)
    loras = {module: _entry(path, config, file, module, keys.pairs[source]) for module, source in modules.items()}
    for key in sorted({key for lora in loras.values() for key in (lora.key_a, lora.key_b)}):
        if not file.tensors[key].is_float:
            raise AdapterError(
                f"{path} holds {file.tensors[key].dtype} numbers in {key!r}; expected floating-point LoRA weights: "
                f"a quantised LoRA is to be dequantised first"
            )
    check_extras(path, config, file, keys, notes)
    copies = base_copies(path, config, file, keys.others, layout, notes)
    if layout is not None:
        check_shapes(path, {m: (lora.d_in, lora.d_out) for m, lora in loras.items()}, layout, base_model_of(config))
    notes += idle_patterns(config, loras)
    return AdapterFolder(
        name=name, path=path, config=config, file=file, loras=loras, base_copies=copies, notes=tuple(notes)
    )


def check_numbers(folder: AdapterFolder) -> tuple[str, ...]:
    """Reads the numbers of an adapter's LoRAs and returns warnings about them.

    Raises:
        AdapterError: if a number is not finite.
    """
    for lora in folder.loras.values():
        for key in (lora.key_a, lora.key_b):
            if not folder.file.is_finite(key):
                raise AdapterError(not_finite(folder.path, key))
    if all(folder.file.is_zero(lora.key_b) for lora in folder.loras.values()):
        return (changes_nothing(folder.path),)
    return ()


def not_finite(path: Path, key: str) -> str:
    """The error for a weight with NaN or infinity."""
    return f"{path} holds NaN or infinite numbers in {key!r}; its training diverged"


def changes_nothing(path: Path) -> str:
    """The warning that an adapter changes nothing."""
    return f"{path} changes nothing: all of its lora_B are zero, as before the first step of a training"


def _entry(path: Path, config: Mapping[str, Any], file: TensorFile, module: str, pair: Mapping[str, str]) -> LoraEntry:
    a, b = file.tensors[pair["A"]].shape, file.tensors[pair["B"]].shape
    rank, scaling = rank_and_scaling(path, config, module)
    if 0 in a or 0 in b:
        raise AdapterError(
            f"{path}: {module} has lora_A {a} and lora_B {b}, which are empty: its training saved a part of weights "
            f"that were spread over several devices (ZeRO-3, FSDP); gather them before saving"
        )
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise AdapterError(
            f"{path}: {module} has lora_A {a} and lora_B {b}; "
            f"its config says rank {rank}, so expected ({rank}, d_in) and (d_out, {rank})"
        )
    return LoraEntry(key_a=pair["A"], key_b=pair["B"], rank=rank, d_in=a[1], d_out=b[0], scaling=scaling)
