"""Likelihoods under a fixed mixture: of a question's choices, and the paper's teacher-forced measure."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from dlp_lora.engine.cache import cache_argument
from dlp_lora.engine.engine import Engine
from dlp_lora.policy import Mixture


@torch.no_grad()
def choice_likelihoods(
    engine: Engine, read: Sequence[int], choices: Sequence[Sequence[int]], mixture: Mixture
) -> list[float]:
    """Gives the mean log-likelihood a token of each choice after the prompt `read`.

    The prompt is encoded once; the choices go on from copies of its KV cache.
    """
    model: Any = engine.model
    device = model.device
    cache = DynamicCache(config=model.config)
    with engine.fixed(mixture):
        prompt = torch.tensor([list(read)], device=device)
        first = model(prompt, **cache_argument(cache), use_cache=True, logits_to_keep=1).logits[0, -1]
        scores = [first.float().log_softmax(-1)[choice[0]] for choice in choices]
        width = max(len(choice) for choice in choices) - 1
        if width:
            cache.batch_repeat_interleave(len(choices))
            ids = torch.zeros(len(choices), width, dtype=torch.long, device=device)
            for i, choice in enumerate(choices):
                ids[i, : len(choice) - 1] = torch.tensor(choice[:-1])
            logits = model(ids, **cache_argument(cache), use_cache=True).logits.float().log_softmax(-1)
            for i, choice in enumerate(choices):
                learned = torch.tensor(choice[1:], device=device)
                scores[i] = scores[i] + logits[i, : len(choice) - 1].gather(-1, learned[:, None]).sum()
    return [round(float(score) / len(choice), 5) for score, choice in zip(scores, choices, strict=True)]


@torch.no_grad()
def teacher_forced(engine: Engine, read: Sequence[int], learned: Sequence[int], mixture: Mixture) -> list[int]:
    """Gives the likeliest token at each place of the gold answer, with the gold tokens before it given.

    The paper's released code measures this: one forward pass over prompt and gold answer. It flatters every
    method, as each token is guessed after a correct beginning.
    """
    model: Any = engine.model
    ids = torch.tensor([[*read, *learned]], device=model.device)
    with engine.fixed(mixture):
        logits = model(ids, use_cache=False, logits_to_keep=len(learned) + 1).logits[0, :-1]
    found: list[int] = logits.argmax(-1).tolist()
    return found
