"""Chats: messages in, their tokens out, through the tokenizer's chat template."""

import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from dlp_lora.errors import PromptError

Message = Mapping[str, Any]
"""A turn of a chat: its role and its content, a string or a list of parts `{"type": "text", "text": ...}`."""

PROBE = "@@content@@"
# transformers gives this function to templates; they call it with a constant.
_CLOCK = re.compile(r"""strftime_now\(\s*("[^"]*"|'[^']*')\s*\)""")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A chat with all that its template reads.

        messages = [{"role": "user", "content": "Is it warm in Rome?"}]
        Chat(messages=messages, chat_template_kwargs={"enable_thinking": False})

    `tools` are JSON schemas, or functions that transformers turns into schemas; `chat_template_kwargs` are arguments of
    the template. With `continue_final_message` the last message is the beginning of the answer. By default, this holds
    if it is the assistant's message, as in a pipeline of transformers.
    """

    messages: Sequence[Message]
    tools: Sequence[Any] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool | None = None

    @property
    def continues(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        if self.continue_final_message is None:
            return bool(self.messages) and self.messages[-1].get("role") == "assistant"
        return self.continue_final_message


def text_of(message: Message) -> str:
    """Returns the text of a message: each part is a line, and a message of only tool calls has no text.

    Raises:
        PromptError: if the message has other content than text.
    """
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        return "\n".join(map(_text_of_part, content))
    if not isinstance(content, str):
        raise PromptError(f"the content of a message must be a string or parts of text, got {_shown(content)}")
    check_text(content)
    return content


def check_text(text: str) -> None:
    """Raises a PromptError if a text has half a character, which no tokenizer encodes."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise PromptError(f"a prompt must be Unicode, got half a character in {text[:60]!r}")


def chat_tokens(tokenizer: Any, chat: Chat, *, now: datetime | None = None) -> list[int]:
    """Encodes a chat up to the beginning or continuation of the answer.

    Args:
        now: the time that the template prints; by default the present.

    Raises:
        PromptError: if there is no chat template, or the template refuses this chat.

    Warns:
        UserWarning: if the template does not read an argument.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("the tokenizer has no chat template; give the prompt as a string instead of messages")
    messages = [_plain(message) for message in chat.messages]
    tools = list(chat.tools) or None
    try:
        template = str(tokenizer.get_chat_template(None, tools))
        _check_arguments(tokenizer, template, chat)
        if reads_parts(template):
            messages = [in_parts(message) for message in messages]
        fixed = {} if now is None else {"chat_template": _at(template, now)}
        encoded = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=not chat.continues,
            continue_final_message=chat.continues,
            return_dict=True,
            **fixed,
            **chat.chat_template_kwargs,
        )
    except PromptError:
        raise
    except Exception as error:  # a template may raise anything
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise PromptError(
            f"the chat template refuses these messages (roles: {roles}): {' '.join(str(error).split())[:200]}; "
            "change the messages, or set another tokenizer.chat_template"
        ) from error
    return list(encoded["input_ids"])


def prints_time(tokenizer: Any) -> bool:
    """Whether a chat template of the tokenizer prints the time or the date."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def _at(template: str, now: datetime) -> str:
    return _CLOCK.sub(lambda call: json.dumps(now.strftime(call[1][1:-1])), template)


@lru_cache(maxsize=64)
def template_arguments(template: str) -> frozenset[str]:
    """Names the variables that a chat template reads and does not set."""
    from jinja2 import Environment, TemplateError, meta, nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """The block that marks the assistant's words in templates, as in transformers."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    try:
        tree = Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError as error:
        raise PromptError(f"the chat template is no Jinja template: {error}; set another one") from error
    return frozenset(meta.find_undeclared_variables(tree))


def check_reserved(tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> None:
    """Checks that arguments of the chat template are none of the tokenizer's.

    Raises:
        PromptError: if one is.
    """
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters.values()
    reserved = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"documents"} | {"messages"}
    if taken := sorted(reserved & set(chat_template_kwargs)):
        raise PromptError(
            f"{', '.join(taken)} cannot be among the arguments of the template (chat_template_kwargs); tools and "
            "continue_final_message are arguments beside it"
        )


def _check_arguments(tokenizer: Any, template: str, chat: Chat) -> None:
    check_reserved(tokenizer, chat.chat_template_kwargs)
    read = template_arguments(template)
    if chat.tools and "tools" not in read:
        raise PromptError(
            "the chat template does not read tools, so the model would not see them; leave tools out, or set a "
            "tokenizer.chat_template that reads them"
        )
    if unread := sorted(set(chat.chat_template_kwargs) - read):
        warnings.warn(f"the chat template does not read {', '.join(unread)}", stacklevel=2)


@lru_cache(maxsize=64)
def reads_parts(template: str) -> bool:
    """Whether a template reads content only as a list of parts, not as a string."""
    return not _writes(template, PROBE) and _writes(template, [{"type": "text", "text": PROBE}])


def _writes(template: str, content: Any) -> bool:
    from transformers.utils.chat_template_utils import render_jinja_template

    chats = [[{"role": "user", "content": content}]]
    tokens: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
    try:
        return PROBE in render_jinja_template(conversations=chats, chat_template=template, **tokens)[0][0]
    except Exception:  # it may refuse a chat of one message; the error then comes with the caller's chat
        return False


def _plain(message: Message) -> dict[str, Any]:
    """A message with its content as one string and its tool calls' arguments as objects, which templates read."""
    plain = dict(message)
    if message.get("content") is not None or not message.get("tool_calls"):
        plain["content"] = text_of(message)
    if isinstance(calls := message.get("tool_calls"), Sequence) and not isinstance(calls, str):
        plain["tool_calls"] = [_with_arguments(call) for call in calls]
    return plain


def _with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:  # clients of OpenAI's API send them as a string
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def in_parts(message: Message) -> dict[str, Any]:
    """Turns a message's content from a string into a list of one part."""
    content = message.get("content")
    return dict(message) if content is None else {**message, "content": [{"type": "text", "text": content}]}


def _text_of_part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return text_of({"content": part["text"]})
    kind = f"a part of type {part.get('type')!r}" if isinstance(part, Mapping) else _shown(part)
    raise PromptError(f'a message holds {kind}, expected parts {{"type": "text", "text": "..."}}')


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
