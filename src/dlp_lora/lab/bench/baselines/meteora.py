"""MeteoRA: in every adapted module, a separate gate chooses adapters for every token.

Xu, Lai and Huang: MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models. arXiv 2405.13053, ICLR 2025.

The paper embeds ready LoRAs of many tasks in a model and trains only gates: one linear map per adapted module from the
token's hidden state to a score per LoRA; the two best LoRAs are added, weighed by the softmax of their scores.

As in the authors' code, which by default copies each token's A and B together and multiplies them in two batched
products (their `bmm-torch`), so that the cost per token hardly grows with the number of adapters. Ours: gates are
random; adapters of any rank and target are taken, padded with zeros; their Triton kernel, and the temperature that they
set by hand for some tasks, are left out.
"""

from collections.abc import Mapping

from transformers import PreTrainedModel

from dlp_lora.bank.peft_format import Adapter
from dlp_lora.lab.bench.baselines.gated import attach_gated, gathered, touched


def attach_meteora(
    model: PreTrainedModel, adapters: Mapping[str, Adapter], *, top_k: int = 2, seed: int = 0
) -> PreTrainedModel:
    """Gives each module that some adapter changes a gate over all adapters; `seed` draws the gates' weights.

    Raises:
        AdapterError: if an adapter does not fit the model.
        ModelError: if something is attached to the model already.
    """
    modules = {module: list(adapters.values()) for module in touched(model, adapters)}
    return attach_gated(model, modules, add=gathered, top_k=top_k, seed=seed)
