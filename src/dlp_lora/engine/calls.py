"""A call: the settings of one answer, and checks of the arguments of Hugging Face's `generate`."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dlp_lora.engine.routing_log import RoutingLog
from dlp_lora.policy import Mixture, RoutingSettings
from dlp_lora.router import Context, Router
from dlp_lora.sentences import Segmenter, SentenceSegmenter


@dataclass(frozen=True)
class Endings:
    """The token ids that end a row in `generate`, and those that pad it; and whether a row may also stop without such a
    token while others go on, at a stop string or by a criterion of the caller.
    """

    eos_ids: frozenset[int] = frozenset()
    pad_ids: frozenset[int] = frozenset()
    has_others: bool = False

    @classmethod
    def of_model(cls, generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> "Endings":
        """The ids of the model's generation config and of its tokenizer, for passes outside `generate`."""
        return cls(
            _ids(generation_config.eos_token_id) | _ids(tokenizer.eos_token_id),
            _ids(generation_config.pad_token_id) | _ids(tokenizer.pad_token_id),
        )

    @classmethod
    def of_call(cls, kwargs: Mapping[str, Any], generation_config: Any) -> "Endings":
        """The ids of one call of `generate`: its arguments come before its config, and this before the model's."""
        eos, pad = (call_setting(name, kwargs, generation_config) for name in ("eos_token_id", "pad_token_id"))
        others = ("stop_strings", "stopping_criteria")
        return cls(_ids(eos), _ids(pad), any(call_setting(name, kwargs, generation_config) for name in others))

    def is_after_end(self, token: int) -> bool:
        """Whether a token after the end of a row is not part of its answer."""
        return token in self.pad_ids or token in self.eos_ids

    def trim(self, rows: Sequence[list[int]], special_ids: Collection[int]) -> list[list[int]]:
        """The answers of all rows with the tokens that end them, without padding.

        A row that stops before others without such a token is padded behind its answer. This padding is recognised
        only if it is a special token; then it hides such tokens that end the answer of a row.
        """
        padding = self.pad_ids & set(special_ids) if self.has_others and len(rows) > 1 else frozenset()
        return [tokens[: self._length(tokens, padding)] for tokens in rows]

    def _length(self, tokens: Sequence[int], padding: Collection[int]) -> int:
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos_ids), None)
        if end is None:
            end = next((i + 1 for i in reversed(range(len(tokens))) if tokens[i] not in padding), 0)
        return end


@dataclass(eq=False, kw_only=True)
class Generating:
    """One running call of the model's `generate`: the length of its prompts, and whether a pass has begun."""

    num_prompt: int | None = None
    has_begun: bool = False

    def is_prompt(self, num_tokens: int) -> bool:
        """Whether the first `num_tokens` tokens of a row are in its prompt."""
        return self.num_prompt is not None and num_tokens <= self.num_prompt


@dataclass(frozen=True, kw_only=True)
class Call:
    """The settings of one answer: routing settings, router, segmenter, fixed mixtures and endings.

    `mixtures` are fixed by the caller, one for all rows or one per row; with None, the router chooses. `segmenter`
    makes a segmenter for a row. `contexts` are the router's contexts of known prompts, by their tokens; other prompts
    are read from their tokens. `known` has the router's probabilities of the prompts that it has read for this answer.
    Decisions of the router go to the `routing_log`.
    """

    settings: RoutingSettings = field(default_factory=RoutingSettings)
    router: Router | None = None
    segmenter: Callable[[], Segmenter] = SentenceSegmenter
    mixtures: tuple[Mixture, ...] | None = None
    endings: Endings = Endings()
    contexts: Mapping[tuple[int, ...], Context] = field(default_factory=dict)
    known: dict[Context, dict[str, float]] | None = None
    generating: Generating | None = None
    routing_log: RoutingLog | None = None

    @property
    def is_base(self) -> bool:
        """Whether the caller selected the base model."""
        return self.mixtures is not None and not any(self.mixtures)

    def changed(self, changes: Mapping[str, Any]) -> "Call":
        """Returns a copy with changes, by the name of a field or of a routing setting."""
        settings = {name: value for name, value in changes.items() if name in RoutingSettings.names()}
        rest = {name: value for name, value in changes.items() if name not in settings}
        call = replace(self, **rest)
        return replace(call, settings=replace(call.settings, **settings)) if settings else call

    def mixtures_of(self, batch: int) -> list[Mixture]:
        """Gives the fixed mixture of each row of a batch; none if the router chooses.

        Raises:
            ValueError: if there are several and they do not divide the batch.
        """
        if self.mixtures is None:
            return []
        if batch % len(self.mixtures):
            raise ValueError(
                f"{len(self.mixtures)} mixtures were fixed for a batch of {batch} rows; give one, or one a row"
            )
        return [mixture for mixture in self.mixtures for _ in range(batch // len(self.mixtures))]


# Arguments that the engine sets, or whose result is not rows with a trace.
NOT_ARGUMENTS = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "return_dict_in_generate", "assistant_model")


def call_setting(name: str, kwargs: Mapping[str, Any], generation_config: Any) -> Any:
    """The value of an argument of `generate`: from the call, else from its config, else from the model; or None.

    As in `generate`, None in the call counts, and None in its config does not.
    """
    if name in kwargs:
        return kwargs[name]
    values = (getattr(config, name, None) for config in (kwargs.get("generation_config"), generation_config))
    return next((value for value in values if value is not None), None)


def num_new_tokens(num_read: int, kwargs: Mapping[str, Any], generation_config: Any) -> int:
    """How many tokens a call may write after `num_read` others, as far as it or the model's config says; at least 1.

    A `max_length` of the model's config is no wish of the caller's.
    """
    new = call_setting("max_new_tokens", kwargs, generation_config)
    length = call_setting("max_length", kwargs, None) if new is None else None
    return max(1, new or (length or 0) - num_read)


def is_one_row(kwargs: Mapping[str, Any], generation_config: Any) -> bool:
    """Whether a call of `generate` needs as many rows as prompts, or has one form for the whole answer."""
    objects = ("streamer", "past_key_values", "prefix_allowed_tokens_fn")
    lists = ("logits_processor", "stopping_criteria")  # criteria that return one bool end all rows
    has_object = any(kwargs.get(name) is not None for name in objects) or any(kwargs.get(name) for name in lists)
    numbers = [call_setting(name, kwargs, generation_config) or 1 for name in ("num_beams", "num_return_sequences")]
    return has_object or max(numbers) > 1


def check_call(kwargs: Mapping[str, Any], generation_config: Any, *, is_stream: bool = False) -> None:
    """Checks the arguments of a call, its generation config and the model's.

    Raises:
        ValueError: if the router cannot follow one of them.
    """
    for name in NOT_ARGUMENTS:
        if kwargs.get(name) is not None and kwargs[name] is not False:  # it may be a tensor
            raise ValueError(f"{name} is not an argument of engine.generate; use engine.model.generate")
    if call_setting("prompt_lookup_num_tokens", kwargs, generation_config) is not None:
        raise ValueError(
            "prompt_lookup_num_tokens reads several tokens at once, so sentences cannot be routed one by one; leave "
            "it out"
        )
    if kwargs.get("use_cache") is False:
        raise ValueError("routing by sentence follows the KV cache; leave use_cache on")
    for name in ("num_return_sequences", "num_beams") if is_stream else ():
        if (number := call_setting(name, kwargs, generation_config) or 1) > 1:
            raise ValueError(f"engine.stream gives one answer, but {name} is {number}; use engine.generate")


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Samples with a seed, if there is one, and restores PyTorch's random state."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices) if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        yield


def kept_tokens(
    ids: Tensor, mask: Any, *, num_cached: int = 0, endings: Endings = Endings()
) -> Bool[Tensor, "batch seq"]:
    """Which of the tokens after `num_cached` others are not padding.

    The mask is (batch, seq), or an attention mask, as with static caches, in which each token but padding attends to
    itself. Without a mask, padding is at the right end of rows.

    Raises:
        ValueError: if the mask is of another kind.
    """
    if isinstance(mask, Mapping):  # one for each kind of layer; some need none
        mask = next((each for each in mask.values() if each is not None), None)
    num_new = ids.shape[1]
    if mask is None:
        return _kept_without_mask(ids, endings)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        # A mask may be as wide as a static cache, or have only the new tokens.
        first = num_cached if mask.shape[1] >= num_cached + num_new else mask.shape[1] - num_new
        return mask[:, first : first + num_new].bool()
    if isinstance(mask, Tensor) and mask.ndim == 4:
        attended = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # (batch, new tokens, places)
        # A cache of a sliding window has places only for the last tokens.
        first = min(num_cached, attended.shape[2] - num_new)
        return attended.diagonal(offset=first, dim1=-2, dim2=-1).expand(len(ids), -1)
    shape = f" of {mask.ndim} dimensions" if isinstance(mask, Tensor) else ""
    raise ValueError(
        f"an attention mask must be (batch, seq) or (batch, 1, seq, places), got a "
        f"{type(mask).__name__}{shape}; pass one of these"
    )


def _kept_without_mask(ids: Tensor, endings: Endings) -> Bool[Tensor, "batch seq"]:
    """Leaves out padding at the right end of rows: tokens that end or pad rows, or zeros at the end of only some rows.

    Other callers of the model pad with such tokens and pass no mask, because tokens after a text do not change it.
    """
    kept = torch.ones_like(ids, dtype=torch.bool)
    if ids.shape[1] < 2:
        return kept
    special = torch.tensor(sorted(endings.pad_ids | endings.eos_ids), dtype=ids.dtype, device=ids.device)
    for is_filler, is_text_too in ((torch.isin(ids, special), False), (ids == 0, True)):
        length = is_filler.flip(1).cumprod(1).sum(1)  # (batch) of the run at the end
        if is_text_too:
            length = length - length.min()
        kept &= torch.arange(ids.shape[1], device=ids.device) < (ids.shape[1] - length)[:, None]
    kept[:, 0] |= ~kept.any(1)
    return kept


def _ids(value: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)
