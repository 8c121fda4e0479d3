"""Groups: linear layers that read one input, alike in every layer of the model, and the pairs fused for them
(section 3.3, Eq. 6).

Adapters are concatenated along the rank axis in buffers that do not move. A of a stacked group lies in one tensor under
the base weights, `[W_q; W_k; W_v; A_q; A_v]`. So one product gives the base projections and the low-rank activations.
"""

import math
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple
from weakref import ref

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from dlp_lora.bank.cpu import want_huge_pages
from dlp_lora.bank.layout import StackedLora
from dlp_lora.bank.paths import PLAIN, Ways

# Bytes. The rounding of a product with a vector can depend on the matrix's address modulo this number (docs/log.md),
# and weights from a file may begin at any address.
ALIGNMENT = 16
MAX_VIEWS = 32  # for different ranks of mixtures; compiled passes have separate ones


class FusedPair(NamedTuple):
    """The fused pair of one module of one layer; `rows` is the place of its A among its group's."""

    a: Float[Tensor, "d_in rank"]
    b: Float[Tensor, "rank d_out"]
    rows: slice


class Reads(NamedTuple):
    """The input of a pass: the number of tokens of each row, and whether all rows have equally many images.

    `num_kept` is the number of last tokens with logits, if not all have them: some models run their last layers only
    over these.
    """

    num_tokens: int
    has_like_images: bool = False
    num_kept: int | None = None


class Prepacked(NamedTuple):
    """A second copy of the base weights `[W_1; ...]` of one layer in oneDNN's layout, and A separately."""

    weight: Tensor  # opaque
    bias: Float[Tensor, " d_outs"] | None
    a: Float[Tensor, "rank d_in"]


class FusedProjection(NamedTuple):
    """One layer's stacked weight `[W_1; ...; A_1; ...]` and its bias. `sizes` cuts the product into the siblings' base
    projections and the low-rank activations; `pairs` are the siblings with a pair, the place of their activations among
    these, and their B.
    """

    weight: Float[Tensor, "rows d_in"]
    bias: Float[Tensor, " rows"] | None
    sizes: tuple[int, ...]
    pairs: tuple[tuple[int, slice, Float[Tensor, "rank d_out"]], ...]
    prepacked: Prepacked | None


Pairs = list[list[FusedPair] | None]
"""By sibling and layer; None for a sibling that no adapter of the mixture changes."""


class Fused(NamedTuple):
    """The active parts of a group in a pass: the pairs, and one projection per layer if the weights are stacked.

    `gate` is None if all rows share one mixture; otherwise it weighs the low-rank activations by row or by token.
    """

    pairs: Pairs
    projections: list[FusedProjection] | None
    gate: Float[Tensor, "batch _ rank"] | None = None  # one for all tokens of a row, or one for each token


class Group:
    """Linear layers that read one input, alike in every layer of the model, and the buffers for fused mixtures.

    `modules[s][i]` is the name of sibling `s` in layer `i`. `active` has the tensors of the current pass; if it is
    None, the layers are the base's. `write` and `idle` set it, `clear` unsets it, `activate` sets it to the last
    written one. The buffers move only if a mixture does not fit in. `ways` are the ways of the products, and `reads` is
    the input of the pass, if it is known.

    A compiled pass needs tensors of one shape at one address for every mixture. `write(..., batch=...)` pads the ranks
    of the siblings to `padded`, with a gate that is zero beyond the mixture.
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
        self.ways = Ways()
        self.active: Fused | None = None
        self.reads: Reads | None = None
        self.num_allocations = 0
        self.padded = (0,) * len(self.modules)
        self._written: Fused | None = None
        self._gates: dict[int, Tensor] = {}  # of compiled passes, by batch
        self._ends = tuple(accumulate(self.d_outs, initial=0))  # of the siblings' rows in a stacked weight
        self._a = torch.empty(self.num_layers, 0, d_in, dtype=dtype, device=device)
        self._b = [torch.empty(self.num_layers, 0, d_out, dtype=dtype, device=device) for d_out in self.d_outs]
        self._linears: list[list[nn.Linear]] | None = None  # [sibling][layer], once stacked
        self._weights: list[Float[Tensor, "rows d_in"]] = []  # of the layers, once stacked
        self._biases: list[Float[Tensor, " rows"] | None] = []
        self._prepacked: dict[int, Tensor] = {}  # second copies of base weights, by layer
        self._packed_versions: list[int] = []  # of the weights at that time
        # By sibling and first row of B: the LoRA there, the first row of its sibling's A, and its weight in B.
        self._laid: dict[tuple[int, int], tuple[ref[StackedLora], int, float]] = {}
        # By the siblings' ranks, the least recently used first.
        self._views: dict[tuple[int, ...], tuple[Pairs, list[FusedProjection] | None]] = {}

    @property
    def label(self) -> str:
        """The names of its modules without the number of the layer."""
        return ", ".join(names[0].rpartition(".")[2] for names in self.modules)

    @property
    def gains(self) -> bool:
        """Whether its `ways` are faster even without an adapter; for a single layer, stacked is not."""
        as_before = {"plain"} if len(self.modules) > 1 else {"plain", "stacked"}
        return not self.ways.ways <= as_before

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of B."""
        return self._b[0].dtype

    @property
    def num_layers(self) -> int:
        """The number of layers with these modules."""
        return len(self.modules[0])

    @property
    def capacity(self) -> int:
        """The rank for which the buffers have room, all siblings together."""
        return self._a.shape[1]

    @property
    def num_views(self) -> int:
        """The number of different ranks for which it keeps tensors."""
        return len(self._views)

    @property
    def is_stacked(self) -> bool:
        """Whether A lies under the base weights."""
        return self._linears is not None

    def stack(self, linears: Sequence[Sequence[nn.Linear]]) -> None:
        """Lays the weights of the siblings, `linears[s][i]`, and A into one tensor; the weights become views of it."""
        self._linears = [list(layers) for layers in linears]
        self._b = [b.to(self._linears[0][0].weight.device) for b in self._b]
        self._allocate(self.capacity)

    def restack(self, *, layers: Collection[int] | None = None) -> bool:
        """Stacks weights again that were moved, as by `model.to`; returns whether some of `layers` were.

        If siblings are no longer alike, the layers become plain.
        """
        layers = range(self.num_layers) if layers is None else layers
        if self._linears is None or all(self._is_in_place(i) for i in layers):
            return False
        weights = [linear.weight for each in self._linears for linear in each]
        before, is_prepacked = self._a, bool(self._prepacked)
        if len({(w.dtype, w.device) for w in weights}) > 1:
            self.unstack()
            self.ways = PLAIN
            return True
        self._prepacked = {}
        self._allocate(self.capacity)
        if is_prepacked and (self._a.dtype, self._a.device) == (before.dtype, before.device):
            self.prepack(self._pack)
        return True

    def _is_in_place(self, layer: int) -> bool:
        """Whether the base weights of a layer lie in its stacked one."""
        pairs: list[tuple[Tensor | None, Tensor | None]] = [
            (parameter, stacked)
            for linears in self._linears or ()
            for parameter, stacked in (
                (linears[layer].weight, self._weights[layer]),
                (linears[layer].bias, self._biases[layer]),
            )
        ]
        return all(
            parameter is None
            or stacked is None
            or parameter.data_ptr() == stacked.data_ptr() + self._ends[i // 2] * stacked[0].nbytes
            for i, (parameter, stacked) in enumerate(pairs)
        )

    def place(self, *, dtype: torch.dtype, device: torch.device) -> None:
        """Moves the buffers; A of a stacked group moves with the base weights."""
        self._b = [b.to(device, dtype) for b in self._b]
        if self._linears is None:
            self._a = self._a.to(device, dtype)
        self._gates.clear()
        self._laid.clear()
        self._forget_views()

    def unstack(self) -> None:
        """Gives the base layers separate tensors again."""
        if self._linears is None:
            return
        for linear in (linear for layers in self._linears for linear in layers):
            for parameter in (linear.weight, linear.bias):
                if parameter is not None:
                    parameter.data = _empty_as(parameter, parameter.shape).copy_(parameter.data)
        self._a = self._a.clone()
        self._linears, self._weights, self._biases, self._prepacked = None, [], [], {}
        self._laid.clear()
        self._forget_views()

    def prepack(self, pack: Callable[[Tensor], Tensor], *, layers: Collection[int] | None = None) -> None:
        """Makes second copies of the base weights of a stacked group with `pack`, of all layers or of some."""
        self._pack, self._packed_versions = pack, self._versions()
        layers = range(self.num_layers) if layers is None else layers
        self._prepacked = {i: pack(self._weights[i][: self._ends[-1]]) for i in layers}
        self._forget_views()

    def repack(self) -> bool:
        """Makes second copies again if the base weights changed, and then fuses nothing; returns whether they did."""
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
        return sum(weight.numel() * weight.itemsize for weight in self._prepacked.values())

    def reserve(self, rank: int, ranks: Sequence[int]) -> None:
        """Makes room for mixtures of this rank, all siblings together, and of `ranks` for each sibling."""
        for s, (b, needed) in enumerate(zip(self._b, ranks, strict=True)):
            if needed > b.shape[1]:
                self._b[s] = b.new_zeros(b.shape[0], needed, b.shape[2])
                self._laid.clear()
                self._forget_views()
                self.num_allocations += 1
        if rank > self.capacity:
            self._allocate(rank)
            self.num_allocations += 1

    def pad(self, ranks: Sequence[int]) -> None:
        """Makes room for compiled passes, with this rank for each sibling."""
        if self.padded == tuple(ranks):
            return
        self.padded = tuple(ranks)
        self.reserve(sum(ranks), ranks)
        self._forget_views()
        self._gates.clear()

    def write(
        self,
        loras: Sequence[Sequence[StackedLora]],
        weights: Sequence[Sequence[float]],
        gate: Tensor | None,
        *,
        batch: int | None = None,
    ) -> None:
        """Concatenates the LoRAs of each sibling, with B times its weight, and makes them the active pairs.

        A `batch` is for a compiled pass over so many rows: then the gate is padded, too.
        """
        ranks = tuple(sum(lora.rank for lora in each) for each in loras) if batch is None else self.padded
        self._make_room(ranks)
        row, before = 0, self._laid
        self._laid = {}  # unknown, in case of an error
        laid: dict[tuple[int, int], tuple[ref[StackedLora], int, float]] = {}
        for sibling, (each, own_weights, b, rank) in enumerate(zip(loras, weights, self._b, ranks, strict=True)):
            start = 0
            for lora, weight in zip(each, own_weights, strict=True):
                old, old_row, old_weight = before.get((sibling, start), (None, None, None))
                is_there = old is not None and old() is lora
                if not is_there or old_row != row:
                    self._a[:, row + start : row + start + lora.rank].copy_(lora.a)
                if not is_there or old_weight != weight:
                    torch.mul(lora.b, weight, out=b[:, start : start + lora.rank])
                laid[sibling, start] = (ref(lora), row, weight)
                start += lora.rank
            row += rank
        self._laid = laid
        self._written = Fused(*self._view(ranks), self._kept_gate(gate, batch))
        self.active = self._written

    def idle(self, *, stacked: bool = True) -> None:
        """Fuses nothing here; if `stacked`, siblings with stacked weights still compute one product."""
        ranks = (0,) * len(self.modules)
        self._written = Fused(*self._view(ranks)) if stacked and self.is_stacked else None
        self.active = self._written

    def rehearse(self, rank: int) -> None:
        """Makes pairs of this rank active, with any content, if there is room: for timing."""
        self.active = Fused(*self._view(tuple(min(rank, b.shape[1]) for b in self._b)))

    def activate(self) -> None:
        """Makes the last written pairs active again, or nothing if the group was idle."""
        self.active = self._written

    def clear(self) -> None:
        """Makes nothing active: only the base layers compute. The buffers keep their content."""
        self.active = None

    def buffers(self) -> list[Tensor]:
        """The tensors that it writes into; the first one of a stacked group also has the base weights."""
        return [self._a, *self._b]

    def _make_room(self, ranks: Sequence[int]) -> None:
        """Doubles the buffers that are too small for pairs of these ranks."""
        if sum(ranks) <= self.capacity and all(rank <= b.shape[1] for rank, b in zip(ranks, self._b, strict=True)):
            return
        grown = [r if r <= b.shape[1] else max(r, 2 * b.shape[1]) for r, b in zip(ranks, self._b, strict=True)]
        self.reserve(self.capacity if sum(ranks) <= self.capacity else max(sum(ranks), 2 * self.capacity), grown)

    def _allocate(self, capacity: int) -> None:
        """Makes a buffer for A of this capacity; in a stacked group, under the base weights, which move there."""
        self._laid.clear()
        self._forget_views()
        if self._linears is None:
            self._a = self._a.new_zeros(self.num_layers, capacity, self.d_in)
            return
        first, end = self._linears[0][0], self._ends[-1]
        shape = (end + capacity, self.d_in)
        whole = _empty_as(first.weight, (self.num_layers, *shape)) if capacity else None
        biased = any(layers[0].bias is not None for layers in self._linears)
        self._weights, self._biases = [], []
        for i, linears in enumerate(zip(*self._linears, strict=True)):
            # First each layer gets a separate tensor, so that there is never a second copy of all.
            self._weights.append(_empty_as(first.weight, shape) if whole is None else whole[i])
            bias = self._weights[i].new_zeros(end + capacity) if biased else None
            self._biases.append(bias)
            for linear, (start, stop) in zip(linears, pairwise(self._ends), strict=True):
                _move(linear.weight, self._weights[i][start:stop])
                if bias is not None and linear.bias is not None:
                    _move(linear.bias, bias[start:stop])
        if whole is None:
            self._a = first.weight.new_empty(self.num_layers, 0, self.d_in).detach()
        else:
            self._a = whole[:, end:].zero_()  # rows with a gate of zero must be finite

    def _forget_views(self) -> None:
        self._views.clear()
        self._written = self.active = None

    def _kept_gate(self, gate: Tensor | None, batch: int | None) -> Tensor | None:
        """The gate in the dtype of A; for a compiled pass, always at the same address."""
        if batch is None or gate is None:
            return None if gate is None else gate.to(self._a.dtype)
        if batch not in self._gates:
            self._gates[batch] = _static(self._a.new_zeros(batch, *gate.shape[1:]))
        return self._gates[batch].copy_(gate)

    def _view(self, ranks: tuple[int, ...]) -> tuple[Pairs, list[FusedProjection] | None]:
        views = self._views.pop(ranks, None) or self._make_views(ranks)
        self._views[ranks] = views
        if len(self._views) > MAX_VIEWS:
            del self._views[next(others for others in self._views if others != self.padded)]
        return views

    def _make_views(self, ranks: tuple[int, ...]) -> tuple[Pairs, list[FusedProjection] | None]:
        layers = range(self.num_layers)
        rows = [slice(start, stop) for start, stop in pairwise(accumulate(ranks, initial=0))]
        view = _static if ranks == self.padded else Tensor.detach
        pairs: Pairs = [
            [FusedPair(view(self._a[i, of_a].T), view(b[i, :rank]), of_a) for i in layers] if rank else None
            for of_a, b, rank in zip(rows, self._b, ranks, strict=True)
        ]
        if self._linears is None:
            return pairs, None
        end = self._ends[-1] + sum(ranks)
        sizes = self.d_outs + ((sum(ranks),) if any(ranks) else ())
        projections = [
            FusedProjection(
                view(self._weights[i][:end]),
                None if (bias := self._biases[i]) is None else view(bias[:end]),
                sizes,
                tuple((s, pair[i].rows, pair[i].b) for s, pair in enumerate(pairs) if pair is not None),
                self._prepacked_of(i, end),
            )
            for i in layers
        ]
        return pairs, projections

    def _prepacked_of(self, layer: int, end: int) -> Prepacked | None:
        if layer not in self._prepacked:
            return None
        width, bias = self._ends[-1], self._biases[layer]
        a = self._weights[layer][width:end].detach()
        return Prepacked(self._prepacked[layer], None if bias is None else bias[:width], a)


def keep_alignment(weights: Sequence[Tensor]) -> bool:
    """Whether weights keep their alignment as rows of one tensor, so that their products stay bit-exact."""
    return len({w.data_ptr() % ALIGNMENT for w in weights}) == 1 and weights[0][0].nbytes % ALIGNMENT == 0


def _empty_as(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor as well aligned as a parameter is."""
    num, start = math.prod(shape), parameter.data_ptr() % ALIGNMENT // parameter.itemsize
    flat = parameter.new_empty(start + num).detach()  # aligned as by the CPU allocator
    want_huge_pages(flat)
    return flat[start:].view(shape)


def _move(parameter: Tensor, place: Tensor) -> None:
    """Moves a parameter's values; afterwards the parameter shares the memory of their new place.

    The parameter gets a separate storage, which begins there. accelerate, safetensors and `deepcopy` compare storages;
    with one storage they would take siblings for one weight and lose all but one.
    """
    place.copy_(parameter.data)
    parameter.data = from_dlpack(place)


def _static(tensor: Tensor) -> Tensor:
    """Marks a tensor as static for `torch.compile`, so that a CUDA graph reads it there and copies nothing."""
    torch._dynamo.mark_static_address(tensor)
    return tensor
