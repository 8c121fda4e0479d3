"""The arithmetic of LoRA in training: PEFT's layers and float32 parameters, with our forward and backward passes.

PEFT multiplies by A and B layer by layer, on float32 copies of the input and of the gradient. Here layers that read one
input share one product with their stacked A, all in the base's dtype, and a pass stores only x and x A.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from dlp_lora.bank.linear import Outputs, is_plain


def compute_together(model: nn.Module, siblings: Sequence[Sequence[str]]) -> None:
    """Lets PEFT's plain LoRA layers compute with `_LowRank`, siblings together; other layers do not change.

    `siblings` names layers that read one input, in the order of their calls. When PEFT unloads its layers, this ends,
    too.
    """
    plain = {name: layer for name, layer in model.named_modules() if _is_plain_lora(layer)}
    for names in siblings:
        if together := [plain.pop(name) for name in names if name in plain]:
            _share(together)
    for layer in plain.values():
        _share([layer])


def _is_plain_lora(layer: nn.Module) -> bool:
    if type(layer) is not Linear or not is_plain(layer.base_layer):
        return False
    return isinstance(layer.lora_dropout["default"], nn.Identity)


def _share(layers: Sequence[nn.Module]) -> None:
    """Replaces the forward pass of each layer; the layer that is called first computes all of them."""
    outputs = Outputs()

    def forward(x: Tensor, own: int) -> Tensor:
        if outputs.x is not x:
            outputs.x, outputs.ready = x, _project(layers, x)
        y = outputs.ready[own]
        if own == len(layers) - 1:
            outputs.x, outputs.ready = None, []
        return y

    for i, layer in enumerate(layers):
        layer.forward = partial(forward, own=i)  # type: ignore[method-assign]


def _project(layers: Sequence[Any], x: Float[Tensor, "*batch d_in"]) -> list[Tensor]:
    a = [layer.lora_A["default"].weight for layer in layers]
    b = [layer.lora_B["default"].weight for layer in layers]
    scales = [layer.scaling["default"] for layer in layers]
    bases = [layer.base_layer for layer in layers]
    ys = _LowRank.apply(x.reshape(-1, x.shape[-1]), bases, scales, *a, *b)
    return [y.view(*x.shape[:-1], -1) for y in ys]


class _LowRank(torch.autograd.Function):
    """`y_i = W_i x + scale_i B_i A_i x` for the layers i that read one x; every W is frozen.

    One product with all W stacked is not faster than separate ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "rows d_in"],
        bases: Sequence[nn.Linear],
        scales: Sequence[float],
        *pairs: Float[Tensor, "_ _"],
    ) -> tuple[Float[Tensor, "rows _"], ...]:
        num = len(bases)
        a = torch.cat(pairs[:num]).to(x.dtype)
        bs = [(b * scale).to(x.dtype) for b, scale in zip(pairs[num:], scales, strict=True)]
        h = x @ a.T  # (rows, rank), the ranks of the siblings side by side
        ctx.save_for_backward(x, h, a, *bs)
        ctx.bases, ctx.scales = bases, scales
        lows = h.split([b.shape[1] for b in bs], dim=1)
        return tuple(
            F.linear(x, base.weight, base.bias).addmm_(low, b.T) for base, low, b in zip(bases, lows, bs, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Float[Tensor, "rows _"]) -> tuple[Tensor | None, ...]:
        x, h, a, *bs = ctx.saved_tensors
        ranks = [b.shape[1] for b in bs]
        dh = torch.cat([g @ b for g, b in zip(grads, bs, strict=True)], dim=1)
        dx = None
        if ctx.needs_input_grad[0]:  # the first layer reads embeddings, which are frozen
            dx = dh @ a
            for g, base in zip(grads, ctx.bases, strict=True):
                dx.addmm_(g, base.weight)
        da = (dh.T @ x).float().split(ranks)
        lows = h.split(ranks, dim=1)
        # (low^T g)^T reads g as it lies; g^T low takes a third longer.
        db = [(low.T @ g).T.float() * scale for g, low, scale in zip(grads, lows, ctx.scales, strict=True)]
        return dx, None, None, *da, *db
