"""The shared parts of token-level methods: a gate that chooses adapters for each token, and a layer that adds them.

What is added is held in the dtype in which our own engine holds adapters (`fused.pair_dtype`), so that none is slow
for bfloat16 on a CPU. Adapters of a module lie in one tensor, padded to one rank; one that leaves the module alone is
all zeros there, and the gate may choose it all the same.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlp_lora.bank.attach import linear_layers, pair_dtype
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import Adapter
from dlp_lora.errors import ModelError


class Choice(NamedTuple):
    """The adapters that each token goes to, by number, and their weights, which sum to 1."""

    weights: Float[Tensor, "tokens slots"]
    adapters: Int[Tensor, "tokens slots"]


class Part(NamedTuple):
    """The tokens that one adapter gets, and its weight for each."""

    adapter: int
    tokens: Int[Tensor, " here"]
    weights: Float[Tensor, "here 1"]


Add = Callable[[Tensor, Choice, Tensor, Tensor], Tensor]
"""The chosen adapters' addition to each token's output, from x, the choice, and A and B of all adapters."""


class TopKGate(nn.Module):
    """Scores adapters linearly for each token, and weighs the `top_k` best by the softmax over their scores.

    Some of the authors' codes take the softmax over all and divide by the chosen ones' sum, which is the same.
    """

    def __init__(
        self,
        d_in: int,
        num_adapters: int,
        *,
        top_k: int,
        generator: torch.Generator,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_adapters:
            raise ValueError(f"top_k={top_k} of {num_adapters} adapters; expected 1 to {num_adapters}")
        self.top_k = top_k
        weight = nn.init.kaiming_uniform_(torch.empty(num_adapters, d_in), a=math.sqrt(5), generator=generator)
        self.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)

    def forward(self, x: Float[Tensor, "tokens d_in"]) -> Choice:
        scores, adapters = (x @ self.weight.T).topk(self.top_k, dim=-1)
        return Choice(scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype), adapters)


class Wrapped(nn.Module, ABC):
    """Stands in the place of one of the base model's modules, and keeps it."""

    @abstractmethod
    def release(self) -> nn.Module:
        """Gives the base's module back, with the weights that it had."""


class GatedLinear(Wrapped):
    """A linear layer, its adapters and its gate: `y = W x + sum of w_i B_i A_i x` over the chosen."""

    a: Tensor
    b: Tensor

    def __init__(self, base_layer: nn.Module, gate: nn.Module, a: Tensor, b: Tensor, add: Add) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gate = gate
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        self.add = add

    def forward(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_out"]:
        y: Tensor = self.base_layer(x)
        tokens = x.reshape(-1, x.shape[-1]).to(self.a.dtype)
        delta = self.add(tokens, self.gate(tokens), self.a, self.b)
        return y + delta.view(y.shape).to(y.dtype)

    def release(self) -> nn.Module:
        return self.base_layer


def gathered(
    x: Float[Tensor, "tokens d_in"],
    choice: Choice,
    a: Float[Tensor, "adapters rank d_in"],
    b: Float[Tensor, "adapters rank d_out"],
) -> Float[Tensor, "tokens d_out"]:
    """Copies A and B of each token's adapters together, and multiplies them in two batched products."""
    tokens, slots = choice.adapters.shape
    chosen = choice.adapters.flatten()
    low = torch.bmm(x.repeat_interleave(slots, dim=0)[:, None], a[chosen].transpose(1, 2))  # (tokens * slots, 1, rank)
    out = torch.bmm(low, b[chosen]).view(tokens, slots, -1)
    return (choice.weights[:, None] @ out).squeeze(1)


def looped(
    x: Float[Tensor, "tokens d_in"],
    choice: Choice,
    a: Float[Tensor, "adapters rank d_in"],
    b: Float[Tensor, "adapters rank d_out"],
) -> Float[Tensor, "tokens d_out"]:
    """Goes through the adapters, each with the tokens that chose it, as Mixtral goes through its experts."""
    return add_parts(x, split(choice, len(a)), a, b)


def split(choice: Choice, num_adapters: int) -> list[Part]:
    """Gathers each adapter's tokens; those that no token chose are left out, after looking for one."""
    parts = []
    for i in range(num_adapters):
        tokens, slots = torch.where(choice.adapters == i)
        if len(tokens):
            parts.append(Part(i, tokens, choice.weights[tokens, slots, None]))
    return parts


def add_parts(
    x: Float[Tensor, "tokens d_in"],
    parts: Sequence[Part],
    a: Float[Tensor, "adapters rank d_in"],
    b: Float[Tensor, "adapters rank d_out"],
) -> Float[Tensor, "tokens d_out"]:
    """Sums the additions of the adapters to their tokens."""
    total = x.new_zeros(len(x), b.shape[-1])
    for i, tokens, weights in parts:
        total.index_add_(0, tokens, (x[tokens] @ a[i].T @ b[i]) * weights)
    return total


def attach_gated(
    model: PreTrainedModel, modules: Mapping[str, Sequence[Adapter]], *, add: Add, top_k: int, seed: int
) -> PreTrainedModel:
    """Puts a GatedLinear with the adapters given for it in the place of each module."""
    generator = torch.Generator().manual_seed(seed)
    gated = {}
    for name, adapters in modules.items():
        a, b = (stack[0] for stack in stacked(model, [name], adapters))
        gate = TopKGate(a.shape[-1], len(a), top_k=top_k, generator=generator, dtype=a.dtype, device=a.device)
        gated[name] = GatedLinear(model.get_submodule(name), gate, a, b, add)
    for name, module in gated.items():
        model.set_submodule(name, module)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Removes the attached baseline: the base's modules are bit for bit as before."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Wrapped):
            model.set_submodule(name, module.release())
    return model


def touched(model: PreTrainedModel, adapters: Mapping[str, Adapter]) -> list[str]:
    """Lists the modules that some adapter changes, in the order of the model.

    Raises:
        AdapterError: if an adapter does not fit the model.
        ModelError: if something is attached to the model already.
    """
    check(model, adapters)
    layout = linear_layers(model)
    AdapterBank(layout, adapters.values(), device="meta")  # refuses adapters that do not fit
    return [name for name in layout if any(name in adapter.modules for adapter in adapters.values())]


def check(model: PreTrainedModel, adapters: Mapping[str, Adapter]) -> None:
    """Checks that there are adapters, and a model that no baseline is attached to.

    Raises:
        ModelError: if one is.
    """
    if not adapters:
        raise ValueError("there are no adapters to choose from; give at least one")
    if any(isinstance(module, Wrapped) for module in model.modules()):
        raise ModelError("the model has a baseline attached already; call baselines.detach(model) first")


def stacked(
    model: PreTrainedModel, modules: Sequence[str], adapters: Sequence[Adapter]
) -> tuple[Float[Tensor, "modules adapters rank d_in"], Float[Tensor, "modules adapters rank d_out"]]:
    """Lays the LoRAs of modules of one shape into one A and one B, which carries their scaling."""
    found = [
        (m, i, adapter.modules[module])
        for m, module in enumerate(modules)
        for i, adapter in enumerate(adapters)
        if module in adapter.modules
    ]
    rank = max(lora.rank for _, _, lora in found)
    dtype, device = pair_dtype(model), next(model.get_submodule(modules[0]).parameters()).device
    a = torch.zeros(len(modules), len(adapters), rank, found[0][2].a.shape[1], dtype=dtype, device=device)
    b = torch.zeros(len(modules), len(adapters), rank, found[0][2].b.shape[0], dtype=dtype, device=device)
    for m, i, lora in found:
        a[m, i, : lora.rank] = lora.a
        b[m, i, : lora.rank] = lora.b.float().T * lora.scaling
    return a, b
