"""Groups: linear layers that read one input, alike in every layer of the model, and the pairs fused for them
(section 3.3, Eq. 6).

Blocks of adapters lie side by side along the rank axis in buffers that stay where they are. A of a stacked group lies
in one tensor under the base weights, `[W_q; W_k; W_v; A_q; A_v]`, so that one product gives the base projections and
the low-rank activations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple
from weakref import ref

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Bytes. A product of a vector can round by where in such a stretch its matrix begins (docs/log.md), and weights that
# are read from a file begin anywhere in it.
ALIGNMENT = 16
MAX_VIEWS = 32  # of the ranks that mixtures have; a compiled pass keeps its own


@dataclass(frozen=True)
class Block:
    """One adapter's LoRAs in modules that are alike in every layer. B already carries alpha / r."""

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


class LowRank(NamedTuple):
    """The fused pair of one module of one layer; `rows` is where its A lies among its group's."""

    a: Float[Tensor, "d_in rank"]
    b: Float[Tensor, "rank d_out"]
    rows: slice


class Prepacked(NamedTuple):
    """The base weights `[W_1; ...]` of one layer once more, in oneDNN's own layout, and A beside them."""

    weight: Tensor  # opaque
    bias: Float[Tensor, " d_outs"] | None
    a: Float[Tensor, "rank d_in"]


class Projection(NamedTuple):
    """One layer's stacked weight `[W_1; ...; A_1; ...]` and its bias. `sizes` cuts the product into the siblings' base
    projections and, where there is a pair, the low-rank activations of all; `pairs` are the siblings that have one,
    with the place of their activations among these, and their B.
    """

    weight: Float[Tensor, "rows d_in"]
    bias: Float[Tensor, " rows"] | None
    sizes: tuple[int, ...]
    pairs: tuple[tuple[int, slice, Float[Tensor, "rank d_out"]], ...]
    prepacked: Prepacked | None


class Group:
    """Linear layers that read one input, alike in every layer of the model, and what is fused for them now.

    `modules[s][i]` is the name of sibling `s` in layer `i`. `active` is None while the mixture touches none of them,
    else `active[s][i]` is a sibling's pair in a layer, None where it has none; `projections[i]` is the same for
    a layer whose weights are stacked. `gate` is None while all rows share one mixture; else it weighs the low-rank
    activations row by row, or token by token. Buffers stay where they are until a mixture does not fit in.

    A compiled pass must find tensors of one shape at one place, whatever the mixture. `write(..., batch=...)` gives it
    the ranks that `padded` says for each sibling, and a gate that is zero beyond the mixture.
    """

    def __init__(
        self,
        modules: Sequence[Sequence[str]],
        d_in: int,
        d_outs: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.modules = tuple(tuple(names) for names in modules)
        self.d_in = d_in
        self.d_outs = tuple(d_outs)
        self.active: list[list[LowRank] | None] | None = None
        self.projections: list[Projection] | None = None
        self.gate: Float[Tensor, "batch _ rank"] | None = None  # one for all tokens of a row, or one for each
        self.num_allocations = 0
        self.num_copies = 0  # of an adapter's A into the buffer
        self.padded = (0,) * len(self.modules)
        self._gates: dict[int, Tensor] = {}  # by batch
        self._ends = tuple(accumulate(self.d_outs, initial=0))  # of the siblings' rows in a stacked weight
        self._a = torch.empty(self.num_layers, 0, d_in, dtype=dtype, device=device)
        self._b = [torch.empty(self.num_layers, 0, d_out, dtype=dtype, device=device) for d_out in self.d_outs]
        self._linears: list[list[nn.Linear]] | None = None  # [sibling][layer], once stacked
        self._weights: list[Float[Tensor, "rows d_in"]] = []  # of the layers, once stacked
        self._biases: list[Float[Tensor, " rows"] | None] = []
        self._prepacked: list[Tensor] = []  # the layers' base weights once more, where they are prepacked
        self._packed_versions: list[int] = []  # of the weights, when they were
        # By sibling and first row of B, what lies there: the block, the first row of its sibling's A, the weight in B.
        self._laid: dict[tuple[int, int], tuple[ref[Block], int, float]] = {}
        # By the siblings' ranks, the least recently used first.
        self._views: dict[tuple[int, ...], tuple[list[list[LowRank] | None], list[Projection] | None]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of B."""
        return self._b[0].dtype

    @property
    def num_layers(self) -> int:
        """How many layers hold these modules."""
        return len(self.modules[0])

    @property
    def capacity(self) -> int:
        """How much rank the buffers hold, all siblings together."""
        return self._a.shape[1]

    @property
    def is_stacked(self) -> bool:
        """Whether A lies under the base weights."""
        return self._linears is not None

    def stack(self, linears: Sequence[Sequence[nn.Linear]]) -> None:
        """Lays the weights of the siblings, `linears[s][i]`, and A into one tensor; the weights become views of it."""
        self._linears = [list(layers) for layers in linears]
        self._b = [b.to(self._linears[0][0].weight.device) for b in self._b]
        self._lay(self.capacity)

    def unstack(self) -> None:
        """Gives the base layers tensors of their own again."""
        if self._linears is None:
            return
        for linear in (linear for layers in self._linears for linear in layers):
            for parameter in (linear.weight, linear.bias):
                if parameter is not None:
                    parameter.data = _empty_as(parameter, parameter.shape).copy_(parameter.data)
        self._a = self._a.clone()
        self._laid.clear()
        self._linears, self._weights, self._biases, self._prepacked = None, [], [], []
        self._views.clear()
        self.clear()

    def prepack(self, pack: Callable[[Tensor], Tensor]) -> None:
        """Holds the base weights of a stacked group once more, as `pack` lays them out."""
        self._pack, self._packed_versions = pack, self._versions()
        self._prepacked = [pack(weight[: self._ends[-1]]) for weight in self._weights]
        self._views.clear()
        self.clear()

    def repack(self) -> bool:
        """Lays prepacked weights out anew, and fuses nothing, where the base's were changed since; says whether."""
        if not self._prepacked or self._versions() == self._packed_versions:
            return False
        self.prepack(self._pack)
        return True

    def _versions(self) -> list[int]:
        linears = [linear for layers in self._linears or () for linear in layers]
        parameters = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
        return [0 if p.is_inference() else p._version for p in parameters]

    @property
    def prepacked_nbytes(self) -> int:
        """Bytes of memory that prepacked weights take."""
        return sum(weight.numel() * weight.itemsize for weight in self._prepacked)

    def reserve(self, rank: int, ranks: Sequence[int]) -> None:
        """Makes room for mixtures of this rank, all siblings together, and of `ranks` for each of them."""
        for s, (b, needed) in enumerate(zip(self._b, ranks, strict=True)):
            if needed > b.shape[1]:
                self._b[s] = b.new_zeros(b.shape[0], needed, b.shape[2])
                self._laid.clear()
                self._views.clear()
                self.num_allocations += 1
        if rank > self.capacity:
            self._lay(rank)
            self._views.clear()
            self.num_allocations += 1

    def pad(self, ranks: Sequence[int]) -> None:
        """Makes room for compiled passes, with this rank for each sibling."""
        if self.padded == tuple(ranks):
            return
        self.padded = tuple(ranks)
        self.reserve(sum(ranks), ranks)
        self._views.clear()
        self._gates.clear()

    def write(
        self,
        blocks: Sequence[Sequence[Block]],
        weights: Sequence[Sequence[float]],
        gate: Tensor | None,
        *,
        batch: int | None = None,
    ) -> None:
        """Lays the blocks of each sibling side by side, B times its weight, and makes them the active pairs.

        With a `batch`, for a compiled pass over as many rows: then the gate, too, is padded.
        """
        ranks = tuple(sum(block.rank for block in own) for own in blocks)
        if batch is not None:
            ranks = self.padded
        if sum(ranks) > self.capacity or any(r > b.shape[1] for r, b in zip(ranks, self._b, strict=True)):
            grown = [r if r <= b.shape[1] else max(r, 2 * b.shape[1]) for r, b in zip(ranks, self._b, strict=True)]
            self.reserve(self.capacity if sum(ranks) <= self.capacity else max(sum(ranks), 2 * self.capacity), grown)
        row, before = 0, self._laid
        self._laid = {}  # of what breaks off half-way, nothing is known
        laid: dict[tuple[int, int], tuple[ref[Block], int, float]] = {}
        for s, (own, own_weights, b, rank) in enumerate(zip(blocks, weights, self._b, ranks, strict=True)):
            start = 0
            for block, weight in zip(own, own_weights, strict=True):
                old, old_row, old_weight = before.get((s, start), (None, None, None))
                is_there = old is not None and old() is block
                if not is_there or old_row != row:
                    self._a[:, row + start : row + start + block.rank].copy_(block.a)
                    self.num_copies += 1
                if not is_there or old_weight != weight:
                    torch.mul(block.b, weight, out=b[:, start : start + block.rank])
                laid[s, start] = (ref(block), row, weight)
                start += block.rank
            row += rank
        self._laid = laid
        self.active, self.projections = self._view(ranks)
        if batch is None or gate is None:
            self.gate = None if gate is None else gate.to(self._a.dtype)
            return
        if batch not in self._gates:
            self._gates[batch] = _in_place(self._a.new_zeros(batch, 1, sum(ranks)))
        self.gate = self._gates[batch]
        self.gate.copy_(gate)

    def rest(self, *, plain: bool) -> None:
        """Fuses nothing here; unless `plain`, stacked siblings are still one product."""
        self.clear()
        if self.is_stacked and not plain:
            self.active, self.projections = self._view((0,) * len(self.modules))

    def buffers(self) -> list[Tensor]:
        """What it writes into; a stacked group's first one holds the base weights, too."""
        return [self._a, *self._b]

    def clear(self) -> None:
        """Leaves the base layers alone."""
        self.active = self.projections = self.gate = None

    def _lay(self, capacity: int) -> None:
        self._laid.clear()
        if self._linears is None:
            self._a = self._a.new_zeros(self.num_layers, capacity, self.d_in)
            return
        first, end = self._linears[0][0], self._ends[-1]
        shape = (end + capacity, self.d_in)
        whole = _empty_as(first.weight, (self.num_layers, *shape)) if capacity else None
        biased = any(layers[0].bias is not None for layers in self._linears)
        self._weights, self._biases = [], []
        for i, linears in enumerate(zip(*self._linears, strict=True)):
            # Without adapters each layer has a tensor of its own, so that no second copy of all is ever held.
            self._weights.append(_empty_as(first.weight, shape) if whole is None else whole[i])
            bias = self._weights[i].new_zeros(end + capacity) if biased else None
            self._biases.append(bias)
            for linear, (start, stop) in zip(linears, pairwise(self._ends), strict=True):
                self._move(linear.weight, self._weights[i][start:stop])
                if bias is not None and linear.bias is not None:
                    self._move(linear.bias, bias[start:stop])
        if whole is None:
            self._a = first.weight.new_empty(self.num_layers, 0, self.d_in).detach()
        else:
            self._a = whole[:, end:].zero_()  # what a gate of zero leaves out must be finite
        self._views.clear()
        self.clear()

    @staticmethod
    def _move(parameter: Tensor, place: Tensor) -> None:
        place.copy_(parameter.data)
        parameter.data = place

    def _view(self, ranks: tuple[int, ...]) -> tuple[list[list[LowRank] | None], list[Projection] | None]:
        found = self._views.pop(ranks, None) or self._make_views(ranks)
        self._views[ranks] = found
        if len(self._views) > MAX_VIEWS:
            del self._views[next(known for known in self._views if known != self.padded)]
        return found

    def _make_views(self, ranks: tuple[int, ...]) -> tuple[list[list[LowRank] | None], list[Projection] | None]:
        layers = range(self.num_layers)
        rows = [slice(start, stop) for start, stop in pairwise(accumulate(ranks, initial=0))]
        place = _in_place if ranks == self.padded else Tensor.detach
        pairs = [
            [LowRank(place(self._a[i, own].T), place(b[i, :rank]), own) for i in layers] if rank else None
            for own, b, rank in zip(rows, self._b, ranks, strict=True)
        ]
        if self._linears is None:
            return pairs, None
        end = self._ends[-1] + sum(ranks)
        sizes = self.d_outs + ((sum(ranks),) if any(ranks) else ())
        projections = [
            Projection(
                place(self._weights[i][:end]),
                None if (bias := self._biases[i]) is None else place(bias[:end]),
                sizes,
                tuple((s, pair[i].rows, pair[i].b) for s, pair in enumerate(pairs) if pair is not None),
                self._prepacked_of(i, end),
            )
            for i in layers
        ]
        return pairs, projections

    def _prepacked_of(self, layer: int, end: int) -> Prepacked | None:
        if not self._prepacked:
            return None
        width, bias = self._ends[-1], self._biases[layer]
        a = self._weights[layer][width:end].detach()
        return Prepacked(self._prepacked[layer], None if bias is None else bias[:width], a)


def keep_alignment(weights: Sequence[Tensor]) -> bool:
    """Whether weights of one input keep their alignment as rows of one tensor, and so their products every bit."""
    return len({w.data_ptr() % ALIGNMENT for w in weights}) == 1 and weights[0][0].nbytes % ALIGNMENT == 0


def _empty_as(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor as well aligned as a parameter is."""
    num, start = math.prod(shape), parameter.data_ptr() % ALIGNMENT // parameter.itemsize
    flat = parameter.new_empty(start + num).detach()  # which begins a stretch
    return flat[start:].view(shape)


def _in_place(tensor: Tensor) -> Tensor:
    """Tells `torch.compile` that a tensor stays where it is, so that a CUDA graph reads it there and copies nothing."""
    torch._dynamo.mark_static_address(tensor)
    return tensor
