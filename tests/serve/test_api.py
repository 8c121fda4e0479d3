"""The API over HTTP: a real server process, a tiny model in float64, and the engine alone as the oracle."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from dlp_lora import Engine
from server_process import ServerProcess, start
from serving import double_engine

TALE = {"messages": [{"role": "user", "content": "Tell me a tale"}], "max_tokens": 24}


@pytest.fixture(scope="module")
def server(lively_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start(lively_adapters, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def engine(lively_adapters: Path) -> Engine:
    return double_engine(lively_adapters)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_a_chat_is_answered_as_the_engine_answers_it(server: ServerProcess, engine: Engine) -> None:
    answer = server.chat(max_tokens=24).json()
    alone = engine.generate(TALE["messages"], max_new_tokens=24)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone.text, "refusal": None}
    assert choice["finish_reason"] == ("stop" if alone.tokens[-1] in engine.eos_ids else "length")
    assert answer["model"] == "tiny"
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(alone.tokens)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_trace_is_that_of_the_engine_and_tiles_the_text(server: ServerProcess, engine: Engine) -> None:
    choice = server.chat(max_tokens=24).json()["choices"][0]
    alone = engine.generate(TALE["messages"], max_new_tokens=24)
    trace = choice["dlp"]["trace"]
    assert "".join(sentence["text"] for sentence in trace) == choice["message"]["content"]
    assert [s["mixture"] for s in trace] == [dict(s.mixture) for s in alone.trace]
    assert [(s["start"], s["end"]) for s in trace] == [(s.start, s.end) for s in alone.trace]
    assert len(trace) > 1
    without = server.chat(max_tokens=24, dlp={"trace": False}).json()["choices"][0]
    assert "dlp" not in without


@pytest.mark.parametrize("model", ["tiny", "tiny:base", "math", "tiny:math", "math=0.6,units=0.4", None])
def test_a_stream_concatenates_to_the_plain_answer(server: ServerProcess, engine: Engine, model: str | None) -> None:
    mixtures: dict[str | None, Any] = {"tiny:base": {}, "math": {"math": 1.0}, "tiny:math": {"math": 1.0}}
    mixtures["math=0.6,units=0.4"] = {"math": 0.6, "units": 0.4}
    alone = engine.generate("Tell me a tale", max_new_tokens=24, mixture=mixtures.get(model))
    *chunks, end = server.events("/v1/completions", {"prompt": "Tell me a tale", "max_tokens": 24, "model": model})
    assert end == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone.text
    assert {chunk["model"] for chunk in chunks} == {model or "tiny"}
    assert [chunk["choices"][0]["finish_reason"] is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [
        True
    ]


def test_each_sentence_begins_a_chunk_that_says_how_it_is_routed(server: ServerProcess, engine: Engine) -> None:
    *chunks, _ = server.events("/v1/chat/completions", TALE)
    texts: list[str] = []
    mixtures = []
    for choice in (chunk["choices"][0] for chunk in chunks[1:-1]):
        if "dlp" in choice:
            texts.append("")
            mixtures.append(choice["dlp"]["mixture"])
            assert choice["dlp"]["offset"] == len("".join(texts))
        texts[-1] += choice["delta"].get("content", "")
    alone = engine.generate(TALE["messages"], max_new_tokens=24)
    assert texts == [sentence.text for sentence in alone.trace]
    assert mixtures == [dict(sentence.mixture) for sentence in alone.trace]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [s["text"] for s in chunks[-1]["choices"][0]["dlp"]["trace"]] == texts


def test_nulls_are_written_and_usage_comes_only_if_it_is_asked_for(server: ServerProcess) -> None:
    *chunks, _ = server.events("/v1/chat/completions", TALE)
    assert all("finish_reason" in choice and "logprobs" in choice for c in chunks for choice in c["choices"])
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert not any("usage" in chunk for chunk in chunks)
    *_, usage, _ = server.events("/v1/chat/completions", {**TALE, "stream_options": {"include_usage": True}})
    assert usage["choices"] == []
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = server.events("/v1/chat/completions", {**TALE, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 24
    assert usage["usage"]["completion_tokens"] == 24


def test_a_temperature_that_float32_does_not_have_is_none(server: ServerProcess) -> None:
    greedy, tiny = (server.complete(max_tokens=6, temperature=t, seed=1).json()["choices"] for t in (0, 1e-45))
    assert tiny[0]["text"] == greedy[0]["text"]


def test_several_answers_and_prompts_are_numbered(server: ServerProcess, engine: Engine) -> None:
    answer = server.complete(["Once", "Why?"], n=2, max_tokens=8, temperature=1.0, seed=3).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    for i, (prompt, seed) in enumerate([("Once", 3), ("Once", 4), ("Why?", 3), ("Why?", 4)]):
        sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "seed": seed}
        assert texts[i] == engine.generate(prompt, max_new_tokens=8, **sampled).text
    merged = ["", "", "", ""]
    body = {"prompt": ["Once", "Why?"], "n": 2, "max_tokens": 8, "temperature": 1.0, "seed": 3}
    for chunk in server.events("/v1/completions", body)[:-1]:
        merged[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert merged == texts


def test_stop_strings_end_the_text_before_them(server: ServerProcess) -> None:
    whole = server.complete(max_tokens=24).json()["choices"][0]["text"]
    stop = whole[10:12]
    choice = server.complete(max_tokens=24, stop=[stop, "never"]).json()["choices"][0]
    assert choice["text"] == whole[: whole.find(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert "".join(s["text"] for s in choice["dlp"]["trace"]) == choice["text"]


def test_log_probabilities_name_tokens_and_those_that_might_have_come(server: ServerProcess) -> None:
    choice = server.chat(max_tokens=6, logprobs=True, top_logprobs=3).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 6
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}
    streamed = [
        entry
        for chunk in server.events(
            "/v1/chat/completions", {**TALE, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
        )[:-1]
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == entries


def test_an_echo_has_the_log_probabilities_of_the_prompt(server: ServerProcess, engine: Engine) -> None:
    import torch

    choice = server.complete("Once upon", max_tokens=1, echo=True, logprobs=2, model="math").json()["choices"][0]
    scores = choice["logprobs"]
    assert choice["text"].startswith("Once upon")
    ids = engine.tokenizer("Once upon")["input_ids"]
    with engine.fixed({"math": 1.0}), torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    expected = [float(logits[i, token]) for i, token in enumerate(ids[1:])]
    assert scores["token_logprobs"][0] is None
    assert scores["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-5)
    assert "".join(scores["tokens"][: len(ids)]) == "Once upon"
    assert scores["text_offset"][: len(ids)] == list(range(len(ids)))
    alone = server.complete("Once upon", max_tokens=0, echo=True, logprobs=2, model="math").json()
    assert alone["choices"][0]["text"] == "Once upon"


def test_token_ids_are_prompts_and_go_there_and_back(server: ServerProcess) -> None:
    told = server.post("/tokenize", {"prompt": "Tell me a tale", "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == 14
    assert "".join(told["token_strs"]) == "Tell me a tale"
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "Tell me a tale"}
    by_text = server.complete(max_tokens=12).json()["choices"][0]["text"]
    assert server.complete(told["tokens"], max_tokens=12).json()["choices"][0]["text"] == by_text
    chat = server.post("/tokenize", {"messages": TALE["messages"]}).json()
    assert (
        server.complete(chat["tokens"], max_tokens=12).json()["choices"][0]["text"]
        in (server.chat(max_tokens=12).json()["choices"][0]["message"]["content"])
    )


def test_roles_and_parts_of_clients_are_read(server: ServerProcess) -> None:
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a tale"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me\na tale"}]
    asked, expected = (
        server.post("/v1/chat/completions", {"messages": m, "max_completion_tokens": 8}).json()
        for m in (messages, plain)
    )
    assert asked["choices"][0]["message"] == expected["choices"][0]["message"]
    assert asked["usage"]["completion_tokens"] == 8


def test_a_message_is_gone_on_with(server: ServerProcess, engine: Engine) -> None:
    messages = [*TALE["messages"], {"role": "assistant", "content": "Once"}]
    body = {"messages": messages, "max_tokens": 8, "continue_final_message": True, "add_generation_prompt": False}
    answer = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert answer == engine.generate(messages, max_new_tokens=8).text


def test_models_are_listed_and_described(server: ServerProcess) -> None:
    listed = server.client.get("/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["tiny", "tiny:base", "math", "poems", "units"]
    assert {card["parent"] for card in listed[1:]} == {"tiny"}
    for card in listed:
        assert server.client.get(f"/v1/models/{card['id']}").json() == card


@pytest.mark.parametrize("name", ["gpt-4", "tiny:nobody", "nobody=1", "math=0.5,nobody=0.5", "", "tiny:", "base"])
def test_an_unknown_model_is_not_found_and_never_the_base(server: ServerProcess, name: str) -> None:
    response = server.chat(model=name)
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "tiny:base" in error["message"]


def test_what_would_answer_is_told_without_an_answer(server: ServerProcess, engine: Engine) -> None:
    told = server.post("/v1/route", {"prompt": "Tell me a tale"}).json()
    first = server.complete(max_tokens=1).json()["choices"][0]["dlp"]["trace"][0]
    assert told["mixture"] == first["mixture"]
    assert told["probabilities"] == pytest.approx(first["probabilities"], abs=1e-6)
    chat = server.post("/v1/route", {"messages": TALE["messages"]}).json()
    assert chat["mixture"] == server.chat(max_tokens=1).json()["choices"][0]["dlp"]["trace"][0]["mixture"]


def test_a_request_may_be_routed_otherwise(server: ServerProcess, engine: Engine) -> None:
    def text(**dlp: Any) -> str:
        return str(server.complete(max_tokens=24, dlp=dlp).json()["choices"][0]["text"])

    from dlp_lora import TopK, Uniform

    assert text(fixed={"math": 1.0}) == engine.generate("Tell me a tale", max_new_tokens=24, mixture={"math": 1.0}).text
    assert text(fixed={}) == engine.generate("Tell me a tale", max_new_tokens=24, mixture={}).text
    with engine.using(policy=TopK(1), kv_policy="keep"):
        expected = engine.generate("Tell me a tale", max_new_tokens=24).text
    assert text(policy={"type": "TopK", "k": 1}, kv_policy="keep") == expected
    with engine.using(policy=Uniform()):
        assert text(policy={"type": "Uniform"}) == engine.generate("Tell me a tale", max_new_tokens=24).text
    trace = server.complete(max_tokens=24, dlp={"adapters": ["math", "units"]}).json()["choices"][0]["dlp"]["trace"]
    assert {name for sentence in trace for name in sentence["mixture"]} <= {"math", "units"}


def test_json_is_written_where_it_is_asked_for(server: ServerProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "ok": {"type": "boolean"}},
        "required": ["size", "ok"],
        "additionalProperties": False,
    }
    format_ = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    choice = server.chat(response_format=format_, temperature=1.0, seed=1).json()["choices"][0]
    data = json.loads(choice["message"]["content"])
    assert data["size"] in ("small", "large")
    assert isinstance(data["ok"], bool)
    assert len(choice["dlp"]["trace"]) == 1  # one mixture while a grammar holds
    assert choice["finish_reason"] == "stop"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"where": {"enum": ["here", "there"]}},
                "required": ["where"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("look", "go")
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "go"}}])
def test_tools_are_called_by_grammar(server: ServerProcess, choice: Any) -> None:
    body = {**TALE, "max_tokens": 80, "tools": TOOLS, "tool_choice": choice}
    answer = server.post("/v1/chat/completions", body).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert answer["message"]["content"] is None
    assert call["function"]["name"] in (("look", "go") if choice == "required" else ("go",))
    assert json.loads(call["function"]["arguments"])["where"] in ("here", "there")
    assert call["function"]["arguments"].startswith("{")
    assert answer["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    name, arguments = "", ""
    for chunk in server.events("/v1/chat/completions", body)[:-1]:
        for part in chunk["choices"][0]["delta"].get("tool_calls", ()):
            name += part["function"].get("name", "")
            arguments += part["function"]["arguments"]
    assert (name, arguments) == (call["function"]["name"], call["function"]["arguments"])


def test_a_call_and_its_result_go_on_in_the_chat(server: ServerProcess) -> None:
    """Also with a template that reads no calls: they are text then, as the model writes them."""
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"where": "here"}'}}
    chat = [*TALE["messages"], {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat.append({"role": "tool", "tool_call_id": "1", "content": "A tree."})
    tokens = server.post("/tokenize", {"messages": chat}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert '{"name": "look", "arguments": {"where": "here"}}' in text
    assert "A tree." in text
    for more in ({}, {"tools": TOOLS, "tool_choice": "required"}):
        assert server.post("/v1/chat/completions", {"messages": chat, "max_tokens": 2, **more}).status_code == 200


def test_tools_are_left_alone_where_none_is_to_be_called(server: ServerProcess) -> None:
    answer = server.chat(max_tokens=8, tools=TOOLS, tool_choice="none").json()["choices"][0]
    assert answer == server.chat(max_tokens=8).json()["choices"][0] | {"dlp": answer["dlp"]}
    refused = server.chat(tools=TOOLS)
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "tool_choice"


def test_a_request_id_comes_back_and_stands_in_the_log(server: ServerProcess) -> None:
    response = server.complete(max_tokens=2)
    assert len(response.headers["x-request-id"]) == 32
    response = server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}, headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    line = server.logged("mine-1")
    assert (line["path"], line["status"], line["completion_tokens"]) == ("/v1/completions", 200, 2)


def test_metrics_count_what_was_answered(server: ServerProcess) -> None:
    before = server.metric("generation_tokens_total", model="math")
    server.complete(max_tokens=7, model="math")
    assert server.metric("generation_tokens_total", model="math") == before + 7
    assert server.metric("sentences_total", adapter="math") > 0
    server.complete(model="no-such-model")
    assert "no-such-model" not in server.client.get("/metrics").text


def test_another_route_is_not_found_and_the_supported_ones_are_named(server: ServerProcess) -> None:
    for path in ("/v1/responses", "/v1/embeddings", "/nowhere"):
        response = server.post(path, {})
        assert response.status_code == 404
        assert "/v1/chat/completions" in error_of(response)["message"]
    response = server.client.get("/v1/chat/completions")
    assert response.status_code == 405
    assert error_of(response)["code"] == "wrong_method"


def test_health_version_and_pages_are_there(server: ServerProcess) -> None:
    assert server.client.get("/health").json() == {"status": "ok", "reason": ""}
    head = server.client.head("/health")
    assert (head.status_code, head.content) == (200, b"")
    releases = server.client.get("/version").json()
    assert releases["version"]
    assert releases["backend"] == f"PyTorch {torch.__version__}"
    for path in ("/", "/docs"):
        page = server.client.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert "script-src 'self'" in page.headers["content-security-policy"]
    assert server.client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]
