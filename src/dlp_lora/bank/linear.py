"""Fused linear layers: a base layer plus the low-rank pair that the current sentence was fused into (section 3.3).

`attach` puts a FusedLinear in the place of each linear layer that some adapter changes, and of siblings, which read the
same input; `detach` puts the very same base layers back.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dlp_lora.bank.cpu import _is_faster_in_halves, linear, prepacked_linear
from dlp_lora.bank.group import Group, LowRank, Projection

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


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is nothing but a linear map; one with hooks, as offloading installs, is not."""
    return type(layer) is nn.Linear and not (
        layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    )
