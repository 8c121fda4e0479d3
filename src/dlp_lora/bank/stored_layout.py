"""The layout of a base model in a folder, from the headers of its files: fast, and without torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# Types whose files name their weights as the model names its layers: a test compares each with the model itself.
TYPES = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo", "olmo2", "phi3"),
        *("qwen2", "qwen3", "smollm3", "stablelm"),
    }
)
_LINEAR = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj|lm_head)\.weight")
_EMBEDDING = "model.embed_tokens.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class StoredLayout:
    """The linear layers of a model with their (d_in, d_out), and the shapes of all its weights, by name."""

    layers: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, tuple[int, ...]]


def layout_of(folder: str | Path) -> StoredLayout | None:
    """Reads the layout of the causal language model in a folder of safetensors; None if the headers are not enough.

    They are not enough if the folder has other files, if the model is quantised or brings code, or if the files of its
    type have other names for weights than the model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not _is_plain(config):
            return None
        headers = {name: header for file in _weight_files(folder) for name, header in _headers(file).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None  # transformers raises the error
    parameters = {name: shape for name, (shape, _) in headers.items()}
    if _EMBEDDING not in parameters or any(dtype not in _FLOATS for _, dtype in headers.values()):
        return None
    parameters.setdefault("lm_head.weight", parameters[_EMBEDDING])  # a tied head is not stored
    matrices = {name: shape for name, shape in parameters.items() if len(shape) > 1 and name != _EMBEDDING}
    if not all(_LINEAR.fullmatch(name) and len(shape) == 2 for name, shape in matrices.items()):
        return None
    layers = {name.removesuffix(".weight"): (shape[1], shape[0]) for name, shape in matrices.items()}
    return StoredLayout(layers=layers, parameters=parameters)


def stored_folder(
    source: str, *, commit: str | None = None, subfolder: str | None = None, cache_dir: str | Path | None = None
) -> Path | None:
    """Returns the folder of a model on this machine, for a hub id in the hub's cache; None if it is not here."""
    if Path(source).is_dir():
        return Path(source, subfolder or "")
    from huggingface_hub import try_to_load_from_cache

    try:
        name = Path(subfolder or "", "config.json").as_posix()
        file = try_to_load_from_cache(source, name, cache_dir=cache_dir, revision=commit)
    except ValueError:  # no id of a repository
        return None
    return Path(file).parent if isinstance(file, str) else None


def _is_plain(config: Mapping[str, Any]) -> bool:
    (architecture,) = config["architectures"]
    is_known = config["model_type"] in TYPES and architecture.endswith("ForCausalLM")
    return is_known and not config.get("quantization_config") and not config.get("auto_map")


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: one, or those that the index names."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with safe_open(file, framework="np") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
