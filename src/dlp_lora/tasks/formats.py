"""Turns a task's prompt and answer into tokens; training, evaluation and the command line all use this."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlp_lora.chat import Chat, chat_tokens
from dlp_lora.errors import TaskError
from dlp_lora.tasks.task import Example, PromptFormat


def resolve_format(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> PromptFormat:
    """Turns "auto" into "chat" if the tokenizer has a chat template, else into "plain".

    Raises:
        TaskError: for "chat" without a chat template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if prompt_format == "chat" and not has_template:
        raise TaskError("the prompt format is 'chat', but the tokenizer has no chat template; use 'plain'")
    if prompt_format == "auto":
        return "chat" if has_template else "plain"
    return prompt_format


def as_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    prompt_format: PromptFormat,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str | Chat:
    """The prompt for `engine.generate`: a chat of one user message, or the text.

    Raises:
        TaskError: if there are tools or arguments of a chat template, and no chat.
    """
    if resolve_format(tokenizer, prompt_format) == "chat":
        messages = [{"role": "user", "content": prompt}]
        return Chat(messages=messages, tools=tools, chat_template_kwargs=chat_template_kwargs or {})
    if tools or chat_template_kwargs:
        fault = "the example has tools" if tools else "there are chat_template_kwargs"
        raise TaskError(f"{fault}, which only a chat template reads, but the prompt format is 'plain'; use 'chat'")
    return prompt


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    prompt_format: PromptFormat,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    *,
    now: datetime | None = None,
) -> tuple[list[int], list[int]]:
    """Returns the tokens to read, and the tokens to learn: the answer, and end-of-sequence if the answer is complete.

    After a plain prompt, the separator is learned with the answer. `now` is the time that a chat template prints, by
    default the present.

    Raises:
        PromptError: if the chat template refuses the prompt.
    """
    prompt = as_prompt(
        tokenizer, example.prompt, prompt_format, tools=example.tools, chat_template_kwargs=chat_template_kwargs
    )
    if isinstance(prompt, str):
        read, separator = list(tokenizer(prompt)["input_ids"]), _separator(prompt)
    else:
        read, separator = chat_tokens(tokenizer, prompt, now=now), ""
    if example.answer_prefix:
        read += tokenizer(separator + example.answer_prefix, add_special_tokens=False)["input_ids"]
        separator = ""
    learned = list(tokenizer(separator + example.answer, add_special_tokens=False)["input_ids"])
    if example.complete and tokenizer.eos_token_id is not None:
        learned.append(tokenizer.eos_token_id)
    return read, learned


def _separator(prompt: str) -> str:
    # After "A:" the answer is on the same line; after any other prompt, on the next line.
    return "" if prompt[-1:].isspace() else " " if prompt.endswith(":") else "\n"
