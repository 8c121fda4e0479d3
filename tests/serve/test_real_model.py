"""A real model in float32: answers over HTTP have the log-probabilities of the engine alone."""

import asyncio
from functools import partial
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import dlp_lora
from conftest import EveryK, HashRouter, make_adapter
from dlp_lora import Engine, ModelError, Switching, TopK
from dlp_lora.default_model import default_model
from dlp_lora.engine.loading import load_model
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.app import make_app
from dlp_lora.serve.keys import Keys
from dlp_lora.serve.server import local_service
from dlp_lora.serve.settings import ServerSettings

pytestmark = pytest.mark.models

CHATS = [
    [{"role": "user", "content": "How many metres are 3 kilometres?"}],
    [
        {"role": "system", "content": "You tell short tales."},
        {"role": "user", "content": "Tell me of a fox, a crow and a piece of cheese, and what the crow learned of it."},
    ],
]
NUM = 18
CLOSE = 1e-4


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its rows change their adapters every 18 characters."""
    try:
        base = default_model()
    except ModelError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("adapters")
    model, tokenizer = load_model(base, dtype=torch.float32)
    for seed, name in enumerate(("math", "poems", "units")):
        make_adapter(model, root / name, seed=seed, scale=0.03)
    settings: dict[str, Any] = {"policy": TopK(1), "switching": Switching(min_tokens=1, margin=0.0)}
    return dlp_lora.load(
        model, tokenizer=tokenizer, adapters=root, router=HashRouter(), segmenter=partial(EveryK, 18), **settings
    )


def alone(engine: Engine, chat: Any) -> tuple[tuple[int, ...], Tensor, bool]:
    """What the engine answers, the log-probabilities of all tokens at each step, and whether it switched."""
    rows: list[Tensor] = []

    def note(_: Tensor, scores: Tensor) -> Tensor:
        rows.append(scores[0].float().log_softmax(dim=-1))
        return scores

    answer = engine.generate(chat, max_new_tokens=NUM, do_sample=False, logits_processor=LogitsProcessorList([note]))
    return answer.tokens, torch.stack(rows), any(sentence.switched for sentence in answer.trace[1:])


@pytest.mark.parametrize("kv_policy", ["recompute", "keep"])
def test_two_answers_at_once_are_those_of_the_engine_up_to_a_near_tie(engine: Engine, kv_policy: str) -> None:
    service = local_service(engine, ServerSettings(), Keys({}), name="smol")
    app = make_app(service, AdapterManager(service))
    more = {"max_tokens": NUM, "temperature": 0, "logprobs": True, "top_logprobs": 2, "dlp": {"kv_policy": kv_policy}}

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            asked = [client.post("/v1/chat/completions", json={"messages": chat, **more}) for chat in CHATS]
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask())
    service.backend.close()
    assert service.backend.stats().num_step_tokens > service.backend.stats().num_steps  # they ran side by side
    with engine.using(kv_policy=kv_policy):
        expected = [alone(engine, chat) for chat in CHATS]
    assert all(switched for _, _, switched in expected)
    num_compared = 0
    for answer, (tokens, rows, _) in zip(answers, expected, strict=True):
        assert answer.status_code == 200, answer.text
        told = answer.json()["choices"][0]["logprobs"]["content"]
        for entry, token, row in zip(told, tokens, rows, strict=False):
            best, second = row.topk(2).values.tolist()
            likeliest = entry["top_logprobs"][0]["logprob"]
            assert likeliest == pytest.approx(best, abs=CLOSE)
            if best - second < CLOSE:
                break
            assert entry["token"] == engine.tokenizer.decode([token])
            assert entry["logprob"] == pytest.approx(row[token].item(), abs=CLOSE)
            num_compared += 1
    assert num_compared > NUM  # of both answers together
