"""Forward passes: their arguments, and the checks that the router can follow their rows from the prompt on.

The mixture of a row depends on its text, so a pass is refused if its text is unknown. Examples are a model without
transformers' KV cache, a second prompt within one call of `generate` (contrast passes, decoding without a cache),
several sequences packed into a row, and a cache from elsewhere. Under a fixed mixture the text does not matter.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache, UnbatchedClassifierFreeGuidanceLogitsProcessor

from dlp_lora.engine.cache import CACHE_NAMES, CachedRows, cache_among
from dlp_lora.engine.calls import Call, Generating, call_setting, kept_tokens
from dlp_lora.errors import ModelError, PromptError

# The arguments of attention over packed sequences, or over the blocks of a paged cache.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "block_table", "read_index", "write_index")

# The text, its KV cache, and settings of the output.
OF_TEXT = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", *CACHE_NAMES),
    *("use_cache", "logits_to_keep", "labels", "num_items_in_batch"),
}


@dataclass(frozen=True)
class PassArguments:
    """The arguments of a forward pass: token ids, mask, KV cache, and the number of cached tokens."""

    kwargs: dict[str, Any]
    ids: Int[Tensor, "batch seq"] | None
    mask: Any
    cache: Cache | None
    num_cached: int

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> "PassArguments":
        """Reads the arguments of a model's forward, all by name."""
        cache = cache_among(kwargs.values())
        num_cached = int(cache.get_seq_length()) if cache is not None else 0
        return cls(kwargs, kwargs.get("input_ids"), kwargs.get("attention_mask"), cache, num_cached)

    def kind(self, known: CachedRows | None, generating: Generating | None) -> Literal["start", "step", "more"]:
        """A pass starts rows, takes a step of one token, or reads more text: the next turn, a chunk, a cropped cache.

        `known` are the rows of its KV cache. One token is a step unless it is the end of the prompt of a `generate`.
        """
        if self.ids is None or known is None or self.num_cached == 0:
            return "start"
        is_step = self.ids.shape[1] == 1 and known.ids.shape[1] == self.num_cached
        if is_step and generating is not None and generating.is_prompt(self.num_cached + 1):
            return "more"
        return "step" if is_step else "more"

    @property
    def num_kept(self) -> int | None:
        """The number of last tokens with logits; None for all tokens, or if the argument lists places."""
        number = self.kwargs.get("logits_to_keep")
        return number or None if isinstance(number, int) else None

    def kept(self, call: Call) -> Bool[Tensor, "batch seq"]:
        """Which of the tokens are not padding."""
        assert self.ids is not None
        return kept_tokens(self.ids, self.mask, num_cached=self.num_cached, endings=call.endings)


def other_inputs(arguments: PassArguments) -> dict[str, Any]:
    """The arguments of a pass over prompts beside the text, such as images, so that the prompts can be read again."""
    return {
        name: value
        for name, value in arguments.kwargs.items()
        if value is not None and name not in OF_TEXT and not name.startswith(("output_", "return_"))
    }


def lengthened(others: Mapping[str, Any], *, batch: int, num_tokens: int) -> dict[str, Any]:
    """The arguments beside the text; those with one number per token, such as its type, get zeros for later tokens."""
    inputs = dict(others)
    for name, value in others.items():
        is_by_token = isinstance(value, Tensor) and value.ndim == 2 and name.endswith("type_ids")
        if is_by_token and len(value) == batch and value.shape[1] < num_tokens:
            inputs[name] = F.pad(value, (0, num_tokens - value.shape[1]))
    return inputs


def check_keeps_cache(model: nn.Module) -> None:
    """Checks that a model keeps its state in transformers' KV cache, which carries the rows.

    Raises:
        ModelError: if it has none, or another state.
    """
    kind: Any = type(model)
    takes = set(inspect.signature(kind.forward).parameters)
    supports = getattr(kind, "_supports_default_dynamic_cache", None)
    # A forward without named arguments may accept one; its passes will show it.
    takes_none = "input_ids" in takes and not takes & set(CACHE_NAMES)
    if takes_none or (supports is not None and not supports()):
        raise ModelError(
            f"{kind.__name__} keeps no KV cache of transformers (a `Cache`): an answer cannot be followed sentence by "
            "sentence; take a model that does, or use one adapter with PEFT"
        )


def check_text_is_known(arguments: PassArguments, known: CachedRows | None, call: Call) -> None:
    """Checks that a pass without a fixed mixture continues the known text of its rows.

    Raises:
        PromptError: if its text is not known.
    """
    num_known = 0 if known is None else known.ids.shape[1]
    if arguments.num_cached > num_known:
        raise PromptError(
            f"the KV cache holds {arguments.num_cached} tokens, of which this engine has read {num_known}, so the "
            "router does not know the text; start with the whole prompt and a new cache, or use engine.fixed()"
        )
    if arguments.num_cached == 0 and call.generating is not None and call.generating.has_begun:
        raise PromptError(
            "a second prompt within one call of generate: a contrast pass, as of guidance, or a decoding step without "
            "a KV cache; routing cannot follow it: leave that setting out, or use engine.fixed()"
        )


def check_not_packed(arguments: PassArguments, kept: Bool[Tensor, "batch seq"]) -> None:
    """Checks that each row of a pass is one text.

    Raises:
        PromptError: if several sequences are packed into one.
    """
    positions = arguments.kwargs.get("position_ids")
    restarts = False
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == kept.shape[1]:
        falls = positions[:, 1:] < positions[:, :-1]
        restarts = bool((falls & kept[:, 1:] & kept[:, :-1]).any())
    if restarts or any(arguments.kwargs.get(name) is not None for name in PACKING):
        raise PromptError(
            "several sequences are packed into one row, as continuous batching and packed training have it; routing "
            "needs one text a row: pass them as rows with padding, or use engine.fixed()"
        )


def check_is_kept(cache: Cache | None, arguments: PassArguments, call: Call, model: nn.Module) -> None:
    """Checks that the KV cache has the tokens of a prompt after its pass.

    Raises:
        ModelError: if it has not; the next token would then look like another prompt.
    """
    assert arguments.ids is not None
    if cache is None:
        if call.generating is None:
            return  # nothing follows
        state = "no KV cache of transformers"
    else:
        num_held, num_read = int(cache.get_seq_length()), arguments.ids.shape[1]
        if num_held == num_read:
            return
        state = f"a {type(cache).__name__} of {num_held} tokens after a prompt of {num_read}"
    raise ModelError(
        f"{type(model).__name__} gives {state}, so its answers cannot be followed sentence by sentence; use "
        "engine.fixed(), or another model"
    )


def check_generate(kwargs: Mapping[str, Any], generation_config: Any) -> None:
    """Checks that a call of `generate`, with its generation config, can be routed.

    Raises:
        ValueError: if its passes would not read the answer token by token.
    """
    instead = "leave it out, or choose the adapters with engine.fixed(), under which it works"
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if call_setting(name, kwargs, generation_config) is not None:
            raise ValueError(
                f"{name} has the model read several guessed tokens at once, so sentences cannot be routed one by one "
                f"and the answer would be another; {instead}"
            )
    scale = call_setting("guidance_scale", kwargs, generation_config)
    processors = kwargs.get("logits_processor") or ()
    guides = any(isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor) for each in processors)
    if scale not in (None, 1, 1.0) or guides or kwargs.get("negative_prompt_ids") is not None:
        name = "negative_prompt_ids" if scale is None and not guides else "guidance_scale"
        raise ValueError(f"{name} runs the model over another prompt beside the answer, which has no route; {instead}")
    if kwargs.get("use_cache") is False:
        raise ValueError("routing by sentence follows the KV cache; leave use_cache on, or use engine.fixed()")


def has_like_images(model: nn.Module, ids: Int[Tensor, "batch seq"]) -> bool:
    """Whether all rows have the same numbers of images, sounds and videos; false for a text model."""
    config: Any = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return False
    names = [name for name in vars(config) if name.endswith(("_token_id", "_token_index"))]
    numbers = {getattr(config, name) for name in names if not name.startswith(("bos_", "eos_", "pad_"))}
    places = torch.tensor(sorted(n for n in numbers if isinstance(n, int)), dtype=ids.dtype, device=ids.device)
    counts = (ids[..., None] == places).sum(1)  # (batch, kinds)
    return bool((counts == counts[:1]).all()) and bool(counts.any())
