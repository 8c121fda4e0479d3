"""The adapter bank: N adapters stacked over the layers of a model; mixtures in, one fused low-rank pair out
(section 3.3, Eq. 6).

A mixture of R adapters of rank r is one LoRA of rank R*r: their A's lie side by side along the rank axis, so do
their B's, and the weights go into B. A sentence pays once for the choice, and each token pays two matmuls however
many adapters the bank holds. Where rows of a batch differ, the pair holds the union of their adapters and a gate
of shape (batch, 1, rank) weighs the low-rank activations row by row.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dlp_lora.errors import AdapterError
from dlp_lora.peft_format import Adapter
from dlp_lora.policy import Mixture

# Buffers start at the rank of the whole bank, but no larger than this; a wider mixture doubles them.
START_CAPACITY = 512


@dataclass(frozen=True)
class Block:
    """One adapter's LoRAs in modules that are alike in every layer. B already carries alpha / r."""

    a: Float[Tensor, "layers rank d_in"]
    b: Float[Tensor, "layers rank d_out"]

    @property
    def rank(self) -> int:
        """The largest rank among the layers; lower ones are padded with zero rows, which add nothing."""
        return self.a.shape[1]


class FusedPair:
    """The fused A and B of one module in every layer, in buffers that stay where they are.

    `active` is None while the mixture does not touch these modules, else one (A transposed, B) pair of views a
    layer, of shapes (d_in, rank) and (rank, d_out); `gate` is None while all rows share one mixture.
    """

    def __init__(self, *, num_layers: int, d_in: int, d_out: int, dtype: torch.dtype, device: torch.device) -> None:
        self._a = torch.empty(num_layers, 0, d_in, dtype=dtype, device=device)
        self._b = torch.empty(num_layers, 0, d_out, dtype=dtype, device=device)
        self._views: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.active: list[tuple[Tensor, Tensor]] | None = None
        self.gate: Float[Tensor, "batch 1 rank"] | None = None
        self.num_allocations = 0

    @property
    def capacity(self) -> int:
        """How much rank the buffers hold."""
        return self._a.shape[1]

    def reserve(self, rank: int) -> None:
        """Makes room for mixtures of this rank."""
        if rank <= self.capacity:
            return
        self._a = self._a.new_empty(self._a.shape[0], rank, self._a.shape[2])
        self._b = self._b.new_empty(self._b.shape[0], rank, self._b.shape[2])
        self._views.clear()
        self.num_allocations += 1

    def write(self, blocks: Sequence[Block], weights: Sequence[float], gate: Tensor | None) -> None:
        """Lays the blocks side by side, B times its weight, and makes them the active pair."""
        rank = sum(block.rank for block in blocks)
        if rank > self.capacity:
            self.reserve(max(rank, 2 * self.capacity))
        start = 0
        for block, weight in zip(blocks, weights, strict=True):
            end = start + block.rank
            self._a[:, start:end].copy_(block.a)
            torch.mul(block.b, weight, out=self._b[:, start:end])
            start = end
        self.gate = gate
        self.active = self._view(rank)

    def clear(self) -> None:
        """Leaves the base layer alone."""
        self.active = self.gate = None

    def _view(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        if rank not in self._views:
            layers = range(self._a.shape[0])
            self._views[rank] = [(self._a[i, :rank].T, self._b[i, :rank]) for i in layers]
        return self._views[rank]


@dataclass(frozen=True)
class Stack:
    """The modules that are alike in every layer, such as all q_proj, and what is fused for them now."""

    modules: tuple[str, ...]
    shape: tuple[int, int]  # (d_in, d_out)
    pair: FusedPair


class AdapterBank:
    """N adapters for one base model, ready to be fused in any mixture.

    `layout` maps each linear layer of the base model to its (d_in, d_out); `fused.linear_layers` reads it.

    Raises:
        AdapterError: if an adapter does not fit the layout, or two adapters have one name.
    """

    def __init__(
        self,
        layout: Mapping[str, tuple[int, int]],
        adapters: Iterable[Adapter] = (),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._layout = dict(layout)
        self._dtype = dtype
        self._device = torch.device(device)
        self._blocks: dict[str, dict[int, Block]] = {}
        self.adapters: dict[str, Adapter] = {}
        self.stacks = [
            Stack(
                modules,
                shape,
                FusedPair(num_layers=len(modules), d_in=shape[0], d_out=shape[1], dtype=dtype, device=self._device),
            )
            for modules, shape in _alike(self._layout)
        ]
        self._site = {module: (s, i) for s, stack in enumerate(self.stacks) for i, module in enumerate(stack.modules)}
        self._fused: tuple[Mixture, ...] | None = None
        for adapter in adapters:
            self.add(adapter)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order they were added."""
        return tuple(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, adapter: Adapter) -> None:
        """Adds one adapter; mixtures may use it from the next `fuse` on."""
        if adapter.name in self._blocks:
            raise AdapterError(f"two adapters are named {adapter.name!r} (the second: {adapter.path}); rename one")
        self._check(adapter)
        touched: dict[int, dict[int, str]] = {}
        for module in adapter.modules:
            stack, layer = self._site[module]
            touched.setdefault(stack, {})[layer] = module
        self._blocks[adapter.name] = {s: self._block(adapter, self.stacks[s], layers) for s, layers in touched.items()}
        self.adapters[adapter.name] = adapter
        for s in touched:
            self.stacks[s].pair.reserve(min(START_CAPACITY, sum(b[s].rank for b in self._blocks.values() if s in b)))

    def remove(self, name: str) -> None:
        """Removes one adapter; what is fused now stays as it is until the next `fuse`."""
        self._known(name)
        del self._blocks[name], self.adapters[name]
        self._fused = None

    def touched(self) -> set[str]:
        """The modules that at least one adapter changes."""
        stacks = {s for blocks in self._blocks.values() for s in blocks}
        return {module for s in stacks for module in self.stacks[s].modules}

    def fuse(self, mixtures: Sequence[Mixture]) -> None:
        """Fuses one mixture for the whole batch, or one a row, into every stack's pair.

        Raises:
            AdapterError: if a mixture names an adapter that the bank does not hold.
        """
        rows = tuple(mixtures) if len(set(mixtures)) > 1 else tuple(mixtures[:1])
        if rows == self._fused:
            return
        for row in rows:
            for name in row:
                self._known(name)
        union = [name for name in self._blocks if any(name in row for row in rows)]
        self._fused = None  # what breaks off half-way must be fused anew
        for s, stack in enumerate(self.stacks):
            here = [name for name in union if s in self._blocks[name]]
            if not here:
                stack.pair.clear()
                continue
            blocks = [self._blocks[name][s] for name in here]
            if len(rows) == 1:
                stack.pair.write(blocks, [rows[0][name] for name in here], None)
            else:
                stack.pair.write(blocks, [1.0] * len(here), self._gate(rows, here, blocks))
        self._fused = rows

    def clear(self) -> None:
        """Fuses nothing: the base model."""
        self.fuse([Mixture()])

    def _gate(self, rows: Sequence[Mixture], names: Sequence[str], blocks: Sequence[Block]) -> Tensor:
        weights = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows], dtype=torch.float32)
        ranks = torch.tensor([block.rank for block in blocks])
        return weights.repeat_interleave(ranks, dim=1)[:, None].to(self._device, self._dtype)

    def _block(self, adapter: Adapter, stack: Stack, layers: Mapping[int, str]) -> Block:
        rank = max(adapter.modules[module].rank for module in layers.values())
        d_in, d_out = stack.shape
        a = torch.zeros(len(stack.modules), rank, d_in, dtype=self._dtype, device=self._device)
        b = torch.zeros(len(stack.modules), rank, d_out, dtype=self._dtype, device=self._device)
        for layer, module in layers.items():
            lora = adapter.modules[module]
            a[layer, : lora.rank] = lora.a
            b[layer, : lora.rank] = lora.b.float().T * lora.scaling
        return Block(a, b)

    def _check(self, adapter: Adapter) -> None:
        unknown = [module for module in adapter.modules if module not in self._layout]
        if unknown:
            matched = len(adapter.modules) - len(unknown)
            raise AdapterError(
                f"{adapter.path}: {matched} of its {len(adapter.modules)} modules are linear layers of the base "
                f"model; {unknown[0]} is not. It was trained on another architecture ({adapter.base_model})"
            )
        for module, lora in adapter.modules.items():
            found = (lora.a.shape[1], lora.b.shape[0])
            if found != self._layout[module]:
                raise AdapterError(
                    f"{adapter.path}: {module} maps {found[0]} to {found[1]} features, but the base model's maps "
                    f"{self._layout[module][0]} to {self._layout[module][1]}; it was trained on another base "
                    f"({adapter.base_model})"
                )

    def _known(self, name: str) -> None:
        if name not in self._blocks:
            raise AdapterError(f"no adapter {name!r}; there are {', '.join(sorted(self._blocks)) or 'none'}")


def _alike(layout: Mapping[str, tuple[int, int]]) -> list[tuple[tuple[str, ...], tuple[int, int]]]:
    alike: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for module, shape in layout.items():
        alike.setdefault((re.sub(r"\d+", "*", module), shape), []).append(module)
    return [(tuple(modules), shape) for (_, shape), modules in alike.items()]
