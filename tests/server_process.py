"""A server of a tiny model in a process of its own: run as a script, it serves; `start` runs it so."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

TESTS = Path(__file__).parent


def _lines(path: Path) -> list[str]:
    """The lines of a file to which another process writes, without one that is half written."""
    return path.read_text().split("\n")[:-1]


@dataclass
class ServerProcess:
    """A server that runs."""

    process: "subprocess.Popen[str]"
    address: str
    log_path: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.address, timeout=60)

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in _lines(self.log_path) if line.startswith("{")]

    def logged(self, request_id: str) -> dict[str, Any]:
        """What the log says of a request, which is written after its answer was sent."""
        deadline = time.monotonic() + 30
        while not (found := [line for line in self.log if line.get("request_id") == request_id]):
            assert time.monotonic() < deadline, f"the log has no request {request_id}"
            time.sleep(0.01)
        (line,) = found
        return line

    def post(self, path: str, body: Any = None, *, key: str | None = None, **kwargs: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.client.post(path, json=body, headers={**headers, **kwargs.pop("headers", {})}, **kwargs)

    def chat(self, text: str = "Tell me a tale", **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})

    def complete(self, prompt: Any = "Tell me a tale", **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **body})

    def events(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """The data of a stream's events, the last one "[DONE]"."""
        found: list[Any] = []
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("data: "):
                    data = line.removeprefix("data: ")
                    found.append(data if data == "[DONE]" else json.loads(data))
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric that have these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == f"dlp_lora_{name}"]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def wait_until_idle(self, *, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while self.metric("num_requests_running") + self.metric("num_requests_waiting"):
            assert time.monotonic() < deadline, "rows still run"
            time.sleep(0.02)

    def stop(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(timeout=60)


@contextmanager
def start(adapters: Path, folder: Path, **settings: Any) -> Iterator[ServerProcess]:
    """Runs a server while the block lasts. `keys`, `admin`, `slow_s` (per step) and `dies_after` (so many
    passes) stand among the settings.
    """
    log_path = folder / f"server-{time.monotonic_ns()}.log"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])}
    arguments = json.dumps({"adapters": str(adapters), "port": 0, **settings})
    with log_path.open("w") as log:
        process = subprocess.Popen([sys.executable, __file__, arguments], env=env, stderr=log, stdout=log, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (lines := [line for line in _lines(log_path) if line.startswith("http")]):
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.05)
        server = ServerProcess(process, lines[0], log_path)
        yield server
        server.client.close()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def main(arguments: dict[str, Any]) -> None:
    from conftest import _hook

    _hook.__exit__(None, None, None)
    from dlp_lora.serve.keys import Keys
    from dlp_lora.serve.logs import log_as_json
    from dlp_lora.serve.server import local_service, serve
    from dlp_lora.serve.settings import ServerSettings
    from serving import double_engine

    keys = Keys(arguments.pop("keys", None), admin=arguments.pop("admin", None))
    slow_s = arguments.pop("slow_s", 0)
    dies_after = arguments.pop("dies_after", 0)
    engine = double_engine(Path(arguments.pop("adapters")), **arguments.pop("engine", {}))
    if slow_s:
        engine.model.get_input_embeddings().register_forward_pre_hook(lambda *_: time.sleep(slow_s))
    if dies_after:
        passes = iter(range(dies_after))
        engine.model.model.layers[0].register_forward_pre_hook(
            lambda *_: sys.exit() if next(passes, None) is None else None
        )
    log_as_json()
    name = arguments.pop("name", "tiny")
    service = local_service(engine, ServerSettings(**arguments), keys, name=name)
    serve(service, on_ready=lambda at: print(at, file=sys.stderr, flush=True))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
