"""The openai package: plain, streaming, async, tools, JSON, errors."""

import asyncio
import json
import sys
from collections.abc import Callable

import openai

MESSAGES = [{"role": "user", "content": "Tell me a tale"}]
OPTIONS = {"model": "tiny", "messages": MESSAGES}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"where": {"enum": ["here", "there"]}}, "required": ["where"],
    "additionalProperties": False}}}  # fmt: skip


def main(address: str) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0)
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny:base", "math", "poems", "units"], names
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_tokens=24)
    assert raw.headers["x-request-id"]
    answer = raw.parse()
    text = answer.choices[0].message.content
    trace = answer.choices[0].model_extra["dlp"]["trace"]
    assert "".join(sentence["text"] for sentence in trace) == text
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.choices == []
    assert last.usage == answer.usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})
    fixed = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=24, extra_body={"dlp": {"fixed": {"math": 1.0}, "trace": False}}
    )
    same = client.chat.completions.create(model="math", messages=MESSAGES, max_tokens=24)
    assert fixed.choices[0].message.content == same.choices[0].message.content
    assert "dlp" not in fixed.choices[0].model_extra

    called = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=80
    )
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["where"] in ("here", "there")
    assert called.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=80
    ) as events:
        final = events.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    written = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "it", "schema": {**schema, "additionalProperties": False}},
        },
    )
    assert isinstance(json.loads(written.choices[0].message.content)["ok"], bool)
    scored = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert len(scored.choices[0].logprobs.content) == 4
    completed = client.completions.create(model="tiny", prompt="Tell me a tale", max_tokens=8, echo=True, logprobs=1)
    assert completed.choices[0].text.startswith("Tell me a tale")

    for error, fields in [
        (openai.NotFoundError, {"model": "gpt-4"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"max_tokens": 10**6}),
    ]:
        check_raises(error, lambda more=fields: client.chat.completions.create(**OPTIONS | more))
    late = {"stream": True, "extra_body": {"dlp": {"deadline_s": 0.01}, "ignore_eos": True}, "max_tokens": 400}
    check_raises(openai.APIError, lambda: list(client.chat.completions.create(**OPTIONS | late)))
    asyncio.run(at_once(address, text))


def check_raises(error: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except error as raised:
        if str(raised):
            return
    raise AssertionError(f"no {error.__name__} with a message")


async def at_once(address: str, text: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0)

    async def one() -> str:
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=24, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert await asyncio.gather(*(one() for _ in range(8))) == [text] * 8


main(sys.argv[1])
