"""The application of a Ray replica, without Ray: in front of a vLLM server, and how it ends."""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import dlp_lora
from conftest import byte_tokenizer, lively_model
from dlp_lora.serve.ray import RayArgs, _app_of
from serving import until
from vllm_stand_in import standing_in

pytestmark = pytest.mark.filterwarnings("ignore:.*changes nothing")  # the adapter that servers are checked with

ASKED: dict[str, Any] = {"prompt": "Tell me a tale", "max_tokens": 8, "temperature": 0}


def test_a_replica_in_front_of_vllm_answers_within_its_rank_and_leaves_nothing_behind(
    lively_adapters: Path, tmp_path: Path
) -> None:
    lively_model().double().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    engine = dlp_lora.load(str(tmp_path / "model"), adapters=lively_adapters)
    engine.save_pretrained(tmp_path / "bundle")
    before = {*threading.enumerate()}
    with standing_in(dlp_lora.load(str(tmp_path / "model"), adapters={"unused": lively_adapters / "math"})) as server:
        args = RayArgs(
            bundle=str(tmp_path / "bundle"), backend_url=server.url, max_rank=10, served_model_name="tiny", watch_s=0.02
        )
        with TestClient(_app_of(args)(), base_url="http://127.0.0.1") as client:

            def ask(mixture: dict[str, float]) -> httpx.Response:
                model = ",".join(f"{name}={weight}" for name, weight in mixture.items())
                return client.post("/v1/completions", json={**ASKED, "model": model})

            mixture = {"units": 0.5, "poems": 0.5}
            answer = ask(mixture)
            assert answer.status_code == 200, answer.text
            expected = engine.generate(ASKED["prompt"], mixture=mixture, max_new_tokens=8, do_sample=False)
            assert answer.json()["choices"][0]["text"] == expected.text
            refused = ask({"units": 0.5, "math": 0.5})
            assert refused.status_code == 400
            assert "have a rank of 12 together, and this server takes 10" in refused.text
            assert server.adapters
        assert not server.adapters
    until(lambda: not any(t.name.startswith("dlp-lora") for t in {*threading.enumerate()} - before))
