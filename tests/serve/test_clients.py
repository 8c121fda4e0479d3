"""Clients as oracles, in an environment of their own: what they read of the server is what it said."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest

from server_process import ServerProcess, start

pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]
CLIENTS = Path(__file__).parent / "clients"
PACKAGES = ("openai", "litellm", "langchain-openai", "llm", "schemathesis")
CHECKS = ("openai", "litellm", "langchain", "llm")


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the clients; DLP_LORA_CLIENTS may name one that is there."""
    if given := os.environ.get("DLP_LORA_CLIENTS"):
        return Path(given)
    folder = tmp_path_factory.mktemp("clients")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    found = folder / "bin" / "python"
    done = subprocess.run([found, "-m", "pip", "install", "--quiet", *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the clients cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return found


@pytest.fixture(scope="module")
def server(lively_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start(lively_adapters, tmp_path_factory.mktemp("clients-server")) as running:
        yield running


@pytest.mark.parametrize("client", CHECKS)
def test_a_client_reads_what_the_server_says(python: Path, server: ServerProcess, client: str) -> None:
    script = CLIENTS / f"check_{client}.py"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, script, server.address], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_curl_sees_tokens_as_they_come(server: ServerProcess) -> None:
    if which("curl") is None:
        pytest.skip("there is no curl")
    body = '{"prompt": "Tell me a tale", "max_tokens": 8, "stream": true}'
    command = ["curl", "-sN", "-D", "-", f"{server.address}/v1/completions", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    head, _, events = done.stdout.replace("\r\n", "\n").partition("\n\n")
    lines = head.lower().splitlines()
    assert lines[0] == "http/1.1 200 ok"
    assert {"cache-control: no-cache", "x-accel-buffering: no"} <= set(lines)
    data = [line for line in events.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in data)
    assert data[-1] == "data: [DONE]"
    assert len(data) > 4  # not all tokens complete a character


def test_every_route_keeps_to_its_description(python: Path, server: ServerProcess, tmp_path: Path) -> None:
    command = [python.parent / "schemathesis", "run", f"{server.address}/openapi.json", "--max-examples", "25"]
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ["--checks", checks, "--phases", "examples,coverage,fuzzing", "--seed", "1", "--request-timeout", "30"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=800, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    assert server.client.get("/health").status_code == 200
