"""The settings of a PEFT adapter, adapter_config.json: those that can be fused exactly, and their values for a module.

A setting that changes nothing in the weights is no reason to refuse an adapter.
"""

import importlib.metadata
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dlp_lora.bank.adapter_files import CONFIG_FILE
from dlp_lora.errors import AdapterError
from dlp_lora.files import parse_json

ALL_LINEAR = "all-linear"
# Settings that have no effect on W + scaling * B A after training, or that are read below.
_NEUTRAL = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_rslora",
    }
)
# How a LoRA was started or trained; the initialisations that change the base are refused by init_lora_weights.
_TRAINING_ALONE = frozenset({"corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"})
REASONS = {
    "use_dora": "DoRA rescales the weight's columns, so adapters cannot be summed; retrain with use_dora=False",
    "alora_invocation_tokens": "an activated LoRA applies only after its invocation tokens",
    "layer_replication": "it was trained on a base with repeated layers",
    "use_qalora": "QA-LoRA reads its input in groups; retrain with use_qalora=False",
    "use_bdlora": "its A or B is made of blocks; retrain with use_bdlora=None",
    "kasa_config": "KaSA changes the base weights; retrain without it",
    "monteclora_config": "its weights are drawn at random; retrain without it",
    "arrow_config": "it routes among other adapters; pass these",
    "megatron_config": "it was trained on Megatron's parallel layers; convert it to plain ones",
}
# Initialisations that leave the base weights as they were. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# subtract something from them, so their adapter is right only on a base that was changed the same way.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false")


def read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads an adapter's settings; returns them, and warnings about ignored ones.

    Raises:
        AdapterError: if they cannot be read, or a LoRA with these settings cannot be fused exactly.
    """
    file = path / CONFIG_FILE
    try:
        config = parse_json(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path} has no {CONFIG_FILE}; expected a PEFT adapter folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds a {type(config).__name__}; expected a JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(_no_lora(path, config))
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        raise AdapterError(
            f"{path} was initialised with {init!r}, which changes the base weights; convert it to a plain LoRA with "
            f"PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key, reason in REASONS.items():
        if is_set(config.get(key)):
            raise AdapterError(f"{path} cannot be fused exactly: {key}={config[key]!r}: {reason}")
    _check_types(file, config)
    _check_patterns(file, config)
    return config, _ignored(path, config)


def base_model_of(config: Mapping[str, Any]) -> str | None:
    """The base model that an adapter's settings name."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def model_name(name: str | Path) -> str:
    """The name of a model, from a hub id or a path of any system, in small letters.

    "owner/Model", "./Model", r"C:\\models\\Model" and a snapshot in a hub's cache are all "model".
    """
    parts = [part for part in re.split(r"[/\\]+", str(name)) if part not in ("", ".")]
    if len(parts) > 1 and parts[-2] == "snapshots":
        parts = parts[:-2]
    last = parts[-1] if parts else ""
    if last.startswith("models--"):
        last = last.split("--")[-1]
    return last.replace("___", ".").lower()  # ModelScope's cache has no dots in names


def other_base(path: Path, config: Mapping[str, Any], base: str) -> str:
    """A warning if an adapter names another base model than `base`, else ""."""
    named = base_model_of(config)
    if not named or not base or model_name(named) == model_name(base):
        return ""
    return f"{path} says it was trained on {named!r}, but the base model is {base!r}"


def is_set(value: Any) -> bool:
    """Whether a setting is in use."""
    return bool(value)  # PEFT, too, reads 0 and "" as no


def is_parameter(config: Mapping[str, Any], module: str) -> bool:
    """Whether the weight of a module of this name is one of the `target_parameters`."""
    return f".{module}.weight".endswith(tuple(f".{name}" for name in config.get("target_parameters") or ()))


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT applies a LoRA to a module of this name; "all-linear" is any linear layer."""
    if is_parameter(config, module):
        return True
    target = config.get("target_modules")
    is_broad = target is None or (isinstance(target, str) and target.lower() == ALL_LINEAR)
    if is_broad and not config.get("exclude_modules") and not config.get("modules_to_save"):
        return True
    others = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    if isinstance(target, list) and not any(config.get(key) not in (None, [], "") for key in others):
        return module in target or module.endswith(tuple(f".{one}" for one in target))
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = {**dict.fromkeys((*others, "target_parameters")), **config}
    settings["target_modules"] = ".*" if is_broad else target
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(check_target_module_exists(SimpleNamespace(**settings), module))


def targets(config: Mapping[str, Any]) -> str:
    """The settings that select the adapted modules."""
    keys = (
        *("target_modules", "target_parameters", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "modules_to_save"),
    )
    return ", ".join(f"{key}={config[key]!r}" for key in keys if is_set(config.get(key)))


def rank_and_scaling(path: Path, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """The rank of a module's LoRA, and the scaling of its `B A`.

    Raises:
        AdapterError: if these are not numbers.
    """
    # For a LoRA of a parameter, PEFT uses the parameter's name.
    name = f"{module}.weight" if is_parameter(config, module) else module
    rank = _for_module(config.get("rank_pattern") or {}, name, config.get("r", 8))
    alpha = _for_module(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise AdapterError(
            f"{path}: its config says rank {rank!r} and alpha {alpha!r} for {module}; "
            f"expected a whole number of at least 1 and a number"
        )
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _for_module(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    # PEFT's rule (get_pattern_key): the first key that is a regular expression for the end of the module path.
    key = next((key for key in pattern if _matches(key, module)), None)
    return pattern.get(module, default) if key is None else pattern[key]


def idle_patterns(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Warnings about patterns of the settings that match no adapted module."""
    modules = list(modules)
    notes = []
    for setting in ("rank_pattern", "alpha_pattern"):
        idle = [key for key in config.get(setting) or {} if not any(_matches(key, module) for module in modules)]
        if idle:
            notes.append(f"its {setting} has {', '.join(map(repr, idle))}, which matches none of its modules")
    target = config.get("target_modules")
    if isinstance(target, list):
        idle = [one for one in target if not any(m == one or m.endswith(f".{one}") for m in modules)]
        if idle:
            notes.append(f"its target_modules has {', '.join(map(repr, idle))}, which it has no weights for")
    return notes


def _no_lora(path: Path, config: Mapping[str, Any]) -> str:
    if "peft_type" in config and config["peft_type"] is not None:
        return f"{path} is a {config['peft_type']} adapter; only peft_type LORA can be fused"
    if "lora_parameters" in config or "fine_tune_type" in config or (path / "adapters.safetensors").is_file():
        return (
            f"{path} is an adapter of mlx, whose A and B lie the other way round and whose scale is no alpha; fuse it "
            "into its base with mlx_lm.fuse, or convert it to a PEFT adapter"
        )
    return (
        f"{path} is a {config.get('peft_type')} adapter; only peft_type LORA can be fused, and its {CONFIG_FILE} names "
        "no peft_type: PEFT did not write it"
    )


def _check_types(file: Path, config: Mapping[str, Any]) -> None:
    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterError(f"{file} has {key}={config[key]!r}; expected an object of module names to numbers")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if value is not None and not isinstance(value, str) and not names(value):
            raise AdapterError(f"{file} has {key}={value!r}; expected a pattern or a list of names")
    for key in ("modules_to_save", "target_parameters"):
        if config.get(key) is not None and not names(config[key]):
            raise AdapterError(f"{file} has {key}={config[key]!r}; expected a list of names")
    layers = config.get("layers_to_transform")
    if not (layers is None or whole(layers) or (isinstance(layers, list) and all(map(whole, layers)))):
        raise AdapterError(f"{file} has layers_to_transform={layers!r}; expected numbers of layers")
    if isinstance(config.get("target_modules"), str):
        for key in ("layers_to_transform", "layers_pattern"):
            if config.get(key) is not None:
                raise AdapterError(
                    f"{file} has {key}={config[key]!r} beside a pattern as target_modules, which PEFT refuses; "
                    f"say the layers in the pattern"
                )
    if config.get("layers_pattern") and layers is None:
        raise AdapterError(f"{file} has a layers_pattern and no layers_to_transform, which PEFT refuses")
    if not isinstance(config.get("bias") or "none", str):
        raise AdapterError(f"{file} has bias={config['bias']!r}; expected none, all or lora_only")
    tokens = config.get("trainable_token_indices")
    for rows in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if rows is not None and not (isinstance(rows, list) and all(map(whole, rows))):
            raise AdapterError(f"{file} has trainable_token_indices={tokens!r}; expected numbers of tokens")


def _check_patterns(file: Path, config: Mapping[str, Any]) -> None:
    target = config.get("target_modules")
    patterns: list[tuple[str, str, str]] = [
        (key, pattern, rf"(.*\.)?({pattern})$")
        for key in ("rank_pattern", "alpha_pattern")
        for pattern in config.get(key) or {}
    ]
    patterns += [("modules_to_save", name, rf"(^|.*\.){name}($|\..*)") for name in config.get("modules_to_save") or []]
    for key, value in (("target_modules", target), ("exclude_modules", config.get("exclude_modules"))):
        if isinstance(value, str) and value.lower() != ALL_LINEAR:
            patterns.append((key, value, value))
    layers = config.get("layers_pattern") or []
    patterns += [
        ("layers_pattern", pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
        for pattern in ([layers] if isinstance(layers, str) else layers)
    ]
    for key, written, pattern in patterns:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"{file} has {key} {written!r}, which is not a regular expression ({error}); PEFT reads it as one, so "
                f'write ".*" for any letters'
            ) from error


def _ignored(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Warnings about unknown settings, which PEFT ignores, too.

    Raises:
        AdapterError: if a setting may belong to a kind of LoRA of a later PEFT.
    """
    training = [key for key in config if key in _TRAINING_ALONE and is_set(config[key])]
    known = _NEUTRAL | _TRAINING_ALONE | set(REASONS)
    unknown = [key for key, value in config.items() if key not in known and is_set(value)]
    version = str(config.get("peft_version") or "")
    later = [key for key in unknown if not isinstance(config[key], int | float) or config[key] is True]
    if later and _is_later(version):
        raise AdapterError(
            f"{path} cannot be fused exactly: {later[0]}={config[later[0]]!r}: PEFT {version} wrote that, and this "
            f"version does not know it; upgrade PEFT and dlp-lora, or retrain without it"
        )
    notes = []
    if training:
        notes.append(f"{path}: settings of the training alone are ignored: {', '.join(sorted(training))}")
    if unknown:
        notes.append(
            f"{path}: settings that PEFT does not know are ignored, as PEFT does: {', '.join(sorted(unknown))}"
        )
    return notes


def _is_later(version: str) -> bool:
    numbers = [tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (version, importlib.metadata.version("peft"))]
    return numbers[0] > numbers[1]


def _matches(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None
