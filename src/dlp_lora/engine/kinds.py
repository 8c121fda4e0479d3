"""Kinds of model: the causal LMs whose passes the router can follow, and the reasons against others."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.engine.cache import cache_among
from dlp_lora.engine.passes import check_keeps_cache
from dlp_lora.errors import ModelError

_ANSWER_NO_TOKEN = ("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "RewardModel")
_WHAT_TO_DO = "take a decoder-only causal LM with attention"


def check_config(source: str, config: PretrainedConfig) -> None:
    """Checks that a checkpoint belongs to a causal LM, before its weights are read.

    Raises:
        ModelError: with the reason, if it is not.
    """
    if config.is_encoder_decoder:
        raise _encoder_decoder(f"the base model {source!r}")
    kinds: Sequence[str] = config.architectures or ()
    if kinds and all(kind.endswith(_ANSWER_NO_TOKEN) for kind in kinds):
        raise ModelError(
            f"the base model {source!r} is saved as {kinds[0]}, which gives no next token: it is a classifier or an "
            f"encoder; {_WHAT_TO_DO}"
        )
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not has_code and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"the base model {source!r} is of type {config.model_type!r}, for which transformers has no "
            f"AutoModelForCausalLM; {_WHAT_TO_DO}, or load it with its class and give it with tokenizer="
        )


def check_weights(source: str, missing: Sequence[str]) -> None:
    """Checks that a checkpoint has all weights of its causal LM.

    Raises:
        ModelError: if some would be random.
    """
    if missing:
        names = sorted(missing)
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ModelError(
            f"the base model {source!r} has no weights for {shown}, which would be random: it is a bare decoder or was "
            f"trained for something else; {_WHAT_TO_DO}"
        )


def check_kind(model: Any, base: BaseLayers) -> None:
    """Checks that a model is a causal LM whose passes the router can follow.

    Raises:
        ModelError: with the reason, if it is not.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _encoder_decoder(name)
    if hasattr(model, "can_generate") and not model.can_generate():
        raise ModelError(
            f"{name} gives no next token: it is a bare decoder, a classifier or an encoder; {_WHAT_TO_DO}, as "
            "AutoModelForCausalLM loads it"
        )
    check_keeps_cache(model)
    if (reason := _reason_of_pass(base.skeleton)) is not None:
        raise _not_followed(name, reason)


def _reason_of_pass(skeleton: Any) -> str | None:
    """Runs a pass of one token without weights; returns the reason if the router cannot follow it, else None."""
    try:
        with torch.no_grad():
            output = skeleton(torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=True)
    except Exception:  # some models need their weights; passes of the real model are checked later
        return None
    cache = cache_among(output.values()) if isinstance(output, dict) else None
    if cache is None:
        return "keeps no KV cache of transformers"
    try:
        return None if cache.get_seq_length() == 1 else "has a KV cache that does not count tokens"
    except ValueError:  # there is no such layer
        return "has no attention: its state is not a KV cache of tokens"


def _encoder_decoder(what: str) -> ModelError:
    return ModelError(f"{what} is an encoder-decoder, which reads and answers in two models; {_WHAT_TO_DO}")


def _not_followed(name: str, reason: str) -> ModelError:
    return ModelError(f"{name} {reason}, so its answers cannot be followed sentence by sentence; {_WHAT_TO_DO}")
