"""The layout of a base model: which linear layers are alike, and so the places of an adapter's LoRAs.

Layers that read one input are siblings (q, k and v of one layer); sets of siblings that differ only in the number of
their layer are a family. An adapter is stacked family by family, so that a switch is a handful of large copies.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dlp_lora.bank.adapter_modules import check_shapes
from dlp_lora.bank.peft_format import Adapter


class Place(NamedTuple):
    """The place of LoRAs: the number of a family, and of the sibling in it."""

    family: int
    sibling: int


class Family(NamedTuple):
    """Sets of siblings that are alike in every layer: `modules[s][i]` is the name of sibling `s` in layer `i`."""

    modules: tuple[tuple[str, ...], ...]
    d_in: int
    d_outs: tuple[int, ...]


@dataclass(frozen=True)
class StackedLora:
    """One adapter's LoRAs at one place, stacked over the layers. B already carries alpha / r."""

    a: Float[Tensor, "layers rank d_in"]
    b: Float[Tensor, "layers rank d_out"]

    @property
    def rank(self) -> int:
        """The largest rank among the layers; lower ones are padded with zero rows, which add nothing."""
        return self.a.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.a.nbytes + self.b.nbytes


class Layout:
    """The linear layers of a base model by family, and the dtype and device of adapters for them.

    `shapes` maps each linear layer to its (d_in, d_out), in the order of the model; `siblings` lists those that read
    one input.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        siblings: Sequence[tuple[str, ...]] = (),
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.families = _families(shapes, siblings)
        self._shapes = shapes
        self._sites = {
            module: (Place(f, s), layer)
            for f, family in enumerate(self.families)
            for s, modules in enumerate(family.modules)
            for layer, module in enumerate(modules)
        }

    def check(self, adapter: Adapter) -> None:
        """Checks that an adapter fits.

        Raises:
            AdapterError: if it does not.
        """
        shapes = {module: (lora.a.shape[1], lora.b.shape[0]) for module, lora in adapter.modules.items()}
        check_shapes(adapter.path, shapes, self._shapes, adapter.base_model)

    def ranks(self, adapter: Adapter) -> dict[Place, int]:
        """The rank of an adapter at each place that it changes."""
        return {
            place: max(adapter.modules[module].rank for module in layers.values())
            for place, layers in self._places(adapter).items()
        }

    def stack(self, adapter: Adapter) -> dict[Place, StackedLora]:
        """Stacks an adapter's weights over the layers, place by place."""
        return {place: self._stack(adapter, place, layers) for place, layers in self._places(adapter).items()}

    def _stack(self, adapter: Adapter, place: Place, layers: Mapping[int, str]) -> StackedLora:
        family = self.families[place.family]
        rank = max(adapter.modules[module].rank for module in layers.values())
        num_layers, d_out = len(family.modules[0]), family.d_outs[place.sibling]
        a = torch.zeros(num_layers, rank, family.d_in, dtype=self.dtype, device=self.device)
        b = torch.zeros(num_layers, rank, d_out, dtype=self.dtype, device=self.device)
        for layer, module in layers.items():
            lora = adapter.modules[module]
            a[layer, : lora.rank] = lora.a
            b[layer, : lora.rank] = lora.b.float().T * lora.scaling
        return StackedLora(a, b)

    def _places(self, adapter: Adapter) -> dict[Place, dict[int, str]]:
        """The modules that the adapter changes: by place, then layer."""
        places: dict[Place, dict[int, str]] = {}
        for module in adapter.modules:
            place, layer = self._sites[module]
            places.setdefault(place, {})[layer] = module
        return places


def _families(shapes: Mapping[str, tuple[int, int]], siblings: Sequence[tuple[str, ...]]) -> list[Family]:
    siblings_of = {name: names for names in siblings for name in names}
    # By the siblings' names without numbers, and their shapes.
    sets: dict[tuple[tuple[str, tuple[int, int]], ...], list[tuple[str, ...]]] = {}
    for names in dict.fromkeys(siblings_of.get(module, (module,)) for module in shapes):
        sets.setdefault(tuple((re.sub(r"\d+", "*", name), shapes[name]) for name in names), []).append(names)
    return [
        Family(tuple(zip(*names, strict=True)), kinds[0][1][0], tuple(d_out for _, (_, d_out) in kinds))
        for kinds, names in sets.items()
    ]
