"""The door of the server: which names and origins it answers to, and what keeps a silent stream open."""

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from dlp_lora import Engine
from dlp_lora.serve import answers, chat
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.app import PAGE, make_app
from dlp_lora.serve.keys import Keys
from dlp_lora.serve.server import local_service
from dlp_lora.serve.service import Service
from dlp_lora.serve.settings import ServerSettings
from serving import double_engine, events_of, over_http

ELSEWHERE = "https://chat.example"


@pytest.fixture(scope="module")
def engine(lively_adapters: Path) -> Engine:
    return double_engine(lively_adapters)


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Service]:
    service = local_service(engine, ServerSettings(), Keys({}), name="tiny")
    yield service
    service.backend.close()


def ask(service: Service, path: str, *, method: str = "GET", keys: Any = None, **kwargs: Any) -> httpx.Response:
    """Asks the application of a service with other settings or keys."""
    headers = kwargs.pop("headers", {})
    other = replace(service, settings=ServerSettings(**kwargs), keys=Keys(keys))
    app = make_app(other, AdapterManager(other))

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(asked())


PREFLIGHT = {
    "Origin": ELSEWHERE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


def test_pages_of_other_origins_may_ask_only_if_they_are_allowed(service: Service) -> None:
    asked: dict[str, Any] = {"method": "OPTIONS", "headers": PREFLIGHT}
    assert "access-control-allow-origin" not in ask(service, "/v1/chat/completions", **asked).headers
    allowed = ask(service, "/v1/chat/completions", allow_origin=(ELSEWHERE,), **asked)
    assert allowed.headers["access-control-allow-origin"] == ELSEWHERE
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    answer = ask(service, "/v1/models", allow_origin=(ELSEWHERE,), headers={"Origin": ELSEWHERE})
    assert answer.headers["access-control-allow-origin"] == ELSEWHERE
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
    other = ask(service, "/v1/models", allow_origin=(ELSEWHERE,), headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "host, settings, keys, status",
    [
        ("127.0.0.1:8000", {}, {}, 200),
        ("[::1]:8000", {}, {}, 200),
        ("localhost", {}, {}, 200),
        ("evil.example", {}, {}, 421),
        ("127.0.0.1.evil.example", {}, {}, 421),
        ("evil.example", {}, {"K": None}, 401),  # a page elsewhere does not know the key
        ("ai.example:443", {"allow_host": ("AI.example",)}, {}, 200),
        ("localhost", {"allow_host": ("ai.example",)}, {}, 200),
        ("evil.example", {"allow_host": ("ai.example",)}, {"K": None}, 421),
        ("anything", {"host": "0.0.0.0"}, {}, 200),
    ],
)
def test_names_that_could_lead_a_browser_here_are_refused(
    service: Service, host: str, settings: Any, keys: Any, status: int
) -> None:
    assert ask(service, "/v1/models", keys=keys, headers={"Host": host}, **settings).status_code == status


def test_a_silent_stream_is_kept_open_by_comments(
    service: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "KEEPALIVE_S", 0.02)
    slow = engine.model.get_input_embeddings().register_forward_pre_hook(lambda *_: time.sleep(0.1))
    body = {"prompt": "Once", "max_tokens": 3, "stream": True, "model": "math"}
    response = over_http(service, AdapterManager(service), "/v1/completions", body)
    slow.remove()
    assert "\n\n: keepalive\n\n" in f"\n\n{response.text}"
    *chunks, end = events_of(response)
    assert (chunks[-1]["choices"][0]["finish_reason"], end) == ("length", "[DONE]")


def test_a_stream_whose_call_is_not_certain_yet_is_kept_open_by_comments(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "KEEPALIVE_S", 0.0)
    monkeypatch.setattr(service.encoder.tokenizer, "response_template", {"fields": {}}, raising=False)
    tool = {"type": "function", "function": {"name": "look"}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "max_tokens": 4, "stream": True}
    response = over_http(service, AdapterManager(service), "/v1/chat/completions", {**body, "dlp": {"trace": False}})
    assert "\n\n: keepalive\n\n" in response.text


def test_the_pages_scripts_write_text_and_never_markup() -> None:
    scripts = "".join(path.read_text() for path in PAGE.glob("*.js"))
    assert "createTextNode" in scripts
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", scripts)
    pages = "".join(path.read_text() for path in PAGE.glob("*.html"))
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=|https?://", pages)


@pytest.mark.parametrize("prefix", ["/llm", "/"])
def test_behind_a_path_prefix_a_key_is_asked_for_as_elsewhere(service: Service, prefix: str) -> None:
    guarded = replace(service, keys=Keys({"K": None}))
    app = make_app(guarded, AdapterManager(guarded))

    async def asked(headers: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(f"{prefix.rstrip('/')}/v1/models", headers=headers)

    assert asyncio.run(asked({})).status_code == 401
    assert asyncio.run(asked({"Authorization": "Bearer wrong"})).status_code == 401
    assert asyncio.run(asked({"Authorization": "Bearer K"})).status_code == 200
