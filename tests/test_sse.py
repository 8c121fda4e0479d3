"""Server-sent events survive whatever a model writes."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from dlp_lora.sse import data_of, event

TEXTS = ["a\u2028b", "\u2029", "\x85\x0b\x0c\x1c\x1d\x1e", "\r\n\n", "data: x", "ü\U0001f600", " "]


class Pieces(httpx.AsyncByteStream):
    """A body in pieces of so many bytes."""

    def __init__(self, body: bytes, size: int) -> None:
        self.body, self.size = body, size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self.body), self.size):
            yield self.body[start : start + self.size]


def read(body: bytes, *, size: int = 1000) -> list[str]:
    async def all_of() -> list[str]:
        return [data async for data in data_of(httpx.Response(200, stream=Pieces(body, size)))]

    return asyncio.run(all_of())


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_data_of_a_server_that_escapes_no_line_breaks_comes_whole(size: int, end: str) -> None:
    lines = [f"data:{' ' * (i % 2)}{json.dumps(text, ensure_ascii=False)}{end}{end}" for i, text in enumerate(TEXTS)]
    body = f": a comment{end}{end}{''.join(lines)}data: [DONE]{end}{end}"
    *found, last = read(body.encode(), size=size)
    assert [json.loads(data) for data in found] == TEXTS
    assert last == "[DONE]"


def test_what_we_write_is_one_line_for_every_client() -> None:
    for text in TEXTS:
        written = event({"text": text})
        assert json.loads(read(written)[0]) == {"text": text}
        assert len(written.decode().splitlines()) == 2  # the data, and the empty line that ends the event


def test_an_event_that_breaks_off_is_none() -> None:
    assert read(event({"text": "a"}) + b'data: {"tex') == ['{"text":"a"}']
