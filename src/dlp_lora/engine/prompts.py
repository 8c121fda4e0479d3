"""Prompts: strings and chats in, token ids and the router's contexts out."""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.bank.device import computing_device
from dlp_lora.chat import Chat, Message, chat_tokens, check_text, text_of
from dlp_lora.engine.routing import Prompt
from dlp_lora.engine.turns import read_chat
from dlp_lora.errors import PromptError
from dlp_lora.router import Context


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as tokens, and its context for the router; None for a string, which is read from its tokens.

    A string may be a conversation that the caller has already written in the chat template. `source` is the original
    prompt; None for token ids.
    """

    tokens: tuple[int, ...]
    context: Context | None = None
    source: str | Chat | None = None

    @property
    def prompt(self) -> Prompt | None:
        """The start of a row; its sentences are not cut."""
        return None if self.context is None else Prompt.of(self.context)


def as_batch(
    prompts: Any,
    *,
    tools: Sequence[Any] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool | None = None,
) -> tuple[list[str | Chat], bool]:
    """Returns one prompt or several as a list, and whether it was one. A Chat's settings win over the arguments.

    Raises:
        PromptError: if there is no prompt, if one is neither text nor messages, or a string has arguments of a chat.
    """
    single = isinstance(prompts, str | Chat)
    if not single and (isinstance(prompts, Mapping) or not isinstance(prompts, Iterable)):
        raise _strange(prompts)
    batch = [prompts] if single else list(prompts)
    if not batch:
        raise PromptError("there is no prompt; give a string, a list of strings, or messages")
    if _is_chat(batch):
        batch, single = [batch], True
    options: dict[str, Any] = {
        "tools": tools,
        "chat_template_kwargs": chat_template_kwargs or {},
        "continue_final_message": continue_final_message,
    }
    options = {name: value for name, value in options.items() if value not in ((), [], {}, None)}
    return [_with(prompt, options) for prompt in batch], single


def check_embedded(model: Any, tokenizer: PreTrainedTokenizerBase, tokens: Collection[int]) -> None:
    """Checks that a model has an embedding of each token: a tokenizer may have more tokens than the model.

    Raises:
        PromptError: naming the first token without an embedding.
    """
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if not tokens or max(tokens) < num_embeddings:
        return
    # The placeholders of images and sounds may have larger ids; their embeddings come from elsewhere.
    config = model.config.to_dict()
    places = {
        config.get(f"{kind}_{word}") for kind in ("image", "video", "audio") for word in ("token_id", "token_index")
    }
    unknown = next((token for token in tokens if token >= num_embeddings and token not in places), None)
    if unknown is not None:
        text = tokenizer.convert_ids_to_tokens(unknown)
        what = f"token {unknown}" if text is None else f"{text!r}, token {unknown}"
        raise PromptError(
            f"the text holds {what}, but the model has embeddings of only {num_embeddings} tokens; leave it out, or "
            "use the tokenizer that the model was made with"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Chat) -> EncodedPrompt:
    """Encodes a prompt, a chat through the chat template.

    Raises:
        PromptError: if it is empty, or the chat template refuses it.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        tokens, context = list(tokenizer(prompt)["input_ids"]) if prompt.strip() else [], None
    else:
        context = read_chat(prompt)
        has_text = any(text_of(message).strip() or message.get("tool_calls") for message in prompt.messages)
        tokens = chat_tokens(tokenizer, prompt) if has_text else []
    if not tokens:
        raise PromptError("the prompt is empty; give at least one token of text")
    return EncodedPrompt(tuple(tokens), context, prompt)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool | None = None,
) -> EncodedPrompt:
    """Encodes messages as `encode_prompt` does a Chat of them."""
    chat = Chat(
        messages=messages,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs or {},
        continue_final_message=continue_final_message,
    )
    return encode_prompt(tokenizer, chat)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Chat]) -> list[EncodedPrompt]:
    """Encodes prompts.

    Raises:
        PromptError: as `encode_prompt`, and says which of several it is.
    """
    encoded = []
    for i, prompt in enumerate(prompts):
        try:
            encoded.append(encode_prompt(tokenizer, prompt))
        except PromptError as error:
            raise PromptError(f"prompt {i}: {error}" if len(prompts) > 1 else str(error)) from error
    return encoded


def contexts_of(prompts: Sequence[EncodedPrompt]) -> dict[tuple[int, ...], Context]:
    """Returns the contexts of prompts that are chats, by their tokens, for `Call.contexts`."""
    return {prompt.tokens: prompt.context for prompt in prompts if prompt.context is not None}


def padded(prompts: Sequence[EncodedPrompt], model: PreTrainedModel, *, num_new: int) -> dict[str, Tensor]:
    """Pads prompts on the left: input_ids and attention_mask, (batch, seq).

    A row is padded with its own first token, because penalties for repetition also apply to padding: of a token that
    ends answers, they would make answers longer.

    Raises:
        PromptError: if one leaves no room for `num_new` tokens in the model's context.
    """
    rows = [list(prompt.tokens) for prompt in prompts]
    limit = context_of(model)
    for i, row in enumerate(rows):
        which = f"prompt {i}" if len(rows) > 1 else "the prompt"
        if len(row) + num_new > limit:
            raise PromptError(
                f"{which} has {len(row)} tokens, and {num_new} new ones do not fit: the model's context is {limit}; "
                f"shorten the prompt or ask for fewer new tokens"
            )
    width = max(map(len, rows))
    ids = [row[:1] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    device = computing_device(model)
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def context_of(model: PreTrainedModel) -> int:
    """The number of tokens that the model reads, prompt and answer together; infinite if its settings have no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def fitting(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, max_tokens: int) -> Chat:
    """Drops the oldest turns of a chat, each question with its answers, until it has at most `max_tokens` tokens.

    Messages before the first question, such as the system message, and the latest question stay, even if they alone
    have more tokens.

    Raises:
        PromptError: as `encode_prompt`.
    """
    while len(encode_prompt(tokenizer, chat).tokens) > max_tokens:
        questions = [i for i, message in enumerate(chat.messages) if message.get("role") == "user"]
        if len(questions) < 2:
            break
        chat = replace(chat, messages=[*chat.messages[: questions[0]], *chat.messages[questions[1] :]])
    return chat


def _with(prompt: Any, options: Mapping[str, Any]) -> str | Chat:
    if isinstance(prompt, str):
        if options:
            raise PromptError(f"{', '.join(options)}: for chats, but a prompt is a string; give it as messages")
        return prompt
    if not isinstance(prompt, Chat) and not _is_chat(prompt):
        raise _strange(prompt)
    chat = prompt if isinstance(prompt, Chat) else Chat(messages=list(prompt))
    default = Chat(messages=())
    unset = {name: value for name, value in options.items() if getattr(chat, name) == getattr(default, name)}
    return replace(chat, **unset)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)


def _strange(prompt: Any) -> PromptError:
    return PromptError(
        f"a prompt is a string or a list of messages with role and content, got {type(prompt).__name__} "
        f"{str(prompt)[:60]!r}; token ids go to engine.model.generate"
    )
