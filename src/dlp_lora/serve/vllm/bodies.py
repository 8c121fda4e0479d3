"""Bodies: a request and its answer so far in, the body of the next request to vLLM out.

An answer may take several requests, one per mixture. Each continues the one before. vLLM counts per request, so the
body has the number of remaining tokens, and the penalties of earlier tokens.
"""

import hashlib
from collections import Counter
from typing import Any

from dlp_lora.serve.answer_builder import AnswerBuilder
from dlp_lora.serve.backend import BackendError, Sampling

MAX_BIAS = 100.0  # beyond, vLLM cuts


def body_of(answer: AnswerBuilder, model: str) -> dict[str, Any]:
    """Makes the body of the next request for an answer, to a model or adapter."""
    sampling, num_tokens = answer.request.sampling, answer.num_tokens
    body: dict[str, Any] = {
        "model": model,
        "prompt": answer.tokens,
        "max_tokens": answer.max_tokens - num_tokens,
        "min_tokens": max(0, min(sampling.min_tokens, answer.max_tokens) - num_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        # End-of-sequence is among the ending tokens, so that `min_tokens` applies to it, too.
        "ignore_eos": True,
        "stop_token_ids": sorted(answer.end_ids),
        "add_special_tokens": False,
        "return_token_ids": True,
    }
    if biases := _biases(answer):
        body["logit_bias"] = {str(token): bias for token, bias in biases.items()}
    if sampling.seed is not None:
        body["seed"] = _seed(sampling.seed, num_tokens)
    if sampling.num_logprobs is not None:
        body |= {"logprobs": sampling.num_logprobs, "return_tokens_as_token_ids": True}
    if sampling.grammar is not None:
        body["structured_outputs"] = {"json": _schema(sampling)}
    return body


def _biases(answer: AnswerBuilder) -> dict[int, float]:
    """The caller's biases, and the frequency penalty for tokens of earlier requests."""
    sampling = answer.request.sampling
    biases = Counter(sampling.logit_bias)
    if sampling.frequency_penalty:
        for token, count in Counter(answer.tokens[answer.num_prompt :]).items():
            biases[token] -= sampling.frequency_penalty * count  # type: ignore[assignment]
    return {token: max(-MAX_BIAS, min(MAX_BIAS, bias)) for token, bias in biases.items()}


def _seed(seed: int, num_tokens: int) -> int:
    """The seed of a request, from the caller's seed and the place of its first token."""
    if num_tokens:
        seed = int.from_bytes(hashlib.sha256(f"{seed} {num_tokens}".encode()).digest()[:8])
    return seed % 2**63  # vLLM's are signed


def _schema(sampling: Sampling) -> Any:
    schema = sampling.grammar and sampling.grammar.schema
    if schema is None:
        raise BackendError("vLLM follows JSON schemas alone, and this request has another grammar")
    return schema
