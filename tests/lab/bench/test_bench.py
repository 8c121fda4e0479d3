import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoTokenizer

from conftest import byte_tokenizer, lively_model
from dlp_lora import Context, DLPLoRAError, Engine, Mixture
from dlp_lora.bank.peft_format import read_adapter
from dlp_lora.engine import controller
from dlp_lora.lab.bench import models, train
from dlp_lora.lab.bench.agreement import Twin, check_paths, check_sentences
from dlp_lora.lab.bench.bank import BankArgs, bench_bank
from dlp_lora.lab.bench.case import PROMPTS, BenchArgs, Case, read_prompts
from dlp_lora.lab.bench.contexts import bench_contexts
from dlp_lora.lab.bench.decode import DecodeArgs, bench_decode
from dlp_lora.lab.bench.memory import Memory, bandwidth_gb_s, counted, growth_mb, held_mb, peak_mb, read_mb
from dlp_lora.lab.bench.paths import PathsArgs, bench_paths
from dlp_lora.lab.bench.peers import PEERS, PeersArgs, bench_peers
from dlp_lora.lab.bench.plot import plot
from dlp_lora.lab.bench.prefill import PrefillArgs, bench_prefill
from dlp_lora.lab.bench.random_adapters import NUM_DISTINCT, write_random_adapters
from dlp_lora.lab.bench.routers import RoutersArgs, bench_routers
from dlp_lora.lab.bench.serve import ServeArgs
from dlp_lora.lab.bench.suite import PRESETS, suite
from dlp_lora.lab.bench.switch import SwitchArgs, bench_switch, context_at
from dlp_lora.lab.bench.timing import interleave, interleave_steps
from dlp_lora.lab.bench.train import TrainArgs, bench_train
from dlp_lora.lab.records.environment import environment
from dlp_lora.progress import Progress
from dlp_lora.sentences import split
from dlp_lora.tasks import Example, Task, write_task

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"r": 2, "rounds": 1, "dtypes": ("float32",)}
SMALL = DecodeArgs(num_adapters=3, selected=2, new_tokens=4, **{**QUICK, "rounds": 2})
BENCHES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "decode": lambda model: bench_decode(model, replace(SMALL, rounds=1)),
    "paths": lambda model: bench_paths(
        model, PathsArgs(num_adapters=3, selected=2, new_tokens=3, compiled=False, **QUICK)
    ),
    "prefill": lambda model: bench_prefill(model, PrefillArgs(num_adapters=4, selected=2, batch=3, length=9, **QUICK)),
    "switch": lambda model: bench_switch(model, SwitchArgs(sizes=(3, 5), selected=2, num_switches=250, **QUICK)),
    "switch_context": lambda model: bench_contexts(model, SwitchArgs(context=(8, 24), selected=1, **QUICK)),
    "bank": lambda model: bench_bank(
        model, BankArgs(sizes=(1, 3), on_disk=(40,), budget_mb=0.02, new_tokens=3, **QUICK)
    ),
    "routers": lambda model: bench_routers(model, RoutersArgs(num_adapters=3, new_tokens=2, **QUICK)),
    "peers": lambda model: bench_peers(
        model, PeersArgs(num_adapters=4, new_tokens=3, methods=("peft several active",), **QUICK)
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    lively_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


RecordOf = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def record_of(model: Path) -> RecordOf:
    """Runs a benchmark once."""
    return cache(lambda name: BENCHES[name](model))


def make_case(
    model: Path, folder: Path, *, num_adapters: int = 3, target_modules: tuple[str, ...] = ("q_proj",)
) -> Case:
    return Case(
        benchmark="test",
        model=model,
        dtype="float32",
        device=CPU,
        tokenizer=AutoTokenizer.from_pretrained(model, padding_side="left"),
        adapters=write_random_adapters(model, folder, num_adapters, r=2, target_modules=target_modules),
        texts=PROMPTS,
        bandwidth_gb_s=1.0,
    )


def test_every_variant_has_a_row_with_its_ratio_over_the_base(model: Path) -> None:
    rounds: list[Progress] = []
    args = replace(SMALL, dtypes=("float32", "bfloat16"))
    record = bench_decode(model, args, on_progress=rounds.append)
    assert rounds == [Progress(f"decode, {dtype}", i, 2) for dtype in args.dtypes for i in range(3)]
    names = ["base", "base again", "base, stacked", "dlp-lora, 2 of 3", "peft one adapter"]
    names += ["base, prepacked", "dlp-lora, prepacked, 2 of 3"]
    assert [(row["name"], row["dtype"]) for row in record["rows"]] == [(n, d) for d in args.dtypes for n in names]
    for row in record["rows"]:
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert min(row["ms_per_token"], row["ttft_ms"], row["tokens_per_s"], row["bandwidth_share"] + 1e-3) > 0
        assert row["peak_mb"] > row["held_mb"] > 0
        if row["name"] == "base, stacked":
            assert row["ratio_over_alike"] == 1
        if row["name"] == "base, prepacked":
            assert row["ratio_over_alike"] == 1
            assert row["memory_ratio"] > 1.2  # the weights of linear layers twice, embeddings once
        if row["name"] == "base":
            assert row["memory_ratio"] == 1
    for bases in (record["rows"][:2], record["rows"][len(names) : len(names) + 2]):
        faster = min(bases, key=lambda row: row["ms_per_token"])
        assert faster["ratio"] == faster["ratio_min"] == faster["ratio_max"] == 1
    assert record["model"] == "tiny"
    assert record["settings"]["new_tokens"] == 4
    assert record["num_prompts"] == len(PROMPTS)


@pytest.mark.parametrize("name", BENCHES)
def test_a_record_is_json_with_its_machine_and_settings_and_can_be_drawn(
    record_of: RecordOf, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    record = record_of(name)
    assert json.loads(json.dumps(record, allow_nan=False))["rows"] == record["rows"]
    assert record["benchmark"] == name
    assert record["bandwidth_gb_s"] > 0
    assert record["environment"]["torch"] == torch.__version__
    assert record["settings"]["device"] == "cpu"
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        plot(record, tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"{name}{suffix}").read_bytes().startswith(start)
    assert all(row["name"] in (tmp_path / f"{name}.svg").read_text() or name == "bank" for row in record["rows"])


@pytest.mark.parametrize("name", BENCHES)
def test_no_figures_are_given_when_the_disabled_engine_differs_from_the_base(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def load_and_perturb(*args: Any, **kwargs: Any) -> Engine:
        engine = load(*args, **kwargs)
        with torch.no_grad():
            next(engine.model.parameters()).add_(1e-3)
        return engine

    load = models.load
    monkeypatch.setattr(models, "load", load_and_perturb)
    with pytest.raises(DLPLoRAError, match="adapters disabled differs from the base model; no figures"):
        BENCHES[name](model)


@pytest.mark.parametrize("name", ["decode", "paths", "prefill", "switch", "bank", "peers"])
def test_no_figures_are_given_when_the_engine_differs_from_peft(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def load_others(*args: Any, **kwargs: Any) -> Engine:
        names, paths = zip(*kwargs["adapters"].items(), strict=True)
        # The first adapter is another one than it says.
        return load(*args, **{**kwargs, "adapters": dict(zip(names, (other, *paths[1:]), strict=True))})

    load, folder = models.load, model.parent / name
    *_, other = write_random_adapters(model, folder, 7, r=2, target_modules=("q_proj", "v_proj")).values()
    monkeypatch.setattr(models, "load", load_others)
    with pytest.raises(DLPLoRAError, match=r"and the engine under the same mixture differ by .* no figures"):
        BENCHES[name](model)


def test_paths_of_bfloat16_are_told_apart_although_they_round_differently(model: Path, tmp_path: Path) -> None:
    case = replace(make_case(model, tmp_path), dtype="bfloat16")
    engine, base, one = models.engine_with(case, selected=1), models.base_model(case), models.peft_one(case)
    first, second, _ = case.names
    check_paths(engine, base, case.prompts(2)[0], {"peft": Twin(one, {first: 1.0})})
    with pytest.raises(DLPLoRAError, match="peft and the engine under the same mixture differ by"):
        check_paths(engine, base, case.prompts(2)[0], {"peft": Twin(one, {second: 1.0})})
    # What was made loud is as it was.
    assert {scale for m in one.modules() if isinstance(m, LoraLayer) for scale in m.scaling.values()} == {1.0}


def test_no_figures_are_given_when_a_step_on_the_cache_differs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(model, tmp_path)
    engine, base, mixed = models.engine_with(case, selected=1), models.base_model(case), models.peft_many(case, 3)
    twin = Twin(mixed, [{name: 1.0} for name in case.names], {"adapter_names": list(case.names)})
    check_paths(engine, base, case.prompts(3)[0], {"peft": twin})
    fuse = engine.bank.fuse

    def turned(mixtures: list[Mixture], *args: Any, reuse: bool = False, **kwargs: Any) -> None:
        fuse(mixtures[::-1] if reuse else mixtures, *args, reuse=reuse, **kwargs)

    monkeypatch.setattr(engine.bank, "fuse", turned)
    with pytest.raises(DLPLoRAError, match="peft and the engine under the same mixture differ by"):
        check_paths(engine, base, case.prompts(3)[0], {"peft": twin})


@pytest.mark.usefixtures("unchecked")  # the type checks of the tests cannot be traced
def test_every_path_has_a_row_and_compiled_steps_stand_beside_a_compiled_base(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # graphs, without a C++ compiler
    monkeypatch.setenv("CXX", sys.executable)
    graphs = counters["stats"]["unique_graphs"]
    record = bench_paths(model, PathsArgs(num_adapters=3, selected=2, new_tokens=3, **QUICK))
    ours = [f"dlp-lora, {path}" for path in ("stacked", "concatenated", "prepacked", "merged", "compiled")]
    others = ["base", "base again", "base, stacked", "base, prepacked", "peft one adapter", "base, compiled"]
    assert sorted(row["name"] for row in record["rows"]) == sorted(ours + others)
    # One each, and one for the check, which gives masks that are not prepared: none for another prompt.
    assert counters["stats"]["unique_graphs"] == graphs + 3


def test_compiled_steps_ask_for_a_compiler(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DLPLoRAError, match=r"need a C\+\+ compiler, and there is none .* pass --no-compiled"):
        bench_paths(model)


def test_concatenated_layers_hold_their_own_weights(model: Path, tmp_path: Path) -> None:
    case = make_case(model, tmp_path)
    engine = models.engine_with(case, selected=1)
    assert any(group.is_stacked for group in engine.bank.groups)
    models.concatenated(engine)
    assert not any(group.is_stacked for group in engine.bank.groups)
    check_paths(
        engine, models.base_model(case), case.prompts(2)[0], {"peft": Twin(models.peft_one(case), {case.names[0]: 1.0})}
    )


def test_long_prompts_are_different_texts(model: Path, tmp_path: Path) -> None:
    case = make_case(model, tmp_path, num_adapters=1)
    ids = case.long_prompts(4, 256)["input_ids"]
    text = case.tokenizer.decode(ids.flatten())
    assert ids.shape == (4, 256)
    assert text.startswith(case.texts[0])
    assert len(set(split(text))) > 0.9 * len(split(text))
    assert case.long_prompts(2, 200_000)["input_ids"].shape == (2, 200_000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_figures_are_given_when_a_sentence_is_read_under_another_ones_mixture(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    case = replace(make_case(model, tmp_path, num_adapters=8), dtype=dtype)
    engine, base, inputs = models.engine_with(case, selected=2), models.base_model(case), case.long_prompts(3, 256)
    check_sentences(engine, base, inputs)

    def shifted(*args: Any, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        mixtures, tokens = by_token(*args, **kwargs)
        return mixtures, tokens.roll(20, dims=1)

    by_token = controller.mixtures_by_token
    monkeypatch.setattr(controller, "mixtures_by_token", shifted)
    with pytest.raises(DLPLoRAError, match=r"prompts routed by sentence differ from their sentences .* no figures"):
        check_sentences(engine, base, inputs)


def test_the_router_of_the_benchmarks_chooses_other_adapters_for_other_sentences() -> None:
    router = models.mini_mlp([f"adapter_{i}" for i in range(26)], byte_tokenizer().backend_tokenizer)
    sentences = [sentence for text in PROMPTS for sentence in text.split(". ")]
    chosen = router.probabilities([Context(sentence) for sentence in sentences]).topk(3).indices
    assert len({frozenset(row) for row in chosen.tolist()}) > len(sentences) / 3
    assert len(set(chosen.flatten().tolist())) > 10


def test_variants_take_turns_and_the_first_round_is_left_out() -> None:
    order: list[str] = []

    def run(name: str, ms: float) -> models.Any:
        def measure(i: int) -> dict[str, float]:
            order.append(name)
            return {"ms": ms * (i + 1)}

        return measure

    times = interleave({"base": run("base", 2.0), "ours": run("ours", 3.0)}, rounds=3)
    assert order == ["base", "ours", "ours", "base", "base", "ours", "ours", "base"]
    assert times.each["base"]["ms"] == [4.0, 6.0, 8.0]
    assert times.median("ours", "ms") == 9.0
    assert times.ratio("ours", "ms") == {"ratio": 1.5, "ratio_min": 1.5, "ratio_max": 1.5}
    assert times.spread("ours", "ms") == {"ms": 9.0, "ms_min": 6.0, "ms_max": 12.0}


def test_memory_is_counted_in_the_round_that_warms_up() -> None:
    rounds, memory = [], {}
    layer = nn.Linear(2**18, 1, bias=False)  # 1 MB

    def run(i: int) -> dict[str, float]:
        rounds.append((i, torch.empty(2**18)))
        return {"ms": 1.0}

    times = interleave({"layer": counted("layer", layer, run, memory, CPU)}, rounds=2)
    assert [i for i, _ in rounds] == [0, 1, 2]
    assert times.each == {"layer": {"ms": [1.0, 1.0]}}
    assert memory["layer"] == Memory(held_mb=1, peak_mb=2)


def test_steps_take_turns_and_what_follows_the_last_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = [0.0]  # seconds
    monkeypatch.setattr("dlp_lora.lab.bench.timing.time.perf_counter", lambda: now[0])

    def run(name: str, seconds: float) -> models.Any:
        def go(i: int, step: models.Any) -> None:
            for k in range(3):
                now[0] += seconds * (5 if k == 0 else 1)
                order.append(f"{name}{k}")
                step()
            now[0] += 0.2

        return go

    times = interleave_steps({"base": run("a", 0.01), "ours": run("b", 0.02)}, rounds=1)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2", "b0", "a0", "b1", "a1", "b2", "a2"]
    assert times.median("base", "first_ms") == pytest.approx(50)
    assert times.median("base", "step_ms") == pytest.approx(10)
    assert times.median("base", "all_ms") == pytest.approx(70)
    assert times.ratio("ours", "step_ms")["ratio"] == pytest.approx(2)


def test_an_error_in_one_variant_is_raised() -> None:
    def fails(i: int, step: models.Any) -> None:
        step()
        raise DLPLoRAError("broken")

    with pytest.raises(DLPLoRAError, match="broken"):
        interleave_steps({"base": fails}, rounds=1)


def test_the_stacked_base_computes_what_the_base_does(model: Path, tmp_path: Path) -> None:
    case = make_case(model, tmp_path, num_adapters=1, target_modules=("all-linear",))
    base, stacked = models.base_model(case), models.stacked_base(case)
    inputs = case.prompts(3)[0]
    with torch.no_grad():
        torch.testing.assert_close(stacked(**inputs).logits, base(**inputs).logits)


def test_batches_decode_and_prefill_with_all_variants(model: Path, record_of: RecordOf) -> None:
    record = bench_decode(model, replace(SMALL, batch=3, target_modules=("all-linear",), rounds=1))
    assert record["settings"]["batch"] == 3
    assert [row["name"] for row in record["rows"]][4:6] == ["peft one adapter", "peft another adapter a row"]
    rows = record_of("prefill")["rows"]
    assert [row["name"] for row in rows] == [
        "base",
        "base again",
        "dlp-lora, routed, 2 of 4 a row",
        "dlp-lora, one mixture",
        "dlp-lora, another mixture a row",
        "dlp-lora, routed, 2 of 4 a sentence",
        "peft one adapter",
        "peft another adapter a row",
        "dlp-lora, prepacked, 2 of 4 a row",
        "dlp-lora, prepacked, 2 of 4 a sentence",
    ]
    assert all(row["ms"] > 0 and row["tokens_per_s"] > 0 for row in rows)


def test_hundreds_of_switches_allocate_and_move_nothing_and_every_part_is_timed(record_of: RecordOf) -> None:
    rows = record_of("switch")["rows"]
    ours, theirs = [f"dlp-lora, {k} of {n}" for n in (3, 5) for k in (1, 2)], ["peft weighted, 1"]
    assert [row["name"] for row in rows] == [*ours, *theirs, "peft weighted, 2"]
    for row in rows[:4]:
        assert row["num_switches"] == 250
        assert row["num_allocations"] == row["num_moved"] == 0
        assert row["growth_mb"] is None or row["growth_mb"] < 8
        parts = row["route_ms"] + row["policy_ms"] + row["fuse_ms"]
        assert 0 < row["route_ms"] < parts == pytest.approx(row["switch_ms"], abs=1e-2)


def test_a_switch_under_each_kv_policy_stands_beside_a_sentence(record_of: RecordOf) -> None:
    rows = {row["name"]: row for row in record_of("switch_context")["rows"]}
    assert set(rows) == {f"{n} tokens, {way}" for n in (8, 24) for way in ("no switch", "keep", "recompute")}
    assert all(row["pass_ms"] > 0 for row in rows.values())
    assert rows["24 tokens, recompute"]["extra_ms"] > 0
    assert rows["24 tokens, no switch"]["over_sentence"] == 0


def test_no_figures_are_given_when_switches_allocate(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlp_lora.bank.group import Group

    def write_elsewhere(self: Group, *args: Any) -> None:
        self.reserve(self.capacity + 1, [b.shape[1] + 1 for b in self.buffers()[1:]])
        write(self, *args)

    write = Group.write
    monkeypatch.setattr(Group, "write", write_elsewhere)
    with pytest.raises(DLPLoRAError, match=r"switching is not free of allocations: .*'num_allocations': [1-9]"):
        BENCHES["switch"](model)


def test_the_bank_benchmark_gives_each_size_a_row_with_its_share_of_the_parameters(record_of: RecordOf) -> None:
    rows = record_of("bank")["rows"]
    assert [row["name"] for row in rows[:2]] == ["base", "base again"]
    assert [row["num_adapters"] for row in rows] == [0, 0, 1, 3, 40]
    _, _, one, three, on_disk = rows
    total = sum(p.numel() for p in lively_model().parameters())
    # Two layers, rank 2, q of 32 to 32 and v of 32 to 16.
    assert one["share_of_parameters"] == pytest.approx(2 * 2 * (32 + 32 + 32 + 16) / total, abs=1e-5)
    assert three["share_of_parameters"] == pytest.approx(3 * one["share_of_parameters"], abs=3e-5)
    assert one["num_misses"] == three["num_misses"] == 0
    assert one["miss_ms"] is None
    # All 39 that make whole mixtures of three were read once; those of the last mixtures were there when asked again.
    assert on_disk["num_misses"] == 39
    assert on_disk["miss_ms"] > 0
    assert 0 < on_disk["kept_mb"] <= on_disk["budget_mb"] == 0.02


def test_no_figures_are_given_when_the_bank_keeps_more_than_its_budget(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_without_limit(*args: Any, **kwargs: Any) -> Engine:
        engine = load(*args, **kwargs)
        engine.bank.store.budget_mb = None
        return engine

    load = models.load
    monkeypatch.setattr(models, "load", load_without_limit)
    with pytest.raises(DLPLoRAError, match=r"the bank keeps .* MB under a budget of 0.02 MB; no figures"):
        BENCHES["bank"](model)


def test_decoding_tells_how_often_it_switched(record_of: RecordOf) -> None:
    ours = [row for row in record_of("bank")["rows"] if row["name"].startswith("dlp-lora")]
    assert all(1 <= row["switches"] + 1 <= row["sentences"] for row in ours)
    assert not any("switches" in row for row in record_of("bank")["rows"] if row["name"].startswith("base"))


def test_prefill_tells_what_the_precision_costs_in_accuracy(model: Path) -> None:
    record = bench_prefill(
        model,
        PrefillArgs(num_adapters=3, selected=2, length=64, batch=2, **{**QUICK, "dtypes": ("bfloat16", "float32")}),
    )
    errors = {(row["name"], row["dtype"]): row["logit_error"] for row in record["rows"]}
    assert all(error is None for (_, dtype), error in errors.items() if dtype == "float32")
    narrow = {name: error for (name, dtype), error in errors.items() if dtype == "bfloat16" and error is not None}
    assert {"base", "peft one adapter", "dlp-lora, one mixture", "dlp-lora, routed, 2 of 3 a sentence"} <= narrow.keys()
    assert all(0 < error < 0.05 for error in narrow.values())


def test_a_router_reads_no_answer_twice_in_the_switch_benchmark() -> None:
    asked = [context_at(("How?", "Why?"), turn) for turn in range(40)]
    assert {context.prompt for context in asked} == {"How?", "Why?"}
    assert len({context.answer for context in asked}) == 40


def test_routers_are_told_apart_by_their_parameters_and_time_a_sentence(record_of: RecordOf) -> None:
    base, mini_mlp, albert = record_of("routers")["rows"]
    assert "router_parameters" not in base
    assert "random weights" in albert["name"]
    assert albert["router_parameters"] > 7e6 > mini_mlp["router_parameters"]
    assert albert["held_mb"] - mini_mlp["held_mb"] > 20  # a router is held, too
    for row in (mini_mlp, albert):
        assert 0 < row["route_ms"] < row["switch_ms"]
        assert row["answer_ratio"] > 0


def test_random_adapters_are_peft_folders_and_many_of_them_take_no_more_disk(model: Path, tmp_path: Path) -> None:
    paths = list(write_random_adapters(model, tmp_path, NUM_DISTINCT + 1, r=2, target_modules=("q_proj",)).values())
    first, second, last = (read_adapter(path) for path in (paths[0], paths[1], paths[-1]))
    (one, *_), (other, *_) = first.modules.values(), second.modules.values()
    assert not torch.equal(one.a, other.a)
    assert set(first.modules) == set(last.modules) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    weights = "adapter_model.safetensors"
    assert os.path.samefile(paths[0] / weights, paths[-1] / weights)
    everything = write_random_adapters(model, tmp_path / "all", 1, r=2, target_modules=("all-linear",))
    assert len(read_adapter(everything["adapter_0000"]).modules) == 2 * 7  # all but the head
    with pytest.raises(ValueError, match=r"tiny has no layers \['qkv'\]; there are down_proj, gate_proj"):
        write_random_adapters(model, tmp_path / "none", 1, r=2, target_modules=("qkv",))


def test_prompts_of_a_data_folder_take_turns_by_task(model: Path, tmp_path: Path) -> None:
    for name, count in (("days", 3), ("sums", 1)):
        examples = tuple(Example(prompt=f"{name} {i}?", answer="1") for i in range(count))
        write_task(tmp_path / name, Task(name=name, train=(Example(prompt="train", answer="1"),), test=examples))
    assert read_prompts(str(tmp_path)) == ("days 0?", "sums 0?", "days 1?", "days 2?")
    record = bench_decode(model, replace(SMALL, rounds=1, prompts=str(tmp_path)))
    assert record["num_prompts"] == 4
    assert record["settings"]["prompts"] == tmp_path.name  # no path of this machine
    assert read_prompts(None) == PROMPTS


def test_peak_memory_is_what_a_run_holds_at_a_time() -> None:
    def run() -> None:
        first = torch.empty(2**20)  # 4 MB
        second = torch.empty(2**21)  # 8 MB
        del first
        third = torch.empty(2**20)
        del second, third

    assert peak_mb(run, CPU) == 12


def test_held_memory_counts_each_storage_once() -> None:
    layer = nn.Linear(256, 1024, bias=False)
    twice = nn.ModuleList([layer, nn.Linear(256, 1024, bias=False)])
    assert held_mb(layer) == 1
    assert held_mb(twice) == 2
    assert held_mb(layer, twice, tensors=[layer.weight[3:], torch.empty(2**18)]) == 3


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_all_weights_but_a_table_of_embeddings(tied: bool) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(1024, 256)
            self.head = nn.Linear(256, 1024, bias=False)
            if tied:
                self.head.weight = self.embedding.weight

    assert read_mb(Tiny()) == 1


def test_the_machine_reads_some_gigabytes_a_second_and_growth_is_told() -> None:
    grown = growth_mb(CPU)
    assert bandwidth_gb_s(CPU, num_mb=8, tries=2) > 0.01
    kept = torch.ones(64 * 2**18)
    more = grown()
    assert more is None or 60 < more < 128
    assert kept.sum() > 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dtypes": ("float32", "half_a_float")}, "no dtype 'half_a_float'; choose from bfloat16"),
        ({"dtypes": ("nn",)}, "no dtype 'nn'"),
        ({"dtypes": ("int8",)}, "no dtype 'int8'"),
        ({"dtypes": ()}, "dtypes must be at least 1"),
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"device": "mps"}, "benchmarks run on cpu or cuda, not on 'mps'"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeArgs(**wrong)


def test_other_settings_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes must be at least 1, got \(4, 0\)"):
        BankArgs(sizes=(4, 0))
    with pytest.raises(ValueError, match="a bank of 3 has no other mixture of 3; give larger sizes"):
        SwitchArgs(sizes=(3, 10))
    with pytest.raises(ValueError, match="no method 'vllm'; there are peft one adapter"):
        PeersArgs(methods=("vllm",))


def test_the_environment_names_hardware_and_versions() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]


def test_every_peer_decodes_beside_us_and_says_what_it_holds(model: Path) -> None:
    record = bench_peers(model, PeersArgs(num_adapters=4, new_tokens=3, **QUICK))
    assert [row["name"] for row in record["rows"]] == ["base", "base again", "base, stacked", "dlp-lora", *PEERS]
    held = {row["name"]: row["held_mb"] for row in record["rows"]}
    weights = sum(p.nbytes for p in lively_model().parameters()) / 2**20
    assert held["base"] == pytest.approx(weights, abs=0.1)
    assert held["peft merged"] == held["base"]
    assert min(held.values()) == held["base"]
    # Four adapters of rank 2 on q and v in two layers: in the bank, and in the buffers.
    ours = 4 * 2 * 2 * (32 + 32 + 32 + 16) * 4 / 2**20
    router = models.mini_mlp(("a", "b", "c", "d"), byte_tokenizer().backend_tokenizer)
    assert held["dlp-lora"] - weights - held_mb(router) == pytest.approx(2 * ours, abs=0.006)  # type: ignore[arg-type]


TRAINING = replace(train.RECIPE, prompt_format="plain", batch_size=4)


def echo(num: int = 6) -> Task:
    examples = tuple(Example(prompt=f"What is {i}?", answer=f"It is {i}.") for i in range(num))
    return Task(name="echo", train=(Example(prompt="long" * 400, answer="left out"), *examples), test=())


@pytest.mark.parametrize("epochs", [0.5, 3.0])
def test_both_ways_to_train_end_at_the_same_loss_on_the_same_batches(model: Path, epochs: float) -> None:
    several = replace(TRAINING, epochs=epochs, learning_rate=1e-2)
    theirs, ours = bench_train(model, [echo(10)], TrainArgs(num_samples=10, rounds=1, training=several))["rows"]
    assert ours["loss"] < ours["loss_before"] - 0.01
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)


def test_both_ways_to_train_see_the_same_samples_and_end_at_the_same_loss(model: Path) -> None:
    record = bench_train(model, [echo()], TrainArgs(num_samples=10, rounds=1, training=TRAINING))
    theirs, ours = record["rows"]
    assert ours["num_samples"] == theirs["num_samples"] == 6  # all but the long one
    before = ours["loss_before"]
    assert before == theirs["loss_before"]
    assert before - ours["loss"] == pytest.approx(before - theirs["loss"], rel=train.TOLERANCE)
    assert ours["loss"] < before
    assert theirs["speedup"] == theirs["memory_ratio"] == 1
    assert ours["samples_per_s"] > 0
    # "What is " begins each: of four and of two examples, of 20 tokens each, it is encoded once.
    assert (theirs["shared"], ours["shared"]) == (0, pytest.approx((3 + 1) * 8 / (6 * 20), abs=1e-4))
    assert ours["peak_mb"] > ours["held_mb"] == theirs["held_mb"]
    assert json.loads(json.dumps(record, allow_nan=False))["settings"]["training"]["batch_size"] == 4


def test_no_figures_are_given_when_the_two_ways_to_train_end_at_other_losses(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_less(*args: Any, **options: Any) -> None:
        *others, settings, out = args
        trainer(*others, replace(settings, learning_rate=1e-9), out, **options)

    trainer = train._train_with_trainer
    monkeypatch.setattr(train, "_train_with_trainer", train_less)
    with pytest.raises(DLPLoRAError, match=r"echo: we end at a loss of .*, the Trainer at .*; no figures are given"):
        bench_train(model, [echo()], TrainArgs(num_samples=6, rounds=1, training=TRAINING))


def test_the_suite_of_a_gpu_differs_by_device_precision_and_batches(model: Path) -> None:
    found = suite(model, PRESETS["gpu"], rounds=2, threads=1, vllm_python="/opt/v llm/bin/python")
    assert list(found) == [
        *("decode", "decode_batch8", "decode_batch32", "decode_all_linear"),
        *("prefill_batch1", "prefill_batch8", "prefill_batch32"),
        *("paths", "switch", "bank", "routers", "peers", "train", "serve", "serve_vllm"),
    ]
    for name, bench in found.items():
        args: BenchArgs = bench.args[-1]  # type: ignore[attr-defined]
        assert (args.device, args.rounds, args.threads) == ("cuda", 2, 1)
        if name == "serve_vllm":
            assert isinstance(args, ServeArgs)
            assert args.backend == "vllm"
            assert "--dtype bfloat16" in args.serve_args
            assert shlex.split(args.serve_args)[-2:] == ["--vllm-python", "/opt/v llm/bin/python"]
        else:
            assert getattr(args, "dtypes", ("bfloat16",)) == ("bfloat16",)
        assert f"batch{getattr(args, 'batch', 1)}" in name or getattr(args, "batch", 1) == 1
    assert "decode_batch8" in suite(model, PRESETS["cpu"])


def test_a_plot_names_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--plot writes \.png or \.svg, not it\.txt"):
        plot({}, tmp_path / "it.txt")
    monkeypatch.setattr("dlp_lora.lab.bench.plot.find_spec", lambda name: None)
    with pytest.raises(DLPLoRAError, match=r"--plot needs matplotlib; run `pip install 'dlp-lora\[report\]'`"):
        plot({}, tmp_path / "it.png")
