"""Server-sent events: data in, bytes out; and the bytes of a response in, the data of its events out."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx

# They end lines for many clients, although not by the standard: in JSON they are escaped.
LINE_BREAKS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
ESCAPED = str.maketrans(LINE_BREAKS)


def event(data: Any) -> bytes:
    """Writes one event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(ESCAPED)
    return b"data: " + text.encode() + b"\n\n"


async def data_of(response: httpx.Response) -> AsyncGenerator[str]:
    """Yields the data of each event of a response; each event has one line of data.

    Only CR and LF end a line: the data may hold other characters that end lines of text.
    """
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield str(line.removeprefix(b"data:"), "utf-8", "replace").strip(" \r")
