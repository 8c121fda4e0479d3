"""PESC: bottleneck adapters as experts behind each feed-forward block.

Wu, Zheng and Yu: Parameter-Efficient Sparsity Crafting from Dense to Mixture-of-Experts for Instruction Tuning on
General Tasks. arXiv 2401.02731, EMNLP 2024.

The paper turns a dense model into a sparse one: all experts of a layer share the dense feed-forward block's weights and
differ in a small adapter behind it. For each token a linear router, which reads the block's input, weighs the top-2
experts by the softmax of their scores.

As in the authors' code: the block runs once for all experts; an adapter is `up(gelu(down(y)))` of its output y, of
width 64, with 8 experts; the up-projections start at zero, so that the crafted model starts as the dense one; experts
are gone through one by one, each with its tokens. Ours: routers and down-projections are random, as many experts as
adapters are given (a LoRA cannot be turned into a bottleneck, so their weights are not used). What the experts add is
summed and added to y: the same, as the weights sum to 1, and exact where the experts add nothing. The LoRAs that the
paper merges into the dense weights after training cost nothing and are left out.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlp_lora.bank.attach import pair_dtype
from dlp_lora.bank.peft_format import Adapter
from dlp_lora.errors import ModelError
from dlp_lora.lab.bench.baselines.gated import TopKGate, Wrapped, check, split


class BottleneckExperts(Wrapped):
    """A feed-forward block, bottleneck adapters behind it, and a router that reads the block's input."""

    def __init__(self, base_layer: nn.Module, gate: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gate = gate
        self.down = nn.Parameter(down, requires_grad=False)  # (experts, width, d_model)
        self.up = nn.Parameter(up, requires_grad=False)  # (experts, width, d_model)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        y: Tensor = self.base_layer(x)
        inputs, outputs = (tensor.reshape(-1, x.shape[-1]).to(self.up.dtype) for tensor in (x, y))
        added = torch.zeros_like(outputs)
        for i, tokens, weights in split(self.gate(inputs), len(self.up)):
            hidden = F.gelu(outputs[tokens] @ self.down[i].T)  # (here, width)
            added.index_add_(0, tokens, (hidden @ self.up[i]) * weights)
        return y + added.view(y.shape).to(y.dtype)

    def release(self) -> nn.Module:
        return self.base_layer


def attach_pesc(
    model: PreTrainedModel, adapters: Mapping[str, Adapter], *, width: int = 64, top_k: int = 2, seed: int = 0
) -> PreTrainedModel:
    """Puts as many experts as there are adapters behind each feed-forward block (a module named `mlp`).

    Raises:
        ModelError: if the model has no such block, or something is attached to it already.
    """
    check(model, adapters)
    blocks = {name: module for name, module in model.named_modules() if name.endswith(".mlp")}
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} has no module named mlp; PESC's experts go behind feed-forward blocks"
        )
    generator = torch.Generator().manual_seed(seed)
    d_model, num_experts = model.config.get_text_config().hidden_size, len(adapters)
    dtype = pair_dtype(model)
    for name, block in blocks.items():
        device = next(block.parameters()).device
        gate = TopKGate(d_model, num_experts, top_k=top_k, generator=generator, dtype=dtype, device=device)
        down = torch.empty(num_experts, width, d_model)
        for own in down:
            nn.init.kaiming_uniform_(own, a=math.sqrt(5), generator=generator)
        down = down.to(device, dtype)
        model.set_submodule(name, BottleneckExperts(block, gate, down, torch.zeros_like(down)))
    return model
