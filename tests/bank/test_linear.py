import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

import dlp_lora.bank.bank as bank_module
import reference
from conftest import ARCHITECTURES, USUAL_TARGETS, make_adapter, tiny_model
from dlp_lora.bank.attach import attach, detach, linear_layers, merged, siblings
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.cpu import product
from dlp_lora.bank.group import ALIGNMENT
from dlp_lora.bank.linear import FusedLinear, add_product
from dlp_lora.bank.paths import FEW_ROWS, Setting, Way
from dlp_lora.bank.peft_format import read_adapter
from dlp_lora.errors import AdapterError, ModelError
from dlp_lora.policy import Mixture

IDS = torch.arange(3, 27).reshape(3, 8) * 7 % 256
WEIGHTS = "adapter_model.safetensors"
PATH = "siblings stacked"


@pytest.fixture(params=["siblings stacked", "each stacked", "concatenated"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every claim of this file holds on each of the ways to compute a fused layer."""
    monkeypatch.setattr(sys.modules[__name__], "PATH", request.param)
    return str(request.param)


def paths_of(path: str) -> Setting:
    return "plain" if path == "concatenated" else "stacked"


@contextmanager
def fused(model: PreTrainedModel, folders: Mapping[str, Path]) -> Iterator[AdapterBank]:
    """Attaches adapters to a model for a while."""
    adapters = [read_adapter(folder, name) for name, folder in folders.items()]
    bank = AdapterBank(
        linear_layers(model),
        adapters,
        siblings=siblings(model) if PATH == "siblings stacked" else (),
        dtype=model.dtype,
    )
    attach(model, bank, paths=paths_of(PATH))
    try:
        yield bank
    finally:
        detach(model)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    found: Tensor = model(ids, **kwargs).logits
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the scale of what is wanted."""
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def all_linear(architecture: str) -> list[str]:
    names = {name.rpartition(".")[2] for name in linear_layers(tiny_model(architecture))}
    return sorted(names - {"lm_head"})


# One adapter is what PEFT makes of it


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 8, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {r"\w+\.1\..+": 7}, "alpha_pattern": {r"\w+\.0\..+": 3, r".*": 11}},
    "rslora-patterns": {"r": 4, "use_rslora": True, "rank_pattern": {r"\w+\.0\..+": 2}, "alpha_pattern": {r".*": 5}},
    "one-layer": {"r": 4, "lora_alpha": 16, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("targets", ["usual", "all-linear"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_one_adapter_at_weight_1_is_pefts_own_forward(
    architecture: str, targets: str, setting: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    names = USUAL_TARGETS[architecture] if targets == "usual" else all_linear(architecture)
    folder = make_adapter(model, tmp_path / "it", seed=1, scale=0.05, target_modules=names, **SETTINGS[setting])
    plain = logits(model)
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(model), folder))
    with fused(model, {"it": folder}) as bank:
        bank.fuse([Mixture({"it": 1.0})])
        assert error(logits(model), theirs) < 1e-5
    assert error(theirs, plain) > 5e-3  # the adapter is no trifle

    # bf16 against the same bf16 weights, computed in fp32.
    model = model.bfloat16()
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(model).float(), folder))
    with fused(model, {"it": folder}) as bank:
        bank.fuse([Mixture({"it": 1.0})])
        assert error(logits(model), theirs) < 1e-2


def test_one_adapter_generates_the_tokens_that_peft_generates(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "it", seed=1, scale=0.5, target_modules="all-linear")
    generate = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = llama.generate(IDS, **generate)
    theirs = PeftModel.from_pretrained(copy.deepcopy(llama), folder).generate(input_ids=IDS, **generate)
    with fused(llama, {"it": folder}) as bank:
        bank.fuse([Mixture({"it": 1.0})])
        assert torch.equal(llama.generate(IDS, **generate), theirs)
    assert not torch.equal(plain, theirs)


# A mixture is the weighted sum of the deltas


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    """An architecture, and three adapters for it of different ranks, scalings and target modules."""
    architecture: str = request.param
    model, root = tiny_model(architecture), tmp_path_factory.mktemp(architecture)
    names = all_linear(architecture)
    folders = {
        "usual": make_adapter(model, root / "usual", seed=1, scale=0.05, target_modules=USUAL_TARGETS[architecture]),
        "all": make_adapter(
            model, root / "all", seed=2, scale=0.05, target_modules=names, r=3, use_rslora=True, lora_alpha=2
        ),
        "late": make_adapter(
            model,
            root / "late",
            seed=3,
            scale=0.05,
            target_modules=names[-2:],
            r=6,
            rank_pattern={names[-1]: 2},
            layers_to_transform=[1],
        ),
    }
    return architecture, folders


MIXTURES = [
    {"usual": 0.505, "all": 0.495},
    {"usual": 0.2, "all": 0.3, "late": 0.5},
    {"late": 1.0},
    {"usual": -0.8, "all": 1.7},
    {"usual": 0.9, "all": 0.8, "late": -1.4},
    {"usual": 1e-3, "late": 0.0},
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_mixture_is_the_base_with_the_weighted_sum_of_the_deltas(bench: tuple[str, dict[str, Path]]) -> None:
    architecture, folders = bench
    model = tiny_model(architecture)
    coarse = tiny_model(architecture, dtype=torch.bfloat16)
    with fused(model, folders) as bank, fused(coarse, folders) as coarse_bank:
        for mixture in MIXTURES:
            bank.fuse([Mixture(mixture)])
            wanted = logits(reference.with_mixture(tiny_model(architecture), mixture, folders))
            assert error(logits(model), wanted) < 1e-5
            coarse_bank.fuse([Mixture(mixture)])
            rounded = tiny_model(architecture, dtype=torch.bfloat16).float()
            wanted = logits(reference.with_mixture(rounded, mixture, folders))
            assert error(logits(coarse), wanted) < 1e-2


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_rows_of_different_mixtures_equal_each_row_alone(bench: tuple[str, dict[str, Path]]) -> None:
    architecture, folders = bench
    model = tiny_model(architecture)
    base = logits(model)
    rows = [Mixture({"usual": 0.3, "late": 0.7}), Mixture(), Mixture({"all": -1.2, "usual": 0.5})]
    with fused(model, folders) as bank:
        bank.fuse(rows)
        together = logits(model)
        last = logits(model, logits_to_keep=1)
        for i, row in enumerate(rows):
            bank.fuse([row])
            alone = logits(model, IDS[i : i + 1])
            assert error(together[i : i + 1], alone) < 1e-5
            assert error(last[i : i + 1], alone[:, -1:]) < 1e-5
            wanted = logits(reference.with_mixture(tiny_model(architecture), row, folders), IDS[i : i + 1])
            assert error(together[i : i + 1], wanted) < 1e-5
    assert error(together[1], base[1]) < 1e-5
    assert error(together[0], base[0]) > 5e-3
    assert error(together[2], base[2]) > 5e-3


def test_adapters_of_different_precision_than_the_model_are_converted(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "it", seed=1, scale=0.3)
    half = {key: tensor.half() for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / WEIGHTS)
    wanted = logits(reference.with_mixture(llama, {"it": 0.5}, {"it": folder}))
    with fused(llama, {"it": folder}) as bank:
        bank.fuse([Mixture({"it": 0.5})])
        assert logits(llama).dtype == torch.float32
        assert error(logits(llama), wanted) < 1e-5


# Attaching, detaching, doing nothing


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """What must be the same after detaching: the very modules and parameters, the keys, the bits of the weights."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "keys": list(model.state_dict()),
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "weights": {name: p.detach().float().numpy().tobytes() for name, p in model.named_parameters()},
        "own storage": {name: p.untyped_storage().nbytes() == p.nbytes for name, p in model.named_parameters()},
    }


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_detaching_gives_the_very_same_model_back(bench: tuple[str, dict[str, Path]]) -> None:
    architecture, folders = bench
    model = tiny_model(architecture)
    before, plain = snapshot(model), logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with fused(model, folders) as bank:
        assert any(isinstance(module, FusedLinear) for module in model.modules())
        bank.fuse([Mixture({"usual": 1.0, "all": -3.0})])
        assert not torch.equal(logits(model), plain)
    assert snapshot(model) == before
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    detach(model)  # nothing is attached any more: nothing happens
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_model_with_adapters_is_saved_and_loaded_as_the_base(
    bench: tuple[str, dict[str, Path]], tmp_path: Path
) -> None:
    architecture, folders = bench
    model, other = tiny_model(architecture), tiny_model(architecture, seed=9)
    plain, keys, weights = logits(model), list(model.state_dict()), other.state_dict()
    with fused(model, folders):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()), plain)
        model.load_state_dict(weights)
    assert torch.equal(logits(model), logits(other))


def test_a_merged_mixture_is_saved_as_an_ordinary_checkpoint(
    llama: PreTrainedModel, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    name = next(iter(adapters))
    wanted = logits(reference.with_mixture(llama, {name: 0.5}, adapters))
    with fused(llama, adapters) as bank, merged(llama, bank, Mixture({name: 0.5})):
        llama.save_pretrained(tmp_path / "merged")
    assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_with_nothing_fused_the_model_is_the_base_bit_for_bit(
    bench: tuple[str, dict[str, Path]], dtype: torch.dtype
) -> None:
    architecture, folders = bench
    model = tiny_model(architecture, dtype=dtype)
    plain = logits(model)
    with fused(model, folders) as bank:
        assert torch.equal(logits(model), plain)
        bank.fuse([Mixture({"all": 1.0}), Mixture({"usual": 1.0}), Mixture()])
        assert not torch.equal(logits(model), plain)
        bank.clear()
        assert torch.equal(logits(model), plain)
        bank.fuse([Mixture(), Mixture(), Mixture()])
        assert torch.equal(logits(model), plain)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_deep_copy_is_the_base_with_weights_of_its_own(bench: tuple[str, dict[str, Path]]) -> None:
    architecture, folders = bench
    model = tiny_model(architecture)
    plain, keys = logits(model), list(model.state_dict())
    with fused(model, folders) as bank:
        bank.fuse([Mixture({"all": 1.0})])
        before = logits(model)
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied), plain)
        assert list(copied.state_dict()) == keys
        assert not any(isinstance(module, FusedLinear) for module in copied.modules())
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in copied.parameters())
        for parameter in copied.parameters():
            parameter.data.zero_()
        assert torch.equal(logits(model), before)
        assert not logits(copied).any()
        layer = next(module for module in model.modules() if isinstance(module, FusedLinear))
        alone = copy.deepcopy(layer)
        assert type(alone) is type(layer.base_layer)
        assert torch.equal(alone.weight, layer.weight)
        alone.weight.data.zero_()
    assert torch.equal(logits(model), plain)


def misaligned(parameter: torch.nn.Parameter, num_bytes: int) -> None:
    """Moves a weight to where one may begin that was read from a file."""
    skipped = num_bytes // parameter.itemsize
    flat = parameter.data.new_empty(parameter.numel() + skipped)
    parameter.data = flat[skipped:].view(parameter.shape).copy_(parameter.data)


@pytest.mark.parametrize("num_bytes", [4, 8, 12])
@pytest.mark.parametrize("others", [0, 4])
def test_weights_keep_the_alignment_on_which_the_rounding_of_a_product_hangs(
    llama: PreTrainedModel, adapters: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, num_bytes: int, others: int
) -> None:
    monkeypatch.setattr(bank_module, "START_CAPACITY", 3)
    model = copy.deepcopy(llama)
    for name, parameter in model.named_parameters():
        misaligned(parameter, others if "k_proj" in name else num_bytes)
    before = {name: p.data_ptr() % ALIGNMENT for name, p in model.named_parameters()}
    expected = logits(model, IDS[:1, :1])

    def found() -> dict[str, int]:
        names = {p.data_ptr(): name.replace(".base_layer", "") for name, p in model.named_parameters()}
        return {name: place % ALIGNMENT for place, name in names.items()}

    with fused(model, adapters) as bank:
        assert found() == before
        for names in ("poems", "math", "math units poems"):  # the buffers grow
            bank.fuse([Mixture(dict.fromkeys(names.split(), 0.5))])
            assert not torch.equal(logits(model, IDS[:1, :1]), expected)
            bank.clear()
            assert torch.equal(logits(model, IDS[:1, :1]), expected)
            assert found() == before
    assert found() == before
    assert torch.equal(logits(model, IDS[:1, :1]), expected)


@pytest.mark.parametrize("paths", ["stacked", "columns"])
def test_only_layers_that_gain_by_it_are_replaced(
    llama: PreTrainedModel, tmp_path: Path, path: str, paths: Setting
) -> None:
    folder = make_adapter(llama, tmp_path / "it", seed=1, target_modules=["q_proj", "down_proj"])
    adapters, siblings_of = [read_adapter(folder, "it")], siblings(llama) if path == "siblings stacked" else ()
    everything = set(linear_layers(llama))
    bank = AdapterBank(linear_layers(llama), adapters, siblings=siblings_of)
    attach(llama, bank, paths="plain" if path == "concatenated" else paths)
    replaced = {name for name, module in llama.named_modules() if isinstance(module, FusedLinear)}
    names = {"self_attn.q_proj", "mlp.down_proj"}
    if path == "siblings stacked":
        names |= {"self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"}
    expected = {f"model.layers.{i}.{name}" for i in (0, 1) for name in names}
    assert replaced == (everything if paths == "columns" and path != "concatenated" else expected)


def test_a_fused_layer_shows_its_base_layers_weight_and_bias(tmp_path: Path) -> None:
    model = tiny_model("qwen2")  # q_proj has a bias there, o_proj has none
    folder = make_adapter(model, tmp_path / "it", seed=1, target_modules=["q_proj", "o_proj"])
    attention = model.model.layers[0].self_attn
    q, o = attention.q_proj, attention.o_proj
    with fused(model, {"it": folder}):
        assert attention.q_proj.weight is q.weight
        assert attention.q_proj.bias is q.bias
        assert attention.o_proj.bias is None
        assert attention.o_proj.base_layer is o


def test_a_head_is_tied_to_the_embeddings_again_as_lm_eval_does(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "it", seed=1, target_modules=["q_proj"])
    llama.config.tie_word_embeddings = True
    model = type(llama)(llama.config).eval()
    bank = AdapterBank(linear_layers(model), [read_adapter(folder, "it")])
    before = logits(model)
    attach(model, bank, paths="columns")
    model.tie_weights()
    assert isinstance(model.lm_head, FusedLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), before)
    detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_added_at_run_time_needs_only_another_attach(llama: PreTrainedModel, tmp_path: Path) -> None:
    first = make_adapter(llama, tmp_path / "first", seed=1, scale=0.3, target_modules=["q_proj"])
    second = make_adapter(llama, tmp_path / "second", seed=2, scale=0.3, target_modules=["v_proj", "up_proj"], r=9)
    folders, mixture = {"first": first, "second": second}, {"first": 0.4, "second": 0.6}
    wanted = logits(reference.with_mixture(llama, mixture, folders))
    before = snapshot(llama)
    with fused(llama, {"first": first}) as bank:
        bank.fuse([Mixture({"first": 1.0})])
        logits(llama)
        bank.add(read_adapter(second))
        attach(llama, bank, paths=paths_of(PATH))
        bank.fuse([Mixture(mixture)])
        assert error(logits(llama), wanted) < 1e-5
        assert not any(isinstance(m.base_layer, FusedLinear) for m in llama.modules() if isinstance(m, FusedLinear))
        bank.remove("second")
        bank.fuse([Mixture({"first": 1.0})])
        assert error(logits(llama), logits(reference.with_mixture(tiny_model(), {"first": 1.0}, folders))) < 1e-5
    assert snapshot(llama) == before


def test_a_thousand_switches_reach_the_layers_and_leave_the_buffers_in_place(
    llama: PreTrainedModel, adapters: Mapping[str, Path]
) -> None:
    wanted = logits(reference.with_mixture(llama, {"math": 0.999, "poems": 0.001}, adapters))
    with fused(llama, adapters) as bank:
        before = [(g._a.data_ptr(), g._b[0].data_ptr(), g.num_allocations) for g in bank.groups]
        for i in range(1000):
            bank.fuse([Mixture({"math": i / 1000, "poems" if i % 2 else "units": (1000 - i) / 1000})])
        assert [(g._a.data_ptr(), g._b[0].data_ptr(), g.num_allocations) for g in bank.groups] == before
        assert error(logits(llama), wanted) < 1e-5


# Stacked under the base weights


def test_stacking_holds_no_weight_twice(llama: PreTrainedModel, tmp_path: Path, path: str) -> None:
    folder = make_adapter(llama, tmp_path / "it", seed=1, r=4, target_modules=["q_proj", "v_proj"])
    with fused(llama, {"it": folder}) as bank:
        assert all(group.is_stacked == (path != "concatenated") for group in bank.touched())
        stacked = [group.buffers()[0].untyped_storage() for group in bank.touched() if group.is_stacked]
        inside = [
            p
            for p in llama.parameters()
            if any(s.data_ptr() <= p.data_ptr() < s.data_ptr() + s.nbytes() for s in stacked)
        ]
        assert len(inside) == {"siblings stacked": 6, "each stacked": 4, "concatenated": 0}[path]
        # Beside the weights: two layers, rank 4 for q and v, 32 inputs, 4 bytes each.
        beside = sum(s.nbytes() for s in stacked) - sum(p.nbytes for p in inside)
        assert beside == (0 if path == "concatenated" else 2 * (4 + 4) * 32 * 4)


def test_a_mixture_that_outgrows_the_buffers_leaves_the_base_weights_as_they_are(
    llama: PreTrainedModel, adapters: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "START_CAPACITY", 3)
    plain, before = logits(llama), snapshot(llama)
    mixture = {"math": 0.5, "units": 0.3, "poems": 0.2}
    wanted = logits(reference.with_mixture(llama, mixture, adapters))
    with fused(llama, adapters) as bank:
        bank.fuse([Mixture({"poems": 1.0})])
        logits(llama)
        bank.fuse([Mixture(mixture)])
        assert error(logits(llama), wanted) < 1e-5
        bank.clear()
        assert torch.equal(logits(llama), plain)
    assert snapshot(llama) == before


def test_loaded_weights_reach_a_stacked_layer(llama: PreTrainedModel, adapters: Mapping[str, Path]) -> None:
    other = tiny_model(seed=1)
    wanted = logits(reference.with_mixture(other, {"math": 1.0}, adapters))
    with fused(llama, adapters) as bank:
        bank.fuse([Mixture({"math": 1.0})])
        with torch.no_grad():
            for name, parameter in llama.named_parameters():
                parameter.copy_(other.get_parameter(name.replace(".base_layer", "")))
        assert error(logits(llama), wanted) < 1e-5


def test_siblings_are_computed_in_one_product(llama: PreTrainedModel, tmp_path: Path, path: str) -> None:
    folder = make_adapter(llama, tmp_path / "it", seed=1, target_modules=["q_proj", "v_proj"])
    with fused(llama, {"it": folder}) as bank:
        bank.fuse([Mixture({"it": 1.0})])
        with torch.profiler.profile() as profile:
            logits(llama)
    products = sum(e.count for e in profile.key_averages() if e.key in ("aten::addmm", "aten::addmm_", "aten::mm"))
    # Two layers of q, k, v, o, gate, up and down, the head, and a second product for q and for v.
    counts = {
        "siblings stacked": 2 * 4 + 1 + 2 * 2,
        "each stacked": 2 * 7 + 1 + 2 * 2,
        "concatenated": 2 * 7 + 1 + 2 * 4,
    }
    assert products == counts[path]


def test_siblings_called_in_another_order_are_the_same(llama: PreTrainedModel, adapters: Mapping[str, Path]) -> None:
    attention, x = llama.model.layers[0].self_attn, torch.randn(2, 3, 32)
    with fused(llama, adapters) as bank, torch.no_grad():
        bank.fuse([Mixture({"math": 1.0}), Mixture({"poems": 1.0})])
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        assert torch.equal(attention.v_proj(x), v)
        assert torch.equal(attention.k_proj(x), k)
        assert torch.equal(attention.q_proj(x), q)
        assert not torch.allclose(attention.q_proj(x * 2), q)


# lm_head


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_lm_head_is_fused_and_leaves_a_tied_embedding_alone(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    targets = [*USUAL_TARGETS[architecture], "lm_head"]
    folders = {
        "head": make_adapter(model, tmp_path / "head", seed=1, scale=0.2, target_modules=targets),
        "usual": make_adapter(model, tmp_path / "usual", seed=2, target_modules=USUAL_TARGETS[architecture]),
    }
    assert any("lm_head.base_layer" in key for key in load_file(folders["head"] / WEIGHTS))
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(model), folders["head"]))
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    assert tied == (architecture != "llama")
    before = snapshot(model)
    with fused(model, folders) as bank:
        bank.fuse([Mixture({"head": 1.0})])
        assert error(logits(model), theirs) < 1e-5
        rows = [Mixture({"head": 0.5, "usual": -0.5}), Mixture(), Mixture({"usual": 1.0})]
        bank.fuse(rows)
        for keep in (0, 1):  # 0 keeps all
            together = logits(model, logits_to_keep=keep)
            for i, row in enumerate(rows):
                wanted = logits(reference.with_mixture(tiny_model(architecture), row, folders), IDS[i : i + 1])
                assert error(together[i : i + 1], wanted[:, -keep:]) < 1e-5
    assert snapshot(model) == before
    assert (model.get_output_embeddings().weight is embedding) == tied


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_brings_another_lm_head_along_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = make_adapter(llama, tmp_path / "head", seed=1, target_modules=["lm_head"])
    before = snapshot(llama)
    tensors = load_file(folder / WEIGHTS)
    for change in (lambda t: t + 1e-3, lambda t: t[:-1].contiguous()):
        altered = {key: change(t) if "base_layer" in key else t for key, t in tensors.items()}
        save_file(altered, folder / WEIGHTS)
        with (
            pytest.raises(AdapterError, match=r"head holds a copy of the base model's lm_head\.weight that differs"),
            fused(llama, {"head": folder}),
        ):
            pass
        assert snapshot(llama) == before


# What is refused


def test_attaching_twice_is_refused(llama: PreTrainedModel, adapters: Mapping[str, Path]) -> None:
    with (
        fused(llama, adapters),
        pytest.raises(ModelError, match=r"has fused layers attached already; call detach\(\) on its engine first"),
    ):
        linear_layers(llama)
    assert linear_layers(llama) == linear_layers(tiny_model())


def test_a_model_that_carries_peft_layers_is_refused(llama: PreTrainedModel, adapters: Mapping[str, Path]) -> None:
    plain = logits(llama)
    peft_model = PeftModel.from_pretrained(llama, next(iter(adapters.values())))
    for model in (peft_model, llama):
        with pytest.raises(ModelError, match=r"carries PEFT adapters already.*unload\(\) gives it back"):
            linear_layers(model)
    base = peft_model.unload()
    with fused(base, adapters):
        assert torch.equal(logits(base), plain)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="Embedding has no linear layer to attach to"):
        linear_layers(torch.nn.Embedding(3, 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_layers_are_listed_with_what_they_map(architecture: str) -> None:
    model = tiny_model(architecture)
    layers = linear_layers(model)
    assert layers["lm_head"] == (32, 260)
    for name, (d_in, d_out) in layers.items():
        y = model.get_submodule(name)(torch.zeros(1, 1, d_in))
        assert y.shape == (1, 1, d_out), name


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ("gpt2", "llama", "0 of its 2 modules are linear layers of the base model"),
        ("llama", "phi3", "0 of its 4 modules are linear layers of the base model"),
        ("mistral", "qwen2", None),
    ],
)
def test_an_adapter_of_another_architecture_is_refused_unless_it_fits_exactly(
    theirs: str, ours: str, message: str | None, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_model(theirs), tmp_path / "it", seed=1, target_modules=USUAL_TARGETS[theirs])
    model = tiny_model(ours)
    if message is None:
        with fused(model, {"it": folder}) as bank:
            assert bank.names == ("it",)
    else:
        with pytest.raises(AdapterError, match=rf"it: {message}"), fused(model, {"it": folder}):
            pass


def test_a_base_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = make_adapter(tiny_model("llama"), tmp_path / "it", seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "tiny-llama"}))
    wide = copy.deepcopy(tiny_model("llama"))
    wide.model.layers[1].self_attn.v_proj = torch.nn.Linear(32, 32, bias=False)
    message = r"it: model\.layers\.1\.self_attn\.v_proj maps 32 to 16 features, but the base model's maps 32 to 32"
    with pytest.raises(AdapterError, match=message + r".*another base .tiny-llama."), fused(wide, {"it": folder}):
        pass


def test_gradients_pass_through_a_fused_model(llama: PreTrainedModel, adapters: Mapping[str, Path]) -> None:
    rows: Sequence[Mixture] = [Mixture({"math": 1.0}), Mixture(), Mixture({"poems": 0.5})]
    with fused(llama, adapters) as bank:
        bank.fuse(rows)
        loss = llama(IDS, labels=IDS).loss
        loss.backward()
        inner = llama.get_submodule("model.layers.0.self_attn.q_proj").weight.grad
    assert inner is not None
    assert inner.abs().max() > 0
    gradient = llama.model.embed_tokens.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_a_base_layer_with_hooks_is_called_so_that_offloading_works(llama: PreTrainedModel, tmp_path: Path) -> None:
    calls: list[str] = []
    layer = llama.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(lambda module, inputs: calls.append("q_proj"))
    bank = AdapterBank(linear_layers(llama), [read_adapter(make_adapter(llama, tmp_path / "a", seed=1))])
    calls.clear()
    attach(llama, bank)
    llama(torch.tensor([[1, 2, 3]]))
    assert calls == ["q_proj"]


# Products


@pytest.mark.parametrize("num_rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("way", ["stacked", "columns", "halves"])
def test_a_product_is_that_of_float64_rounded(num_rows: int, dtype: torch.dtype, biased: bool, way: Way) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 48).to(dtype), torch.randn(24, 48).to(dtype)
    bias = torch.randn(24).to(dtype) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    close = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)
    y = product(x, weight, bias, way)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=close, atol=close)

    for wider in {dtype, torch.promote_types(dtype, torch.float32)}:
        h, b = torch.randn(num_rows, 8).to(dtype), torch.randn(8, 24).to(wider)
        summed = y.clone()
        add_product(summed, h, b)
        torch.testing.assert_close(summed.double(), y.double() + h.double() @ b.double(), rtol=close, atol=close)


@pytest.mark.parametrize("paths", ["stacked", "halves"])
def test_layers_without_adapters_take_the_faster_way_too(
    llama: PreTrainedModel, tmp_path: Path, paths: Setting
) -> None:
    folder = make_adapter(llama, tmp_path / "it", seed=1, target_modules=["q_proj", "v_proj"])
    ids, before = torch.tensor([[7]]), snapshot(llama)
    plain, wanted = logits(llama, ids), logits(reference.with_mixture(tiny_model(), {"it": 1.0}, {"it": folder}), ids)
    bank = AdapterBank(linear_layers(llama), [read_adapter(folder, "it")], siblings=siblings(llama))
    attach(llama, bank, paths=paths)
    assert isinstance(llama.lm_head, FusedLinear) == (paths == "halves")
    bank.fuse([Mixture({"it": 1.0})])
    with torch.profiler.profile() as profile:
        assert error(logits(llama, ids), wanted) < 1e-5
    halved = sum(e.count for e in profile.key_averages() if e.key == "aten::bmm")
    assert halved == (2 * 4 + 1 if paths == "halves" else 0)  # two layers of q, k, v; o; gate, up; down; the head
    bank.clear()
    assert torch.equal(logits(llama, ids), plain)
    detach(llama)
    assert snapshot(llama) == before


def test_a_layer_that_is_given_all_rows_tokens_as_one_list_is_gated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=260, word_embed_proj_dim=32, max_position_embeddings=64, **sizes)
    model = OPTForCausalLM(config).eval()
    targets = ["q_proj", "fc1", "fc2"]
    folders = {
        name: make_adapter(model, tmp_path / name, seed=i, scale=0.3, target_modules=targets, r=i)
        for i, name in enumerate("abc", 1)
    }
    mixtures: list[dict[str, float]] = [{"a": 1.0}, {"b": 0.5, "c": -0.5}, {}]
    rows = [logits(reference.with_mixture(model, m, folders), IDS[i : i + 1])[0] for i, m in enumerate(mixtures)]
    ends = torch.stack([row[:3] for row in rows])
    with fused(model, folders) as bank:
        bank.fuse([Mixture(m) for m in mixtures])
        assert error(logits(model), torch.stack(rows)) < 1e-5
        # The same for the first tokens, others behind them.
        tokens = torch.tensor([[i] * 3 + [(i + 1) % 3] * 5 for i in range(3)])
        bank.fuse([Mixture(m) for m in mixtures], tokens)
        assert error(logits(model)[:, :3], ends) < 1e-5


def test_siblings_that_no_adapter_changes_are_one_product_while_something_is_fused(
    llama: PreTrainedModel, tmp_path: Path, path: str
) -> None:
    folder = make_adapter(llama, tmp_path / "it", seed=1, scale=0.3, target_modules=["q_proj"])
    other = make_adapter(llama, tmp_path / "other", seed=2, scale=0.3, target_modules=["gate_proj"])
    folders = {"it": folder, "other": other}
    mixtures = [{"it": 0.4}, {"other": 0.5}, {}]
    wanted = [logits(reference.with_mixture(llama, mixture, folders)).float() for mixture in mixtures]
    with fused(llama, {"it": folder}) as bank:
        bank.fuse([Mixture({"it": 0.4})])
        torch.testing.assert_close(logits(llama), wanted[0], rtol=1e-4, atol=1e-5)
        if path == "siblings stacked":
            group = llama.model.layers[0].mlp.up_proj.group
            assert group.active is not None
            assert group.active.projections is not None
            bank.clear()
            assert group.active is None
        bank.add(read_adapter(other))
        attach(llama, bank)
        for mixture, own in zip(mixtures, wanted, strict=True):
            bank.fuse([Mixture(mixture)])
            torch.testing.assert_close(logits(llama), own, rtol=1e-4, atol=1e-5)
        bank.fuse([Mixture(mixture) for mixture in mixtures])
        of_its_own = torch.stack([own[i] for i, own in enumerate(wanted)])
        torch.testing.assert_close(logits(llama), of_its_own, rtol=1e-4, atol=1e-5)
