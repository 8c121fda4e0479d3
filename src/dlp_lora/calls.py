"""A call of Hugging Face's `generate`: what may be asked of one that is followed sentence by sentence, and its seed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

# What is made from prompts here, or leads to another result than rows with a trace.
NOT_ARGUMENTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "return_dict_in_generate", "assistant_model")


def call_setting(name: str, kwargs: Mapping[str, Any], generation_config: Any) -> Any:
    """What a call of `generate` sets: its own argument, before its config's, before the model's; None if nothing."""
    configs = (kwargs.get("generation_config"), generation_config)
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def check_call(kwargs: Mapping[str, Any], generation_config: Any) -> None:
    """Checks the arguments of a call, its own generation config and the model's.

    Raises:
        ValueError: if one of them cannot be followed.
    """
    for name in NOT_ARGUMENTS:
        given = call_setting(name, kwargs, generation_config)
        if given is not None and given is not False:
            raise ValueError(f"{name} is not an argument of engine.generate; use engine.model.generate")
    if call_setting("prompt_lookup_num_tokens", kwargs, generation_config) is not None:
        raise ValueError(
            "prompt_lookup_num_tokens reads several tokens at once, so sentences cannot be routed one by one; leave "
            "it out"
        )
    if call_setting("use_cache", kwargs, generation_config) is False:
        raise ValueError("routing by sentence follows the KV cache; leave use_cache on")


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Samples with a seed, if there is one, and leaves PyTorch's random numbers as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices) if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        yield
