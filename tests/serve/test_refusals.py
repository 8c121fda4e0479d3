"""What is refused: bad input, wrong keys, adapters from elsewhere. Answers say what is wrong, and the server lives."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import ValidationError

from conftest import lively_model, make_adapter
from dlp_lora.serve.schema import Body, ChatRequest, CompletionRequest, DetokenizeRequest
from server_process import ServerProcess, start

USER, MATHS, ADMIN = "key-of-a-user", "key-of-maths", "key-of-the-admin"
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server(lively_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start(lively_adapters, tmp_path_factory.mktemp("open"), max_body_mb=1.0) as running:
        yield running


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that adapters may be loaded from, and some that must not be."""
    root = tmp_path_factory.mktemp("adapters")
    model = lively_model()
    make_adapter(model, root / "shelf" / "tales", seed=7, scale=0.3)
    make_adapter(model, root / "elsewhere", seed=8, scale=0.3)
    make_adapter(model, root / "shelf" / "dora", seed=9, use_dora=True)
    os.symlink(root / "elsewhere", root / "shelf" / "link")
    shutil.copytree(root / "elsewhere", root / "shelf" / "linked-file")
    (root / "shelf" / "linked-file" / "adapter_model.safetensors").unlink()
    os.symlink(
        root / "elsewhere" / "adapter_model.safetensors", root / "shelf" / "linked-file" / "adapter_model.safetensors"
    )
    shutil.copytree(root / "elsewhere", root / "shelf" / "pickle")
    (root / "shelf" / "pickle" / "adapter_model.safetensors").rename(root / "shelf" / "pickle" / "adapter_model.bin")
    (root / "shelf" / "empty").mkdir()
    return root / "shelf"


@pytest.fixture(scope="module")
def guarded(lively_adapters: Path, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    keys = {USER: None, MATHS: ["math"]}
    folder = tmp_path_factory.mktemp("guarded")
    with start(lively_adapters, folder, keys=keys, admin=ADMIN, adapter_dir=[str(shelf)]) as running:
        yield running


def refused(response: httpx.Response, status: int, param: str | None = None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert response.headers["x-request-id"]
    return str(error["message"])


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"min_p": -0.1}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"n": 10**6}, "n"),
    ({"n": 0}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [260]}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"260": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
        "response_format.json_schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        "response_format.json_schema",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"dlp": {"polcy": {}}}, "dlp.polcy"),
    ({"dlp": {"policy": {"type": "Best"}}}, "dlp.policy"),
    ({"dlp": {"policy": {"type": "TopP", "p": 3}}}, "dlp.policy"),
    ({"dlp": {"policy": {"type": "Only", "name": "nobody"}}}, "dlp.policy"),
    ({"dlp": {"policy": {"type": "Only", "name": "math"}, "adapters": ["units"]}}, "dlp.policy"),
    ({"dlp": {"policy": {"type": "Only"}}}, "dlp.policy"),
    ({"dlp": {"policy": {"type": "Only", "name": ["math"]}}}, "dlp.policy"),
    ({"dlp": {"policy": {"type": ["TopP"]}}}, "dlp.policy"),
    ({"dlp": {"policy": {"type": "TopP", "q": 0.5}}}, "dlp.policy"),
    ({"dlp": {"policy": {"type": "TopK", "k": 1.5}}}, "dlp.policy"),
    ({"dlp": {"adapters": ["nobody"]}}, "dlp.adapters"),
    ({"dlp": {"fixed": {"nobody": 1.0}}}, "dlp.fixed"),
    ({"dlp": {"fixed": {"math": 1e300, "units": 1e200}}}, "dlp.fixed.math"),
    ({"logit_bias": {str(i): 1.0 for i in range(20_000)}}, "logit_bias"),
    ({"model": "math", "dlp": {"fixed": {}}}, "dlp.fixed"),
    ({"model": "math", "dlp": {"adapters": ["units"]}}, "dlp.adapters"),
    ({"dlp": {"fixed": {"math": 1.0}, "adapters": ["units"]}}, "dlp.adapters"),
    ({"dlp": {"kv_policy": "forget"}}, "dlp.kv_policy"),
    ({"dlp": {"deadline_s": 0}}, "dlp.deadline_s"),
    ({"model": "math=heavy"}, "model"),
    ({"model": "math=1,math=2"}, "model"),
    ({"model": "math=inf"}, "model"),
    ({"model": "math=1e300"}, "model"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    *(({name: value}, name) for name, value in {
        "best_of": 2,
        "use_beam_search": True,
        "guided_json": {},
        "prompt_logprobs": 1,
        "reasoning_effort": "high",
        "chat_template": "{{ x }}",
        "functions": [{}],
        "store": True,
        "modalities": ["text", "audio"],
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize("fields, param", FIELDS, ids=lambda value: json.dumps(value)[:60])
def test_a_field_that_cannot_be_followed_is_named(server: ServerProcess, fields: Any, param: str) -> None:
    message = refused(server.post(CHAT, {"messages": MESSAGES, **fields}), 400, param)
    assert 0 < len(message) < 600


@pytest.mark.parametrize("name, value", [("best_of", 1), ("store", False), ("modalities", ["text"]), ("user", "me")])
def test_fields_that_ask_for_nothing_are_let_through(server: ServerProcess, name: str, value: Any) -> None:
    more = {name: value, "chat_id": "x", "session_id": "y", "temperature": None, "stop": None, "tools": None}
    assert server.chat(max_tokens=2, **more).status_code == 200


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"x"', 400),
        (b"\xff\xfe", 400),
        (b'{"messages": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}', 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "user": "\\udfff"}', 400),
        (b'{"messages": [{"role": "user", "content": "x\xed\xa0\x80"}], "prompt": "x\xed\xa0\x80"}', 400),
        ('{"messages": [{"role": "user", "content": "\\ud800"}], "prompt": "\\ud800"}'.encode("utf-16"), 400),
        (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", 400),
        (b"[" * 100_000 + b"]" * 100_000, 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"messages": "' + b"x" * 2**21 + b'"}', 413),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_body_that_is_no_request_is_refused_at_once(server: ServerProcess, body: bytes, status: int) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize", "/v1/route"):
        start_s = time.perf_counter()
        response = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert time.perf_counter() - start_s < 10  # on a busy machine
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert server.client.get("/health").status_code == 200


def test_a_body_without_a_length_is_cut_at_the_limit(server: ServerProcess) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 2**16

    response = server.client.post(CHAT, content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


@pytest.mark.parametrize(
    "kind, origin, status",
    [
        ("application/json; charset=utf-8", None, 200),
        ("application/x-www-form-urlencoded", None, 200),  # curl -d
        ("application/x-www-form-urlencoded", "https://evil.example", 415),
        ("text/plain", None, 415),
        ("multipart/form-data; boundary=x", None, 415),
        ("application/xml", None, 415),
        (None, None, 200),
        (None, "https://evil.example", 415),  # a page may send a Blob without a type
    ],
)
def test_a_body_is_json_whatever_a_page_elsewhere_calls_it(
    server: ServerProcess, kind: str | None, origin: str | None, status: int
) -> None:
    headers = {name: value for name, value in {"Content-Type": kind, "Origin": origin}.items() if value is not None}
    body = json.dumps({"messages": MESSAGES, "max_tokens": 1})
    assert server.client.post(CHAT, content=body, headers=headers).status_code == status


def test_a_name_that_leads_here_from_elsewhere_is_refused(server: ServerProcess) -> None:
    response = server.client.get("/v1/models", headers={"Host": "evil.example"})
    assert "--allow-host" in refused(response, 421)
    place = urlsplit(server.address)
    with socket.create_connection((place.hostname, place.port)) as client:  # as some health checks do
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "path, fields, message",
    [
        (CHAT, {"temperature": -1}, "temperature: must be at least 0, got -1"),
        (CHAT, {"max_tokens": 1.5}, "max_tokens: must be an integer, got 1.5"),
        (CHAT, {"stream": "yes"}, "stream: must be true or false, got 'yes'"),
        (CHAT, {"messages": None}, "messages: must be a list, got null"),
        (CHAT, {"messages": []}, "messages: the list must have 1 or more items, got 0"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": 3}]},
            "messages.0.content: must be a string or a list, got 3",
        ),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0: a message needs content"),
        (CHAT, {"stop": ["a"] * 17}, "stop: the list must have at most 16 items, got 17"),
        (CHAT, {"stop": 5}, "stop: must be a string or a list, got 5"),
        (
            CHAT,
            {"tool_choice": "always"},
            "tool_choice: must be 'none', 'auto' or 'required' or an object, got 'always'",
        ),
        (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice.function: this field is required"),
        (CHAT, {"dlp": "x"}, "dlp: must be an object, got 'x'"),
        (CHAT, {"best_of": 2}, "best_of: not supported; leave it out"),
        (
            CHAT,
            {"dlp": {"switching": {"mergin": 1}}},
            "dlp.switching.mergin: there is no such field; there are min_tokens",
        ),
        (COMPLETIONS, {"prompt": [-1]}, "prompt.0: must be at least 0, got -1"),
        (COMPLETIONS, {"prompt": []}, "prompt: the list must have 1 or more items, got 0"),
    ],
)
def test_a_wrong_value_is_said_with_what_would_be_right(
    server: ServerProcess, path: str, fields: Any, message: str
) -> None:
    body = {"messages": MESSAGES, "prompt": "x", **fields}
    assert refused(server.post(path, body), 400, message.split(":")[0]).startswith(message)


def test_a_body_that_is_no_object_is_said_to_be_none(server: ServerProcess) -> None:
    assert refused(server.post(CHAT, [1]), 400) == "the body must be an object, got a list"


def test_what_does_not_fit_the_context_is_refused_with_its_code(server: ServerProcess) -> None:
    for body in (
        {"prompt": "x" * 600},
        {"prompt": "x" * 500, "max_tokens": 100},
        {"prompt": "x" * 900_000},
        {"prompt": [1] * 513},
        {"prompt": "x", "max_tokens": 10**9},
        {"messages": [{"role": "user", "content": "x" * 600}]},
        {"messages": [{"role": "user", "content": "x" * 900_000}]},
        {"messages": MESSAGES, "max_tokens": 500},
    ):
        error = server.post(CHAT if "messages" in body else COMPLETIONS, body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == ("messages" if "messages" in body else "prompt")
        assert "maximum context length is 512" in error["message"]
    assert server.complete("x" * 511, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "prompt", ["", "   ", [], [[]], [""], [260], [-1], [1.5], ["a", 1], {"a": 1}, None, 7, [[1], ["x"]]], ids=repr
)
def test_a_prompt_that_is_none_is_refused(server: ServerProcess, prompt: Any) -> None:
    response = server.complete(prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")


def test_what_is_no_prompt_of_other_routes_is_told_what_is_missing(server: ServerProcess) -> None:
    for path in ("/tokenize", "/v1/route"):
        assert refused(server.post(path, {}), 400) == "give either prompt or messages"
    for tokens in ([260], [-1], [1] * 513, "x", None):
        error = server.post("/detokenize", {"tokens": tokens}).json()["error"]
        assert error["param"].startswith("tokens")


def test_without_its_key_nobody_is_answered(guarded: ServerProcess) -> None:
    for path in ("/v1/models", "/v1/nowhere"):
        assert "Bearer" in refused(guarded.client.get(path), 401)
    for key in ("wrong", USER[:-1], USER + "x", "é"):
        response = guarded.client.post(CHAT, json={}, headers=[(b"authorization", b"Bearer " + key.encode())])
        refused(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    assert guarded.post(CHAT, {"messages": MESSAGES, "max_tokens": 1}, key=USER).status_code == 200
    for path in ("/health", "/version", "/metrics", "/", "/docs", "/openapi.json"):
        assert guarded.client.get(path).status_code == 200


def test_a_key_uses_its_adapters_and_no_others(guarded: ServerProcess) -> None:
    headers = {"Authorization": f"Bearer {MATHS}"}
    listed = [card["id"] for card in guarded.client.get("/v1/models", headers=headers).json()["data"]]
    assert listed == ["tiny", "tiny:base", "math"]
    for model in ("poems", "tiny:poems", "math=0.5,poems=0.5"):
        message = refused(guarded.post(CHAT, {"messages": MESSAGES, "model": model}, key=MATHS), 404, "model")
        assert "units" not in message
    refused(guarded.post(CHAT, {"messages": MESSAGES, "dlp": {"adapters": ["poems"]}}, key=MATHS), 400, "dlp.adapters")
    body = {"messages": MESSAGES, "max_tokens": 40}
    trace = guarded.post(CHAT, body, key=MATHS).json()["choices"][0]["dlp"]["trace"]
    assert {name for sentence in trace for name in [*sentence["mixture"], *sentence["probabilities"]]} <= {"math"}
    free = guarded.post(CHAT, body, key=USER).json()["choices"][0]["dlp"]["trace"]
    assert {name for sentence in free for name in sentence["mixture"]} > {"math"}
    told = guarded.post("/v1/route", {"prompt": "Hi"}, key=MATHS).json()
    assert set(told["probabilities"]) <= {"math"}


def test_keys_never_stand_in_the_log(guarded: ServerProcess) -> None:
    guarded.client.get(f"/v1/models?api_key={USER}", headers={"Authorization": f"Bearer {USER}"})
    guarded.post(CHAT, {"messages": MESSAGES, "max_tokens": 1}, key=MATHS)
    text = guarded.log_path.read_text()
    assert "/v1/models" in text
    assert not any(key in text for key in (USER, MATHS, ADMIN))


def test_only_the_admin_manages_adapters(guarded: ServerProcess, server: ServerProcess) -> None:
    body = {"lora_name": "tales", "lora_path": "tales"}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/reload"):
        refused(guarded.post(path, body), 401)
        refused(guarded.post(path, body, key=USER), 403)
        refused(server.post(path, body), 403)


@pytest.mark.parametrize(
    "path, code",
    [
        ("../elsewhere", "path_refused"),
        ("tales/../../elsewhere", "path_refused"),
        ("{root}/elsewhere", "path_refused"),
        ("/etc", "path_refused"),
        ("link", "path_refused"),
        ("linked-file", "path_refused"),
        ("pickle", "path_refused"),
        ("owner/name", "path_refused"),
        ("meta-llama/Llama-2", "path_refused"),
        (".", "path_refused"),
        ("tales\0", "path_refused"),
        ("a" * 300, "path_refused"),
        ("empty", "adapter_refused"),
        ("dora", "adapter_refused"),
    ],
)
def test_adapters_from_elsewhere_are_refused(guarded: ServerProcess, shelf: Path, path: str, code: str) -> None:
    body = {"lora_name": "new", "lora_path": path.replace("{root}", str(shelf.parent))}
    response = guarded.post("/v1/load_lora_adapter", body, key=ADMIN)
    assert refused(response, 400, "lora_path")
    assert response.json()["error"]["code"] == code
    headers = {"Authorization": f"Bearer {USER}"}
    assert guarded.client.get("/v1/models/new", headers=headers).status_code == 404


@pytest.mark.parametrize("name", ["tiny", "tiny:x", "a=b", "a,b", " a", "math"])
def test_names_that_clients_could_not_use_are_refused(guarded: ServerProcess, name: str) -> None:
    response = guarded.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "tales"}, key=ADMIN)
    refused(response, 400, "lora_name")


def test_an_adapter_comes_and_goes(guarded: ServerProcess, shelf: Path) -> None:
    def ask(**more: Any) -> httpx.Response:
        return guarded.post(CHAT, {"messages": MESSAGES, "max_tokens": 12, **more}, key=USER)

    base = ask(model="tiny:base").json()["choices"][0]["message"]
    told = guarded.post("/v1/load_lora_adapter", {"lora_name": "tales", "lora_path": "tales"}, key=ADMIN).json()
    assert told["is_routed"] is False
    assert "never chooses it" in told["message"]
    first = ask(model="tales").json()["choices"][0]["message"]
    assert first != base
    again = guarded.post("/v1/load_lora_adapter", {"lora_name": "tales", "lora_path": "tales"}, key=ADMIN)
    refused(again, 400, "lora_name")
    make_adapter(lively_model(), shelf / "tales", seed=70, scale=0.3)
    body = {"lora_name": "tales", "lora_path": str(shelf / "tales"), "load_inplace": True}
    assert guarded.post("/v1/load_lora_adapter", body, key=ADMIN).status_code == 200
    second = ask(model="tales").json()["choices"][0]["message"]
    assert second != first
    assert ask(model="tales").json()["choices"][0]["message"] == second
    assert guarded.post("/v1/unload_lora_adapter", {"lora_name": "tales"}, key=ADMIN).status_code == 200
    refused(ask(model="tales"), 404, "model")
    refused(guarded.post("/v1/unload_lora_adapter", {"lora_name": "tales"}, key=ADMIN), 404, "lora_name")


def test_examples_need_a_router_that_learns(guarded: ServerProcess) -> None:
    body = {"lora_name": "tales", "lora_path": "tales", "examples": [{"prompt": "a", "answer": "b"}]}
    message = refused(guarded.post("/v1/load_lora_adapter", body, key=ADMIN), 400, "examples")
    assert "HashRouter" in message


@pytest.mark.parametrize(
    "kind, body",
    [
        (CompletionRequest, {"prompt": [-1] * 50_000}),
        (CompletionRequest, {"prompt": [[-1] * 50_000]}),
        (CompletionRequest, {"prompt": "x", "stop_token_ids": [-1] * 50_000}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(50_000)}}),
        (CompletionRequest, {"prompt": "x", "dlp": {"fixed": {str(i): "x" for i in range(50_000)}}}),
        (ChatRequest, {"messages": [0] * 50_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [0] * 50_000}]}),
        (ChatRequest, {"messages": MESSAGES, "tools": [0] * 50_000}),
        (DetokenizeRequest, {"tokens": [""] * 50_000}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)
def test_a_body_with_thousands_of_wrong_items_is_refused_for_a_few(kind: type[Body], body: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 8
