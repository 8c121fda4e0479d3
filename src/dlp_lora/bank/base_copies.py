"""Other tensors than LoRAs in an adapter's folder: copies of base weights, and tensors that cannot be fused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlp_lora.bank.adapter_config import REASONS, base_model_of, is_set, is_targeted
from dlp_lora.bank.adapter_keys import Keys
from dlp_lora.bank.adapter_modules import TEXT_PARTS
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.tensor_file import TensorFile
from dlp_lora.errors import AdapterError

# The place of a wrapped base weight in PEFT's files.
_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.[^.]+)?)(?=\.[^.]+$)")
_TOKENS = re.compile(r"\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")


@dataclass(frozen=True)
class BaseCopy:
    """A copy of a base weight in an adapter's folder, and the reason for a refusal if it differs from the base's.

    For an embedding, it may have only the `rows` of some tokens. `is_trained` if the settings say that it was trained.
    """

    key: str
    reason: str
    rows: tuple[int, ...] | None = None
    is_trained: bool = False


def check_extras(path: Path, config: Mapping[str, Any], file: TensorFile, keys: Keys, notes: list[str]) -> None:
    """Checks that other LoRA tensors than A and B of linear layers change nothing.

    Raises:
        AdapterError: if one changes something.
    """
    # An embedding's delta is zero if either half is.
    idle = {module for key, module, kind in keys.extras if kind.startswith("embedding") and file.is_zero(key)}
    for key, module, kind in keys.extras:
        if not is_targeted(config, module) or file.is_zero(key) or (kind.startswith("embedding") and module in idle):
            notes.append(f"{path}: {key!r} changes nothing and is left out")
            continue
        start = f"{path} cannot be fused exactly: it holds {key!r}; expected only lora_A and lora_B of linear layers"
        if kind.startswith("magnitude_vector"):
            raise AdapterError(f"{start}: {REASONS['use_dora']}")
        if kind.endswith(".bias"):
            raise AdapterError(f"{start}: it has a trained bias on B (lora_bias); retrain with lora_bias=False")
        if kind.startswith("embedding"):
            raise AdapterError(
                f"{start}: it adapts the token embeddings ({module}); retrain with target_modules without them"
            )
        raise AdapterError(start)


def base_copies(
    path: Path,
    config: Mapping[str, Any],
    file: TensorFile,
    others: Mapping[str, str],
    layout: BaseLayers | None,
    notes: list[str],
) -> dict[str, BaseCopy]:
    """The copies of base weights in the folder, by their names in the base.

    Raises:
        AdapterError: if a weight that was trained beside the LoRAs is missing.
    """
    copies: dict[str, BaseCopy] = {}
    foreign: list[str] = []
    for key, plain in others.items():
        is_tokens = _TOKENS.search(plain) is not None
        name = _TOKENS.sub(".weight", plain) if is_tokens else _WRAPPED.sub("", plain)
        if layout is not None and layout.parameters is not None and name not in layout.parameters:
            like = _like(name, layout.parameters)
            if like is None:
                foreign.append(key)
                continue
            name = like
        copies[name] = _copy(path, config, key, name, is_tokens=is_tokens)
    if foreign:
        notes.append(
            f"{path}: {len(foreign)} of its tensors, such as {foreign[0]!r}, belong to no part of the base model and "
            f"are left out, as PEFT does"
        )
    _check_presence(path, config, copies, layout)
    biases = config.get("bias", "none") not in (None, "none") and layout is not None and layout.parameters
    if biases and any(name.endswith(".bias") for name in biases) and not any(n.endswith(".bias") for n in copies):
        notes.append(f"{path} was trained with bias={config['bias']!r}, but no bias is in its folder: none is applied")
    return copies


def _like(name: str, parameters: Mapping[str, Any]) -> str | None:
    """The one weight of the base that has the same end of its name; another version of the model has other prefixes."""
    parts = name.split(".")
    for cut in range(1, len(parts) - 1):
        if parts[cut - 1] not in TEXT_PARTS:
            return None
        rest = ".".join(parts[cut:])
        if matches := [one for one in parameters if one == rest or one.endswith(f".{rest}")]:
            return matches[0] if len(matches) == 1 else None
    return None


def _copy(path: Path, config: Mapping[str, Any], key: str, name: str, *, is_tokens: bool) -> BaseCopy:
    saved = config.get("modules_to_save") or []
    module, _, attribute = name.rpartition(".")
    if is_tokens:
        tokens = config.get("trainable_token_indices")
        if isinstance(tokens, dict):
            tokens = next((rows for one, rows in tokens.items() if module.endswith(one)), None)
        return BaseCopy(
            key=key,
            reason=f"{path} cannot be fused exactly: trainable_token_indices={tokens!r}: it changes token embeddings; "
            f"retrain without trainable_token_indices",
            rows=tuple(tokens or ()),
            is_trained=True,
        )
    is_trained = True
    if any(re.match(rf"(^|.*\.){one}($|\..*)", module) for one in saved):
        reason = (
            f"{path} cannot be fused exactly: modules_to_save={saved!r}: it replaces whole layers of the base model "
            f"({name}); retrain without modules_to_save"
        )
    elif attribute == "bias" and config.get("bias", "none") not in (None, "none"):
        reason = f"{path} has trained biases (bias={config['bias']!r}), such as {name}; retrain with bias='none'"
    else:
        is_trained = False
        reason = (
            f"{path} holds a copy of the base model's {name} that differs from the base model's; "
            f"it was trained on another base ({base_model_of(config)}), or changed that weight"
        )
    return BaseCopy(key=key, reason=reason, is_trained=is_trained)


def _check_presence(
    path: Path, config: Mapping[str, Any], copies: Mapping[str, BaseCopy], layout: BaseLayers | None
) -> None:
    """Refuses an adapter if a weight that was trained beside the LoRAs is not in the folder."""
    if layout is None or layout.parameters is None:
        return
    for name in config.get("modules_to_save") or []:
        trained = [module for module in layout.modules if module.endswith(name)]
        if trained and not any(one.startswith(f"{module}.") for module in trained for one in copies):
            raise AdapterError(
                f"{path} cannot be fused exactly: modules_to_save={config['modules_to_save']!r}: {trained[0]} was "
                f"trained, but its weights are not in the folder"
            )
    tokens = config.get("trainable_token_indices")
    if is_set(tokens) and not any(copy.rows is not None for copy in copies.values()):
        raise AdapterError(
            f"{path} cannot be fused exactly: trainable_token_indices={tokens!r}: it changes token embeddings, but "
            f"their weights are not in the folder"
        )
