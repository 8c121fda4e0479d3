"""Fused linear layers: a base layer plus the low-rank pair that the current sentence was fused into (section 3.3).

`attach` puts a FusedLinear in the place of each linear layer that some adapter changes; `detach` puts the very
same base layers back.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlp_lora.bank import AdapterBank, FusedPair
from dlp_lora.errors import AdapterError, ModelError
from dlp_lora.peft_format import Adapter, read_base_copies


class FusedLinear(nn.Module):
    """A base layer plus the fused pair of its stack: `y = W x + ((x A) * gate) B`."""

    def __init__(self, base_layer: nn.Module, pair: FusedPair, layer: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.pair = pair
        self.layer = layer
        # A plain Linear is computed here: one module call fewer a layer and token. One with hooks
        # or a forward of its own, as offloading installs, is called.
        self._plain = type(base_layer) is nn.Linear and not (
            base_layer._forward_hooks or base_layer._forward_pre_hooks or "forward" in vars(base_layer)
        )

    def forward(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_out"]:
        base = self.base_layer
        y: Tensor = F.linear(x, base.weight, base.bias) if self._plain else base(x)  # type: ignore[arg-type]
        active = self.pair.active
        if active is None:
            return y
        a, b = active[self.layer]
        h = x.to(a.dtype) @ a  # (batch, seq, rank)
        if self.pair.gate is not None:
            h = h * self.pair.gate
        fused = torch.addmm(y.view(-1, y.shape[-1]).to(b.dtype), h.view(-1, h.shape[-1]), b)
        return fused.view(y.shape).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: some architectures read its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Maps each linear layer of a model to its (d_in, d_out), in the order of the model.

    Raises:
        ModelError: if fused layers are attached to the model already, or it has no linear layer.
    """
    if any(isinstance(module, FusedLinear) for module in model.modules()):
        raise ModelError("the model has fused layers attached already; call detach() on its engine first")
    shapes = {name: shape for name, module in model.named_modules() if (shape := _shape(module)) is not None}
    if not shapes:
        raise ModelError(f"{type(model).__name__} has no linear layer to attach to")
    return shapes


def pair_dtype(model: nn.Module) -> torch.dtype:
    """Gives the dtype to fuse in: the model's own on an accelerator, float32 on a CPU.

    A CPU takes about three times as long for a product of rank 24 in bfloat16 as in float32, and loses digits.
    """
    parameter = next(model.parameters())
    return torch.float32 if parameter.device.type == "cpu" else parameter.dtype


def attach(model: nn.Module, bank: AdapterBank) -> None:
    """Puts a FusedLinear in the place of each layer that an adapter of the bank changes; may be called again.

    Raises:
        AdapterError: if an adapter was trained on a base whose weights differ from the model's, where it tells.
    """
    for adapter in bank.adapters.values():
        _check_base_copies(model, adapter)
    touched = bank.touched()
    for stack in bank.stacks:
        for layer, name in enumerate(stack.modules):
            module = model.get_submodule(name)
            if name in touched and not isinstance(module, FusedLinear):
                model.set_submodule(name, FusedLinear(module, stack.pair, layer))


def detach(model: nn.Module) -> None:
    """Puts the base layers back: the same objects, never written to."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedLinear):
            model.set_submodule(name, module.base_layer)


def _check_base_copies(model: nn.Module, adapter: Adapter) -> None:
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
