"""Fused linear layers: a base layer plus the low-rank pair that the current sentence was fused into (section 3.3).

`attach` puts a FusedLinear in the place of each linear layer that some adapter changes, and of siblings, which read the
same input; `detach` puts the very same base layers back.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlp_lora.bank import AdapterBank
from dlp_lora.errors import AdapterError, ModelError
from dlp_lora.group import Group, LowRank, Projection, keep_alignment
from dlp_lora.peft_format import Adapter, read_base_copies
from dlp_lora.policy import Mixture
from dlp_lora.prepacking import check_prepacking, prepacked, prepacked_linear

# Names of layers of one parent that read one input, in the order they are called.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, ...
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
)


HAS_AMX = torch.cpu._is_amx_tile_supported()
# On a CPU, up to so many rows times a narrow matrix are faster in float32 than in bfloat16 (docs/log.md).
FEW_ROWS = 32


class Outputs:
    """What one product gave the siblings of a layer, until each has taken its own."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.ready: list[Tensor] = []


class FusedLinear(nn.Module):
    """A base layer plus the fused pair of its group: `y = W x + ((x A) * gate) B`.

    In a stacked group, the sibling that is called first computes all of them in one product.
    """

    def __init__(self, base_layer: nn.Module, group: Group, sibling: int, layer: int, outputs: Outputs) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.group = group
        self.sibling = sibling
        self.layer = layer
        self.outputs = outputs
        self._plain = is_plain(base_layer)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        active = self.group.active
        if active is None:
            return self._base(x)
        # A stacked weight has no gradient: where one is asked for, the base layers are called.
        if self.group.projections is not None and not torch.is_grad_enabled():
            return self._take(x)
        pairs = active[self.sibling]
        return self._base(x) if pairs is None else self._concatenated(x, pairs[self.layer])

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's, under its own names: what is saved is an ordinary checkpoint of the base model."""
        return self.base_layer.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _base(self, x: Tensor) -> Tensor:
        base = self.base_layer
        y: Tensor = F.linear(x, base.weight, base.bias) if self._plain else base(x)  # type: ignore[arg-type]
        return y

    def _concatenated(self, x: Tensor, pair: LowRank) -> Tensor:
        y = self._base(x)
        flat = y.view(-1, y.shape[-1])
        h = x.reshape(-1, x.shape[-1]).to(pair.a.dtype) @ pair.a  # (rows, rank)
        if self.group.gate is not None:
            weigh(h, self.group.gate[..., pair.rows])
        add_product_(flat, h.to(_dtype_for(flat, pair.b.dtype)), pair.b)
        return y

    def _take(self, x: Tensor) -> Tensor:
        outputs = self.outputs
        if outputs.x is not x:
            outputs.x, outputs.ready = x, self._project(x)
        y = outputs.ready[self.sibling]
        if self.sibling == len(outputs.ready) - 1:
            outputs.x, outputs.ready = None, []
        return y

    def _project(self, x: Tensor) -> list[Tensor]:
        projection: Projection = self.group.projections[self.layer]  # type: ignore[index]
        shape = x.shape[:-1]
        outs = project(x.reshape(-1, x.shape[-1]), projection, self.group.dtype)
        if projection.pairs:
            low = outs.pop()
            low = low.to(_dtype_for(low, self.group.dtype))
            if self.group.gate is not None:
                weigh(low, self.group.gate)
            for sibling, rows, b in projection.pairs:
                add_product_(outs[sibling], low[:, rows], b)
        return [out.view(*shape, -1) for out in outs]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: some architectures read its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]


def project(x: Float[Tensor, "rows d_in"], projection: Projection, dtype: torch.dtype) -> list[Float[Tensor, "rows _"]]:
    """Gives the siblings' base projections and, where there are pairs, the low-rank activations of all; those of few
    rows may be in `dtype`, that of B."""
    weight, bias, sizes, pairs, packed = projection
    if torch.compiler.is_compiling() or packed is None or _is_faster_in_halves(x):
        return list(linear(x, weight, bias).split(sizes, dim=1))
    y = prepacked_linear(x, packed.weight, packed.bias)
    if not pairs:
        return list(y.split(sizes, dim=1))
    dtype = _dtype_for(x, dtype)
    return [*y.split(sizes[:-1], dim=1), F.linear(x.to(dtype), packed.a.to(dtype))]


def linear(
    x: Float[Tensor, "rows d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "rows d_out"]:
    """`F.linear`; on a CPU, one row is multiplied in the way that is fastest there (docs/log.md)."""
    if x.shape[0] != 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if HAS_AMX and x.itemsize == 2:
        y = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
        return y[None]
    if len(weight) % 2 == 0 and _is_faster_in_halves(x):
        y = _in_halves(x, weight)
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)


def _has_faster_way(weight: Any) -> bool:
    """Whether `linear` multiplies one row otherwise than `F.linear`."""
    if weight.device.type != "cpu":
        return False
    return (HAS_AMX and weight.itemsize == 2) or (
        weight.dtype == torch.float32 and is_faster_in_halves(torch.get_num_threads())
    )


def _is_faster_in_halves(x: Float[Tensor, "rows d_in"]) -> bool:
    return x.shape[0] == 1 and x.dtype == torch.float32 and is_faster_in_halves(torch.get_num_threads())


def _in_halves(x: Float[Tensor, "1 d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "1 d_out"]:
    return torch.bmm(weight.view(2, -1, weight.shape[1]), x.T.expand(2, -1, 1)).view(1, -1)


@cache
def is_faster_in_halves(num_threads: int) -> bool:
    """Whether a float32 row is multiplied much faster as a batch of two halves, with weights that come from memory.

    Measured once for each number of threads, in a few hundredths of a second.
    """
    x, weights = torch.ones(1, 576), torch.ones(16, 1024, 576)  # more than most caches hold
    ways: dict[Callable[..., Tensor], list[float]] = {F.linear: [], _in_halves: []}
    for _ in range(5):
        for way, seconds in ways.items():
            start = time.perf_counter()
            for weight in weights:
                way(x, weight)
            seconds.append(time.perf_counter() - start)
    return min(ways[F.linear]) > 1.5 * min(ways[_in_halves])


def add_product_(y: Float[Tensor, "rows d_out"], h: Float[Tensor, "rows rank"], b: Float[Tensor, "rank d_out"]) -> None:
    """Adds `h B`, in place, as base projections are wide; h is in the dtype to compute in."""
    if h.dtype == y.dtype:
        y.addmm_(h, b.to(y.dtype))
    else:
        y.add_(h @ b)


def weigh(h: Float[Tensor, "*rows rank"], gate: Float[Tensor, "batch _ rank"]) -> None:
    """Weighs low-rank activations in place, row by row or token by token."""
    # Some models give a layer the tokens of all rows as one list, and their head the last tokens of each row alone.
    tokens = h.view(gate.shape[0], -1, h.shape[-1])
    tokens.mul_(gate[:, -tokens.shape[1] :])


def _dtype_for(y: Float[Tensor, "rows d_out"], dtype: torch.dtype) -> torch.dtype:
    """Few rows are computed in the dtype of B, which is faster than to narrow B."""
    return dtype if y.shape[0] <= FEW_ROWS else y.dtype


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Maps each linear layer of a model to its (d_in, d_out), in the order of the model.

    Raises:
        ModelError: if fused layers or PEFT's are attached to the model already, or it has no linear layer.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(
            "the model carries PEFT adapters already, which would be part of every mixture; take the plain base "
            "(PeftModel's unload() gives it back) and pass the adapters' folders"
        )
    if any(isinstance(module, FusedLinear) for module in model.modules()):
        raise ModelError("the model has fused layers attached already; call detach() on its engine first")
    shapes = {name: shape for name, module in model.named_modules() if (shape := _shape(module)) is not None}
    if not shapes:
        raise ModelError(f"{type(model).__name__} has no linear layer to attach to")
    return shapes


def pair_dtype(model: nn.Module) -> torch.dtype:
    """Gives the dtype to hold adapters in: the model's own; on a CPU float32 for a model in 16 bits, where a product of
    rank 24 takes three times as long.
    """
    parameter = next(model.parameters())
    return torch.float32 if parameter.device.type == "cpu" and parameter.itemsize < 4 else parameter.dtype


def siblings(model: nn.Module) -> list[tuple[str, ...]]:
    """Lists the linear layers of one parent that read one input and can be computed in one product."""
    found = []
    for parent, module in model.named_modules():
        for names in SIBLINGS:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), nn.Module)]
            if len(layers) == len(names) and all(map(is_plain, layers)) and _are_alike(layers):
                found.append(tuple(f"{parent}.{name}".lstrip(".") for name in names))
    return found


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is nothing but a linear map; one with hooks, as offloading installs, is not."""
    return type(layer) is nn.Linear and not (
        layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    )


def attach(model: nn.Module, bank: AdapterBank, *, stack: bool = True, prepack: bool = False) -> None:
    """Puts a FusedLinear in the place of each layer that an adapter of the bank changes; may be called again.

    Where `stack`, the weights of plain layers become views of a tensor that holds A under them; nothing is held twice.
    So do those of siblings that no adapter changes, which are one product, too, while something is fused; and on a CPU
    those of single layers, where one row is multiplied faster than by `F.linear`.

    Where `prepack`, all stacked weights are held once more in oneDNN's layout, those of layers that no adapter changes
    as well, and multiplied there while something is fused. The next `fuse` sees weights that were loaded or copied into
    the base since, but not what was done to their `.data`.

    Raises:
        AdapterError: if an adapter was trained on a base whose weights differ from the model's, where it tells.
        ModelError: if weights cannot be prepacked here.
    """
    if prepack:
        check_prepacking(next(model.parameters()))
    for name in bank.unattached:
        check_base_copies(model, bank.adapters[name])
    bank.unattached.clear()
    bank.clear()
    touched = bank.touched()
    for group in bank.groups:
        layers = [[model.get_submodule(name) for name in names] for names in group.modules]
        if isinstance(layers[0][0], FusedLinear):
            continue
        flat = [layer for own in layers for layer in own]
        is_stackable = stack and all(map(is_plain, flat)) and _are_alike(flat)
        gains = is_stackable and (prepack or len(layers) > 1 or _has_faster_way(flat[0].weight))
        if group not in touched and not gains:
            continue
        if is_stackable:
            group.stack(layers)  # type: ignore[arg-type]
            if prepack:
                group.prepack(prepacked)
        outputs = [Outputs() for _ in layers[0]]
        for s, names in enumerate(group.modules):
            for i, name in enumerate(names):
                model.set_submodule(name, FusedLinear(layers[s][i], group, s, i, outputs[i]))
    if prepack and not any(group.prepacked_nbytes for group in bank.groups):
        detach(model)
        raise ModelError(
            f"no layer of {type(model).__name__} can be prepacked: none is a plain nn.Linear; leave it out"
        )


def detach(model: nn.Module) -> None:
    """Puts the base layers back: the same objects, with the weights that they had."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedLinear):
            module.group.unstack()
            model.set_submodule(name, module.base_layer)


@contextmanager
def merged(model: nn.Module, bank: AdapterBank, mixture: Mixture) -> Iterator[None]:
    """Adds a mixture to the base weights for a while: `W + B A`, in float32 and rounded once.

    A copy of the weights that it changes gives them back, bit for bit; to subtract it again would drift.

    Raises:
        ModelError: if a layer has no weight of its own to add to.
    """
    pristine: list[tuple[FusedLinear, Tensor]] = []
    try:
        with bank.lock:
            bank.fuse([mixture])
            found = list(_fused_pairs(model))
            _check_mergeable(model, [module for module, _ in found])
            for module, (a, b, _) in found:
                pristine.append((module, module.weight.detach().clone()))
                delta = a.detach().float() @ b.detach().float()  # (d_in, d_out)
                delta = delta if isinstance(module.base_layer, Conv1D) else delta.T
                module.weight.data.copy_(module.weight.data.float() + delta)
            bank.clear()
            bank.is_merged = True
        yield
    finally:
        with bank.lock:
            bank.is_merged = False
            for module, weight in pristine:
                module.weight.data.copy_(weight)


def _fused_pairs(model: nn.Module) -> Iterator[tuple[FusedLinear, LowRank]]:
    for module in (module for module in model.modules() if isinstance(module, FusedLinear)):
        pairs = module.group.active and module.group.active[module.sibling]
        if pairs:
            yield module, pairs[module.layer]


def _check_mergeable(model: nn.Module, modules: Sequence[FusedLinear]) -> None:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in modules:
        weight = module.weight  # a method of some quantised layers
        if not (isinstance(weight, Tensor) and weight.is_floating_point()) or uses[id(weight)] != 1:
            name = module.group.modules[module.sibling][module.layer]
            raise ModelError(f"{name} is quantised or shares its weight with another layer; use fixed() instead")


def _are_alike(layers: Sequence[nn.Module]) -> bool:
    weights: list[Any] = [layer.weight for layer in layers]
    if any(w.is_meta for w in weights) or len({id(w) for w in weights}) < len(weights):
        return False  # layers that share one weight cannot have a place each
    return len({(w.dtype, w.device, w.shape[1]) for w in weights}) == 1 and keep_alignment(weights)


def check_base_copies(model: nn.Module, adapter: Adapter) -> None:
    """Checks base weights that an adapter brings along.

    Raises:
        AdapterError: if they differ from the model's.
    """
    for name, copy in read_base_copies(adapter).items():
        module, _, parameter = name.rpartition(".")
        weight = getattr(model.get_submodule(module), parameter)
        if weight is None or not torch.equal(copy.to(weight), weight):
            raise AdapterError(
                f"{adapter.path} holds a copy of the base model's {name} that differs from the base model's own; "
                f"it was trained on another base ({adapter.base_model})"
            )


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):  # GPT-2: the weight is stored (d_in, d_out)
        return module.nx, module.nf
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    # Quantised linear layers are not nn.Linear everywhere, but all say their features.
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None
