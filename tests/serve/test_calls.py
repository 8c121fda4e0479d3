"""Calls of tools are read from an answer as its tokenizer's response template says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from dlp_lora.engine.trace import Generation
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.backend import Done, Times, Usage
from dlp_lora.serve.calls import TemplateWriter, message_of
from dlp_lora.serve.keys import Keys
from dlp_lora.serve.schema import Tool
from dlp_lora.serve.server import local_service
from dlp_lora.serve.service import Service
from dlp_lora.serve.settings import ServerSettings
from serving import double_engine, events_of, over_http

PARAMETERS = {"type": "object", "properties": {"n": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}
MARK = "<|pad|>"  # a special token, as those of many models around a call
CALL = f'{MARK}{{"name": "look", "arguments": {{"n": "7"}}}}{MARK}'
FIELD = {"open": MARK, "close": MARK, "content": "json", "repeats": True}
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant\n",
    "fields": {"content": {}, "tool_calls": {**FIELD, "transform": {"type": "function", "function": "{content}"}}},
}


def tokenizer() -> Any:
    found: Any = byte_tokenizer()
    found.response_template = TEMPLATE
    return found


def read(answer: str, *, stop: str | None = None) -> tuple[Any, str]:
    """The message and the reason of an answer, which came as text without special tokens."""
    writes = tokenizer()
    tokens = tuple(writes(answer)["input_ids"])
    text = writes.decode(tokens, skip_special_tokens=True)
    writer = TemplateWriter(
        writes,
        writes("assistant\n")["input_ids"],
        [Tool.model_validate(TOOL)],
        [writes.convert_tokens_to_ids("<|im_end|>")],
    )
    done = Done(
        reason="stop",
        stop=stop,
        text="",
        generation=Generation(text=text, tokens=tokens, trace=()),
        usage=Usage(prompt_tokens=1, completion_tokens=len(tokens)),
        times=Times(queued_s=0, prompt_s=0, answer_s=0),
    )
    deltas = writer.push(text)
    last, reason = writer.end("stop", done)
    return message_of([*deltas, *last]), reason


def test_a_call_between_special_tokens_is_a_call_with_arguments_of_the_tools_types() -> None:
    message, reason = read(f"I look. {CALL}{CALL}<|im_end|>")
    assert (message["content"], reason) == ("I look.", "tool_calls")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["look", "look"]
    assert json.loads(message["tool_calls"][1]["function"]["arguments"]) == {"n": 7}


@pytest.mark.parametrize(
    "answer, stop, expected",
    [
        ("Nothing.<|im_end|>", None, "Nothing."),
        ("Nothing, st", "st", "Nothing, st"),
        (f"{MARK}no<|im_end|>", None, "no"),
        *((f"{MARK}{json_}{MARK}<|im_end|>", None, json_) for json_ in ('"look"', "null", "[1]", '{"arguments": {}}')),
    ],
)
def test_what_is_no_call_is_text(answer: str, stop: str | None, expected: str) -> None:
    message, reason = read(answer, stop=stop)
    assert (message["content"], reason) == (expected, "stop")
    assert "tool_calls" not in message


@pytest.fixture(scope="module")
def service(lively_adapters: Path) -> Iterator[Service]:
    engine = double_engine(lively_adapters, tokenizer=tokenizer())
    service = local_service(engine, ServerSettings(), Keys({}), name="tiny")
    yield service
    service.backend.close()


def test_with_a_response_template_the_model_may_call_or_answer(service: Service) -> None:
    chat = {"messages": [{"role": "user", "content": "Tell me a tale"}], "max_tokens": 12, "tools": [TOOL]}
    manager = AdapterManager(service)
    for choice in ({}, {"tool_choice": "auto"}):
        (whole,) = over_http(service, manager, "/v1/chat/completions", {**chat, **choice}).json()["choices"]
        assert whole["message"]["content"]
        *chunks, end = events_of(
            over_http(service, manager, "/v1/chat/completions", {**chat, **choice, "stream": True})
        )
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert (text, end) == (whole["message"]["content"], "[DONE]")


def test_with_tools_an_answer_in_a_schema_is_whole(service: Service) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["ab", "cd"]}}}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, "response_format": schema}
    manager = AdapterManager(service)
    for more in ({}, {"tools": [TOOL]}):
        (choice,) = over_http(service, manager, "/v1/chat/completions", {**chat, **more}).json()["choices"]
        assert json.loads(choice["message"]["content"]) in ("ab", "cd")
