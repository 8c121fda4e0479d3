"""The server under load: what the client sees, beside the engine, and what stays behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import dlp_lora
from conftest import byte_tokenizer, lively_model
from dlp_lora import DLPLoRAError, MiniMLP
from dlp_lora.cli.app import app
from dlp_lora.engine.bundle import read_bundle
from dlp_lora.lab.bench import serve, soak
from dlp_lora.lab.bench.load import Answer, latency, ms_per_token, percentile, tokens_per_s
from dlp_lora.lab.bench.plot import plot
from dlp_lora.lab.bench.serve import ServeArgs, bench_serve
from dlp_lora.lab.bench.server import agree, serving
from dlp_lora.lab.bench.soak import SoakArgs, bench_soak
from dlp_lora.lab.bench.suite import PRESETS
from dlp_lora.progress import unseen
from dlp_lora.router import MiniMLPConfig
from serving import double_engine
from vllm_stand_in import standing_in

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'dlp-lora[serve]'")

NAMES = ("math", "poems", "units")
SMALL = ServeArgs(
    rounds=1, num_adapters=4, streams=(1, 2), requests=2, new_tokens=4, dtypes=("float32",), loads=("fixed", "keep")
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    lively_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, lively_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    router = MiniMLP(NAMES, byte_tokenizer().backend_tokenizer, MiniMLPConfig(dim=8, hidden=8))
    dlp_lora.load(model, adapters=lively_adapters, router=router).save_pretrained(folder / "bundle")
    return folder / "bundle"


def answer(start_s: float, *times_s: float) -> Answer:
    return Answer(start_s=start_s, times_s=list(times_s), num_tokens=len(times_s))


def test_answers_are_counted_from_the_first_request_to_the_last_token() -> None:
    answers = [answer(0.0, 1.0, 1.5, 2.0), answer(1.0, 1.25, 2.25, 4.0)]
    assert tokens_per_s(answers) == 6 / 4
    assert [a.first_ms for a in answers] == [1000, 250]
    assert ms_per_token(answers) == (500 + 1375) / 2
    assert latency(answers)["gap_ms_p50"] == 1000
    assert latency(answers)["first_ms_p99"] == 1000


@pytest.mark.parametrize(("share", "expected"), [(50, 51), (95, 96), (99, 100), (100, 100)])
def test_percentiles_of_a_hundred_numbers(share: float, expected: float) -> None:
    assert percentile(list(range(1, 101)), share) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.1] * 10, True), ([0.4] * 10, True), ([0.9] * 10, False)],
    ids=["the same bucket", "the next one", "two further"],
)
def test_a_histogram_agrees_within_one_bucket(values: Sequence[float], expected: bool) -> None:
    before = {0.25: 5.0, 0.5: 5.0, 1.0: 5.0, float("inf"): 5.0}
    after = {0.25: 15.0, 0.5: 15.0, 1.0: 15.0, float("inf"): 15.0}
    assert agree(before, after, values) is expected


def test_a_peer_is_written_in_three_parts() -> None:
    with pytest.raises(ValueError, match=r"peers are written name\|http://host:port/v1\|model, got 'vllm'"):
        replace(SMALL, peers=("vllm",))
    with pytest.raises(ValueError, match="no parts disc; there are load, chunk, memory, disk"):
        replace(SMALL, parts=("disc",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tgi"}, "no backend 'tgi'; there are local, vllm, llama.cpp"),
        ({"backend_url": ("http://a:1",)}, "backend_url has addresses of vLLM servers, and the backend is local"),
        ({"backend": "vllm", "parts": ("load", "memory")}, "parts memory are measured with the local backend alone"),
        ({"backend": "vllm", "dtypes": ("float32",)}, "dtypes are of the local backend; choose the precision of vllm"),
        ({"serve_args": "--max-batch 4 --dtype=float16"}, "serve_args: the benchmark itself sets --dtype"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_a_backend_does_not_follow_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeArgs(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["--backend", "local", "--dtype", "bfloat16", "--device", "cpu"]),
        ({"backend": "llama.cpp", "serve_args": "--gguf m.gguf"}, ["--backend", "llama.cpp", "--gguf", "m.gguf"]),
        (
            {
                "backend": "vllm",
                "backend_url": ("http://a", "http://b"),
                "serve_args": "--vllm-args '--dtype half'",
            },
            ["--backend", "vllm", "--backend-url", "http://a,http://b", "--vllm-args", "--dtype half"],
        ),
    ],
)
def test_a_server_gets_the_options_of_its_backend(bundle: Path, settings: dict[str, Any], expected: list[str]) -> None:
    args = ServeArgs(**settings).with_defaults()
    dtype = next(iter(args.dtypes), None)
    case = serve._Case(model="m", args=args, dtype=dtype, bundle=read_bundle(bundle), on_progress=unseen)
    assert case.options() == ["--model", "m", *expected]


@pytest.mark.parametrize("load", ["keep", "recompute"])
def test_routed_pairs_are_asked_in_one_context(bundle: Path, load: str) -> None:
    case = serve._Case(model="m", args=ServeArgs(), dtype=None, bundle=read_bundle(bundle), on_progress=unseen)
    asked = [body["dlp"] for body in case.bodies(load, seed=0)]
    assert asked == [{"kv_policy": load, "prompt_routing": "questions"}] * len(asked) != []


@pytest.mark.parametrize("name", PRESETS["gpu"].servers)
def test_the_serve_command_takes_the_options_of_the_gpu_preset(bundle: Path, name: str) -> None:
    args = replace(PRESETS["gpu"].servers[name], device="cuda").with_defaults()
    dtype = next(iter(args.dtypes), None)
    case = serve._Case(model="m", args=args, dtype=dtype, bundle=read_bundle(bundle), on_progress=unseen)
    command: Any = typer.main.get_command(app)
    parsed = command.commands["serve"].make_context("serve", [*case.options(), "--bundle", "b"]).params
    assert parsed["backend"] == args.backend
    assert (parsed["max_batch"], parsed["vllm_max_loras"]) in ((32, 16), (None, 32))


def test_a_server_that_does_not_start_is_one_error(bundle: Path) -> None:
    options = ["--bundle", str(bundle), "--backend", "vllm", "--vllm-python", "/nowhere/python"]
    with (
        pytest.raises(DLPLoRAError, match=r"^the server did not start: vLLM cannot be started: .*'/nowhere/python'"),
        serving(options, model="x", threads=1),
    ):
        pass


def test_a_server_is_measured_beside_the_engine(
    model: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"LONG_TOKENS": 300, "LONG_ANSWER": 40, "MEMORY_TOKENS": 100, "CHUNK_TOKENS": 64}.items():
        monkeypatch.setattr(serve, name, value)
    for name, value in {"ON_DISK": 40, "ASKED_ON_DISK": 2}.items():
        monkeypatch.setattr(serve, name, value)
    record = bench_serve(model, replace(SMALL, bundle=str(bundle)))
    assert json.loads(json.dumps(record, allow_nan=False))["rows"] == record["rows"]
    assert record["backend"] == f"PyTorch {torch.__version__}"
    assert record["settings"]["parts"] == serve.PARTS
    rows = {(row["name"], row.get("streams")): row for row in record["rows"]}
    for load in SMALL.loads:
        one, two = (rows[f"dlp-lora serve, {load}", n] for n in (1, 2))
        assert one["speedup"] == 1
        assert two["speedup"] == pytest.approx(two["tokens_per_s"] / one["tokens_per_s"], abs=1e-3)
        engine, base = (rows[f"{name}, {load}", 1]["ms_per_token"] for name in (serve.ENGINE, serve.BASE))
        assert one["over_engine"] == pytest.approx(one["ms_per_token"] / engine, abs=1e-2)
        assert one["over_base"] == pytest.approx(one["ms_per_token"] / base, abs=1e-2)
        assert 0 < one["first_ms_p50"] <= one["first_ms_p95"] <= one["first_ms_p99"]
    others: dict[str, Any] = {row["name"]: row for row in record["rows"]}
    assert others["start with 3 adapters"]["resident_mb"] > 50
    assert others["waiting while 300 tokens are read"]["over_chunk"] > 0
    assert "mb_per_request" in others["memory, 2 prompts of 100 tokens"]
    assert others["one of 40 adapters, budget 64 MB"]["first_from_disk_ms"] > 0
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    plot(record, tmp_path / "serve.svg")
    assert "dlp-lora serve, keep, 2" in (tmp_path / "serve.svg").read_text()


@pytest.mark.filterwarnings("ignore:.*changes nothing")  # the adapter that servers are checked with
def test_a_server_on_vllm_is_measured_without_a_model_in_this_process(
    model: Path, lively_adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "load", None)
    monkeypatch.setattr(serve, "AutoModelForCausalLM", None)
    with standing_in(double_engine(lively_adapters)) as vllm:
        args = replace(SMALL, dtypes=(), loads=serve.LOADS, num_adapters=5, backend="vllm", backend_url=(vllm.url,))
        record = bench_serve(model, args)
    assert json.loads(json.dumps(record, allow_nan=False))["rows"] == record["rows"]
    assert record["backend"] == "vLLM 0.33.0"
    assert record["settings"]["backend_url"] == (vllm.url,)
    assert (record["settings"]["dtypes"], record["settings"]["parts"]) == ((), ("load",))
    start, *rows = record["rows"]
    assert start.keys() == {"name", "start_s"}
    assert {(row["name"], row["streams"]) for row in rows} == {
        (f"dlp-lora serve, {load}", streams) for load in serve.LOADS for streams in (1, 2)
    }
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["prompt_tokens"] > 20
        assert "over_base" not in row
        assert "dtype" not in row
    assert {row["answer_tokens"] for row in rows if "fixed" in row["name"]} == {SMALL.new_tokens}
    named = {body["model"].partition("-")[0] for body in vllm.asked}
    assert named >= {"keep"}  # the front asked it under mixtures


def test_a_soak_counts_what_was_answered_and_what_stays(
    model: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "CHANGE_S", 0.2)
    monkeypatch.setattr(soak, "PROMPTS", soak.PROMPTS[:2])
    record = bench_soak(model, SoakArgs(bundle=str(bundle), minutes=0.05, clients=3, leaving=0.2))
    (row,) = record["rows"]
    assert row["answers"] > 5
    assert min(row["left"], row["changes"], row["restart_s"]) > 0
    assert (row["wrong"], row["rows_after"]) == (0, 0)
    assert abs(row["growth"]) < 0.2


def test_an_answer_that_belongs_to_another_request_ends_a_soak(
    model: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "_read", lambda answer: object())
    monkeypatch.setattr(soak, "PROMPTS", soak.PROMPTS[:2])
    with pytest.raises(DLPLoRAError, match=r"\d+ answers are wrong; the first: \{'model'"):
        bench_soak(model, SoakArgs(bundle=str(bundle), minutes=0.02, clients=1))


def test_a_benchmark_that_is_terminated_takes_its_server_with_it(bundle: Path) -> None:
    script = f"""
from dlp_lora.lab.bench.server import serving
with serving(["--bundle", {str(bundle)!r}], model="x", threads=1) as server:
    print(server.process.pid, flush=True)
    server.process.wait()
"""
    env = {**os.environ, "PYTHONPATH": str(Path(dlp_lora.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    server = int(process.stdout.readline())
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
