"""MoRAL: a mixture of LoRA experts with a token-level router in each adapted module.

Yang, Ali, Wang, Hu and Wang: MoRAL: MoE Augmented LoRA for LLMs' Lifelong Learning. arXiv 2402.11260, 2024.

The paper puts several LoRAs and a router beside frozen linear layers; for each token the router's softmax weighs the
top-k LoRAs.

That is MeteoRA's equation, and the one difference here is how it is computed: we know of no public code, so the experts
are gone through one by one, each with its tokens, as Mixtral and the codes derived from it do (`gated.looped`). The
search for an expert's tokens is paid for each expert, chosen or not; an expert's tokens go through in one product. Ours
too: routers are random, and the LoRAs lie where the given adapters have them, while the paper's lie in the feed-forward
layers and are trained together with the router.
"""

from collections.abc import Mapping

from transformers import PreTrainedModel

from dlp_lora.bank.peft_format import Adapter
from dlp_lora.lab.bench.baselines.gated import attach_gated, looped, touched


def attach_moral(
    model: PreTrainedModel, adapters: Mapping[str, Adapter], *, top_k: int = 2, seed: int = 0
) -> PreTrainedModel:
    """Gives each module that some adapter changes a router over all adapters; `seed` draws the routers' weights.

    Raises:
        AdapterError: if an adapter does not fit the model.
        ModelError: if something is attached to the model already.
    """
    modules = {module: list(adapters.values()) for module in touched(model, adapters)}
    return attach_gated(model, modules, add=looped, top_k=top_k, seed=seed)
