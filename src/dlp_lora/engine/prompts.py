"""Prompts as people give them, strings and chats, in; padded token ids out."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.errors import PromptError

Message = Mapping[str, str]
"""A turn of a chat: its role and its content."""


def as_batch(prompts: Any) -> tuple[list[str | Sequence[Message]], bool]:
    """Gives one prompt or several as a list, and whether it was one.

    Raises:
        PromptError: if there is none, or something else than text or messages.
    """
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise _strange(prompts)
    found = list(prompts)
    if not found:
        raise PromptError("there is no prompt; give a string, a list of strings, or messages")
    if _is_chat(found):
        return [found], True
    for prompt in found:
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise _strange(prompt)
    return found, False


def context_of(model: PreTrainedModel) -> int:
    """How many tokens the model reads, prompt and answer together; without end where its settings name no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def encode_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    *,
    num_new: int,
) -> dict[str, Tensor]:
    """Encodes prompts, chats through the chat template, padded on the left: input_ids and attention_mask, (batch, seq).

    Raises:
        PromptError: if a prompt is empty, or leaves no room for `num_new` tokens in the model's context.
    """
    rows = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    limit = context_of(model)
    for i, row in enumerate(rows):
        which = f"prompt {i}" if len(rows) > 1 else "the prompt"
        if not row:
            raise PromptError(f"{which} is empty; give at least one token of text")
        if len(row) + num_new > limit:
            raise PromptError(
                f"{which} has {len(row)} tokens, and {num_new} new ones do not fit: the model's context is {limit}; "
                f"shorten the prompt or lower max_new_tokens"
            )
    width = max(map(len, rows))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    """Encodes one prompt, a chat through the chat template.

    Raises:
        PromptError: if it is no Unicode, or messages that the template cannot take.
    """
    for text in [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]:
        if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
            raise PromptError(f"a prompt must be Unicode, got half a character in {text[:60]!r}")
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"]) if prompt.strip() else []
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the tokenizer has no chat template; give the prompt as a string instead of messages")
    for message in prompt:
        if not isinstance(message.get("content"), str):
            raise PromptError(f"the content of a message must be a string, got {_shown(message.get('content'))}")
    if not any(message["content"].strip() for message in prompt):
        return []
    messages = [dict(message) for message in prompt]
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)


def _strange(prompt: Any) -> PromptError:
    return PromptError(
        f"a prompt is a string or a list of messages with role and content, got {_shown(prompt)}; token ids go to "
        "engine.model.generate"
    )


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
