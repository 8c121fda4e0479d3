"""A PEFT adapter folder, read without torch: its settings, the names and shapes of its LoRAs, and what cannot be used.

Everything that would make a fused adapter differ from the adapter that PEFT applies is refused here, by name: what
cannot be written as `W + scaling * B A` with this A and B has no exact mixture. The weights decide: a setting that
changes nothing in them is no reason to refuse, and a LoRA is applied where PEFT applies it.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.tensor_file import TensorFile
from dlp_lora.errors import AdapterError
from dlp_lora.files import name_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)

ALL_LINEAR = "all-linear"
# Settings that change nothing in W + scaling * B A once the weights are trained, whatever their value, or that are
# read below.
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
_REASONS = {
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
# Modules that training tools put around a model or its layers.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# What a part of a model that reads text is called, by transformers' many classes.
_TEXT_PARTS = frozenset(
    {"model", "language_model", "text_model", "transformer", "decoder", "llm", "thinker", "base_model"}
)
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<kind>[^.]+)(?:\.(?P<rest>.+))?")
# Where PEFT saves a weight of the base that it wrapped.
_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.[^.]+)?)(?=\.[^.]+$)")
_TOKENS = re.compile(r"\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")


@dataclass(frozen=True, kw_only=True)
class LoraEntry:
    """One LoRA as its folder has it: the keys of its weights, and what the settings make of them."""

    key_a: str
    key_b: str
    rank: int
    d_in: int
    d_out: int
    scaling: float


@dataclass(frozen=True)
class BaseCopy:
    """A copy of a base weight in an adapter's folder, and why the adapter is refused if it differs from the base's.

    Of an embedding, it may be the `rows` of some tokens alone. `is_trained` if the settings say that it was trained.
    """

    key: str
    reason: str
    rows: tuple[int, ...] | None = None
    is_trained: bool = False


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """What a folder holds, by the module of the base model that each LoRA changes."""

    name: str
    path: Path
    config: Mapping[str, Any]
    file: TensorFile
    loras: Mapping[str, LoraEntry]
    base_copies: Mapping[str, BaseCopy] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def base_model(self) -> str | None:
        """The base model that the adapter says it was trained on."""
        return base_model_of(self.config)


def find_adapters(folder: str | Path) -> dict[str, Path]:
    """Names the PEFT adapter folders directly inside `folder`, by folder name; one that lacks its settings, too."""
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder; expected a folder of PEFT adapter folders")
    if (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            f"{folder} is itself an adapter; expected a folder of adapter folders, or {{name: path}} for single ones"
        )
    found = {p.name: p for p in sorted(folder.iterdir()) if p.name[0] != "." and _is_adapter(p)}
    if not found:
        raise AdapterError(f"{folder} holds no adapter: no folder in it has an {CONFIG_FILE}")
    return found


def read_folder(
    path: str | Path, name: str | None = None, *, layout: BaseLayers | Mapping[str, Any] | None = None
) -> AdapterFolder:
    """Reads one adapter folder for the base model of a layout; without one, by its names alone.

    Raises:
        AdapterError: if a file is missing or damaged, or the adapter cannot be fused exactly.
    """
    path = Path(path)
    name = check_adapter_name(name_of(path) if name is None else name, path)
    config, notes = _read_config(path)
    file = TensorFile(_weights_file(path))
    layout = layout if isinstance(layout, BaseLayers) or layout is None else BaseLayers(layout)
    keys = _sorted_keys(path, file, layout)
    notes += keys.notes
    modules = _modules(path, config, file, keys, layout, notes)
    loras = {module: _entry(path, config, file, module, keys.pairs[source]) for module, source in modules.items()}
    for key in sorted({key for lora in loras.values() for key in (lora.key_a, lora.key_b)}):
        if not file.tensors[key].is_float:
            raise AdapterError(
                f"{path} holds {file.tensors[key].dtype} numbers in {key!r}; expected floating-point LoRA weights: "
                f"a quantised LoRA is to be dequantised first"
            )
    _check_extras(path, config, file, keys, layout, notes)
    copies = _base_copies(path, config, file, keys.others, layout, notes)
    if layout is not None:
        check_shapes(path, {m: (lora.d_in, lora.d_out) for m, lora in loras.items()}, layout, base_model_of(config))
    notes += _patterns_without_match(config, loras)
    return AdapterFolder(
        name=name, path=path, config=config, file=file, loras=loras, base_copies=copies, notes=tuple(notes)
    )


def check_adapter_name(name: str, path: str | Path) -> str:
    """Checks that mixtures can name an adapter; gives the name.

    Raises:
        AdapterError: if they cannot.
    """
    if not name or name != name.strip() or any(letter in name for letter in "=,\n"):
        raise AdapterError(
            f"{path}: the adapter name {name!r} cannot be written in a mixture such as math=0.6,units=0.4; "
            f'rename it to one without "=", "," and spaces at its ends'
        )
    return name


def check_shapes(
    path: Path, modules: Mapping[str, tuple[int, int]], layout: Mapping[str, tuple[int, int]], base_model: str | None
) -> None:
    """Checks that LoRAs of the given (d_in, d_out) fit the linear layers of a base model.

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


def check_numbers(folder: AdapterFolder) -> tuple[str, ...]:
    """Reads the numbers of an adapter's LoRAs; gives what is to be known of them.

    Raises:
        AdapterError: if one is not finite.
    """
    for lora in folder.loras.values():
        for key in (lora.key_a, lora.key_b):
            if not folder.file.is_finite(key):
                raise AdapterError(not_finite(folder.path, key))
    if all(folder.file.is_zero(lora.key_b) for lora in folder.loras.values()):
        return (changes_nothing(folder.path),)
    return ()


def not_finite(path: Path, key: str) -> str:
    """Says that a weight has numbers that are no numbers."""
    return f"{path} holds NaN or infinite numbers in {key!r}; its training diverged"


def changes_nothing(path: Path) -> str:
    """Says that an adapter is the base model."""
    return f"{path} changes nothing: all of its lora_B are zero, as before the first step of a training"


def base_model_of(config: Mapping[str, Any]) -> str | None:
    """The base model that an adapter's settings name."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def model_name(name: str | Path) -> str:
    """The name of a model of which a hub id or a path of any system is known, in small letters.

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
    """Says that an adapter names another base model than `base`; "" if it does not."""
    told = base_model_of(config)
    if not told or not base or model_name(told) == model_name(base):
        return ""
    return f"{path} says it was trained on {told!r}, but the base model is {base!r}"


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


def _is_adapter(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() or any(path.glob("adapter_model*"))


# Settings


def _read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=functools.partial(_object, file))
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
    for key, reason in _REASONS.items():
        if _is_set(config.get(key)):
            raise AdapterError(f"{path} cannot be fused exactly: {key}={config[key]!r}: {reason}")
    _check_types(file, config)
    _check_patterns(file, config)
    return config, _ignored(path, config)


def _object(file: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise AdapterError(f"{file} has {twice[0]!r} twice in one object; leave one of them")
    return dict(pairs)


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


def _is_set(value: Any) -> bool:
    return bool(value)  # PEFT, too, takes 0 and "" for no


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
                f"{file} has {key} {written!r}, which is no regular expression ({error}); PEFT reads it as one, so "
                f'write ".*" where any letters may stand'
            ) from error


def _ignored(path: Path, config: Mapping[str, Any]) -> list[str]:
    """Says which settings are ignored, as PEFT does.

    Raises:
        AdapterError: if one may be of a kind of LoRA that a later PEFT knows.
    """
    training = [key for key in config if key in _TRAINING_ALONE and _is_set(config[key])]
    known = _NEUTRAL | _TRAINING_ALONE | set(_REASONS)
    unknown = [key for key, value in config.items() if key not in known and _is_set(value)]
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


# Files


def _weights_file(path: Path) -> Path:
    file = path / WEIGHTS_FILE
    if file.is_file():
        return file
    other = sorted(p.name for p in path.glob("adapter_model*"))
    tensors = [name for name in other if name.endswith(".safetensors")]
    start = f"{path} has no {WEIGHTS_FILE}"
    if any(re.search(r"-\d+-of-\d+\.", name) for name in tensors):
        return _shards(start, tensors)
    if tensors:
        raise AdapterError(
            f"{start} (found {', '.join(tensors)}); PEFT reads that name alone: "
            + ("rename it" if len(tensors) == 1 else "choose one and rename it")
        )
    if other:
        raise AdapterError(
            f"{start} (found {', '.join(other)}, which can run code when loaded); save it again with "
            f"safe_serialization=True"
        )
    if (path / "adapters.safetensors").is_file():
        raise AdapterError(f"{start} but adapters.safetensors, as mlx writes it; convert it to a PEFT adapter")
    raise AdapterError(f"{start} (found no weights); save it again with safe_serialization=True")


def _shards(start: str, tensors: Sequence[str]) -> Path:
    raise AdapterError(
        f"{start}: its weights are in {len(tensors)} shards ({', '.join(tensors)}), and PEFT reads one file; join them "
        f"with safetensors.torch: load_file of each into one dict, save_file as {WEIGHTS_FILE}"
    )


# Keys


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """The keys of a weights file by what they are; modules have the names that are left without wrappers."""

    pairs: dict[str, dict[str, str]]  # lora_A and lora_B by module and half
    extras: list[tuple[str, str, str]]  # (key, module, kind) of other lora tensors
    others: dict[str, str]  # all else: key by name
    notes: list[str]


def _sorted_keys(path: Path, file: TensorFile, layout: BaseLayers | None) -> _Keys:
    segments = layout.segments if layout is not None else frozenset()
    loras: list[tuple[str, str, str, str | None, str]] = []  # key, module, kind, adapter name, attribute
    others: dict[str, str] = {}
    for key in file.tensors:
        plain = _without_wrappers(key, segments)
        match = _LORA.fullmatch(plain)
        if match is None:
            others[key] = plain
            continue
        adapter, attribute = _split_rest(match["rest"])
        loras.append((key, match["module"], match["kind"], adapter, attribute))
    loras, notes = _of_one_adapter(path, loras)
    pairs: dict[str, dict[str, str]] = {}
    extras = []
    for key, module, kind, _, attribute in loras:
        if kind not in ("A", "B") or attribute != "weight":
            extras.append((key, module, kind if attribute == "weight" else f"{kind}.{attribute}"))
        elif kind in pairs.setdefault(module, {}):
            raise AdapterError(
                f"{path} cannot be fused exactly: it holds {pairs[module][kind]!r} and {key!r}, both for "
                f"lora_{kind} of {module}; leave one of them"
            )
        else:
            pairs[module][kind] = key
    if not pairs:
        raise AdapterError(_no_pairs(path, file, extras))
    return _Keys(pairs=pairs, extras=extras, others=others, notes=notes)


def _no_pairs(path: Path, file: TensorFile, extras: Iterable[tuple[str, str, str]]) -> str:
    if any("lora_embedding" in f"lora_{kind}" for _, _, kind in extras):
        first = next(key for key, _, kind in extras if kind.startswith("embedding"))
        return f"{path} cannot be fused exactly: it holds {first!r}; expected only lora_A and lora_B of linear layers"
    if any(re.search(r"lora_(up|down)\.", key) for key in file.tensors):
        return f"{path} holds lora_up and lora_down, as kohya's scripts write them; convert it to a PEFT adapter"
    if any(re.search(r"\.lora_[ab]$", key) for key in file.tensors):
        return f"{path} holds lora_a and lora_b, as mlx writes them; convert it to a PEFT adapter"
    found = f"; it holds {next(iter(file.tensors))!r} and the like" if file.tensors else ""
    return f"{path} holds no weights; expected lora_A and lora_B tensors{found}"


def _without_wrappers(key: str, segments: frozenset[str]) -> str:
    """Takes what tools and PEFT put into names out of a key, unless the base, whose names have `segments`, has it."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS or part in segments]
    if "base_model" not in segments:  # PEFT's own prefix, however often and whatever stands before it
        for i in range(len(parts) - 2, -1, -1):
            if parts[i : i + 2] == ["base_model", "model"]:
                parts = parts[i + 2 :]
                break
    while parts[0] == "module" and "module" not in segments and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def _split_rest(rest: str | None) -> tuple[str | None, str]:
    """Takes what follows lora_A apart: the adapter's name, if it is in the key, and the attribute."""
    if rest is None or rest == "weight":
        return None, "weight"
    if rest == "bias":
        return None, "bias"
    name, _, attribute = rest.rpartition(".")
    return (name, attribute) if name and attribute in ("weight", "bias") else (rest, "weight")


def _of_one_adapter(
    path: Path, loras: list[tuple[str, str, str, str | None, str]]
) -> tuple[list[tuple[str, str, str, str | None, str]], list[str]]:
    """Keeps the keys of one adapter: PEFT loads those without a name and those named "default"."""
    named = {adapter for *_, adapter, _ in loras}
    usual = named & {None, "default"}
    if len(named) == 1 or named == usual:
        return loras, []
    if not usual:
        raise AdapterError(
            f"{path} holds the weights of several adapters ({', '.join(sorted(map(str, named)))}); save each in a "
            f"folder of its own"
        )
    dropped = ", ".join(sorted(str(name) for name in named - usual))
    kept = [lora for lora in loras if lora[3] in usual]
    return kept, [f"{path} also holds weights of the adapters {dropped}, which are left out, as PEFT does"]


# Modules


def _modules(
    path: Path, config: Mapping[str, Any], file: TensorFile, keys: _Keys, layout: BaseLayers | None, notes: list[str]
) -> dict[str, str]:
    """Gives the modules of the base that the LoRAs change, with the names that these have in the weights.

    Raises:
        AdapterError: if one changes something else than a linear layer, or nothing in this base.
    """
    for module, pair in keys.pairs.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(f"{path} has only lora_{next(iter(pair))} for {module}; expected both lora_A and lora_B")
    if layout is not None and _needs_peft(config, layout) and layout.skeleton is not None:
        found, untargeted = _placed_by_peft(path, config, file, keys, layout)
    else:
        found, untargeted = _placed_by_name(path, config, keys, layout)
    if not found:
        raise AdapterError(
            f"{path}: its settings target none of the {len(keys.pairs)} modules in its weights, such as "
            f"{next(iter(keys.pairs))}: {_targets(config)}"
        )
    if untargeted:
        notes.append(
            f"{path}: {len(untargeted)} of the {len(keys.pairs)} modules in its weights, such as {untargeted[0]}, are "
            f"not applied, as in PEFT: its settings leave them out ({_targets(config)})"
        )
    return found


def _needs_peft(config: Mapping[str, Any], layout: BaseLayers) -> bool:
    target = config.get("target_modules")
    is_broad = target is None or (isinstance(target, str) and target.lower() == ALL_LINEAR)
    return is_broad or layout.is_renamed or bool(config.get("ensure_weight_tying") or config.get("target_parameters"))


def _placed_by_peft(
    path: Path, config: Mapping[str, Any], file: TensorFile, keys: _Keys, layout: BaseLayers
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
    found = {new: old for old, new in (*placed.placed.items(), *linear.items())}
    untargeted = []
    for module in keys.pairs:
        if module in placed.placed or module in linear:
            continue
        name = placed.renamed.get(module, module)
        moved = _in_text_model(name, layout) or name
        if name in layout.modules or not any(_is_targeted(config, one) for one in {module, name, moved}):
            untargeted.append(module)
        elif moved in found:
            raise AdapterError(_two_for_one(path, found[moved], module, moved))
        else:
            found[moved] = module  # if the base lacks it, it is refused with the others
    return found, untargeted


def _placed_by_name(
    path: Path, config: Mapping[str, Any], keys: _Keys, layout: BaseLayers | None
) -> tuple[dict[str, str], list[str]]:
    found: dict[str, str] = {}
    untargeted = []
    for module in keys.pairs:
        name = module
        if layout is not None and module not in layout.modules:
            name = _in_text_model(module, layout) or module
        if not any(_is_targeted(config, one) for one in {module, name}):
            untargeted.append(module)
        elif name in found:
            raise AdapterError(_two_for_one(path, found[name], module, name))
        else:
            found[name] = module
    return found, untargeted


def _two_for_one(path: Path, first: str, second: str, module: str) -> str:
    return f"{path}: {first} and {second} would both change {module} of the base model; keep one of them"


def _is_parameter(config: Mapping[str, Any], module: str) -> bool:
    """Whether the weight of a module of this name is one of the `target_parameters`."""
    return f".{module}.weight".endswith(tuple(f".{name}" for name in config.get("target_parameters") or ()))


def _is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT applies a LoRA to a module of this name; "all-linear" is any linear layer."""
    if _is_parameter(config, module):
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


def _targets(config: Mapping[str, Any]) -> str:
    keys = (
        *("target_modules", "target_parameters", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "modules_to_save"),
    )
    return ", ".join(f"{key}={config[key]!r}" for key in keys if _is_set(config.get(key)))


def _in_text_model(name: str, layout: BaseLayers) -> str | None:
    """The name in the base's decoder of a layer that is called otherwise in another class of the same family."""
    parts = name.split(".")
    for cut in range(len(parts)):
        if cut and parts[cut - 1] not in _TEXT_PARTS:
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


def _entry(path: Path, config: Mapping[str, Any], file: TensorFile, module: str, pair: Mapping[str, str]) -> LoraEntry:
    a, b = file.tensors[pair["A"]].shape, file.tensors[pair["B"]].shape
    # PEFT looks a LoRA of a parameter up by the parameter's name.
    name = f"{module}.weight" if _is_parameter(config, module) else module
    rank = _for_module(config.get("rank_pattern") or {}, name, config.get("r", 8))
    alpha = _for_module(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise AdapterError(
            f"{path}: its config says rank {rank!r} and alpha {alpha!r} for {module}; "
            f"expected a whole number of at least 1 and a number"
        )
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
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraEntry(key_a=pair["A"], key_b=pair["B"], rank=rank, d_in=a[1], d_out=b[0], scaling=scaling)


def _for_module(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    # PEFT's own rule (get_pattern_key): the first key that is a regular expression for the end of the module path.
    key = next((key for key in pattern if _matches(key, module)), None)
    return pattern.get(module, default) if key is None else pattern[key]


def _matches(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _patterns_without_match(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
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


# Tensors beside the LoRAs of linear layers


def _check_extras(
    path: Path, config: Mapping[str, Any], file: TensorFile, keys: _Keys, layout: BaseLayers | None, notes: list[str]
) -> None:
    # An embedding's delta is zero if either half is.
    idle = {module for key, module, kind in keys.extras if kind.startswith("embedding") and file.is_zero(key)}
    for key, module, kind in keys.extras:
        if not _is_targeted(config, module) or file.is_zero(key) or (kind.startswith("embedding") and module in idle):
            notes.append(f"{path}: {key!r} changes nothing and is left out")
            continue
        start = f"{path} cannot be fused exactly: it holds {key!r}; expected only lora_A and lora_B of linear layers"
        if kind.startswith("magnitude_vector"):
            raise AdapterError(f"{start}: {_REASONS['use_dora']}")
        if kind.endswith(".bias"):
            raise AdapterError(f"{start}: it has a trained bias on B (lora_bias); retrain with lora_bias=False")
        if kind.startswith("embedding"):
            raise AdapterError(
                f"{start}: it adapts the token embeddings ({module}); retrain with target_modules without them"
            )
        raise AdapterError(start)


def _base_copies(
    path: Path,
    config: Mapping[str, Any],
    file: TensorFile,
    others: Mapping[str, str],
    layout: BaseLayers | None,
    notes: list[str],
) -> dict[str, BaseCopy]:
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
    """The one weight of the base that ends as a name does, which another version of the model has elsewhere."""
    parts = name.split(".")
    for cut in range(1, len(parts) - 1):
        if parts[cut - 1] not in _TEXT_PARTS:
            return None
        rest = ".".join(parts[cut:])
        if found := [one for one in parameters if one == rest or one.endswith(f".{rest}")]:
            return found[0] if len(found) == 1 else None
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
            f"{path} holds a copy of the base model's {name} that differs from the base model's own; "
            f"it was trained on another base ({base_model_of(config)}), or changed that weight"
        )
    return BaseCopy(key=key, reason=reason, is_trained=is_trained)


def _check_presence(
    path: Path, config: Mapping[str, Any], copies: Mapping[str, BaseCopy], layout: BaseLayers | None
) -> None:
    """Refuses what was trained beside the LoRAs and is not in the folder."""
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
    if _is_set(tokens) and not any(copy.rows is not None for copy in copies.values()):
        raise AdapterError(
            f"{path} cannot be fused exactly: trainable_token_indices={tokens!r}: it changes token embeddings, but "
            f"their weights are not in the folder"
        )
