"""The keys of an adapter's weights file: the LoRAs of each module, without the prefixes of training tools."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.tensor_file import TensorFile
from dlp_lora.errors import AdapterError

# Modules that training tools put around a model or its layers.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<kind>[^.]+)(?:\.(?P<rest>.+))?")


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of a weights file by kind; the modules' names are without wrappers."""

    pairs: dict[str, dict[str, str]]  # lora_A and lora_B by module and half
    extras: list[tuple[str, str, str]]  # (key, module, kind) of other lora tensors
    others: dict[str, str]  # all others: key by name
    notes: list[str]


def sorted_keys(path: Path, file: TensorFile, layout: BaseLayers | None) -> Keys:
    """Sorts the keys of a weights file by kind.

    Raises:
        AdapterError: if there is no LoRA of a linear layer, two for one module, or only those of several adapters.
    """
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
    return Keys(pairs=pairs, extras=extras, others=others, notes=notes)


def _no_pairs(path: Path, file: TensorFile, extras: Iterable[tuple[str, str, str]]) -> str:
    if any("lora_embedding" in f"lora_{kind}" for _, _, kind in extras):
        first = next(key for key, _, kind in extras if kind.startswith("embedding"))
        return f"{path} cannot be fused exactly: it holds {first!r}; expected only lora_A and lora_B of linear layers"
    if any(re.search(r"lora_(up|down)\.", key) for key in file.tensors):
        return f"{path} holds lora_up and lora_down, as kohya's scripts write them; convert it to a PEFT adapter"
    if any(re.search(r"\.lora_[ab]$", key) for key in file.tensors):
        return f"{path} holds lora_a and lora_b, as mlx writes them; convert it to a PEFT adapter"
    example = f"; it holds {next(iter(file.tensors))!r} and the like" if file.tensors else ""
    return f"{path} holds no weights; expected lora_A and lora_B tensors{example}"


def _without_wrappers(key: str, segments: frozenset[str]) -> str:
    """Removes the parts of tools and of PEFT from a key, unless the base has them in its names (`segments`)."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS or part in segments]
    if "base_model" not in segments:  # PEFT's prefix, even if it is repeated or follows another prefix
        for i in range(len(parts) - 2, -1, -1):
            if parts[i : i + 2] == ["base_model", "model"]:
                parts = parts[i + 2 :]
                break
    while parts[0] == "module" and "module" not in segments and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def _split_rest(rest: str | None) -> tuple[str | None, str]:
    """Splits the part of a key after lora_A: the adapter's name, if it is there, and the attribute."""
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
            f"separate folder"
        )
    dropped = ", ".join(sorted(str(name) for name in named - usual))
    kept = [lora for lora in loras if lora[3] in usual]
    return kept, [f"{path} also holds weights of the adapters {dropped}, which are left out, as PEFT does"]
