"""The plug-in in a real vLLM: a plain server answers under mixtures as the engine does. `make vllm` installs both."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import dlp_lora
from dlp_lora import Engine
from dlp_lora.bank.limits import rounded
from dlp_lora.default_model import default_model, is_converted
from dlp_lora.lab.bench.random_adapters import write_random_adapters
from dlp_lora.policy import Mixture
from vllm_python import interrupted_by_sigterm, vllm_python

pytestmark = [pytest.mark.engines, pytest.mark.models, pytest.mark.timeout(900)]
START_S = 600
NUM_TOKENS = 24
MIXTURE = "a=0.6,b=0.4"
TOLERANCE = 1e-4  # of log-probabilities


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not is_converted():
        pytest.skip("the default model is not installed")
    folder = tmp_path_factory.mktemp("plugin")
    for rank, name in ((4, "a"), (8, "b")):
        written = write_random_adapters(default_model(), folder / "all", 1, r=rank, target_modules=("q_proj", "v_proj"))
        next(iter(written.values())).rename(folder / "all" / name)
    return folder / "all"


@pytest.fixture(scope="module")
def url(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = vllm_python()
    has_plugin = [python, "-c", "import dlp_lora.integrations.vllm, importlib.metadata as m; m.version('dlp-lora')"]
    if subprocess.run(has_plugin, capture_output=True).returncode:
        pytest.skip("dlp-lora is not installed beside vLLM: `make vllm` does it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "DLP_LORA_BUNDLE": str(adapters),
        "DLP_LORA_ADAPTER_CACHE": str(tmp_path_factory.mktemp("mixtures")),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(default_model())]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "512", "--enable-lora", "--max-lora-rank", "16"]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with (
        interrupted_by_sigterm(),
        log.open("wb") as out,
        subprocess.Popen(command, env=env, stdout=out, stderr=out) as process,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            process.send_signal(signal.SIGTERM)


def wait_for(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(address).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(f"vLLM does not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def engine(adapters: Path) -> Engine:
    return dlp_lora.load(default_model(), adapters=adapters, dtype=torch.float32, device="cpu", paths="plain")


def ask(url: str, model: str, tokens: Sequence[int]) -> httpx.Response:
    body = {"model": model, "prompt": list(tokens), "max_tokens": NUM_TOKENS, "temperature": 0}
    return httpx.post(url, json={**body, "logprobs": 1, "return_token_ids": True, "ignore_eos": True}, timeout=120)


@torch.no_grad()
def logprobs(engine: Engine, mixture: Mixture, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    with engine.under([mixture]) as forward:
        logits = forward(input_ids=torch.tensor([[*prompt, *answer]])).logits
    scores = logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    return scores[torch.arange(len(answer)), torch.tensor(answer)]


@pytest.mark.parametrize("mixture", [MIXTURE, "a=1", "b=0.3,a=0.7"])
def test_a_mixture_that_a_client_names_answers_as_in_the_engine(url: str, engine: Engine, mixture: str) -> None:
    prompt = engine.tokenizer("Tell me how rain forms.")["input_ids"]
    response = ask(url, f"dlp:{mixture}", prompt)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    answer = choice["token_ids"]
    weights = {name: float(weight) for name, _, weight in (part.partition("=") for part in mixture.split(","))}
    expected = logprobs(engine, rounded(Mixture(weights)), prompt, answer)
    torch.testing.assert_close(torch.tensor(choice["logprobs"]["token_logprobs"]), expected, rtol=0, atol=TOLERANCE)
    base = ask(url, "base", prompt).json()["choices"][0]
    assert base["logprobs"]["token_logprobs"][0] != pytest.approx(float(expected[0]), abs=TOLERANCE)


@pytest.mark.parametrize("model", ["dlp:nobody=1", "dlp:", "dlp:a=x", "nobody"])
def test_a_name_that_is_no_mixture_is_no_model(url: str, engine: Engine, model: str) -> None:
    response = ask(url, model, engine.tokenizer("Hello")["input_ids"])
    assert response.status_code == 404
    assert "does not exist" in response.text
