"""Which tokens end an answer, and which pad it behind its end."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlp_lora.calls import call_setting


@dataclass(frozen=True)
class Endings:
    """The token ids at which `generate` ends a row, and those with which it pads it."""

    eos_ids: frozenset[int] = frozenset()
    pad_ids: frozenset[int] = frozenset()

    @classmethod
    def of_model(cls, generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> "Endings":
        """Those of the model's generation config and of its tokenizer together, for passes outside `generate`."""
        return cls(
            _ids(generation_config.eos_token_id) | _ids(tokenizer.eos_token_id),
            _ids(generation_config.pad_token_id) | _ids(tokenizer.pad_token_id),
        )

    @classmethod
    def of_call(cls, kwargs: Mapping[str, Any], generation_config: Any) -> "Endings":
        """Those of one call of `generate`: its own arguments, before its config's, before the model's."""
        eos, pad = (call_setting(name, kwargs, generation_config) for name in ("eos_token_id", "pad_token_id"))
        return cls(_ids(eos), _ids(pad))

    def is_behind(self, token: int) -> bool:
        """Whether a token of a row that has ended is no part of its answer."""
        return token in self.pad_ids or token in self.eos_ids

    def trim(self, tokens: list[int], special_ids: Collection[int]) -> list[int]:
        """A row's answer with the token that ends it, without what pads the row.

        Padding without such a token follows a stop string. It is told from text only where it is a special token.
        """
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos_ids), None)
        if end is None:
            padding = self.pad_ids & set(special_ids)
            end = next((i + 1 for i in reversed(range(len(tokens))) if tokens[i] not in padding), 0)
        return tokens[:end]


def _ids(value: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)
