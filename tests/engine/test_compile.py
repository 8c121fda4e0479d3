"""Decoding steps under torch.compile: one graph for every mixture, buffers that stay where they are."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import dlp_lora
from conftest import USUAL_TARGETS, EveryK, HashRouter, byte_tokenizer, lively_model, make_adapter, tiny_model
from dlp_lora import Engine, Switching, TopK, TopP

TOKENIZER = byte_tokenizer()
PROMPTS = ["Tell me a tale", "Why?", "How far is it to the moon"]
LENGTH = 64  # of the caches, as each length has a graph of its own
STATIC: dict[str, Any] = {
    "max_new_tokens": 26,
    "do_sample": False,
    "cache_implementation": "static",
    "max_cache_len": LENGTH,
}
MIXTURES = [
    {"math": 1.0},
    {},
    {"units": 0.3, "poems": 0.7},
    {"math": 0.2, "units": 0.3, "poems": 0.5},
    {"poems": -1.5},
]

# The type checks of the tests cannot be traced.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def plain(lively_adapters: Path) -> Engine:
    return load(lively_adapters)


@pytest.fixture(scope="module")
def counter() -> CompileCounter:
    """Counts graphs, and runs them as they were traced."""
    torch._dynamo.reset()
    counters.clear()
    return CompileCounter()


@pytest.fixture(scope="module")
def engine(lively_adapters: Path, counter: CompileCounter) -> Engine:
    """An engine of which every step is one graph, or an error."""
    engine = load(lively_adapters)
    engine.compile(max_rank=16, backend=counter, fullgraph=True)
    return engine


def load(adapters: Path, **settings: Any) -> Engine:
    settings = {"segmenter": partial(EveryK, 6), "switching": Switching(min_tokens=1, margin=0.0), **settings}
    parts = {"tokenizer": TOKENIZER, "router": HashRouter(), "policy": TopK(k=2), "adapters": adapters}
    return dlp_lora.load(lively_model(), **parts, **settings)


@torch.no_grad()
def steps(
    engine: Engine, mixtures: Sequence[Mapping[str, float] | Sequence[Mapping[str, float]]], *, rows: int = 1
) -> Tensor:
    """One token under each of the mixtures, over a static cache: (seq, rows, vocab)."""
    cache = StaticCache(engine.model.config, max_cache_len=LENGTH)
    device, logits = engine.model.device, []
    with engine.disabled():
        engine.model((torch.arange(3 * rows).reshape(rows, 3) + 40).to(device), past_key_values=cache)
    for i, mixture in enumerate(mixtures):
        ids = torch.full((rows, 1), 50 + i % 40, device=device)
        with engine.fixed(mixture):
            logits.append(engine.model(ids, past_key_values=cache).logits[:, -1].clone())  # a CUDA graph reuses them
    return torch.stack(logits).cpu()


def buffers(engine: Engine) -> list[tuple[int, ...]]:
    return [
        (g.num_allocations, *(t.data_ptr() for t in [*g.buffers(), *g._gates.values()]), id(g._views.get(g.padded)))
        for g in engine.bank.groups
    ]


@contextmanager
def no_new_graph(counter: CompileCounter) -> Iterator[None]:
    before = counter.frame_count
    yield
    assert before > 0
    assert counter.frame_count == before
    assert not counters["graph_break"]


def test_every_mixture_runs_in_one_graph(engine: Engine, plain: Engine, counter: CompileCounter) -> None:
    steps(engine, MIXTURES[:1])
    with no_new_graph(counter):
        found = steps(engine, MIXTURES * 3)
    torch.testing.assert_close(found, steps(plain, MIXTURES * 3), rtol=1e-4, atol=1e-4)


def test_rows_of_any_mixtures_run_in_one_graph(engine: Engine, plain: Engine, counter: CompileCounter) -> None:
    batches: list[Any] = [
        [MIXTURES[i], MIXTURES[(i + j) % 5], MIXTURES[(i + 3) % 5]] for i in range(5) for j in range(3)
    ]
    batches += MIXTURES  # one for all rows
    steps(engine, MIXTURES[:1])
    steps(engine, batches[:1], rows=3)
    with no_new_graph(counter):
        found = steps(engine, batches, rows=3)
        steps(engine, MIXTURES)  # another batch size has its own, and keeps it
    torch.testing.assert_close(found, steps(plain, batches, rows=3), rtol=1e-4, atol=1e-4)


def test_a_thousand_switches_compile_and_allocate_nothing(engine: Engine, counter: CompileCounter) -> None:
    names = ["math", "units", "poems"]
    # Of none to three adapters.
    mixtures = [{name: (i % 7 + k) / 10 for k, name in enumerate(names) if (i >> k) & 1} for i in range(1000)]
    steps(engine, MIXTURES)
    before = buffers(engine)
    with no_new_graph(counter):
        for start in range(0, 1000, 50):
            steps(engine, mixtures[start : start + 50])
    assert buffers(engine) == before


def test_generating_switches_within_one_graph(engine: Engine, plain: Engine, counter: CompileCounter) -> None:
    engine.generate(PROMPTS[1], **STATIC)
    with no_new_graph(counter):
        for prompt in PROMPTS:
            found, wanted = (e.generate(prompt, **STATIC) for e in (engine, plain))
            assert found.tokens == wanted.tokens
            assert [s.mixture for s in found.trace] == [s.mixture for s in wanted.trace]
            assert len({s.mixture for s in found.trace}) > 1
        with engine.using(policy=TopP(min_confidence=0.5), kv_policy="keep"):
            trace = engine.generate(PROMPTS[0], **STATIC).trace
        assert {s.abstained for s in trace} == {True, False}
        sentences = {"prompt_routing": "sentences"}
        with engine.using(**sentences), plain.using(**sentences):
            assert engine.generate(PROMPTS[0], **STATIC).tokens == plain.generate(PROMPTS[0], **STATIC).tokens


def test_a_batch_of_prompts_is_what_it_is_uncompiled(engine: Engine, plain: Engine) -> None:
    found, wanted = (e.generate(PROMPTS, **STATIC) for e in (engine, plain))
    assert [g.tokens for g in found] == [g.tokens for g in wanted]
    assert all(len({s.mixture for s in g.trace}) > 1 for g in found)


def test_other_caches_run_uncompiled(engine: Engine, plain: Engine, counter: CompileCounter) -> None:
    settings = {"max_new_tokens": 9, "do_sample": False}
    steps(engine, MIXTURES)
    with no_new_graph(counter):
        assert engine.generate(PROMPTS[0], **settings).tokens == plain.generate(PROMPTS[0], **settings).tokens
    assert not engine.bank.is_padded


def test_generate_compiles_no_controller(engine: Engine, counter: CompileCounter) -> None:
    everywhere = CompileConfig(backend=counter, mode=None)
    everywhere._compile_all_devices = True  # as on a GPU
    engine.generate(PROMPTS[0], **STATIC)
    with no_new_graph(counter):
        engine.generate(PROMPTS[0], **STATIC, compile_config=everywhere)
    assert not hasattr(engine.model, "_compiled_call")


def test_disabled_is_the_base_bit_for_bit(engine: Engine) -> None:
    steps(engine, MIXTURES)
    settings = {**STATIC, "return_dict_in_generate": True, "output_logits": True}
    ids = torch.tensor([TOKENIZER(PROMPTS[0])["input_ids"]])
    with engine.disabled():
        found = engine.model.generate(ids, **settings)
    wanted = lively_model().generate(ids, **settings)
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))


def test_adapters_come_and_go_within_one_graph(lively_adapters: Path, plain: Engine, counter: CompileCounter) -> None:
    torch._dynamo.reset()
    engine = load(lively_adapters)
    engine.compile(max_rank=16, backend=counter, fullgraph=True)
    steps(engine, MIXTURES)
    before = buffers(engine)
    with no_new_graph(counter):
        for i in range(12):  # more ranks than the buffers began with
            engine.add_adapter(lively_adapters / "units", f"twin{i}")
            found = steps(engine, [{f"twin{i}": 0.5, "math": 0.5}, *MIXTURES])
        for i in range(12):
            engine.remove_adapter(f"twin{i}")
        again = steps(engine, MIXTURES)
    assert buffers(engine) == before
    wanted = steps(plain, [{"units": 0.5, "math": 0.5}, *MIXTURES])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, steps(plain, MIXTURES), rtol=1e-4, atol=1e-4)


def test_a_mixture_wider_than_max_rank_runs_uncompiled(lively_adapters: Path, plain: Engine) -> None:
    counter, engine = CompileCounter(), load(lively_adapters)
    engine.compile(max_rank=8, backend=counter, fullgraph=True)
    wide = {"math": 0.2, "units": 0.8}  # ranks 4 and 8
    torch.testing.assert_close(steps(engine, [wide] * 3), steps(plain, [wide] * 3), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 0
    engine.compile(max_rank=12, backend=counter, fullgraph=True)
    torch.testing.assert_close(steps(engine, [wide] * 3), steps(plain, [wide] * 3), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    model = engine.detach()
    assert "forward" not in vars(model)
    assert "get_compiled_call" not in vars(model)
    ids = torch.tensor([[40, 41]])
    assert torch.equal(model(ids).logits, lively_model()(ids).logits)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])  # of other layers than nn.Linear, and with biases
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_other_architectures_compile(architecture: str, tmp_path: Path) -> None:
    targets = USUAL_TARGETS[architecture]
    for seed, name in enumerate(("math", "units", "poems")):
        make_adapter(tiny_model(architecture), tmp_path / name, seed=seed, scale=0.3, target_modules=targets)
    engines = [dlp_lora.load(tiny_model(architecture), tokenizer=TOKENIZER, adapters=tmp_path) for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    engines[0].compile(backend=counter, fullgraph=True)
    found, wanted = (steps(engine, MIXTURES) for engine in engines)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_switches_without_compiling_anew(lively_adapters: Path, plain: Engine) -> None:
    torch._dynamo.reset()  # graphs of other engines count against the limit
    counter, engine = CompileCounterWithBackend("inductor"), load(lively_adapters)
    engine.compile(max_rank=16, backend=counter, fullgraph=True)
    torch.testing.assert_close(steps(engine, MIXTURES), steps(plain, MIXTURES), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_stay_valid_over_switches(lively_adapters: Path, plain: Engine) -> None:
    engine = load(lively_adapters, device="cuda")
    engine.compile(max_rank=16, fullgraph=True, mode="reduce-overhead")
    steps(engine, MIXTURES)
    with torch.no_grad():
        torch.testing.assert_close(steps(engine, MIXTURES * 3), steps(plain, MIXTURES * 3), rtol=1e-3, atol=1e-3)


def test_a_max_rank_of_none_is_refused(plain: Engine) -> None:
    with pytest.raises(ValueError, match="max_rank must be at least 1, got 0"):
        plain.compile(max_rank=0)
