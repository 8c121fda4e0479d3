"""The modules of a base model that an adapter changes: found by PEFT's rules, and refused if they do not fit."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlp_lora.bank.adapter_config import ALL_LINEAR, is_targeted, targets
from dlp_lora.bank.adapter_keys import Keys
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.tensor_file import TensorFile
from dlp_lora.errors import AdapterError

# The names of the text model in transformers' classes.
TEXT_PARTS = frozenset(
    {"model", "language_model", "text_model", "transformer", "decoder", "llm", "thinker", "base_model"}
)


def adapted_modules(
    path: Path, config: Mapping[str, Any], file: TensorFile, keys: Keys, layout: BaseLayers | None, notes: list[str]
) -> dict[str, str]:
    """Finds the modules of the base that the LoRAs change, with their names in the weights.

    Raises:
        AdapterError: if a LoRA changes something other than a linear layer, or nothing in this base.
    """
    for module, pair in keys.pairs.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{path} has only lora_{next(iter(pair))} for {module}; expected both lora_A and lora_B")
    if layout is not None and _needs_peft(config, layout) and layout.skeleton is not None:
        modules, untargeted = _placed_by_peft(path, config, file, keys, layout)
    else:
        modules, untargeted = _placed_by_name(path, config, keys, layout)
    if not modules:
        raise AdapterError(
            f"{path}: its settings target none of the {len(keys.pairs)} modules in its weights, such as "
            f"{next(iter(keys.pairs))}: {targets(config)}"
        )
    if untargeted:
        notes.append(
            f"{path}: {len(untargeted)} of the {len(keys.pairs)} modules in its weights, such as {untargeted[0]}, are "
            f"not applied, as in PEFT: its settings leave them out ({targets(config)})"
        )
    return modules


def _needs_peft(config: Mapping[str, Any], layout: BaseLayers) -> bool:
    target = config.get("target_modules")
    is_broad = target is None or (isinstance(target, str) and target.lower() == ALL_LINEAR)
    return is_broad or layout.is_renamed or bool(config.get("ensure_weight_tying") or config.get("target_parameters"))


def _placed_by_peft(
    path: Path, config: Mapping[str, Any], file: TensorFile, keys: Keys, layout: BaseLayers
) -> tuple[dict[str, str], list[str]]:
    from dlp_lora.bank.peft_names import placement

    assert layout.skeleton is not None
    shapes = {
        module: (file.tensors[pair["A"]].shape, file.tensors[pair["B"]].shape) for module, pair in keys.pairs.items()
    }
    placed = placement(path, config, shapes, layout.skeleton)
    weights = {module: name.removesuffix(".weight") for module, name in placed.parameters.items()}
    linear = {module: name for module, name in weights.items() if layout.modules.get(name) == "Linear"}
    if bare := placed.parameters.keys() - linear.keys():
        others = {module: placed.parameters[module] for module in bare}
        module, parameter = min(others.items(), key=lambda pair: (".experts" not in pair[1], pair))
        if weights[module] in layout:
            raise AdapterError(
                f"{path} cannot be fused exactly: it adapts {parameter} as a parameter, which a "
                f"{layout.modules[weights[module]]} holds the other way round; retrain with target_modules"
            )
        raise AdapterError(
            f"{path} cannot be fused exactly: {module} adapts {parameter}, which is no linear layer in this base but a "
            f"bare parameter (target_parameters), as PEFT adapts experts; retrain with target_modules of the attention"
        )
    moved_from = {new: old for old, new in (*placed.placed.items(), *linear.items())}
    untargeted = []
    for module in keys.pairs:
        if module in placed.placed or module in linear:
            continue
        name = placed.renamed.get(module, module)
        moved = _in_text_model(name, layout) or name
        if name in layout.modules or not any(is_targeted(config, one) for one in {module, name, moved}):
            untargeted.append(module)
        elif moved in moved_from:
            raise AdapterError(_two_for_one(path, moved_from[moved], module, moved))
        else:
            moved_from[moved] = module  # if the base lacks it, it is refused with the others
    return moved_from, untargeted


def _placed_by_name(
    path: Path, config: Mapping[str, Any], keys: Keys, layout: BaseLayers | None
) -> tuple[dict[str, str], list[str]]:
    modules: dict[str, str] = {}
    untargeted = []
    for module in keys.pairs:
        name = module
        if layout is not None and module not in layout.modules:
            name = _in_text_model(module, layout) or module
        if not any(is_targeted(config, one) for one in {module, name}):
            untargeted.append(module)
        elif name in modules:
            raise AdapterError(_two_for_one(path, modules[name], module, name))
        else:
            modules[name] = module
    return modules, untargeted


def check_shapes(
    path: Path, modules: Mapping[str, tuple[int, int]], layout: Mapping[str, tuple[int, int]], base_model: str | None
) -> None:
    """Checks that LoRAs with these (d_in, d_out) fit the linear layers of a base model.

    Raises:
        AdapterError: if they do not.
    """
    if unknown := [module for module in modules if module not in layout]:
        raise AdapterError(_unknown_modules(path, modules, unknown, layout, base_model))
    for module, found in modules.items():
        if found != layout[module]:
            raise AdapterError(
                f"{path}: {module} maps {found[0]} to {found[1]} features, but the base model's maps "
                f"{layout[module][0]} to {layout[module][1]}; it was trained on another base ({base_model})"
            )


def _two_for_one(path: Path, first: str, second: str, module: str) -> str:
    return f"{path}: {first} and {second} would both change {module} of the base model; keep one of them"


def _in_text_model(name: str, layout: BaseLayers) -> str | None:
    """The name of a layer in the base's decoder, if another class of the family has another name for it."""
    parts = name.split(".")
    for cut in range(len(parts)):
        if cut and parts[cut - 1] not in TEXT_PARTS:
            return None
        rest = ".".join(parts[cut:])
        for candidate in (f"{layout.text_model}.{rest}".lstrip("."), rest):
            if candidate in layout and candidate != name:
                return candidate
    return None


def _unknown_modules(
    path: Path,
    modules: Iterable[str],
    unknown: Sequence[str],
    layout: Mapping[str, tuple[int, int]],
    base_model: str | None,
) -> str:
    total = len(list(modules))
    first = unknown[0]
    start = (
        f"{path}: {total - len(unknown)} of its {total} modules are linear layers of the base model; {first} is not."
    )
    kind = layout.modules.get(first) if isinstance(layout, BaseLayers) else None
    if kind is not None:
        return f"{start} It is a {kind}, and only linear layers can be fused; retrain with other target_modules"
    leaves = {name.rsplit(".", 1)[-1] for name in layout}
    if strange := sorted({name.rsplit(".", 1)[-1] for name in unknown} - leaves):
        return (
            f"{start} It was trained on another architecture ({base_model}): the base model has no "
            f"{', '.join(strange)} but {', '.join(sorted(leaves))}"
        )
    known = {_numberless(name) for name in layout}
    if _numberless(first) in known:
        return f"{start} It was trained on another architecture ({base_model}), with more layers than the base model"
    like = next(name for name in layout if name.rsplit(".", 1)[-1] == first.rsplit(".", 1)[-1])
    return (
        f"{start} Layers of that kind are called like {like} there, and nothing says that these are the same; "
        f"rename the keys of the adapter's weights, or pass the model that it was trained on ({base_model})"
    )


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "*", name)
