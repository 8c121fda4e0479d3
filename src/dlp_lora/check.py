"""What would be refused and why: adapter folders against a base model, and a fixed mixture written as one adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dlp_lora.bank import AdapterBank
from dlp_lora.errors import AdapterError, DLPLoRAError, ModelError
from dlp_lora.folders import name_of, replace_folder
from dlp_lora.fused import linear_layers
from dlp_lora.peft_format import CONFIG_FILE, FILES, Adapter, LoraWeights, find_adapters, read_adapter, write_adapter
from dlp_lora.policy import Mixture


@dataclass(frozen=True, kw_only=True)
class Check:
    """Whether one adapter folder can be fused into a base model; `reason` says why not."""

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


def model_layout(model: str | Path) -> dict[str, tuple[int, int]]:
    """Maps the linear layers of a base model to their (d_in, d_out), from its config alone: no weights are read.

    Raises:
        ModelError: if there is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(str(model))
        with torch.device("meta"):
            return linear_layers(AutoModelForCausalLM.from_config(config))
    except (OSError, ValueError) as error:
        raise ModelError(f"the base model {str(model)!r} cannot be read: {str(error).splitlines()[0]}") from error


def check_adapters(layout: Mapping[str, tuple[int, int]], adapters: str | Path | Mapping[str, Path]) -> list[Check]:
    """Checks each adapter folder on its own; a folder that is itself an adapter is checked as one."""
    if not isinstance(adapters, Mapping):
        single = (Path(adapters) / CONFIG_FILE).is_file()
        adapters = {name_of(adapters): Path(adapters)} if single else find_adapters(adapters)
    return [_check(layout, name, Path(path)) for name, path in adapters.items()]


def export_mixture(bank: AdapterBank, mixture: Mapping[str, float], path: str | Path) -> None:
    """Writes a fixed mixture as one ordinary PEFT adapter folder, exactly: the ranks are concatenated.

    It reads the adapters' folders again: the bank holds their weights in its own dtype.

    Raises:
        AdapterError: if the bank holds no adapter of a name, its folder no longer holds what was added or is `path`,
            or the mixture is empty.
    """
    mixture = Mixture(mixture)
    unknown = set(mixture) - set(bank.names)
    if unknown or not mixture:
        what = f"no adapter {', '.join(sorted(unknown))}" if unknown else "the mixture is empty"
        raise AdapterError(f"{what}; there are {', '.join(sorted(bank.names))}")
    for name, adapter in bank.adapters.items():
        if adapter.path.resolve() == Path(path).resolve():
            raise AdapterError(
                f"{path} is the folder of the adapter {name!r}, which would be lost; write somewhere else"
            )
    for name in mixture:
        bank.check_files(name)
    parts = [(read_adapter(bank.adapters[name].path, name), weight) for name, weight in mixture.items()]
    modules = {module: _concatenated(parts, module) for adapter, _ in parts for module in adapter.modules}
    bases = {adapter.base_model for adapter, _ in parts}
    with replace_folder(path, own=FILES) as folder:
        write_adapter(
            folder,
            modules,
            base_model=next(iter(bases)) if len(bases) == 1 else None,
            rank=max(lora.rank for lora in modules.values()),
        )


def _concatenated(parts: list[tuple[Adapter, float]], module: str) -> LoraWeights:
    here = [(adapter.modules[module], weight) for adapter, weight in parts if module in adapter.modules]
    return LoraWeights(
        a=torch.cat([lora.a.float() for lora, _ in here], dim=0),
        b=torch.cat([lora.b.float() * (lora.scaling * weight) for lora, weight in here], dim=1),
        scaling=1.0,
    )


def _check(layout: Mapping[str, tuple[int, int]], name: str, path: Path) -> Check:
    try:
        adapter = read_adapter(path, name)
        AdapterBank(layout, [adapter], device="meta")
    except DLPLoRAError as error:
        return Check(name=name, path=path, fits=False, reason=str(error))
    return Check(
        name=name,
        path=path,
        fits=True,
        rank=max(lora.rank for lora in adapter.modules.values()),
        targets=tuple(sorted({module.rsplit(".", 1)[-1] for module in adapter.modules})),
        base_model=adapter.base_model,
    )
