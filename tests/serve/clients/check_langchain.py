"""langchain-openai: invoke, stream, batch, structured output."""

import sys

from langchain_openai import ChatOpenAI


def main(address: str) -> None:
    options = {"base_url": f"{address}/v1", "api_key": "k", "max_retries": 0}
    chat = ChatOpenAI(**options, model="tiny", max_tokens=16, stream_usage=True)
    text = chat.invoke("Tell me a tale").content
    assert text
    pieces = list(chat.stream("Tell me a tale"))
    assert "".join(piece.content for piece in pieces) == text
    assert any(piece.usage_metadata for piece in pieces)
    assert [answer.content for answer in chat.batch(["Tell me a tale"] * 8)] == [text] * 8
    schema = {
        "title": "It",
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    it = chat.with_structured_output(schema, method="json_schema").invoke("Is it?")
    assert isinstance(it["ok"], bool)


main(sys.argv[1])
