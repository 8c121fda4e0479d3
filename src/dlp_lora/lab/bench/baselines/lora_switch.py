"""LoRA-Switch: one choice per token for all layers, merged into the weights before the token's pass.

Kong, Li, Fang, Feng, He, Dong, Wang, Li, Kong and Liu: LoRA-Switch: Boosting the Efficiency of Dynamic LLM Adapters via
System-Algorithm Co-design. arXiv 2405.17741, 2024. (As AdaFuse: arXiv 2603.11873, AAAI 2026.)

The paper routes each token once, by a top-2 gate on the input of the first adapted layer, and uses the weights that
come out in every layer: `y = W x + sum of G(x_1)_i B_i A_i x`. In decoding, the chosen adapters of all layers are
merged into the weights before the token runs, and the last token's taken out, in one segmented CUDA kernel (SGMM). The
prompt is not sped up.

Vectorised here: modules of one shape (all q, all v) are merged in one batched product, the nearest that plain PyTorch
comes to SGMM. Not vectorised: a pass over several tokens (a prompt, a batch) has several mixtures, so nothing can be
merged for it; it goes through the adapters one by one, as MoE-LoRA in training does, though the tokens of each are
looked up once for all layers. Ours: the gate is random, and the merged weights are written beside the pristine ones,
which stay as they are, where the paper subtracts the last token's delta again. That leaves no rounding behind, but
copies the adapted layers' weights once more per token, and holds them twice.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlp_lora.bank.linear import is_plain
from dlp_lora.bank.peft_format import Adapter
from dlp_lora.errors import ModelError
from dlp_lora.lab.bench.baselines.gated import Choice, Part, TopKGate, Wrapped, add_parts, split, stacked, touched


class Stack:
    """Modules of one shape: their weights become views of one tensor, beside which lie the merged ones."""

    def __init__(self, layers: Sequence[nn.Linear], a: Tensor, b: Tensor) -> None:
        self.pristine = torch.stack([layer.weight.data for layer in layers])  # (modules, d_out, d_in)
        for layer, weight in zip(layers, self.pristine, strict=True):
            layer.weight.data = weight
        self.merged = torch.empty_like(self.pristine)
        self.a, self.b = a, b  # (modules, adapters, rank, d_in), (modules, adapters, rank, d_out)

    def merge(self, choice: Choice) -> None:
        """Writes every module's weights with one token's adapters merged in."""
        weights, chosen = choice.weights[0], choice.adapters[0]
        a = self.a[:, chosen].flatten(1, 2)  # (modules, slots * rank, d_in)
        b = (self.b[:, chosen] * weights[:, None, None]).flatten(1, 2)
        dtype = self.pristine.dtype
        torch.baddbmm(self.pristine, b.transpose(1, 2).to(dtype), a.to(dtype), out=self.merged)


class Switch:
    """The model's only gate, and its choice for the current pass."""

    def __init__(self, gate: nn.Module, stacks: Sequence[Stack]) -> None:
        self.gate = gate
        self.stacks = stacks
        self.is_merged = False
        self.parts: list[Part] = []

    @torch.no_grad()
    def decide(self, x: Float[Tensor, "tokens d_in"]) -> None:
        """Chooses for the tokens of a pass, from the input of the first adapted layer; merges for a single token."""
        first = self.stacks[0]
        choice: Choice = self.gate(x.to(first.a.dtype))
        self.is_merged = len(x) == 1
        if self.is_merged:
            for stack in self.stacks:
                stack.merge(choice)
        else:
            self.parts = split(choice, first.a.shape[1])


class SwitchedLinear(Wrapped):
    """A linear layer that runs on merged weights; in a pass over several tokens, on its own and the adapters beside."""

    def __init__(self, base_layer: nn.Linear, switch: Switch, stack: Stack, index: int, *, is_first: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.switch = switch
        self.a, self.b, self.merged = stack.a[index], stack.b[index], stack.merged[index]
        self.is_first = is_first

    def forward(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_out"]:
        tokens = x.reshape(-1, x.shape[-1])
        if self.is_first:
            self.switch.decide(tokens)
        if self.switch.is_merged:
            return F.linear(x, self.merged, self.base_layer.bias)
        y: Tensor = self.base_layer(x)
        delta = add_parts(tokens.to(self.a.dtype), self.switch.parts, self.a, self.b)
        return y + delta.view(y.shape).to(y.dtype)

    def release(self) -> nn.Module:
        self.base_layer.weight.data = self.base_layer.weight.data.clone()  # no longer a view of the stack
        return self.base_layer


def attach_lora_switch(
    model: PreTrainedModel, adapters: Mapping[str, Adapter], *, top_k: int = 2, seed: int = 0
) -> PreTrainedModel:
    """Lets one gate, on the input of the first adapted module, choose for all modules that some adapter changes.

    The first module in the model's order must be the first to run, as in Llama and its like.

    Raises:
        AdapterError: if an adapter does not fit the model.
        ModelError: if something is attached to the model already, or a layer's weights cannot be merged into.
    """
    layers = {name: _plain(model, name) for name in touched(model, adapters)}
    shapes: dict[torch.Size, list[str]] = {}
    for name, layer in layers.items():
        shapes.setdefault(layer.weight.shape, []).append(name)
    found, first = list(adapters.values()), next(iter(layers))
    loras = [stacked(model, alike, found) for alike in shapes.values()]
    a = loras[0][0]  # of the first module, too
    generator = torch.Generator().manual_seed(seed)
    gate = TopKGate(a.shape[-1], len(found), top_k=top_k, generator=generator, dtype=a.dtype, device=a.device)
    stacks = [Stack([layers[name] for name in alike], *own) for alike, own in zip(shapes.values(), loras, strict=True)]
    switch = Switch(gate, stacks)
    for stack, alike in zip(stacks, shapes.values(), strict=True):
        for i, name in enumerate(alike):
            model.set_submodule(name, SwitchedLinear(layers[name], switch, stack, i, is_first=name == first))
    return model


def _plain(model: PreTrainedModel, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    if not is_plain(layer):
        raise ModelError(
            f"{name} is a {type(layer).__name__}, or has hooks; LoRA-Switch merges into weights, so load the base "
            f"unquantised and on one device"
        )
    return cast(nn.Linear, layer)
