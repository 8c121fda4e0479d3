"""A model's fingerprint, from a few bytes of its files: it distinguishes models in less than a second."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NUM_TENSORS = 512  # of which some values are read, at most
NUM_BYTES = 64  # of each
NUM_RANGES = 64  # of a GGUF file
# Settings of config.json that identify a model, if they are there.
SETTINGS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    *("rope_theta", "rope_parameters", "rope_scaling", "sliding_window", "tie_word_embeddings"),
    *("n_embd", "n_layer", "n_head", "n_inner", "num_experts", "num_local_experts", "num_experts_per_tok"),
)


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Identifies a model: settings of its config, and hashes of its tensors' names and shapes and of a fixed sample of
    their stored values.
    """

    config: Mapping[str, Any]
    tensors: str
    values: str

    @classmethod
    def of(cls, folder: Path) -> "Fingerprint | None":
        """Takes the fingerprint of a folder of safetensors, or of one GGUF file; None if it has neither."""
        try:
            config = _config(folder)
            if files := _safetensors(folder):
                return cls(config=config, **_of_safetensors(files))
            (file,) = folder.glob("*.gguf")
            return cls(config=config, **_of_gguf(file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # transformers says what is wrong with it

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Fingerprint":
        """Reads the data of `to_dict`."""
        return cls(config=dict(data["config"]), tensors=str(data["tensors"]), values=str(data["values"]))

    def to_dict(self) -> dict[str, Any]:
        """Gives it as JSON data."""
        return asdict(self)

    def differences(self, other: "Fingerprint") -> list[str]:
        """Lists the differences between another model and this one."""
        both = [key for key in self.config if key in other.config]
        changes = [
            f"its {key} is {other.config[key]!r}, not {self.config[key]!r}"
            for key in both
            if other.config[key] != self.config[key]
        ]
        if other.tensors != self.tensors:
            return [*changes, "its tensors have other names or shapes"]
        return [*changes, *(["its weights are others, or stored otherwise"] if other.values != self.values else [])]


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    text = config.get("text_config")  # of a multimodal model
    config = {**config, **(text if isinstance(text, dict) else {})}
    return {key: config[key] for key in SETTINGS if config.get(key) is not None}


def _safetensors(folder: Path) -> list[Path]:
    """The files that transformers reads: one, or those that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    named = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()
    return [folder / name for name in sorted(set(named))]


def _of_safetensors(files: list[Path]) -> dict[str, str]:
    places: dict[str, tuple[Path, int, Any]] = {}
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        places |= {name: (file, 8 + length, entry) for name, entry in header.items()}
    names = sorted(places)
    tensors = _hash(f"{name} {places[name][2]['shape']}".encode() for name in names)
    return {"tensors": tensors, "values": _hash(_sample(places, names))}


def _sample(places: Mapping[str, tuple[Path, int, Any]], names: list[str]) -> Iterator[bytes]:
    some = names if len(names) <= NUM_TENSORS else [names[i * len(names) // NUM_TENSORS] for i in range(NUM_TENSORS)]
    for name in some:
        file, first, entry = places[name]
        begin, end = entry["data_offsets"]
        with file.open("rb") as opened:
            opened.seek(first + begin + (end - begin) // 3)
            yield entry["dtype"].encode() + opened.read(min(NUM_BYTES, end - begin - (end - begin) // 3))


def _of_gguf(file: Path) -> dict[str, str]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        tensors = _hash([str(size).encode(), opened.read(2**16)])
        ranges = []
        for i in range(NUM_RANGES):
            opened.seek(size * i // NUM_RANGES)
            ranges.append(opened.read(NUM_BYTES))
    return {"tensors": tensors, "values": _hash(ranges)}


def _hash(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]
