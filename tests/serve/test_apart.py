"""Questions apart over HTTP: each is a row of its own, and the answer is the one that the engine joins."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import WordRouter
from dlp_lora import Context, Engine, Generation, Mixture, TopK
from dlp_lora.engine.outline import Outline
from dlp_lora.serve import service as serving_module
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.answers import Answers
from dlp_lora.serve.apart import in_order
from dlp_lora.serve.backend import Done, QueueFullError, SentenceStart, Token
from dlp_lora.serve.cutter import SentenceCutter
from dlp_lora.serve.keys import Access, Keys
from dlp_lora.serve.local import LocalBackend
from dlp_lora.serve.schema import CompletionRequest
from dlp_lora.serve.server import local_service, make_service
from dlp_lora.serve.service import Service
from dlp_lora.serve.settings import ServerSettings
from dlp_lora.serve.vllm.backend import VLLMBackend
from serving import ask, double_engine, events_of, over_http, read, timeless
from vllm_stand_in import standing_in

pytestmark = pytest.mark.filterwarnings("ignore:.*changes nothing")  # the adapter that vLLM is checked with

QUESTIONS = ("Add the sum?", "A rhyme in verse?", "How long is an inch?")
PROMPT = "\n".join(QUESTIONS)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
NUM = 24  # tokens of an answer


@pytest.fixture(scope="module")
def engine(lively_adapters: Path) -> Engine:
    return double_engine(lively_adapters, router=WordRouter(), policy=TopK(1), prompt_routing="apart")


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[Service]:
    service = local_service(engine, ServerSettings(max_batch=2, max_queue=4), Keys({}), name="tiny")
    yield service
    service.backend.close()


@pytest.fixture(scope="module", params=["local", "vllm"])
def service(request: pytest.FixtureRequest, engine: Engine, local: Service, lively_adapters: Path) -> Iterator[Service]:
    if request.param == "local":
        yield local
        return
    with standing_in(double_engine(lively_adapters)) as server:
        backend = VLLMBackend(Outline.of(engine), [server.url])
        yield make_service(Outline.of(engine), backend, ServerSettings(), Keys({}), name="tiny")
        backend.close()


def post(service: Service, engine: Engine, **body: Any) -> Any:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = over_http(service, AdapterManager(service), path, {"max_tokens": NUM, **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(service: Service, engine: Engine, **body: Any) -> list[Any]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    body = {"max_tokens": NUM, **body, "stream": True}
    *found, end = events_of(over_http(service, AdapterManager(service), path, body))
    assert end == "[DONE]"
    return found


def text_of(choice: Any) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def told(generation: Generation) -> list[Any]:
    return [(s.text, s.start, s.end, dict(s.mixture), s.switched) for s in generation.trace]


def traced(choice: Any) -> list[Any]:
    return [(s["text"], s["start"], s["end"], s["mixture"], s["switched"]) for s in choice["dlp"]["trace"]]


@pytest.mark.parametrize("body", [{"prompt": PROMPT}, {"messages": MESSAGES}], ids=["completion", "chat"])
def test_an_answer_is_the_one_that_the_engine_joins(service: Service, engine: Engine, body: Any) -> None:
    expected = engine.generate(body.get("prompt") or MESSAGES, max_new_tokens=NUM)
    answer = post(service, engine, **body, dlp={"prompt_tokens": True})
    (choice,) = answer["choices"]
    assert len(expected.parts) == 3
    assert text_of(choice) == expected.text
    assert traced(choice) == told(expected)
    assert choice["dlp"]["parts"] == [part.text for part in expected.parts]
    assert choice["dlp"]["prompt_tokens"] == [token for part in expected.parts for token in part.prompt_tokens]
    assert answer["usage"]["prompt_tokens"] == expected.num_prompt_tokens
    assert answer["usage"]["completion_tokens"] == len(expected.tokens)


@pytest.mark.parametrize("body", [{"prompt": PROMPT}, {"messages": MESSAGES}], ids=["completion", "chat"])
def test_a_stream_is_the_same_answer_with_its_sentences_in_order(service: Service, engine: Engine, body: Any) -> None:
    expected = engine.generate(body.get("prompt") or MESSAGES, max_new_tokens=NUM)
    *chunks, last, usage = events(service, engine, **body, stream_options={"include_usage": True})
    text, sentences = "", []
    for choice in (chunk["choices"][0] for chunk in chunks):
        if "dlp" in choice:
            assert choice["dlp"]["offset"] == len(text)
            sentences.append(choice["dlp"])
        text += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    assert text == expected.text
    assert [s["sentence"] for s in sentences] == list(range(len(expected.trace)))
    assert [(s["start"], s["mixture"], s["switched"]) for s in sentences] == [
        (start, mixture, switched) for _, start, _, mixture, switched in told(expected)
    ]
    assert traced(last["choices"][0]) == told(expected)
    assert usage["usage"]["completion_tokens"] == len(expected.tokens)


def test_each_part_ends_at_its_stop_string_and_the_next_goes_on(local: Service, engine: Engine) -> None:
    texts = [engine.generate(question, max_new_tokens=NUM).text for question in QUESTIONS]
    stop = next(character for character in texts[0][1:-3] if character.isascii() and character.isprintable())
    answer = post(local, engine, prompt=PROMPT, stop=[stop])
    (choice,) = answer["choices"]
    parts = [text.partition(stop)[0] for text in texts]
    assert choice["dlp"]["parts"] == parts
    joined = "".join(part if part.endswith("\n") else f"{part}\n" for part in parts[:-1]) + parts[-1]
    assert choice["text"] == joined
    assert "".join(sentence["text"] for sentence in choice["dlp"]["trace"]) == joined
    *chunks, last = events(local, engine, prompt=PROMPT, stop=[stop])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == joined
    is_cut_off = any(stop not in text for text in texts)
    assert choice["finish_reason"] == last["choices"][0]["finish_reason"] == ("length" if is_cut_off else "stop")


def test_the_joined_stream_tells_one_story_and_holds_back_who_is_not_in_turn(local: Service, engine: Engine) -> None:
    requests = [ask(engine, question, max_tokens=n) for question, n in zip(QUESTIONS, (30, 3, 8), strict=True)]
    told_events = list(in_order(local.backend.open_all(requests)))
    done = read(told_events)
    assert [len(part.tokens) for part in done.generation.parts] == [30, 3, 8]
    for part, request in zip(done.generation.parts, requests, strict=True):
        alone = read(local.backend.open(request)).generation
        assert timeless(part) == timeless(alone)
    places = [event.position for event in told_events if isinstance(event, Token)]
    assert places == list(range(41))
    assert done.usage.prompt_tokens == sum(len(request.tokens) for request in requests)


def test_a_joined_stream_that_is_cancelled_ends_once(local: Service, engine: Engine) -> None:
    requests = [ask(engine, each, max_tokens=400, ignore_eos=True) for each in QUESTIONS]
    stream = in_order(local.backend.open_all(requests))
    while not isinstance(next(stream), Token):
        pass
    stream.cancel()
    done, *others = [event for event in stream if isinstance(event, Done)]
    assert done.reason == "abort"
    assert not others


def test_a_request_may_ask_for_it_or_against_it(local: Service, engine: Engine) -> None:
    whole = post(local, engine, prompt=PROMPT, dlp={"prompt_routing": "whole"})["choices"][0]
    assert "parts" not in whole["dlp"]
    with engine.using(prompt_routing="whole"):
        assert whole["text"] == engine.generate(PROMPT, max_new_tokens=NUM).text
    apart = post(replace(local, call=local.call.changed({"prompt_routing": "questions"})), engine, prompt=PROMPT)
    assert "parts" not in apart["choices"][0]["dlp"]
    among = post(local, engine, prompt=PROMPT, dlp={"prompt_routing": "apart", "adapters": ["math", "poems"]})
    assert len(among["choices"][0]["dlp"].get("parts", [])) < 3  # no adapter may answer the last question


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"logprobs": 1},
        {"echo": True},
        {"model": "math"},
        {"dlp": {"fixed": {}}},
        {"response_format": {"type": "json_object"}},
        {"prompt": [65, 10, 66]},
    ],
    ids=str,
)
def test_what_is_asked_of_one_answer_is_not_answered_in_parts(local: Service, engine: Engine, body: Any) -> None:
    for choice in post(local, engine, **{"prompt": PROMPT, "max_tokens": 4, **body})["choices"]:
        assert "parts" not in choice["dlp"]


def test_several_prompts_are_cut_each_for_itself(local: Service, engine: Engine) -> None:
    prompts = [PROMPT, "Add the sum?"]
    answer = post(local, engine, prompt=prompts, max_tokens=4)
    expected = engine.generate(prompts, max_new_tokens=4)
    assert [text_of(choice) for choice in answer["choices"]] == [generation.text for generation in expected]
    assert answer["usage"]["prompt_tokens"] == sum(generation.num_prompt_tokens for generation in expected)


def test_the_questions_are_told_without_an_answer(service: Service, engine: Engine) -> None:
    routed = over_http(service, AdapterManager(service), "/v1/route", {"messages": MESSAGES}).json()
    assert routed["questions"] == list(QUESTIONS)
    assert routed["mixture"] == {"math": 1.0}
    parts = engine.generate(MESSAGES, max_new_tokens=1).parts
    assert routed["num_tokens"] == sum(len(part.prompt_tokens) for part in parts)


def test_more_questions_than_a_request_may_have_answers_are_refused_if_it_asked_for_them_apart(
    local: Service, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_module, "MAX_CHOICES", 2)
    body = {"prompt": PROMPT, "max_tokens": NUM}
    asked = {**body, "dlp": {"prompt_routing": "apart"}}
    response = over_http(local, AdapterManager(local), "/v1/completions", asked)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "dlp.prompt_routing"
    assert "the prompt asks 3 questions, and 2 are answered apart at most" in response.json()["error"]["message"]
    # Nobody asked for more here: the prompt is answered in one context.
    answer = post(local, engine, **body)["choices"][0]
    assert "parts" not in answer["dlp"]
    with engine.using(prompt_routing="questions"):
        assert text_of(answer) == engine.generate(PROMPT, max_new_tokens=NUM, do_sample=False).text


def test_more_questions_than_the_server_ever_has_room_for_are_answered_in_one_context(engine: Engine) -> None:
    service = local_service(engine, ServerSettings(max_batch=1, max_queue=1), Keys({}), name="tiny")
    try:
        assert "parts" not in post(service, engine, prompt=PROMPT, max_tokens=4)["choices"][0]["dlp"]
    finally:
        service.backend.close()


@pytest.mark.parametrize("body", [{"prompt": PROMPT}, {"prompt": "Hello there. What is the sum?"}], ids=str)
def test_the_router_reads_each_text_of_a_prompt_once(local: Service, engine: Engine, body: Any) -> None:
    router = engine.router
    assert isinstance(router, WordRouter)
    router.asked.clear()
    post(local, engine, **body, max_tokens=1)
    assert router.asked.count(Context(body["prompt"])) == 1


def test_a_sentence_behind_a_stop_string_takes_no_text_of_the_next_part() -> None:
    def start(number: int, offset: int) -> SentenceStart:
        return SentenceStart(
            number=number,
            position=number,
            offset=offset,
            mixture=Mixture(),
            probabilities={},
            switched=False,
            abstained=True,
            route_ms=0.0,
        )

    cutter, pieces = SentenceCutter(), list[tuple[str, int | None]]()
    events: list[SentenceStart | str] = [start(0, 0), "4", start(1, 3), "", start(2, 2), "\nRoses", " are red"]
    for event in events:
        if isinstance(event, str):
            pieces += [(text, begun and begun.number) for text, begun in cutter.cut(event)]
        else:
            cutter.begin(event)
    assert pieces == [("4", 0), ("\n", None), ("", 1), ("Roses", 2), (" are red", None)]


def test_a_queue_without_room_for_all_parts_takes_none(engine: Engine) -> None:
    backend = LocalBackend(engine, max_batch=1, max_queue=1)
    with pytest.raises(QueueFullError, match="0 requests run or wait already, and 3 more do not fit"):
        backend.open_all([ask(engine, question, max_tokens=400, ignore_eos=True) for question in QUESTIONS])
    assert backend.stats().waiting == 0
    backend.close(drain_s=20)
    assert backend.stats().num_read_tokens == 0


def test_a_client_that_leaves_ends_all_parts(engine: Engine) -> None:
    service = local_service(engine, ServerSettings(), Keys({}), name="tiny")
    body = CompletionRequest(prompt=PROMPT, max_tokens=400, ignore_eos=True)

    async def leave() -> None:
        async with Answers(service, service.completion(body, Access(adapters=None))) as answers:
            async for _ in answers.items():
                break

    asyncio.run(leave())
    service.backend.close(drain_s=20)
    stats = service.backend.stats()
    assert stats.num_step_tokens < 3 * 399
    assert stats.decoding == stats.reading == stats.waiting == service.num_running == 0
