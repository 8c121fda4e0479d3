"""Calls of tools: the text of an answer in, deltas of a message out."""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from dlp_lora.serve.backend import Done
from dlp_lora.serve.schema import AssistantMessage, CalledTool, FinishReason, FunctionCall, Tool

# Up to the first character of the arguments.
CALL_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\S)')

Delta = dict[str, Any]
"""The addition of a chunk to a message: `content`, or parts of `tool_calls`."""


@runtime_checkable
class MessageWriter(Protocol):
    """Turns the text of an answer into deltas of its message."""

    def push(self, text: str) -> list[Delta]:
        """Adds text; returns the deltas that have become certain."""
        ...

    def end(self, reason: FinishReason, done: Done) -> tuple[list[Delta], FinishReason]:
        """Returns the last deltas, and the reason of the end."""
        ...


class TextWriter:
    """An answer in text."""

    def push(self, text: str) -> list[Delta]:
        """Adds text."""
        return [{"content": text}]

    def end(self, reason: FinishReason, done: Done) -> tuple[list[Delta], FinishReason]:
        """Ends it."""
        return [], reason


class ArgumentsWriter:
    """A call of one function: the text is its arguments."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def push(self, text: str) -> list[Delta]:
        """Adds text."""
        begin = [] if self._has_begun else [_begun(self._name)]
        self._has_begun = True
        return [*begin, _arguments(text)]

    def end(self, reason: FinishReason, done: Done) -> tuple[list[Delta], FinishReason]:
        """Ends it; as OpenAI does, the reason of a named function is "stop"."""
        return [], reason


class CallWriter:
    """A call of one of several functions, in the form of `Grammars.of_calls`, with any spaces."""

    def __init__(self) -> None:
        self._text = ""
        self._begun = ""  # the name
        self._num_sent = 0

    def push(self, text: str) -> list[Delta]:
        """Adds text."""
        self._text += text
        deltas: list[Delta] = []
        if not self._begun:
            if (head := CALL_HEAD.match(self._text)) is None:
                return []
            self._begun, self._num_sent = json.loads(head[1]), head.end()
            deltas.append(_begun(self._begun))
        end = len(self._text) - 1  # the last bracket is the call's
        if end > self._num_sent:
            deltas.append(_arguments(self._text[self._num_sent : end]))
            self._num_sent = end
        return deltas

    def end(self, reason: FinishReason, done: Done) -> tuple[list[Delta], FinishReason]:
        """Ends it."""
        rest = self._text[self._num_sent :] if self._begun and reason == "length" else ""
        return [_arguments(rest)] if rest else [], "tool_calls" if reason == "stop" else reason


class TemplateWriter:
    """An answer that may have calls of `tools`; at its end, the tokenizer's response template separates them from text.

    The template reads the special tokens of the answer, too, unless a stop string has cut it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        tools: Sequence[Tool],
        end_ids: Collection[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._prompt = prompt
        self._tools: list[Any] = [tool.model_dump(exclude_none=True) for tool in tools]
        self._text = ""

    def push(self, text: str) -> list[Delta]:
        """Adds text."""
        self._text += text
        return []

    def end(self, reason: FinishReason, done: Done) -> tuple[list[Delta], FinishReason]:
        """Reads the answer; if the template cannot read it, it is text."""
        tokens = list(done.generation.tokens)
        if done.reason == "stop" and done.stop is None and tokens and tokens[-1] in self._end_ids:
            tokens = tokens[:-1]  # its end is no part of the message; a grammar ends without one
        written = self._text if isinstance(done.stop, str) else self._tokenizer.decode(tokens)
        prefix = self._tokenizer.decode(list(self._prompt))
        try:
            message = self._tokenizer.parse_response(written, prefix=prefix, tools=self._tools)
            deltas: list[Delta] = [{"content": message["content"]}] if message.get("content") else []
            calls = [_call_of(call) for call in message.get("tool_calls") or []]
        except Exception:  # a model may write anything
            deltas, calls = [{"content": self._text}] if self._text else [], []
        for index, (name, arguments) in enumerate(calls):
            deltas += [_begun(name, index), _arguments(arguments, index)]
        return deltas, "tool_calls" if calls else reason


def _call_of(call: Any) -> tuple[str, str]:
    """The name and the arguments of a call in a message.

    Raises:
        TypeError: if it has another form.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
        raise TypeError(f"a call needs the name of a function, got {call!r}")
    arguments = function.get("arguments", {})
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments)


def call_prefix(name: str) -> str:
    """The text before the arguments in the call of a function."""
    return f'{{"name": {json.dumps(name)}, "arguments": '


def call_text(function: FunctionCall) -> str:
    """A call as text, in the form of `Grammars.of_calls`."""
    arguments = function.arguments
    return call_prefix(function.name) + (arguments if isinstance(arguments, str) else json.dumps(arguments)) + "}"


def message_of(deltas: Sequence[Delta]) -> AssistantMessage:
    """Puts the deltas of a message together."""
    content: str | None = None
    calls: list[CalledTool] = []
    for delta in deltas:
        if "content" in delta:
            content = (content or "") + delta["content"]
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})  # type: ignore[typeddict-item]
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    if calls:
        return {"role": "assistant", "content": content, "refusal": None, "tool_calls": calls}
    return {"role": "assistant", "content": content or "", "refusal": None}


def _begun(name: str, index: int = 0) -> Delta:
    call = {"index": index, "id": f"call_{uuid4().hex[:24]}", "type": "function"}
    return {"tool_calls": [{**call, "function": {"name": name, "arguments": ""}}]}


def _arguments(text: str, index: int = 0) -> Delta:
    return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
