"""Every way to compute a mixture gives the guarantees of all the others."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

import dlp_lora
import reference
from conftest import byte_tokenizer, make_adapter, tiny_model
from dlp_lora import Engine, Mixture
from dlp_lora.bank.adapter_files import find_adapters
from dlp_lora.bank.attach import attach, detach, linear_layers, pair_dtype, siblings
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.cpu import check_prepacking
from dlp_lora.bank.group import Group
from dlp_lora.bank.linear import FusedLinear, is_plain
from dlp_lora.bank.paths import FEW_ROWS, Setting
from dlp_lora.bank.peft_format import Adapter, LoraWeights, read_adapter
from dlp_lora.errors import ModelError

IDS = torch.arange(3, 27).reshape(3, 8) * 7 % 256
OTHER = {"all": -0.7, "usual": 0.6}
MIXTURES = [{"usual": 0.505, "all": 0.495}, {"late": 1.0}, {"usual": 0.2, "all": 0.3, "late": 0.5}, {"all": -1.2}]
Forward = Callable[[Engine, Mapping[str, float], Tensor], Tensor]

# The type checks of the tests cannot be traced by the compiler.
pytestmark = pytest.mark.usefixtures("unchecked")


def fixed(engine: Engine, mixture: Mapping[str, float], ids: Tensor) -> Tensor:
    with engine.fixed(mixture):
        found: Tensor = engine.model(ids).logits
    return found


def gated(engine: Engine, mixture: Mapping[str, float], ids: Tensor) -> Tensor:
    """Each row under the mixture while another row has none, and another one another."""
    rows = []
    for i in range(len(ids)):
        mixtures = [OTHER, mixture, {}]
        around = ids[[(i - 1) % len(ids), i, (i + 1) % len(ids)]]
        with engine.fixed(mixtures):
            rows.append(engine.model(around).logits[1])
    return torch.stack(rows)


def by_sentence(engine: Engine, mixture: Mapping[str, float], ids: Tensor) -> Tensor:
    """The tokens before a change of the mixture, at another place in each pass, as sentences of one prompt have it."""
    found = []
    for n in (3, ids.shape[1]):
        tokens = (torch.arange(ids.shape[1]) >= n).long().repeat(len(ids), 1)
        engine.bank.fuse([Mixture(mixture), Mixture(OTHER)], tokens)
        logits = engine.model.lm_head(engine.model.model(ids)[0])  # beneath the controller
        found.append(logits[:, :n])
    torch.testing.assert_close(found[0], found[1][:, :3], rtol=1e-2, atol=1e-2)
    return torch.cat([found[0], found[1][:, 3:]], dim=1)


def compiled(engine: Engine, mixture: Mapping[str, float], ids: Tensor) -> Tensor:
    cache = StaticCache(engine.model.config, max_cache_len=16)
    with engine.fixed(mixture):
        logits = [engine.model(ids[:, :2], past_key_values=cache).logits]
        for t in range(2, ids.shape[1]):
            logits.append(engine.model(ids[:, t : t + 1], past_key_values=cache).logits)
            assert engine.bank.is_padded == bool(mixture)
    return torch.cat(logits, dim=1)


def merged(engine: Engine, mixture: Mapping[str, float], ids: Tensor) -> Tensor:
    with engine.merged(mixture):
        found: Tensor = engine.model(ids).logits
    return found


PATHS: dict[str, Forward] = {
    "concatenated": fixed,
    "stacked": fixed,
    "gated": gated,
    "by sentence": by_sentence,
    "compiled": compiled,
    "paged": fixed,
    "columns": fixed,
    "halves": fixed,
    "prepacked": fixed,
    "merged": merged,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Graphs of other tests in this process do not count towards the compiler's limit."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of different ranks, scalings and target modules."""
    model, root = tiny_model(), tmp_path_factory.mktemp("adapters")
    make_adapter(model, root / "usual", seed=1, scale=0.05)
    names: Any = {"target_modules": "all-linear", "r": 3, "use_rslora": True, "lora_alpha": 2}
    make_adapter(model, root / "all", seed=2, scale=0.05, **names)
    make_adapter(
        model, root / "late", seed=3, scale=0.05, target_modules=["v_proj", "down_proj"], r=6, layers_to_transform=[1]
    )
    return root


def engine_on(path: str, folder: Path, dtype: torch.dtype) -> Engine:
    model, tokenizer = tiny_model(dtype=dtype), byte_tokenizer()
    if path == "concatenated":
        adapters = [read_adapter(source, name) for name, source in find_adapters(folder).items()]
        bank = AdapterBank(linear_layers(model), adapters, dtype=pair_dtype(model))
        return Engine(model, tokenizer, bank, paths="plain")
    budget = 1e-6 if path == "paged" else None
    paths: Setting = path if path in ("columns", "halves", "prepacked") else "stacked"  # type: ignore[assignment]
    engine = dlp_lora.load(model, tokenizer=tokenizer, adapters=folder, budget_mb=budget, paths=paths)
    if path == "compiled":
        engine.compile(max_rank=16, backend="eager", fullgraph=True)
    return engine


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="module", params=list(PATHS))
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(path: str, dtype: torch.dtype, folder: Path) -> Engine:
    return engine_on(path, folder, dtype)


@pytest.fixture
def forward(path: str) -> Callable[..., Tensor]:
    @torch.no_grad()
    def run(engine: Engine, mixture: Mapping[str, float], ids: Tensor = IDS) -> Tensor:
        return PATHS[path](engine, mixture, ids)

    return run


def base(dtype: torch.dtype) -> PreTrainedModel:
    """The base with the weights that a model of this precision has, in float32."""
    return tiny_model(dtype=dtype).float()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(ids).logits
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-2


@pytest.mark.parametrize("name", ["usual", "all", "late"])
def test_one_adapter_at_weight_1_is_pefts_own_forward(
    engine: Engine, forward: Callable[..., Tensor], dtype: torch.dtype, folder: Path, name: str
) -> None:
    wanted = logits(PeftModel.from_pretrained(copy.deepcopy(base(dtype)), folder / name))
    assert error(forward(engine, {name: 1.0}), wanted) < tolerance(dtype)
    assert error(wanted, logits(base(dtype))) > 5e-3  # the adapter is no trifle


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_a_mixture_is_the_weighted_sum_of_the_deltas(
    engine: Engine, forward: Callable[..., Tensor], dtype: torch.dtype, folder: Path, mixture: dict[str, float]
) -> None:
    wanted = logits(reference.with_mixture(base(dtype), mixture, find_adapters(folder)))
    assert error(forward(engine, mixture), wanted) < tolerance(dtype)


def test_many_rows_are_computed_as_few(
    engine: Engine, forward: Callable[..., Tensor], dtype: torch.dtype, folder: Path
) -> None:
    ids = torch.arange(3, 75).reshape(3, 24) * 7 % 256
    ids = ids[:, :15] if engine.is_compiled else ids  # as long as its cache
    assert ids.numel() > FEW_ROWS
    mixture = MIXTURES[2]
    wanted = logits(reference.with_mixture(base(dtype), mixture, find_adapters(folder)), ids)
    assert error(forward(engine, mixture, ids), wanted) < tolerance(dtype)


def test_disabled_is_the_base_bit_for_bit(engine: Engine, forward: Callable[..., Tensor], dtype: torch.dtype) -> None:
    plain = logits(tiny_model(dtype=dtype))
    for mixture in MIXTURES:
        forward(engine, mixture)
        with engine.disabled():
            assert torch.equal(logits(engine.model), plain)


def test_a_switch_leaves_no_trace(engine: Engine, forward: Callable[..., Tensor]) -> None:
    first = [forward(engine, mixture) for mixture in MIXTURES]
    for mixture, before in reversed(list(zip(MIXTURES, first, strict=True))):
        assert torch.equal(forward(engine, mixture), before)


def test_rows_do_not_touch_each_other(engine: Engine, forward: Callable[..., Tensor], dtype: torch.dtype) -> None:
    for mixture in MIXTURES[:2]:
        together = forward(engine, mixture)
        for i, row in enumerate(together):
            assert error(forward(engine, mixture, IDS[i : i + 1])[0], row) < tolerance(dtype)


def test_detaching_gives_the_base_back_bit_for_bit(
    path: str, forward: Callable[..., Tensor], dtype: torch.dtype, folder: Path
) -> None:
    engine, untouched = engine_on(path, folder, dtype), tiny_model(dtype=dtype)
    for mixture in MIXTURES:
        forward(engine, mixture)
    model = engine.detach()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
    for name, parameter in untouched.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    assert torch.equal(logits(model), logits(untouched))


def test_what_is_paged_is_no_longer_in_memory(folder: Path) -> None:
    engine = engine_on("paged", folder, torch.float32)
    for mixture in MIXTURES:
        fixed(engine, mixture, IDS)
        assert set(engine.bank.store.loaded) == set(mixture)
    assert engine.bank.store.num_misses == 2 + 1 + 2 + 0  # what the next mixture needs stays


class TestPrepacked:
    def test_every_product_with_base_weights_is_prepacked_unless_disabled(self, folder: Path) -> None:
        engine = engine_on("prepacked", folder, torch.bfloat16)
        config = engine.model.config
        for mixture in ({"late": 1.0}, OTHER):
            with engine.fixed(mixture):
                # q, k, v; o; gate, up; down
                assert num_products(engine.model) == 4 * config.num_hidden_layers + 1
        with engine.disabled():
            assert num_products(engine.model) == 0
        with engine.merged(OTHER):
            assert num_products(engine.model) == 0  # the base weights are other ones now

    def test_where_gradients_are_asked_for_the_base_layers_are_called(self, folder: Path) -> None:
        engine = engine_on("prepacked", folder, torch.float32)
        with engine.fixed(OTHER):
            loss = engine.model(IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in engine.model.parameters())

    def test_the_weights_are_held_once_more_until_they_are_detached(self, folder: Path) -> None:
        engine = engine_on("prepacked", folder, torch.bfloat16)
        held = sum(group.prepacked_nbytes for group in engine.bank.groups)
        assert held == sum(m.weight.nbytes for m in tiny_model(dtype=torch.bfloat16).modules() if is_plain(m))
        engine.detach()
        assert not any(group.prepacked_nbytes for group in engine.bank.groups)

    def test_loaded_weights_are_laid_out_anew(self, folder: Path) -> None:
        engine, other = engine_on("prepacked", folder, torch.bfloat16), tiny_model(seed=1, dtype=torch.bfloat16)
        wanted = dlp_lora.load(tiny_model(seed=1, dtype=torch.bfloat16), tokenizer=byte_tokenizer(), adapters=folder)
        with engine.fixed(OTHER), wanted.fixed(OTHER):
            before = logits(engine.model)
            assert torch.equal(logits(engine.model), before)
            with torch.no_grad():
                for name, parameter in engine.model.named_parameters():
                    parameter.copy_(other.get_parameter(name.replace(".base_layer", "")))
            assert error(logits(engine.model), logits(wanted.model)) < tolerance(torch.bfloat16)
            assert error(logits(engine.model), before) > 0.1

    @pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma"])
    def test_biases_and_tied_heads(self, architecture: str, tmp_path: Path) -> None:
        # GPT-2's c_attn stores its weight the other way round and is left as it is.
        targets = ["c_attn", "lm_head"] if architecture == "gpt2" else ["q_proj", "down_proj"]
        make_adapter(tiny_model(architecture), tmp_path / "one", seed=1, scale=0.05, target_modules=targets)
        found, wanted = (
            dlp_lora.load(tiny_model(architecture), tokenizer=byte_tokenizer(), adapters=tmp_path, prepack=prepack)
            for prepack in (True, False)
        )
        with found.fixed({"one": 1.0}), wanted.fixed({"one": 1.0}):
            assert num_products(found.model) > 0
            torch.testing.assert_close(logits(found.model), logits(wanted.model), rtol=1e-4, atol=1e-4)
        with found.disabled():
            assert torch.equal(logits(found.model), logits(tiny_model(architecture)))

    def test_an_adapter_added_later_is_computed_as_from_the_start(self, folder: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model(), tmp_path / "late", seed=5, scale=0.05)
        late = dlp_lora.load(tiny_model(), tokenizer=byte_tokenizer(), adapters=tmp_path, prepack=True)
        late.add_adapter(folder / "all")
        engine = engine_on("prepacked", folder, torch.float32)
        with late.fixed({"all": 0.7}), engine.fixed({"all": 0.7}):
            assert torch.equal(logits(late.model), logits(engine.model))

    def test_compiled_steps_compute_with_the_stacked_weights(self, folder: Path) -> None:
        engine = engine_on("prepacked", folder, torch.float32)
        engine.compile(max_rank=16, backend="eager", fullgraph=True)
        wanted = compiled(engine_on("compiled", folder, torch.float32), OTHER, IDS)
        torch.testing.assert_close(compiled(engine, OTHER, IDS), wanted, rtol=1e-4, atol=1e-4)

    def test_what_cannot_be_prepacked_is_refused(self, folder: Path) -> None:
        with pytest.raises(ModelError, match=r"cannot prepack float64 weights on this CPU: .*; leave prepack out"):
            engine_on("prepacked", folder, torch.float64)
        with pytest.raises(ModelError, match="prepack is for models on a CPU, and this one is on meta"):
            check_prepacking(torch.empty(1, device="meta"))
        model = tiny_model()
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
        with pytest.raises(ModelError, match="no layer of LlamaForCausalLM can be prepacked"):
            dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=folder, prepack=True)
        assert not any(isinstance(module, FusedLinear) for module in model.modules())


def num_products(model: torch.nn.Module) -> int:
    """How many products with prepacked weights a pass takes."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(IDS)
    return sum(event.name == "mkldnn::_linear_pointwise" for event in profiler.events())


def test_a_quantised_base_is_not_merged_into(folder: Path) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no kernels for int8")
    model = quantization.quantize_dynamic(tiny_model(), {torch.nn.Linear}, dtype=torch.qint8)
    engine = dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=folder)
    with pytest.raises(ModelError, match="is quantised, offloaded or shares its weight"), engine.merged(MIXTURES[0]):
        pass


def test_a_quantised_base_is_called_and_the_pair_added(folder: Path) -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no kernels for int8")
    model = quantization.quantize_dynamic(tiny_model(), {torch.nn.Linear}, dtype=torch.qint8)
    unfused, mixtures = copy.deepcopy(model), [MIXTURES[2], {}, MIXTURES[3]]
    adapters = {name: read_adapter(source, name) for name, source in find_adapters(folder).items()}
    bank = AdapterBank(linear_layers(model), adapters.values(), siblings=siblings(model))
    attach(model, bank)
    assert not any(group.is_stacked for group in bank.groups)
    for ids in (IDS, IDS.repeat(1, 3)):
        wanted = torch.cat([logits(unmerged(unfused, adapters, m), ids[i : i + 1]) for i, m in enumerate(mixtures)])
        bank.fuse([Mixture(m) for m in mixtures])
        found = torch.cat([logits(model, ids)])
        # Each batch has a scale of its own for its activations, so rows are compared as coarsely.
        assert error(found, wanted) < 3e-2
        bank.fuse([Mixture(mixtures[0])])
        assert error(logits(model, ids), logits(unmerged(unfused, adapters, mixtures[0]), ids)) < 1e-5
    detach(model)
    assert torch.equal(logits(model), logits(unfused))


def unmerged(model: PreTrainedModel, adapters: Mapping[str, Adapter], mixture: Mapping[str, float]) -> PreTrainedModel:
    """A model to whose layers' outputs the adapters' are added one by one."""
    changed = copy.deepcopy(model)

    def adding(loras: Sequence[tuple[float, LoraWeights]]) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return y + sum(weight * lora.scaling * (args[0] @ lora.a.T @ lora.b.T) for weight, lora in loras)

        return add

    for name, module in changed.named_modules():
        loras = [(w, adapters[a].modules[name]) for a, w in mixture.items() if name in adapters[a].modules]
        if loras:
            module.register_forward_hook(adding(loras))
    return changed


class TestMerged:
    def test_weights_come_back_bit_for_bit_even_after_an_error(self, folder: Path) -> None:
        engine = engine_on("merged", folder, torch.bfloat16)
        before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
        places = [p.data_ptr() for p in engine.model.parameters()]

        def fail() -> None:
            changed = [name for name, p in engine.model.named_parameters() if not torch.equal(p, before[name])]
            assert any("down_proj" in name for name in changed)
            raise KeyError

        with pytest.raises(KeyError), engine.merged({"all": 0.3, "late": 9.0}):
            fail()
        assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())
        assert [p.data_ptr() for p in engine.model.parameters()] == places

    def test_an_answer_and_its_trace_are_those_of_fixed(self, folder: Path) -> None:
        engine = engine_on("merged", folder, torch.float32)
        with engine.fixed(OTHER):
            wanted = engine.generate("Why?", max_new_tokens=12, do_sample=False)
        with engine.merged(OTHER):
            found = engine.generate("Why?", max_new_tokens=12, do_sample=False)
        assert found.tokens == wanted.tokens
        assert [s.mixture for s in found.trace] == [Mixture(OTHER)] * len(found.trace)

    def test_no_other_mixture_is_fixed_meanwhile(self, folder: Path) -> None:
        engine = engine_on("merged", folder, torch.float32)
        with (
            engine.merged(OTHER),
            pytest.raises(ValueError, match=r"the base weights hold another mixture; leave engine\.merged\(\) first"),
            engine.disabled(),
        ):
            pass

    @pytest.mark.filterwarnings("ignore")
    def test_a_tied_head_is_refused(self, tmp_path: Path) -> None:
        model = tiny_model("gemma")
        make_adapter(model, tmp_path / "head", seed=1, target_modules=["q_proj", "lm_head"])
        engine = dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=tmp_path)
        with (
            pytest.raises(ModelError, match="lm_head is quantised, offloaded or shares its weight"),
            engine.merged({"head": 1.0}),
        ):
            pass
        with engine.disabled():
            assert torch.equal(logits(model), logits(tiny_model("gemma")))

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out")
    def test_a_layer_that_stores_its_weight_the_other_way_round_is_merged(self, tmp_path: Path) -> None:
        model = tiny_model("gpt2")
        make_adapter(model, tmp_path / "it", seed=1, target_modules=["c_attn"], fan_in_fan_out=True)
        engine = dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=tmp_path)
        with engine.merged({"it": 0.7}):
            found = logits(model)
        wanted = logits(reference.with_mixture(tiny_model("gpt2"), {"it": 0.7}, find_adapters(tmp_path)))
        assert error(found, wanted) < 1e-5


SMAPS = Path("/proc/self/smaps")


@pytest.mark.skipif(
    not (SMAPS.is_file() and Path("/sys/kernel/mm/transparent_hugepage").is_dir()),
    reason="only Linux has huge pages that a process can ask for, and lists them in /proc",
)
def test_large_stacked_weights_ask_for_huge_pages() -> None:
    layers = [torch.nn.Linear(1024, 1024) for _ in range(2)]
    before = [layer.weight.detach().clone() for layer in layers]
    group = Group([["0.q_proj", "1.q_proj"]], 1024, [1024], dtype=torch.float32, device=torch.device("cpu"))
    group.reserve(8, [8])
    group.stack([layers])
    assert all("hg" in flags_of(layer.weight) for layer in layers)
    assert all(map(torch.equal, before, [layer.weight for layer in layers]))


def flags_of(tensor: torch.Tensor) -> list[str]:
    """The kernel's flags of the memory in the middle of a tensor."""
    middle, is_there = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= middle < int(found[2], 16)
        elif is_there and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("the memory is not listed")
