"""Export: a fixed mixture written as one ordinary PEFT adapter."""

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch

from dlp_lora.bank.adapter_files import FILES
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import Adapter, LoraWeights, write_adapter
from dlp_lora.errors import AdapterError
from dlp_lora.files import replace_folder
from dlp_lora.policy import Mixture


def export_mixture(bank: AdapterBank, mixture: Mapping[str, float], path: str | Path) -> None:
    """Writes a fixed mixture as one ordinary PEFT adapter folder, exactly: the ranks are concatenated.

    It reads the adapters' folders again, because the bank has their weights in another dtype.

    Raises:
        AdapterError: if the bank has no adapter of a name, its folder has changed or is `path`, or the mixture is
            empty.
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
        bank.store.check_files(name)
    parts = [(bank.adapters[name].with_weights(), weight) for name, weight in mixture.items()]
    modules = concatenated(parts, dtype=torch.float32)
    bases = {adapter.base_model for adapter, _ in parts}
    with replace_folder(path, own=FILES) as folder:
        write_adapter(
            folder,
            modules,
            base_model=next(iter(bases)) if len(bases) == 1 else None,
            rank=max(lora.rank for lora in modules.values()),
        )


def concatenated(parts: Sequence[tuple[Adapter, float]], *, dtype: torch.dtype | None = None) -> dict[str, LoraWeights]:
    """Turns a mixture of adapters into one LoRA per module, whose rank is the sum of theirs.

    Scaling and weights are folded into B in float32. By default the result has the widest type of its parts.
    """
    modules = dict.fromkeys(module for adapter, _ in parts for module in adapter.modules)
    return {module: _concatenated(parts, module, dtype) for module in modules}


def _concatenated(parts: Sequence[tuple[Adapter, float]], module: str, dtype: torch.dtype | None) -> LoraWeights:
    here = [(adapter.modules[module], weight) for adapter, weight in parts if module in adapter.modules]
    if dtype is None:
        dtypes = [tensor.dtype for lora, _ in here for tensor in (lora.a, lora.b)]
        # Types of 8 bits are for storage alone.
        dtype = reduce(torch.promote_types, [torch.float32 if d.itemsize == 1 else d for d in dtypes])
    return LoraWeights(
        a=torch.cat([lora.a.to(dtype) for lora, _ in here], dim=0),
        b=torch.cat([(lora.b.float() * (lora.scaling * weight)).to(dtype) for lora, weight in here], dim=1),
        scaling=1.0,
    )
