"""The life of a server: clients that leave, queues that are full, time that is up, and its own end."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server_process import ServerProcess, start

LONG = {"prompt": "Tell me a tale", "max_tokens": 400, "ignore_eos": True}


SLOW: dict[str, Any] = {"slow_s": 0.03, "max_batch": 2, "max_queue": 2, "shutdown_s": 30}


@pytest.fixture(scope="module")
def slow(lively_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of which each pass takes a while, with two rows and two places to wait."""
    with start(lively_adapters, tmp_path_factory.mktemp("slow"), **SLOW) as running:
        yield running


@pytest.fixture
def doomed(lively_adapters: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """As `slow`, for a test that ends it."""
    with start(lively_adapters, tmp_path, **SLOW) as running:
        yield running


def connection(server: ServerProcess, path: str, body: Any) -> socket.socket:
    """Sends a request by hand, and leaves the answer unread."""
    host, port = server.address.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    client.sendall("\r\n".join([*head, "", ""]).encode() + data)
    return client


def wait_for(condition: Any, *, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(slow: ServerProcess, stream: bool) -> None:
    aborted = slow.metric("requests_aborted_total", reason="disconnect")
    num_tokens = slow.metric("generation_tokens_total")
    running = [connection(slow, "/v1/completions", {**LONG, "stream": stream}) for _ in range(4)]
    wait_for(lambda: slow.metric("num_rows_decoding") == 2 and slow.metric("num_requests_waiting") == 2)
    for client in running:
        client.close()
    slow.wait_until_idle(timeout_s=5)  # 400 tokens take 12 s
    wait_for(lambda: slow.metric("requests_aborted_total", reason="disconnect") == aborted + 4)
    assert slow.metric("generation_tokens_total") > num_tokens  # also of answers that nobody has read
    assert slow.complete(max_tokens=2).status_code == 200


def test_more_than_may_wait_are_told_to_come_back(slow: ServerProcess) -> None:
    rejected = slow.metric("requests_rejected_total", reason="queue_full")
    running = [connection(slow, "/v1/completions", LONG) for _ in range(4)]
    wait_for(lambda: slow.metric("num_requests_running") + slow.metric("num_requests_waiting") == 4)
    for stream in (False, True):
        response = slow.complete(max_tokens=1, stream=stream)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "queue_full"
    assert slow.metric("requests_rejected_total", reason="queue_full") == rejected + 2
    for client in running:
        client.close()
    slow.wait_until_idle(timeout_s=5)


def test_the_time_of_a_request_ends(slow: ServerProcess) -> None:
    response = slow.complete(**{**LONG, "dlp": {"deadline_s": 0.3}})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    *_, error, end = slow.events("/v1/completions", {**LONG, "dlp": {"deadline_s": 0.3}})
    assert error["error"]["code"] == "deadline_exceeded"
    assert error["choices"][0]["finish_reason"] == "error"
    assert end == "[DONE]"
    slow.wait_until_idle(timeout_s=5)


def test_what_runs_comes_to_its_end_before_the_server_does(doomed: ServerProcess) -> None:
    body = {**LONG, "max_tokens": 60}
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(doomed.events, "/v1/completions", body) for _ in range(2)]
        wait_for(lambda: doomed.metric("num_rows_decoding") == 2)
        doomed.process.send_signal(signal.SIGTERM)
        wait_for(lambda: doomed.client.get("/health").status_code == 503)
        assert doomed.client.get("/health").json()["status"] == "draining"
        refused = doomed.complete(max_tokens=1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        for answer in answers:
            *chunks, last, end = answer.result()
            assert len(chunks) >= 1
            assert last["choices"][0]["finish_reason"] == "length"
            assert end == "[DONE]"
    assert doomed.process.wait(timeout=20) == 0


def test_what_outlasts_the_time_to_close_is_told_so(lively_adapters: Path, tmp_path: Path) -> None:
    with start(lively_adapters, tmp_path, slow_s=0.05, shutdown_s=0.5) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(server.events, "/v1/completions", LONG) for _ in range(8)]
            wait_for(lambda: server.metric("num_rows_decoding") == 8)
            start_s = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            for answer in answers:
                *_, error, end = answer.result()
                assert error["error"]["code"] == "shutting_down"
                assert end == "[DONE]"
        assert server.process.wait(timeout=20) == 0
        assert time.monotonic() - start_s < 15


def test_a_second_signal_ends_it_at_once(doomed: ServerProcess) -> None:
    client = connection(doomed, "/v1/completions", {**LONG, "stream": True})
    wait_for(lambda: doomed.metric("num_rows_decoding") == 1)
    doomed.process.send_signal(signal.SIGINT)
    wait_for(lambda: doomed.client.get("/health").status_code == 503)
    doomed.process.send_signal(signal.SIGINT)
    doomed.process.wait(timeout=5)
    client.close()


def test_a_server_that_can_answer_no_more_ends_so_that_another_one_is_started(
    lively_adapters: Path, tmp_path: Path
) -> None:
    with start(lively_adapters, tmp_path, dies_after=20) as server:
        for _ in range(8):
            if server.complete(max_tokens=8).status_code == 500:
                break
        assert server.process.wait(timeout=30) == 1
        assert "it cannot answer any more: the scheduler has ended: SystemExit" in server.log_path.read_text()


def test_after_a_kill_it_starts_again_on_the_same_port(lively_adapters: Path, tmp_path: Path) -> None:
    with start(lively_adapters, tmp_path) as server:
        port = int(server.address.rsplit(":", 1)[1])
        client = connection(server, "/v1/completions", {**LONG, "stream": True})
        client.recv(16)
        server.process.kill()
        server.process.wait()
        with start(lively_adapters, tmp_path, port=port) as again:
            assert again.complete(max_tokens=2).status_code == 200
        client.close()


def test_a_taken_port_is_said_before_anything_is_loaded() -> None:
    from commands import run

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("serve", "--bundle", "nowhere", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 1
    assert "cannot listen on 127.0.0.1" in " ".join(result.output.split())


def test_a_reading_client_does_not_hold_up_others(slow: ServerProcess) -> None:
    """One client that reads nothing, one that checks the health: the loop serves both."""
    client = connection(slow, "/v1/completions", {**LONG, "stream": True})
    times = []
    for _ in range(20):
        start_s = time.perf_counter()
        assert slow.client.get("/health").status_code == 200
        times.append(time.perf_counter() - start_s)
    assert sorted(times)[10] < 0.5
    client.close()
    slow.wait_until_idle(timeout_s=5)


def test_adapters_that_come_and_go_change_no_running_answer(lively_adapters: Path, tmp_path: Path) -> None:
    settings = {"admin": "admin", "adapter_dir": [str(lively_adapters)]}
    with start(lively_adapters, tmp_path, **settings) as server:
        body: dict[str, Any] = {**LONG, "max_tokens": 200, "dlp": {"adapters": ["math", "units"]}}
        quiet = server.complete(**body).json()["choices"][0]["text"]
        is_over = threading.Event()

        def change() -> None:
            client = httpx.Client(base_url=server.address, headers={"Authorization": "Bearer admin"}, timeout=60)
            while not is_over.is_set():
                for path, more in (("load", {"lora_path": "poems"}), ("unload", {})):
                    response = client.post(f"/v1/{path}_lora_adapter", json={"lora_name": "other", **more})
                    assert response.status_code == 200, response.text

        with ThreadPoolExecutor(5) as pool:
            changing = pool.submit(change)
            texts = list(pool.map(lambda _: server.complete(**body).json()["choices"][0]["text"], range(4)))
            is_over.set()
            changing.result()
        assert texts == [quiet] * 4
