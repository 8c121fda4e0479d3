"""Checks of adapter folders, with or without a base model: which are refused, and why."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dlp_lora.bank.adapter_config import other_base
from dlp_lora.bank.adapter_files import CONFIG_FILE, find_adapters
from dlp_lora.bank.adapter_folder import AdapterFolder, check_numbers, read_folder
from dlp_lora.bank.base_layers import BaseLayers, Module, Tensor
from dlp_lora.bank.stored_layout import layout_of, stored_folder
from dlp_lora.bank.tokens import BaseTokens, foreign_tokens
from dlp_lora.errors import AdapterError, DLPLoRAError, ModelError, reason_of
from dlp_lora.files import name_of
from dlp_lora.hub import Hub, is_repo_id

FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""All files of a base model but its weights: its structure and its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Whether one adapter folder can be fused into a base model.

    `reason` is the reason for a refusal; for an adapter that fits, it has the warnings.
    """

    name: str
    path: Path
    fits: bool
    reason: str = ""
    rank: int = 0
    targets: tuple[str, ...] = ()
    base_model: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Gives the check as JSON data."""
        return {**self.__dict__, "path": str(self.path)}


def model_layout(
    model: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    trust_remote_code: bool = False,
    hub: Hub = Hub(),  # noqa: B008  # frozen
) -> BaseLayers:
    """Maps the linear layers of a base model to their (d_in, d_out), without its weights.

    They come from the headers of its files. If these are not enough, also for an adapter, the model is built from its
    config without weights. Weights are read only if an adapter's folder has copies of them.

    Args:
        model: a path or hub id; its weights are not downloaded.
        revision: the branch, tag or commit of a hub id.
        subfolder: the folder inside the path or repository.
        trust_remote_code: runs the code that the model brings, if the model is built.
        hub: the access to the hub.

    Raises:
        ModelError: if there is no such model.
    """
    source, place = str(model), str(model)  # only transformers knows ids without an owner
    if is_repo_id(source) or revision is not None or subfolder:
        folder = hub.folder(source, files=FILES, error=ModelError, revision=revision, subfolder=subfolder)
        place = str(folder)
        source = place if Path(source).is_dir() else source
    known: dict[str, Any] = {"source": source, "folder": Path(place) if Path(place).is_dir() else None}
    if source != place:  # not its folder itself
        known |= {"revision": revision, "subfolder": subfolder}
    build = partial(_built, place, source=source, trust_remote_code=trust_remote_code)
    if (stored := layout_of(place)) is not None:
        tensor = _stored_weights(place, {"lm_head.weight": "model.embed_tokens.weight"})
        return BaseLayers(stored.layers, parameters=stored.parameters, build=build, tensor=tensor, **known)
    from dlp_lora.bank.attach import linear_layers

    skeleton = build()
    tied = getattr(skeleton, "all_tied_weights_keys", None) or {}
    tensor = _stored_weights(place, tied)
    return BaseLayers(linear_layers(skeleton), build=lambda: skeleton, tensor=tensor, **known)


def _built(place: str, *, source: str, trust_remote_code: bool) -> Module:
    """Builds a model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"the base model {source!r} cannot be read: {reason_of(error)}") from error


def check_adapters(
    layout: Mapping[str, tuple[int, int]] | None, adapters: str | Path | Mapping[str, Path]
) -> list[Check]:
    """Checks each adapter folder; a folder that is itself an adapter is checked alone.

    Without a `layout`, the checks against the base model are left out, and torch is not imported.
    """
    if not isinstance(adapters, Mapping):
        single = (Path(adapters) / CONFIG_FILE).is_file()
        adapters = {name_of(adapters): Path(adapters)} if single else find_adapters(adapters)
    layout = layout if isinstance(layout, BaseLayers) or layout is None else BaseLayers(layout)
    tokens = BaseTokens(str(layout.folder or layout.source) if layout is not None else "")
    return [_check(layout, tokens, name, Path(path)) for name, path in adapters.items()]


def check_fits(layout: BaseLayers, path: str | Path, name: str) -> None:
    """Checks one adapter folder.

    Raises:
        AdapterError: if it cannot be fused into the base model.
    """
    (check,) = check_adapters(layout, {name: Path(path)})
    if not check.fits:
        raise AdapterError(check.reason)


def _check(layout: BaseLayers | None, tokens: BaseTokens, name: str, path: Path) -> Check:
    try:
        folder = read_folder(path, name or None, layout=layout)
        notes = [*folder.notes, *check_numbers(folder), *_copies(folder, layout)]
        if layout is not None and (other := other_base(path, folder.config, layout.source)):
            notes.append(f"{other}; its shapes fit")
        notes += foreign_tokens(path, tokens)
    except DLPLoRAError as error:
        return Check(name=name, path=path, fits=False, reason=str(error))
    except Exception as error:  # a strange file in one folder must not stop the checks of the others
        return Check(name=name, path=path, fits=False, reason=f"{path} cannot be read: {type(error).__name__}: {error}")
    return Check(
        name=name,
        path=path,
        fits=True,
        reason="; ".join(notes),
        rank=max(lora.rank for lora in folder.loras.values()),
        targets=tuple(sorted({module.rsplit(".", 1)[-1] for module in folder.loras})),
        base_model=folder.base_model,
    )


def _copies(folder: AdapterFolder, layout: BaseLayers | None) -> Sequence[str]:
    """Compares copies of base weights with the base; returns warnings about those that cannot be compared.

    Raises:
        AdapterError: if one differs.
    """
    if not folder.base_copies:
        return []
    out_of_reach = [name for name in folder.base_copies if layout is None or layout.tensor(name) is None]
    for name in out_of_reach:
        if folder.base_copies[name].is_trained:
            raise AdapterError(
                f"{folder.base_copies[name].reason} (only the base model can show whether it was changed)"
            )
    if layout is not None:
        from dlp_lora.bank.peft_format import Adapter, check_base_copies

        check_base_copies(Adapter(folder.name, {}, folder.config, folder.path, folder.base_copies), layout.tensor)
    return [
        f"{folder.path} holds a copy of {name}, which is compared with the base when it is loaded"
        for name in out_of_reach
    ]


def _stored_weights(source: str, tied: Mapping[str, Any]) -> Callable[[str], Tensor | None]:
    """Returns the weights of a model on this machine, by name; tied weights under the name of the stored one."""

    def tensor(name: str) -> Tensor | None:
        from safetensors import safe_open

        folder = stored_folder(source)
        for one in (name, tied.get(name)) if folder is not None else ():
            file = _file_of(folder, one) if folder is not None and isinstance(one, str) else None
            if file is not None:
                with safe_open(file, framework="pt") as tensors:
                    weight: Tensor = tensors.get_tensor(one)
                    return weight
        return None

    return tensor


def _file_of(folder: Path, name: str) -> Path | None:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
            return folder / file if file is not None and (folder / file).is_file() else None
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="np") as tensors:
                if name in tensors.keys():  # noqa: SIM118
                    return Path(file)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    return None
