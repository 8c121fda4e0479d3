"""The modules to which PEFT applies an adapter's weights: PEFT places them in a copy of the model without weights."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.integrations import init_empty_weights
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn

from dlp_lora.bank.base_layers import without_weights
from dlp_lora.errors import AdapterError

# Settings of initialisation or of embeddings, which have no effect on names.
_NEUTRAL = {"init_lora_weights": False, "lora_dropout": 0.0, "trainable_token_indices": None, "bias": "none"}

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""The shapes of the A and the B of one LoRA."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """PEFT's placement of an adapter's LoRAs, by their names in its weights."""

    placed: Mapping[str, str]  # the module of the base that each changes
    parameters: Mapping[str, str]  # those that change a bare parameter of the base: which one
    renamed: Mapping[str, str]  # the names that all of them have in this version of the base


def peft_config(path: Path, config: Mapping[str, Any]) -> LoraConfig:
    """Turns an adapter's settings into PEFT's, without unknown ones.

    Raises:
        AdapterError: if PEFT refuses them.
    """
    known = {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig(**{key: value for key, value in config.items() if key in known})
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise AdapterError(f"{path}: PEFT refuses its settings: {error}") from error


def placement(path: Path, config: Mapping[str, Any], shapes: Mapping[str, Shapes], skeleton: nn.Module) -> Placement:
    """Lets PEFT place LoRAs, given by name, in a model without weights.

    Raises:
        AdapterError: if PEFT refuses the adapter.
    """
    # Every weight has its number as its value, so that it is recognised under another name.
    numbers = {module: float(i) for i, module in enumerate(shapes, start=1)}
    weights = {
        f"base_model.model.{module}.lora_{half}.weight": torch.tensor(numbers[module]).expand(shape)
        for module, pair in shapes.items()
        for half, shape in zip("AB", pair, strict=True)
    }
    settings = peft_config(path, {**config, **_NEUTRAL})
    try:
        layers = _injected(settings, skeleton)
        converted = convert_peft_adapter_state_dict_for_transformers(skeleton, settings, weights)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise AdapterError(f"{path}: PEFT cannot apply it to {type(skeleton).__name__}: {error}") from error
    module_of = {number: module for module, number in numbers.items()}
    placed: dict[str, str] = {}
    parameters: dict[str, str] = {}
    for name, layer in layers.items():
        weight = converted.get(f"base_model.model.{name}.lora_A.weight")
        if weight is None:
            continue
        names = {module_of[number] for number in weight.unique().tolist() if number}
        if isinstance(layer, ParamWrapper):
            parameters.update(dict.fromkeys(names, f"{name.replace('.base_layer', '')}.{layer.parameter_name}"))
        else:
            placed.update(dict.fromkeys(names, name))
    renamed = {
        module_of[number]: key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
        for key, weight in converted.items()
        for number in weight.unique().tolist()
        if number
    }
    return Placement(placed=placed, parameters=parameters, renamed=renamed)


def lora_layers(config: Mapping[str, Any], skeleton: nn.Module) -> dict[str, LoraLayer]:
    """Returns the layers that PEFT makes for these settings in a model without weights, by name.

    Raises:
        ValueError: if PEFT cannot make them.
    """
    try:
        return _injected(peft_config(Path("the adapter"), {**config, **_NEUTRAL}), skeleton)
    except (AdapterError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def _injected(settings: LoraConfig, skeleton: nn.Module) -> dict[str, LoraLayer]:
    model = without_weights(skeleton, {})
    with warnings.catch_warnings(), init_empty_weights():
        warnings.simplefilter("ignore")
        LoraModel(model, {"default": settings}, "default")
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
