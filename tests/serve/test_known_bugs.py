"""Bugs that bit other LoRA servers do not bite here; those of schedulers and processes are tested beside these."""

import asyncio
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conftest import CHAT_TEMPLATE, byte_tokenizer, lively_model, make_adapter
from dlp_lora import Engine
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.app import make_app
from dlp_lora.serve.keys import Keys
from dlp_lora.serve.server import local_service
from dlp_lora.serve.service import Service
from dlp_lora.serve.settings import ServerSettings
from serving import ask, double_engine, events_of, over_http, read

PROMPT = "Tell me a tale"
CHAT = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def engine(lively_adapters: Path) -> Engine:
    return double_engine(lively_adapters)


@pytest.fixture
def service(engine: Engine) -> Iterator[Service]:
    service = local_service(engine, ServerSettings(), Keys({}, admin="A"), name="tiny")
    yield service
    service.backend.close()


def post(service: Service, engine: Engine, body: Any, path: str = "/v1/completions", **more: Any) -> httpx.Response:
    return over_http(service, AdapterManager(service, **more), path, body, key="A")


def by_hand(model: PreTrainedModel, prompt: str, num: int) -> tuple[list[int], list[float]]:
    """What a model answers by itself, greedily, and the log-probabilities of prompt and answer."""
    ids = byte_tokenizer()(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=num, do_sample=False)
        scores = model(output).logits[0].log_softmax(dim=-1)
    tokens = output[0].tolist()
    return tokens[ids["input_ids"].shape[1] :], [float(scores[i, token]) for i, token in enumerate(tokens[1:])]


@pytest.mark.parametrize("name", ["tiny:base", "math", "poems", "units"])
def test_an_adapter_answers_as_peft_and_the_base_as_the_plain_model(
    service: Service, engine: Engine, lively_adapters: Path, name: str
) -> None:
    """https://github.com/vllm-project/vllm/issues/10798, https://github.com/ggml-org/llama.cpp/issues/28674,
    https://github.com/vllm-project/vllm/issues/34186.
    """
    model = lively_model().double()
    if name != "tiny:base":
        model = PeftModel.from_pretrained(model, lively_adapters / name).double()
    tokens, logprobs = by_hand(model, PROMPT, 12)
    answer = post(
        service, engine, {"prompt": PROMPT, "model": name, "max_tokens": 12, "echo": True, "logprobs": 0}
    ).json()
    (choice,) = answer["choices"]
    assert choice["text"] == PROMPT + engine.tokenizer.decode(tokens, skip_special_tokens=True)
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(logprobs, abs=1e-5)
    assert answer["model"] == name  # https://github.com/vllm-project/vllm/issues/7260


def test_a_colon_in_the_served_name_names_no_adapter(engine: Engine) -> None:
    """https://github.com/sgl-project/sglang/issues/12745."""
    settings = ServerSettings(served_model_name="gpt-oss:120b")
    service = local_service(engine, settings, Keys({}), name="tiny")
    found = {
        name: post(service, engine, {"prompt": PROMPT, "model": name, "max_tokens": 8})
        for name in ("gpt-oss:120b", "gpt-oss:120b:base", "gpt-oss:120b:math", "math", "gpt-oss", "gpt-oss:math")
    }
    service.backend.close()
    assert [response.status_code for response in found.values()] == [200] * 4 + [404] * 2
    text = {name: response.json()["choices"][0]["text"] for name, response in list(found.items())[:4]}
    assert text["gpt-oss:120b"] == engine.generate(PROMPT, max_new_tokens=8).text
    assert text["gpt-oss:120b:base"] == engine.generate(PROMPT, max_new_tokens=8, mixture={}).text
    assert text["gpt-oss:120b:math"] == text["math"]


def test_what_is_listed_can_be_asked_for_and_nothing_else(service: Service, engine: Engine, tmp_path: Path) -> None:
    """https://github.com/vllm-project/vllm/issues/11761."""
    make_adapter(lively_model(), tmp_path / "tales", seed=7, scale=0.3)

    def check(names: set[str]) -> None:
        listed = post(service, engine, None, "/v1/models").json()["data"]
        assert {card["id"] for card in listed} == names
        for name in {"tales", *names}:
            status = post(service, engine, {"prompt": "x", "model": name, "max_tokens": 1}).status_code
            assert status == (200 if name in names else 404)

    there = {"tiny", "tiny:base", "math", "poems", "units"}
    check(there)
    body = {"lora_name": "tales", "lora_path": "tales"}
    assert post(service, engine, body, "/v1/load_lora_adapter", folders=[tmp_path]).status_code == 200
    check(there | {"tales"})
    assert post(service, engine, {"lora_name": "tales"}, "/v1/unload_lora_adapter").status_code == 200
    check(there)


def test_short_requests_of_other_adapters_do_not_wait_for_a_long_one(service: Service, engine: Engine) -> None:
    """https://github.com/sgl-project/sglang/pull/14795."""
    long = service.backend.open(ask(engine, PROMPT, mixture={"math": 1.0}, max_tokens=400, ignore_eos=True))
    first = next(iter(long))  # it has begun to answer: the others come later
    mixtures: list[dict[str, float] | None] = [{}, {"units": 1.0}, {"poems": 0.5, "math": 0.5}, None, {"math": 1.0}]
    short = [
        service.backend.open(ask(engine, PROMPT, mixture=mixture, max_tokens=6, ignore_eos=True))
        for mixture in mixtures
    ]
    for stream in short:
        assert read(stream).usage.completion_tokens == 6
    long.cancel()  # it still runs
    assert 6 < len(read(chain([first], long)).generation.tokens) < 400


def test_a_chat_begins_with_one_token_of_beginning(lively_adapters: Path) -> None:
    """https://github.com/vllm-project/vllm/issues/16028: the template writes it, and so does the tokenizer."""
    tokenizer = byte_tokenizer()
    begin = "<|im_start|>"
    id_ = tokenizer.convert_tokens_to_ids(begin)
    processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, id_)])
    tokenizer.backend_tokenizer.post_processor = processor
    engine = double_engine(lively_adapters, tokenizer=tokenizer)
    service = local_service(engine, ServerSettings(), Keys({}), name="tiny")
    options = {"max_tokens": 1, "dlp": {"prompt_tokens": True}}
    chat = post(service, engine, {"messages": CHAT, **options}, "/v1/chat/completions").json()["choices"][0]
    text = post(service, engine, {"prompt": PROMPT, **options}).json()["choices"][0]
    service.backend.close()
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat["dlp"]["prompt_tokens"] == expected
    assert expected[0] == id_ != expected[1]
    assert text["dlp"]["prompt_tokens"] == tokenizer(PROMPT)["input_ids"]
    assert text["dlp"]["prompt_tokens"][0] == id_ != text["dlp"]["prompt_tokens"][1]


@pytest.mark.parametrize(
    "path, prompt", [("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": CHAT})]
)
def test_a_failure_in_a_step_ends_the_stream_as_clients_expect(
    service: Service, engine: Engine, path: str, prompt: Any
) -> None:
    """https://github.com/huggingface/transformers/pull/38443."""
    passes = []

    def fail(*_: Any) -> None:
        passes.append(1)
        if len(passes) > 6:
            raise MemoryError("no memory")

    body = {**prompt, "max_tokens": 60, "ignore_eos": True, "model": "math"}
    hook = engine.model.model.layers[0].register_forward_pre_hook(fail)
    *chunks, error, end = events_of(post(service, engine, {**body, "stream": True}, path))
    passes.clear()
    whole = post(service, engine, body, path)
    hook.remove()
    assert len(chunks) > 1
    assert error["error"]["code"] == "backend_error"
    assert "no memory" in error["error"]["message"]
    assert error["choices"][0]["finish_reason"] == "error"
    assert end == "[DONE]"
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "backend_error"
    assert post(service, engine, body, path).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_scheduler_that_has_died_is_told_by_the_health(service: Service, engine: Engine) -> None:
    def die(*_: Any) -> None:
        raise SystemExit("killed")

    hook = engine.model.model.layers[0].register_forward_pre_hook(die)
    assert post(service, engine, {"prompt": PROMPT}).status_code == 500
    hook.remove()
    health = post(service, engine, None, "/health")
    assert health.status_code == 503
    assert "the scheduler has ended: SystemExit('killed')" in health.json()["reason"]
    refused = post(service, engine, {"prompt": PROMPT})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]


class Blocking(PreTrainedTokenizerFast):
    """A tokenizer that says when it is asked, and answers when it may."""

    asked, go_on = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.set()
        assert self.go_on.wait(20)
        return super().__call__(*args, **kwargs)


def test_a_huge_prompt_is_refused_before_it_is_tokenized_and_a_long_one_blocks_nobody(
    service: Service, engine: Engine
) -> None:
    tokenizer = Blocking(tokenizer_object=engine.tokenizer.backend_tokenizer, chat_template=CHAT_TEMPLATE)
    service.encoder.tokenizer = tokenizer
    for path, body in (
        ("/v1/completions", {"prompt": "x" * 10**6}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 10**6}]}),
        ("/tokenize", {"prompt": "x" * 10**6}),
    ):
        refused = post(service, engine, body, path)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert not tokenizer.asked.is_set()
    app = make_app(service, AdapterManager(service))

    async def both() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            long = asyncio.create_task(client.post("/v1/completions", json={"prompt": "x" * 400, "max_tokens": 1}))
            while not tokenizer.asked.is_set():
                await asyncio.sleep(0.01)
            health = await client.get("/health")
            tokenizer.go_on.set()
            return health, await long

    health, long = asyncio.run(both())
    assert (health.status_code, long.status_code) == (200, 200)
