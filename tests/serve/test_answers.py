"""The answers to a request end with what is sent of them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from dlp_lora.serve.answers import Answers
from dlp_lora.serve.app import AnswerStream
from dlp_lora.serve.keys import Access, Keys
from dlp_lora.serve.schema import CompletionRequest
from dlp_lora.serve.server import local_service
from dlp_lora.serve.settings import ServerSettings
from serving import double_engine


def test_a_client_that_leaves_before_the_first_byte_leaves_no_row_behind(lively_adapters: Path) -> None:
    service = local_service(double_engine(lively_adapters), ServerSettings(), Keys({}), name="tiny")
    body = CompletionRequest(prompt="Tell me a tale", max_tokens=400, ignore_eos=True)

    async def chunks() -> AsyncIterator[bytes]:
        yield b""

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        raise OSError("the client has left")

    async def run() -> None:
        answers = Answers(service, service.completion(body, Access(adapters=None)))
        await answers.__aenter__()
        assert service.num_running == 1
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}}
        with pytest.raises((OSError, ClientDisconnect)):
            await AnswerStream(answers, chunks())(scope, receive, send)

    asyncio.run(run())
    assert service.num_running == 0
    service.backend.close(drain_s=20)
    stats = service.backend.stats()
    assert stats.num_step_tokens < 399  # it was cancelled, not answered to its end
    assert stats.decoding == stats.reading == stats.waiting == 0
