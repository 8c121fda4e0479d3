"""Sampling: the fields of a request in, a backend's Sampling out."""

from collections.abc import Mapping
from typing import Any

from dlp_lora.serve.backend import Grammar, Sampling
from dlp_lora.serve.errors import invalid
from dlp_lora.serve.schema import SamplingFields

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

LEAST_TEMPERATURE = 1e-5  # below it, an answer is greedy, as in vLLM: float32 would overflow


def sampling_of(
    fields: SamplingFields,
    defaults: Mapping[str, Any],
    *,
    number: int,
    max_tokens: int | None,
    vocab_size: int,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> Sampling:
    """Returns the sampling of answer `number` of a request; with a seed, each answer gets another one.

    Raises:
        APIError: if `logit_bias` names an unknown token.
    """
    values = {name: getattr(fields, name) for name in NAMES if getattr(fields, name) is not None}
    values = {**defaults, **values}
    if values.get("temperature", 1.0) < LEAST_TEMPERATURE:
        values["temperature"] = 0.0
    if values.get("top_k") == -1:
        values["top_k"] = 0
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    return Sampling(
        **values,
        logit_bias=_biases(fields.logit_bias or {}, vocab_size),
        seed=None if fields.seed is None else (fields.seed + number) % 2**64,
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens or 0,
        stop=stop,
        stop_token_ids=frozenset(fields.stop_token_ids or ()),
        ignore_eos=bool(fields.ignore_eos),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        grammar=grammar,
    )


def _biases(given: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) < 20) or int(token) >= vocab_size:
            raise invalid(f"logit_bias: {token[:40]!r} is no token id of 0 to {vocab_size - 1}", "logit_bias")
    return {int(token): bias for token, bias in given.items()}
