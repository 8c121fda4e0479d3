"""MoLA: a mixture of LoRA experts, more of them in higher layers.

Gao, Chen, Rao, Sun, Liu, Peng, Zhang, Guo, Yang and Subrahmanian: Higher Layers Need More LoRA Experts. arXiv
2402.08562, 2024; MoLA: MoE LoRA with Layer-wise Expert Allocation, Findings of NAACL 2025.

The paper gives each layer its own number of LoRA experts (best: 2, 4, 6 and 8 in the four quarters of the layers), each
adapted module of a layer a linear router over its layer's experts, and each token the two best, weighed by their
softmax.

As in the authors' code, experts are gone through one by one, each with the tokens that chose it. Ours: routers are
random; a layer's n experts are the first n of the given adapters, where the paper trains each layer's anew. The paper
adapts all linear layers, here the adapters' own targets count: on q and v alone, MoLA costs less than it reports.
"""

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from dlp_lora.bank.peft_format import Adapter
from dlp_lora.errors import AdapterError
from dlp_lora.lab.bench.baselines.gated import attach_gated, looped, touched


def attach_mola(
    model: PreTrainedModel,
    adapters: Mapping[str, Adapter],
    *,
    num_experts: Sequence[int] = (2, 4, 6, 8),
    top_k: int = 2,
    seed: int = 0,
) -> PreTrainedModel:
    """Gives each adapted module a router over its layer's adapters.

    The layers fall into as many equal runs as `num_experts` has numbers, from the lowest up.

    Raises:
        AdapterError: if an adapter does not fit the model, or changes a module outside its layers.
        ModelError: if something is attached to the model already.
    """
    if max(num_experts) > len(adapters):
        raise ValueError(
            f"num_experts={tuple(num_experts)} asks for {max(num_experts)} adapters, but there are {len(adapters)}; "
            f"give more adapters or lower it"
        )
    num_layers: int = model.config.get_text_config().num_hidden_layers
    modules = {}
    for module in touched(model, adapters):
        experts = list(adapters.values())[: num_experts[_layer(module) * len(num_experts) // num_layers]]
        if any(module in adapter.modules for adapter in experts):
            modules[module] = experts
    return attach_gated(model, modules, add=looped, top_k=top_k, seed=seed)


def _layer(module: str) -> int:
    number = re.search(r"\.(\d+)\.", module)
    if number is None:
        raise AdapterError(f"{module} lies in no numbered layer, so MoLA has no number of experts for it; leave it out")
    return int(number[1])
