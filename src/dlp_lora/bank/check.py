"""What would be refused and why: adapter folders against a base model, and a fixed mixture written as one adapter."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import (
    CONFIG_FILE,
    find_adapters,
    read_adapter,
)
from dlp_lora.bank.stored_layout import layout_of
from dlp_lora.errors import DLPLoRAError, ModelError
from dlp_lora.files import name_of


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
    """Maps the linear layers of a base model to their (d_in, d_out), without its weights.

    The headers of its files say them, or else the model is built without weights from its config.

    Raises:
        ModelError: if there is no such model.
    """
    if (stored := layout_of(model)) is not None:
        return dict(stored.layers)
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
