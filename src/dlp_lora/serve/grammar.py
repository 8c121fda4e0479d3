"""Grammars: a response format or tools in, the allowed tokens of an answer out (llguidance)."""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import llguidance.hf
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dlp_lora.serve.backend import BackendError
from dlp_lora.serve.calls import call_prefix
from dlp_lora.serve.errors import invalid, unsupported
from dlp_lora.serve.schema import FunctionDefinition


class Grammars:
    """Makes the grammars of answers; `vocab_size` is the number of tokens with scores."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._guide: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    def of_format(self, response_format: Mapping[str, Any]) -> "AnswerGrammar | None":
        """Makes the grammar of a response format, None for text.

        Raises:
            APIError: if it is not a response format, or its schema is not supported.
        """
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return self._of_schema({"type": "object"}, "response_format")
        if kind == "json_schema":
            holder = response_format.get("json_schema")
            schema = holder.get("schema") if isinstance(holder, Mapping) else None
            if not isinstance(schema, Mapping):
                raise invalid(
                    'response_format: "json_schema" must hold an object "schema"', "response_format.json_schema"
                )
            return self._of_schema(schema, "response_format.json_schema")
        raise unsupported(
            "response_format", f"response_format: type {kind!r} is not one of text, json_object and json_schema"
        )

    def of_call(self, function: FunctionDefinition) -> "AnswerGrammar":
        """Makes the grammar of the arguments of one function."""
        return self._of_schema(_arguments(function), "tools")

    def of_calls(self, functions: Sequence[FunctionDefinition]) -> "AnswerGrammar":
        """Makes the grammar of a call of one of several functions; it begins with `call_prefix` and ends with "}"."""
        rules = [f"start: {' | '.join(f'call_{i}' for i in range(len(functions)))}"]
        for i, function in enumerate(functions):
            rules.append(f'call_{i}: {json.dumps(call_prefix(function.name))} args_{i} "}}"')
            rules.append(f"args_{i}: %json {json.dumps(_compact(_arguments(function)))}")
        schema = {"anyOf": [_call(function) for function in functions]}
        return self._made(llguidance.LLMatcher.grammar_from_lark("\n".join(rules)), schema, "tools")

    def _of_schema(self, schema: Mapping[str, Any], param: str) -> "AnswerGrammar":
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(_compact(schema)))
        return self._made(grammar, schema, param)

    def _made(self, grammar: str, schema: Mapping[str, Any], param: str) -> "AnswerGrammar":
        guide = self._loaded(param)
        matcher = llguidance.LLMatcher(guide, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # a schema that no text follows is found only now
        if matcher.is_error():
            raise invalid(f"{param}: the schema cannot be followed: {_reason(matcher)}", param)
        return AnswerGrammar(matcher, schema)

    def _loaded(self, param: str) -> llguidance.LLTokenizer:
        with self._lock:  # it takes a second, once
            if self._guide is None:
                if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                    raise unsupported(param, f"{param} needs a fast tokenizer, and this model has none")
                self._guide = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos_ids or None
                )
            return self._guide


class AnswerGrammar:
    """The state of one answer in its grammar; `schema` is its JSON schema."""

    def __init__(self, matcher: llguidance.LLMatcher, schema: Mapping[str, Any]) -> None:
        self.schema = schema
        self._matcher = matcher

    def mask(self, scores: Float[Tensor, " vocab"]) -> None:
        """Sets the scores of the tokens that may not come next to minus infinity, in place."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise BackendError(f"the grammar cannot go on: {_reason(self._matcher)}")
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        is_allowed = allowed.flatten()[: len(scores)].bool().to(scores.device)
        scores[: len(is_allowed)].masked_fill_(~is_allowed, float("-inf"))
        scores[len(is_allowed) :] = float("-inf")

    def accept(self, token: int) -> bool:
        """Adds a token; returns whether the answer is complete."""
        if not self._matcher.consume_token(token):
            raise BackendError(f"the grammar does not allow the token {token}: {_reason(self._matcher)}")
        return self._matcher.is_stopped()

    def copy(self) -> "AnswerGrammar":
        """Makes the grammar of another answer to the same request."""
        return AnswerGrammar(self._matcher.deep_copy(), self.schema)


def _reason(matcher: llguidance.LLMatcher) -> str:
    """The error of a matcher, without its state and its grammar."""
    return " ".join(re.split(r"<state>|\n\s*1 \|", matcher.get_error())[0].split())[:300]


def _arguments(function: FunctionDefinition) -> Mapping[str, Any]:
    return function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _call(function: FunctionDefinition) -> dict[str, Any]:
    """The schema of a call of a function."""
    properties = {"name": {"const": function.name}, "arguments": _arguments(function)}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _compact(schema: Mapping[str, Any]) -> dict[str, Any]:
    # If white space is allowed everywhere, a small model may write only white space.
    return {**schema, "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
