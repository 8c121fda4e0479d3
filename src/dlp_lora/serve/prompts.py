"""Prompts: messages, text or token ids of a request in, the model's tokens out."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlp_lora.chat import Chat, check_reserved, template_arguments, text_of
from dlp_lora.engine.prompts import EncodedPrompt, encode_chat
from dlp_lora.errors import PromptError
from dlp_lora.serve.calls import call_text
from dlp_lora.serve.errors import invalid, too_long, unsupported
from dlp_lora.serve.schema import ChatFields, ChatMessage, PromptRequest, Tool


class PromptEncoder:
    """Encodes the prompts of requests; `max_context` is the largest number of tokens of a prompt and its answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_context: int, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.vocab_size = vocab_size

    @cached_property
    def longest_token(self) -> int:
        """The number of characters in the longest token."""
        return max((len(token) for token in self.tokenizer.get_vocab()), default=1)

    @cached_property
    def reads_tools(self) -> bool:
        """Whether the chat template shows tools to the model."""
        try:
            return "tools" in template_arguments(str(self.tokenizer.get_chat_template(None, [{}])))
        except ValueError:  # there is none
            return False

    @cached_property
    def _reads_calls(self) -> bool:
        """Whether the chat template shows calls of tools to the model."""
        try:
            return "tool_calls" in str(self.tokenizer.get_chat_template(None, [{}]))
        except ValueError:  # there is none
            return True

    def chat(self, chat: ChatFields | PromptRequest, tools: Sequence[Tool] = ()) -> EncodedPrompt:
        """Encodes messages through the chat template.

        Raises:
            APIError: if there is no template, it refuses them, or they are too long.
        """
        messages = [_plain(message, reads_calls=self._reads_calls) for message in chat.messages or ()]
        continues = bool(chat.continue_final_message)
        if chat.add_generation_prompt == continues:
            raise unsupported(
                "add_generation_prompt",
                "add_generation_prompt is true unless continue_final_message is, and then false; leave it out",
            )
        if continues and messages[-1]["role"] != "assistant":
            raise invalid(
                "continue_final_message: the last message must be from the assistant, so that its text continues; got "
                f"one from the {messages[-1]['role']}",
                "continue_final_message",
            )
        if tools and not self.reads_tools:
            messages = _with_tools(messages, tools)
        schemas = [tool.model_dump(exclude_none=True) for tool in tools] if self.reads_tools else []
        try:
            check_reserved(self.tokenizer, chat.chat_template_kwargs or {})
        except PromptError as error:
            raise invalid(f"chat_template_kwargs: {error}", "chat_template_kwargs") from error
        texts = [message.get("content") or "" for message in messages]
        self._check_length(sum(map(len, [*texts, *map(json.dumps, schemas)])), "messages")
        try:
            encoded = encode_chat(
                self.tokenizer,
                messages,
                tools=schemas,
                chat_template_kwargs=chat.chat_template_kwargs,
                continue_final_message=continues,
            )
        except PromptError as error:
            raise invalid(f"messages: {error}", "messages") from error
        self.check_room(encoded, 0)
        return encoded

    def text(self, text: str, *, add_special_tokens: bool | None = None) -> EncodedPrompt:
        """Encodes text as it is.

        Raises:
            APIError: if it is empty or too long.
        """
        self._check_length(len(text), "prompt")
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self._checked(self.tokenizer(text, **options)["input_ids"] if text.strip() else (), source=text)

    def ids(self, tokens: Sequence[int], param: str = "prompt") -> EncodedPrompt:
        """Takes token ids as they are; `param` is their field in the request.

        Raises:
            APIError: if there is none, one is unknown, or there are too many.
        """
        if unknown := next((token for token in tokens if token >= self.vocab_size), None):
            raise invalid(f"{param}: the model knows token ids up to {self.vocab_size - 1}, got {unknown}", param)
        return self._checked(tokens, param=param)

    def check_room(self, prompt: EncodedPrompt, num_new: int, param: str | None = None) -> None:
        """Checks that an answer fits after a prompt.

        Raises:
            APIError: if it does not.
        """
        if len(prompt.tokens) + num_new > self.max_context:
            param = param or ("messages" if isinstance(prompt.source, Chat) else "prompt")
            raise too_long(f"{len(prompt.tokens)} tokens", num_new, self.max_context, param)

    def _check_length(self, num_characters: int, param: str) -> None:
        """Refuses a text that cannot fit, before it is tokenized."""
        if num_characters > self.max_context * self.longest_token:
            least = num_characters // self.longest_token
            raise too_long(f"more than {least} tokens", 1, self.max_context, param)

    def _checked(self, tokens: Sequence[int], *, source: str | None = None, param: str = "prompt") -> EncodedPrompt:
        if not tokens:
            raise invalid(f"{param}: it is empty; give at least one token of text", param)
        prompt = EncodedPrompt(tuple(tokens), source=source)
        self.check_room(prompt, 0, param)
        return prompt


def _plain(message: ChatMessage, *, reads_calls: bool) -> dict[str, Any]:
    """A message for templates: a developer becomes the system, parts of text are joined, and calls of tools become text
    if the template does not read them.
    """
    plain = message.model_dump(exclude_none=True)
    if message.role == "developer":
        plain["role"] = "system"
    if isinstance(message.content, list):
        plain["content"] = text_of(plain)
    if message.tool_calls and not reads_calls:
        calls = [call_text(call.function) for call in message.tool_calls]
        plain["content"] = "\n".join([*filter(None, [plain.get("content")]), *calls])
        del plain["tool_calls"]
    return plain


def _with_tools(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Adds the tools to a system message, for a model whose template reads no tools."""
    listed = "\n".join(tool.function.model_dump_json(exclude_none=True) for tool in tools)
    text = f"You may call these functions:\n{listed}"
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
