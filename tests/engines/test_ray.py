"""Two replicas behind Ray Serve answer alike, also after an adapter was added to the bundle."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import dlp_lora
from conftest import byte_tokenizer, lively_model
from dlp_lora.engine.bundle import generation_of
from serving import extra_adapters

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
NUM_ASKED = 24


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, lively_adapters: Path) -> Path:
    root = tmp_path_factory.mktemp("ray")
    lively_model().save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    dlp_lora.load(str(root / "model"), adapters=lively_adapters).save_pretrained(root / "bundle")
    return root / "bundle"


# In a process of its own: functions that the tests check cannot be sent to replicas.
SERVER = """
import sys
import ray
from ray import serve
from dlp_lora.serve.ray import RayArgs, build_app
bundle, port = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": int(port), "host": "127.0.0.1"})
args = RayArgs(bundle=bundle, num_replicas=2, num_cpus=0.5, watch_s=0.2, served_model_name="tiny")
serve.run(build_app(args), name="tiny")
(deployment,) = serve.status().applications["tiny"].deployments.values()
print(deployment.replica_states, flush=True)
sys.stdin.read()
serve.shutdown()
"""


@pytest.fixture(scope="module")
def address(bundle: Path) -> Iterator[str]:
    port = str(free_port())
    command = [sys.executable, "-c", SERVER, str(bundle), port]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert "{'RUNNING': 2}" in (line.strip() for line in process.stdout)
        yield f"http://127.0.0.1:{port}"
        process.stdin.close()
        process.stdout.read()
        assert process.wait(60) == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def asked(address: str, model: str) -> list[tuple[int, str]]:
    """Asks many times at once; gives each status and text."""
    body = {"model": model, "prompt": "Tell me a tale", "max_tokens": 12, "temperature": 0}

    def ask(_: int) -> tuple[int, str]:
        response = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        return response.status_code, response.json()["choices"][0]["text"] if response.status_code == 200 else ""

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, range(NUM_ASKED)))


def test_replicas_answer_alike_and_follow_the_bundle(address: str, bundle: Path, tmp_path: Path) -> None:
    first = set(asked(address, "math"))
    assert len(first) == 1
    assert {status for status, _ in first} == {200}
    assert {status for status, _ in asked(address, "extra")} == {404}

    engine = dlp_lora.load(bundle)
    engine.add_adapter(extra_adapters(tmp_path)[0], "extra")
    before = generation_of(bundle)
    engine.save_pretrained(bundle)
    assert generation_of(bundle) == before + 1

    deadline = time.monotonic() + 60
    found = asked(address, "extra")
    while {status for status, _ in found} != {200}:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
        found = asked(address, "extra")
    assert len(set(found)) == 1
    expected = engine.generate("Tell me a tale", mixture={"extra": 1.0}, max_new_tokens=12, do_sample=False).text
    assert found[0][1] == expected
    assert set(asked(address, "math")) == first
