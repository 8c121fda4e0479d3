"""The front on vLLM is the front: API, trace, adapters; and one command starts vLLM, and ends it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import dlp_lora
import dlp_lora.serve.vllm.process as process_module
from commands import run
from conftest import byte_tokenizer, lively_model, make_adapter
from dlp_lora import Engine, TopP
from dlp_lora.cli.common import EngineOptions, HubOptions, open_outline
from dlp_lora.engine.outline import Outline, read_outline
from dlp_lora.errors import ModelError
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.keys import Keys
from dlp_lora.serve.server import local_service, make_service
from dlp_lora.serve.service import Service
from dlp_lora.serve.settings import ServerSettings
from dlp_lora.serve.vllm.backend import VLLMBackend, VLLMSettings
from dlp_lora.serve.vllm.process import RANKS, VLLMFlags, command, reason, slot_bytes, slot_rank, vllm_server
from serving import double_engine, extra_adapters, over_http, until
from vllm_stand_in import Fault, StandIn, standing_in

pytestmark = pytest.mark.filterwarnings("ignore:.*changes nothing")  # the adapter that servers are checked with

TESTS = Path(__file__).parents[1]
CHAT = {"messages": [{"role": "user", "content": "Tell me a tale"}], "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def engine(lively_adapters: Path) -> Engine:
    return double_engine(lively_adapters)


@pytest.fixture(scope="module")
def stand_in(lively_adapters: Path) -> Iterator[StandIn]:
    with standing_in(double_engine(lively_adapters)) as server:
        yield server


@pytest.fixture(scope="module")
def service(engine: Engine, stand_in: StandIn) -> Iterator[Service]:
    outline = Outline.of(engine)
    backend = VLLMBackend(outline, [stand_in.url], settings=VLLMSettings(poll_s=0.1))
    yield make_service(outline, backend, ServerSettings(), Keys({}, admin="A"), name="tiny")
    backend.close()


def ask(
    service: Service, engine: Engine, path: str, body: Any = None, *, folders: Any = (), key: str = ""
) -> httpx.Response:
    """Asks the application of a service."""
    return over_http(service, AdapterManager(service, folders=folders), path, body, key=key)


def test_a_chat_is_answered_with_the_trace_as_by_the_local_backend(service: Service, engine: Engine) -> None:
    local = local_service(engine, ServerSettings(), Keys({}), name="tiny")
    bodies = [ask(each, engine, "/v1/chat/completions", CHAT).json() for each in (service, local)]
    local.backend.close()
    (found,), (expected,) = (body["choices"] for body in bodies)
    assert len(found["dlp"]["trace"]) == len(expected["dlp"]["trace"]) > 2
    assert set(found["dlp"]["trace"][0]) == set(expected["dlp"]["trace"][0])
    assert bodies[0]["usage"].keys() == bodies[1]["usage"].keys()
    assert bodies[0]["model"] == "tiny"


def test_a_stream_tells_its_sentences_and_the_same_text(service: Service, engine: Engine) -> None:
    whole = ask(service, engine, "/v1/chat/completions", CHAT).json()["choices"][0]
    text = ask(service, engine, "/v1/chat/completions", {**CHAT, "stream": True}).text
    pieces = "".join(re.findall(r'"content":"((?:[^"\\]|\\.)*)"', text))
    assert pieces.encode().decode("unicode_escape", "replace")
    assert text.count('"sentence":') >= len(whole["dlp"]["trace"])
    assert text.endswith("data: [DONE]\n\n")


def test_a_busy_or_dead_server_is_a_503_with_retry_after(service: Service, engine: Engine, stand_in: StandIn) -> None:
    stand_in.faults.append(Fault(status=429))
    response = ask(service, engine, "/v1/chat/completions", {**CHAT, "model": "tiny:base"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "queue_full"


def test_an_adapter_is_added_and_removed_over_http(service: Service, engine: Engine, tmp_path: Path) -> None:
    extra_adapters(tmp_path)
    body = {"lora_name": "extra", "lora_path": "0"}
    loaded = ask(service, engine, "/v1/load_lora_adapter", body, folders=[tmp_path], key="A")
    assert loaded.status_code == 200, loaded.text
    prompt = {"prompt": "x", "model": "extra", "max_tokens": 4}
    assert ask(service, engine, "/v1/completions", prompt).status_code == 200
    unloaded = ask(service, engine, "/v1/unload_lora_adapter", {"lora_name": "extra"}, key="A")
    assert unloaded.status_code == 200, unloaded.text
    assert ask(service, engine, "/v1/completions", prompt).status_code == 404


def test_an_adapter_that_the_servers_have_no_room_for_takes_the_place_of_none(
    service: Service, engine: Engine, tmp_path: Path
) -> None:
    make_adapter(lively_model(), tmp_path / "wide", seed=3, r=24)
    prompt = {"prompt": "x", "model": "math", "max_tokens": 8}
    before = ask(service, engine, "/v1/completions", prompt).json()["choices"][0]["text"]
    body = {"lora_name": "math", "lora_path": "wide", "load_inplace": True}
    refused = ask(service, engine, "/v1/load_lora_adapter", body, folders=[tmp_path], key="A")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "lora_path"
    assert "has rank 24" in refused.json()["error"]["message"]
    assert ask(service, engine, "/v1/completions", prompt).json()["choices"][0]["text"] == before


def test_what_the_servers_cannot_follow_is_a_400(service: Service, engine: Engine) -> None:
    response = ask(service, engine, "/v1/chat/completions", {**CHAT, "dlp": {"prompt_routing": "sentences"}})
    assert response.status_code == 400
    assert "vLLM encodes a prompt under one mixture" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_under_keep_leaves_no_adapter_behind(
    service: Service, engine: Engine, stand_in: StandIn, stream: bool
) -> None:
    body = {"prompt": "Tell me a tale", "max_tokens": 20, "stream": stream, "dlp": {"kv_policy": "keep"}}
    for _ in range(3):
        assert ask(service, engine, "/v1/completions", body).status_code == 200
    backend = service.backend
    assert isinstance(backend, VLLMBackend)
    until(lambda: not any(name.startswith("keep-") for name in stand_in.adapters))
    until(lambda: not list(backend._folder.path.glob("keep-*")))


def test_a_request_with_more_answers_than_there_is_room_for_takes_no_place(engine: Engine, stand_in: StandIn) -> None:
    outline = Outline.of(engine)
    backend = VLLMBackend(outline, [stand_in.url], settings=VLLMSettings(poll_s=0.1), max_running=2, max_queue=0)
    small = make_service(outline, backend, ServerSettings(), Keys({}), name="tiny")
    prompt = {"prompt": "x", "max_tokens": 2, "model": "tiny:base"}
    for _ in range(3):
        assert ask(small, engine, "/v1/completions", {**prompt, "n": 4, "temperature": 1}).status_code == 503
    until(lambda: backend._num_open == 0)
    assert ask(small, engine, "/v1/completions", prompt).status_code == 200
    backend.close()


def test_what_vllm_refuses_is_refused_and_its_address_is_not_told(
    service: Service, engine: Engine, stand_in: StandIn
) -> None:
    stand_in.faults.append(Fault(status=400))
    response = ask(service, engine, "/v1/chat/completions", {**CHAT, "model": "tiny:base"})
    assert response.status_code == 400
    assert "vLLM refuses the request" in response.json()["error"]["message"]
    assert "http://" not in response.text


def test_an_answer_is_never_asked_to_be_longer_than_it_may_be(
    service: Service, engine: Engine, stand_in: StandIn
) -> None:
    body = {"messages": CHAT["messages"], "min_tokens": 5000, "model": "tiny:base", "dlp": {"deadline_s": 0.5}}
    ask(service, engine, "/v1/chat/completions", body)
    assert stand_in.asked[-1]["min_tokens"] <= stand_in.asked[-1]["max_tokens"]


def test_a_prompt_is_routed_without_an_answer(service: Service, engine: Engine) -> None:
    told = ask(service, engine, "/v1/route", {"prompt": "Tell me a tale"}).json()
    assert sum(told["mixture"].values()) == 1
    assert all((64 * weight).is_integer() for weight in told["mixture"].values())


# Starting vLLM.

FAKE = """
import argparse, os, sys
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("model", "host", "port", "max-lora-rank", "max-loras", "max-cpu-loras", "max-model-len"):
    parser.add_argument(f"--{name}")
parser.add_argument("--lora-target-modules", nargs="+")
parser.add_argument("--enable-lora", action="store_true")
parser.add_argument("--enable-prompt-tokens-details", action="store_true")
parser.add_argument("--fails", action="store_true")
parser.add_argument("--bare", action="store_true")
parser.add_argument("--never", action="store_true")
options = parser.parse_args()
assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
if options.fails:
    print("Loading weights")
    sys.exit("RuntimeError: there is no such GPU")
if options.never:
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
while options.never:
    time.sleep(1)
if options.bare:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    HTTPServer((options.host, int(options.port)), Healthy).serve_forever()
from conftest import _hook, byte_tokenizer, lively_model
import dlp_lora
from vllm_stand_in import StandIn
_hook.__exit__(None, None, None)
adapters = {"unused": os.environ["UNUSED_ADAPTER"]}
engine = dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=adapters)
server = StandIn(engine, max_rank=int(options.max_lora_rank))
print("Application startup complete", flush=True)
server.start(port=int(options.port))
server._thread.join()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    lively_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def fake(tmp_path: Path, lively_adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which `vllm` is the stand-in; gives the file of its process id."""
    package = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(FAKE)
    path = [str(tmp_path / "fake"), str(TESTS), str(TESTS.parent / "src")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("UNUSED_ADAPTER", str(lively_adapters / "math"))
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    return tmp_path / "pid"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/status").read_text().splitlines()[2].split()[1] != "Z"


@pytest.mark.engines
def test_one_command_starts_vllm_and_ends_it(model: Path, lively_adapters: Path, fake: Path, tmp_path: Path) -> None:
    arguments = [
        *("serve", "--model", model, "--adapters", lively_adapters, "--port", "0", "--backend", "vllm"),
        *("--vllm-python", sys.executable),
    ]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "dlp_lora", *map(str, arguments)], stderr=out, stdout=out)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"the API at (\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert "slots of rank 16 take 0.00 GB" in log.read_text()
        answer = httpx.post(f"{found[1]}/completions", json={"model": "math", "prompt": "x", "max_tokens": 3})
        assert answer.status_code == 200, answer.text
        pid = int(fake.read_text())
        assert is_alive(pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not is_alive(pid)
    finally:
        if process.poll() is None:
            process.kill()


def test_a_vllm_runs_while_it_is_used(model: Path, lively_adapters: Path, fake: Path) -> None:
    outline = read_outline(base_model=str(model), adapters=lively_adapters)
    flags = VLLMFlags(python=sys.executable, arguments="--bare")
    with vllm_server(outline, flags, targets=["q_proj"], max_rank=4) as server:
        pid = int(fake.read_text())
        assert is_alive(pid)
        assert httpx.get(f"{server.url}/health").status_code == 200
    assert not is_alive(pid)


def test_a_signal_while_vllm_is_used_ends_both(model: Path, lively_adapters: Path, fake: Path) -> None:
    outline = read_outline(base_model=str(model), adapters=lively_adapters)
    flags = VLLMFlags(python=sys.executable, arguments="--bare")
    with pytest.raises(SystemExit, match="143"), vllm_server(outline, flags, targets=["q_proj"], max_rank=4):
        signal.raise_signal(signal.SIGTERM)
    assert not is_alive(int(fake.read_text()))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_while_vllm_starts_ends_both_without_waiting(
    model: Path, lively_adapters: Path, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "STOP_S", 600.0)
    outline = read_outline(base_model=str(model), adapters=lively_adapters)
    flags = VLLMFlags(python=sys.executable, arguments="--never")

    def stop() -> None:
        until(lambda: fake.exists() and bool(fake.read_text()))
        until(lambda: signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)  # else it would end the tests
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    started = time.monotonic()
    with pytest.raises(SystemExit, match="143"), vllm_server(outline, flags, targets=["q_proj"], max_rank=4):
        pass
    stopper.join()
    assert time.monotonic() - started < 300
    assert not is_alive(int(fake.read_text()))


def test_a_vllm_that_does_not_start_is_told_with_its_own_words(model: Path, lively_adapters: Path, fake: Path) -> None:
    outline = read_outline(base_model=str(model), adapters=lively_adapters)
    flags = VLLMFlags(python=sys.executable, arguments="--fails")
    lines: list[str] = []
    with (
        pytest.raises(ModelError, match="vLLM ended with 1 before it could answer: RuntimeError: there is no such GPU"),
        vllm_server(outline, flags, targets=["q_proj"], max_rank=4, on_line=lines.append),
    ):
        pass
    assert "Loading weights" in lines


def test_the_command_has_the_flags_that_a_bundle_needs(model: Path, lively_adapters: Path) -> None:
    outline = read_outline(base_model=str(model), adapters=lively_adapters)
    flags = VLLMFlags(python="python", max_loras=3, max_context=256, arguments="--dtype float32")
    text = " ".join(command(outline, flags, targets=["v_proj", "q_proj"], max_rank=14, port=8001))
    for part in (
        *(f"--model {model}", "--port 8001", "--enable-lora", "--max-lora-rank 16", "--max-loras 3"),
        *("--max-cpu-loras 12", "--enable-prompt-tokens-details", "--max-model-len 256", "--dtype float32"),
        "--lora-target-modules q_proj v_proj",
    ):
        assert part in text


@pytest.mark.parametrize("python", [None, sys.executable])
def test_an_environment_without_vllm_is_named(model: Path, lively_adapters: Path, python: str | None) -> None:
    outline = read_outline(base_model=str(model), adapters=lively_adapters)
    named = f"vLLM is not installed beside {python or 'this Python'}: pip install vllm there"
    with (
        pytest.raises(ModelError, match=re.escape(named)),
        vllm_server(outline, VLLMFlags(python=python), targets=["q_proj"], max_rank=4),
    ):
        pass


# Lines that vLLM 0.32 wrote.
CORE = """
(EngineCore pid=19263) ERROR 11-30 03:54:18 [core.py:1510] ValueError: To serve at least one request
    raise ValueError(
ValueError: To serve at least one request, 0.18 GiB KV cache is needed
(APIServer pid=19203) INFO 11-30 03:54:18 [importing.py:68] Triton not installed
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
warnings.warn('resource_tracker: There appear to be %d '
"""
CONFIG = """
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (1000000) is greater than the derived max_model_len
    For further information visit https://errors.pydantic.dev
"""


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (CORE, "ValueError: To serve at least one request, 0.18 GiB KV cache is needed"),
        (CONFIG, "ModelConfig Value error, User-specified max_model_len (1000000) is greater than the derived"),
        (
            "usage: api_server.py\napi_server.py: error: unrecognized arguments: --x",
            "error: unrecognized arguments: --x",
        ),
        ("(Worker pid=7) torch.OutOfMemoryError: CUDA out of memory.\nbye", "OutOfMemoryError: CUDA out of memory."),
        ("", "it wrote nothing"),
    ],
)
def test_the_cause_is_found_in_vllms_output(output: str, expected: str) -> None:
    assert expected in reason([line for line in output.splitlines() if line])


@pytest.mark.parametrize("option", ["--cache-dir=folder", "--trust-remote-code", "--revision=v1", "--budget-mb=3"])
def test_options_of_the_model_in_this_process_are_refused(model: Path, lively_adapters: Path, option: str) -> None:
    parts = ("--model", model, "--adapters", lively_adapters, "--port", "0")
    result = run("serve", *parts, "--backend", "vllm", option)
    assert result.exit_code == 1
    assert f"{option.partition('=')[0]} is for --backend local; leave it out" in result.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ("--backend vllm --cache-mb 0", "--cache-mb is for --backend local"),
        ("--backend llama.cpp --cache-mb 9", "--cache-mb is for --backend local"),
        ("--backend vllm --chunk-tokens 9", "--chunk-tokens is for --backend local or llama.cpp"),
        ("--backend vllm --backend-url http://a --max-context 9", "--max-context is for a vLLM server"),
        ("--backend vllm --backend-url http://a --vllm-max-loras 3", "--vllm-max-loras is for a vLLM server"),
    ],
)
def test_options_that_a_backend_does_not_read_are_refused(
    model: Path, lively_adapters: Path, options: str, message: str
) -> None:
    result = run("serve", "--model", model, "--adapters", lively_adapters, "--port", "0", *options.split())
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_decisions_are_logged_where_the_command_says(model: Path, lively_adapters: Path, tmp_path: Path) -> None:
    options = EngineOptions(model=str(model), adapters=str(lively_adapters), log_routing=tmp_path / "log.jsonl", p=0.4)
    outline = open_outline(options, HubOptions())
    assert outline.call.routing_log is not None
    assert outline.call.settings.policy == TopP(0.4)


def test_slots_have_ranks_of_vllms_and_take_memory() -> None:
    assert [slot_rank(rank) for rank in (1, 2, 8, 48, 512)] == [1, 8, 8, 64, 512]
    with pytest.raises(ValueError, match=f"slots of rank {RANKS[-1]} at most, and mixtures may have 513"):
        slot_rank(513)
    layout = {"l.q_proj": (10, 20), "l.k_proj": (10, 5), "l.up_proj": (10, 7), "lm_head": (10, 99)}
    assert slot_bytes(layout, ["q_proj"], rank=8, num_slots=2) == (30 + 15) * 8 * 2 * 2


def test_an_outline_is_what_the_engine_says_of_itself(model: Path, lively_adapters: Path) -> None:
    outline = read_outline(base_model=str(model), adapters=lively_adapters)
    expected = Outline.of(dlp_lora.load(str(model), adapters=lively_adapters))
    assert (outline.source, outline.max_context, outline.vocab_size) == (str(model), 512, 260)
    assert (expected.source, expected.max_context, expected.vocab_size) == (str(model), 512, 260)
    assert dict(outline.layout) == dict(expected.layout)
    assert outline.adapters == expected.adapters
    assert outline.call.endings == expected.call.endings
