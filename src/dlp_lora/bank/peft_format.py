"""The PEFT adapter format: a folder in, checked LoRA weights out; and one written.

Everything that would make a fused adapter differ from the adapter that was trained is refused here, by
name: what cannot be written as `W + scaling * B A` with this A and B has no exact mixture.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlp_lora.errors import AdapterError
from dlp_lora.files import name_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)

# Settings that change nothing in W + scaling * B A once the weights are trained, whatever their value.
_NEUTRAL = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
# Initialisations that leave the base weights as they were. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
# subtract something from them, so their adapter is right only on a base that was changed the same way.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "true", "false")
_REASONS = {
    "use_dora": "DoRA rescales the weight's columns, so adapters cannot be summed; retrain with use_dora=False",
    "modules_to_save": "it replaces whole layers of the base model; retrain without modules_to_save",
    "lora_bias": "it has a trained bias on B; retrain with lora_bias=False",
    "trainable_token_indices": "it changes token embeddings; retrain without trainable_token_indices",
    "alora_invocation_tokens": "an activated LoRA applies only after its invocation tokens",
    "layer_replication": "it was trained on a base with repeated layers",
    "target_parameters": "it adapts bare parameters, not linear layers; retrain with target_modules",
}
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# PEFT saves the frozen base layer along with the LoRA of an lm_head.
_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)")


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
    """One trained LoRA: its weights by module path of the base model, and where it came from."""

    name: str
    modules: Mapping[str, LoraWeights]
    config: Mapping[str, Any]
    path: Path
    # Base weights that the folder holds copies of, with their keys in its weights file; `attach.attach` compares them.
    base_copies: Mapping[str, str] = field(default_factory=dict)

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

    @property
    def base_model(self) -> str | None:
        """The base model that the adapter says it was trained on."""
        return self.config.get("base_model_name_or_path") or None


def find_adapters(folder: str | Path) -> dict[str, Path]:
    """Names the PEFT adapter folders directly inside `folder`, by folder name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder; expected a folder of PEFT adapter folders")
    if (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            f"{folder} is itself an adapter; expected a folder of adapter folders, or {{name: path}} for single ones"
        )
    found = {p.name: p for p in sorted(folder.iterdir()) if (p / CONFIG_FILE).is_file() and p.name[0] != "."}
    if not found:
        raise AdapterError(f"{folder} holds no adapter: no folder in it has an {CONFIG_FILE}")
    return found


def read_adapter(path: str | Path, name: str | None = None, *, weights: bool = True) -> Adapter:
    """Reads one PEFT adapter folder; without `weights`, only settings and shapes, as tensors of the meta device.

    Raises:
        AdapterError: if a file is missing or damaged, or the adapter cannot be fused exactly.
    """
    path = Path(path)
    config = _read_config(path)
    tensors = _read_weights(path, weights=weights)
    copies = {f"{match['module']}.{match['parameter']}": key for key in tensors if (match := _COPY.fullmatch(key))}
    for key in copies.values():
        del tensors[key]
    modules = _modules(path, config, tensors)
    return Adapter(name=name or name_of(path), modules=modules, config=config, path=path, base_copies=copies)


def read_base_copies(adapter: Adapter) -> dict[str, Tensor]:
    """Reads the base weights that an adapter's folder holds copies of, by their name in the base model."""
    if not adapter.base_copies:
        return {}
    with safe_open(adapter.path / WEIGHTS_FILE, framework="pt") as file:
        return {name: file.get_tensor(key) for name, key in adapter.base_copies.items()}


def check_base_name(adapter: Adapter, base: str, *, strict: bool = False, stacklevel: int = 1) -> None:
    """Warns of an adapter that says it was trained on a model of another name than `base`.

    Raises:
        AdapterError: instead, where `strict`.
    """
    # "owner/Model", "./Model" and ".cache/Model/" are one model: only the last part of the name says which.
    told, found = (Path(str(name or "").rstrip("/")).name.lower() for name in (adapter.base_model, base))
    if not told or not found or told == found:
        return
    message = f"{adapter.path} says it was trained on {adapter.base_model!r}, but the base model is {base!r}"
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


def files_stamp(path: str | Path) -> tuple[tuple[int, int], ...]:
    """The sizes and times of an adapter's files: other ones were written since."""
    stats = [(Path(path) / file).stat() for file in FILES]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def content_hash(path: str | Path) -> str:
    """The SHA-256 of an adapter's settings and weights: equal hashes are equal adapters."""
    digest = hashlib.sha256()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((Path(path) / file).read_bytes())
    return digest.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path} has no {CONFIG_FILE}; expected a PEFT adapter folder") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds a {type(config).__name__}; expected a JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} is a {config.get('peft_type')} adapter; only peft_type LORA can be fused")
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        raise AdapterError(
            f"{path} was initialised with {init!r}, which changes the base weights; convert it to a plain LoRA with "
            f"PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path} has trained biases (bias={config['bias']!r}); retrain with bias='none'")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterError(f"{file} has {key}={config[key]!r}; expected an object of module names to numbers")
    for key, value in config.items():
        if key not in _NEUTRAL and value not in (None, False, {}, []):
            reason = _REASONS.get(key, "this version does not know how to fuse that")
            raise AdapterError(f"{path} cannot be fused exactly: {key}={value!r}: {reason}")
    return config


def _read_weights(path: Path, *, weights: bool) -> dict[str, Tensor]:
    file = path / WEIGHTS_FILE
    if not file.is_file():
        other = sorted(p.name for p in path.glob("adapter_model*"))
        found = f"found {', '.join(other)}, which can run code when loaded" if other else "found no weights"
        raise AdapterError(f"{path} has no {WEIGHTS_FILE} ({found}); save it again with safe_serialization=True")
    try:
        if weights:
            return load_file(file)
        with safe_open(file, framework="pt") as header:
            return {k: _no_weights(*header.get_slice(k).get_shape()) for k in header.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is truncated or not a safetensors file ({error}); copy it again") from error


@lru_cache
def _no_weights(*shape: int) -> Tensor:
    # Thousands of adapters have few shapes between them.
    return torch.empty(shape, device="meta")


def _modules(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LoraWeights]:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{path} cannot be fused exactly: it holds {key!r}; expected only lora_A and lora_B of linear layers"
            )
        if (
            not tensor.is_meta and not torch.isfinite(tensor.float()).all()
        ):  # float: PyTorch cannot tell for all 8-bit types
            raise AdapterError(f"{path} holds NaN or infinite numbers in {key!r}; its training diverged")
        halves.setdefault(match["module"], {})[match["half"]] = tensor
    if not halves:
        raise AdapterError(f"{path} holds no weights; expected lora_A and lora_B tensors")
    return {module: _lora(path, config, module, pair) for module, pair in halves.items()}


def _lora(path: Path, config: Mapping[str, Any], module: str, pair: Mapping[str, Tensor]) -> LoraWeights:
    if set(pair) != {"A", "B"}:
        raise AdapterError(f"{path} has only lora_{next(iter(pair))} for {module}; expected both lora_A and lora_B")
    a, b = pair["A"], pair["B"]
    rank = _for_module(config.get("rank_pattern") or {}, module, config.get("r", 8))
    alpha = _for_module(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise AdapterError(
            f"{path}: its config says rank {rank!r} and alpha {alpha!r} for {module}; "
            f"expected a whole number of at least 1 and a number"
        )
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{path}: {module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; "
            f"its config says rank {rank}, so expected ({rank}, d_in) and (d_out, {rank})"
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraWeights(a=a, b=b, scaling=scaling)


def _for_module(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    if not pattern:
        return default
    from peft.utils.other import get_pattern_key  # seconds, and few adapters have patterns

    # PEFT's own rule: the first key that equals, or is a regular expression for, the end of the module path.
    return pattern.get(get_pattern_key(list(pattern), module), default)
