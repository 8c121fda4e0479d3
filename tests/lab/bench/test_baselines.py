"""The baselines against plain loops in float64, one token at a time, and against PEFT."""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

import reference
from conftest import make_adapter, tiny_model
from dlp_lora.bank.attach import attach, linear_layers
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import Adapter, read_adapter
from dlp_lora.errors import AdapterError, ModelError
from dlp_lora.lab.bench.baselines import (
    attach_lora_switch,
    attach_meteora,
    attach_mola,
    attach_moral,
    attach_pesc,
    detach,
)
from dlp_lora.lab.bench.baselines.gated import Choice, GatedLinear, TopKGate
from dlp_lora.lab.bench.baselines.lora_switch import SwitchedLinear
from dlp_lora.lab.bench.baselines.pesc import BottleneckExperts

IDS = torch.arange(3, 27).reshape(3, 8) * 7 % 256
ONE = IDS[:1, :1]  # a pass over one token, as in decoding

Attach = Callable[..., PreTrainedModel]
mola = partial(attach_mola, num_experts=(2, 3))
pesc = partial(attach_pesc, width=5)
ON_LORAS: dict[str, Attach] = {
    "meteora": attach_meteora,
    "moral": attach_moral,
    "mola": mola,
    "lora-switch": attach_lora_switch,
}
ALL: dict[str, Attach] = {**ON_LORAS, "pesc": pesc}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of different rank, scaling and targets, which together change what the model says."""
    model, root = tiny_model(), tmp_path_factory.mktemp("adapters")
    return {
        "math": make_adapter(model, root / "math", seed=1),
        "units": make_adapter(model, root / "units", seed=2, r=8, lora_alpha=8, use_rslora=True),
        "poems": make_adapter(model, root / "poems", seed=3, r=2, target_modules="all-linear"),
    }


@pytest.fixture
def adapters(folders: Mapping[str, Path]) -> dict[str, Adapter]:
    return {name: read_adapter(folder, name) for name, folder in folders.items()}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    found: Tensor = model(ids, **kwargs).logits
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the scale of what is wanted."""
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def attached(attach: Attach, adapters: Mapping[str, Adapter], **kwargs: Any) -> PreTrainedModel:
    """A tiny model under a baseline; PESC's experts add something."""
    model = attach(tiny_model(), adapters, **kwargs)
    wake(model)
    return model


def wake(model: nn.Module) -> None:
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, BottleneckExperts):
            nn.init.normal_(module.up, std=5.0)


# Plain loops


def best(gate: Tensor, x: Tensor, top_k: int) -> dict[int, float]:
    """The adapters with the highest scores for one token, and the softmax over these scores."""
    scores = [float(row @ x) for row in gate]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    total = sum(math.exp(scores[i]) for i in order)
    return {i: math.exp(scores[i]) / total for i in order}


class LoopedLinear(nn.Module):
    """A linear layer with adapters, one token at a time; with a gate it chooses, without one it does as it is told."""

    def __init__(self, base: nn.Module, deltas: list[Tensor | None], gate: Tensor | None, told: list[dict[int, float]]):
        super().__init__()
        self.base, self.deltas, self.gate, self.told = base, deltas, gate, told

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x).clone()
        tokens = [(b, s) for b in range(x.shape[0]) for s in range(x.shape[1])]
        if self.gate is not None:
            self.told[:] = [best(self.gate, x[at], 2) for at in tokens]
        for at, choice in zip(tokens, self.told, strict=True):
            for i, weight in choice.items():
                if (delta := self.deltas[i]) is not None:
                    y[at] += weight * (delta @ x[at])
        return y


class LoopedExperts(nn.Module):
    """A feed-forward block with bottleneck experts behind it, one token at a time."""

    def __init__(self, base: nn.Module, gate: Tensor, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base, self.gate, self.down, self.up = base, gate, down, up

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        total = torch.zeros_like(y)
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                for i, weight in best(self.gate, x[b, s], 2).items():
                    hidden = self.down[i] @ y[b, s]
                    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # GELU
                    total[b, s] += weight * (y[b, s] + self.up[i].T @ hidden)
        return total


def looped(model: PreTrainedModel, folders: Mapping[str, Path]) -> nn.Module:
    """A float64 model that does by loops what the baseline attached to `model` does, with the same gates."""
    found = tiny_model().double()
    deltas = [reference.deltas(folder) for folder in folders.values()]
    told: list[dict[int, float]] = []
    for name, module in model.named_modules():
        if isinstance(module, GatedLinear):
            own = [delta.get(name) for delta in deltas]
            gate = module.gate.weight.double()
            found.set_submodule(name, LoopedLinear(found.get_submodule(name), own, gate, []))
        elif isinstance(module, SwitchedLinear):
            own = [delta.get(name) for delta in deltas]
            gate = module.switch.gate.weight.double() if not told and name == first(model) else None
            found.set_submodule(name, LoopedLinear(found.get_submodule(name), own, gate, told))
        elif isinstance(module, BottleneckExperts):
            parts = (module.gate.weight.double(), module.down.double(), module.up.double())
            found.set_submodule(name, LoopedExperts(found.get_submodule(name), *parts))
    return found


def first(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if isinstance(module, SwitchedLinear))


@pytest.mark.parametrize("ids", [IDS, ONE], ids=["batch", "one token"])
@pytest.mark.parametrize("method", ALL)
def test_each_method_is_its_equation_token_by_token(
    method: str, ids: Tensor, adapters: Mapping[str, Adapter], folders: Mapping[str, Path]
) -> None:
    model = attached(ALL[method], adapters)
    wanted = logits(looped(model, folders), ids)
    assert error(logits(model, ids), wanted) < 1e-5
    assert error(logits(tiny_model(), ids), wanted) > 1e-2


def test_the_gate_weighs_the_best_by_a_softmax_over_them_that_sums_to_one() -> None:
    generator = torch.Generator().manual_seed(3)
    gate = TopKGate(16, 7, top_k=3, generator=generator, dtype=torch.float32, device=torch.device("cpu"))
    x = torch.randn(20, 16)
    weights, chosen = gate(x)
    assert torch.allclose(weights.sum(dim=1), torch.ones(20))
    for row, own, wanted in zip(chosen.tolist(), weights.tolist(), x, strict=True):
        expected = best(gate.weight.double(), wanted.double(), 3)
        assert dict(zip(row, own, strict=True)) == pytest.approx(expected, abs=1e-6)


# One adapter is what PEFT makes of it


class Forced(nn.Module):
    """A gate that sends every token to one adapter."""

    def __init__(self, adapter: int) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor) -> Choice:
        return Choice(x.new_ones(len(x), 1), torch.full((len(x), 1), self.adapter))


def force(model: nn.Module, adapter: int) -> None:
    for module in model.modules():
        if isinstance(module, GatedLinear):
            module.gate = Forced(adapter)
        elif isinstance(module, SwitchedLinear):
            module.switch.gate = Forced(adapter)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("method", ON_LORAS)
def test_a_gate_forced_to_one_adapter_gives_what_peft_gives(
    method: str, which: int, adapters: Mapping[str, Adapter], folders: Mapping[str, Path]
) -> None:
    attach = partial(attach_mola, num_experts=(3,)) if method == "mola" else ON_LORAS[method]
    model = attached(attach, adapters, top_k=1)
    force(model, which)
    peft_model = PeftModel.from_pretrained(tiny_model(), list(folders.values())[which]).eval()
    for ids in (IDS, ONE):
        assert error(logits(model, ids), logits(peft_model, ids)) < 1e-5


@pytest.mark.parametrize("method", ON_LORAS)
def test_in_bfloat16_too(method: str, adapters: Mapping[str, Adapter], folders: Mapping[str, Path]) -> None:
    attach = partial(attach_mola, num_experts=(3,)) if method == "mola" else ON_LORAS[method]
    model = attach(tiny_model(dtype=torch.bfloat16), adapters, top_k=1)
    force(model, 1)
    wanted = logits(PeftModel.from_pretrained(tiny_model(), folders["units"]).eval())
    found = logits(model)
    assert found.dtype == torch.bfloat16
    assert error(found, wanted) < 5e-2
    assert error(logits(model, ONE), wanted[:1, :1]) < 5e-2


# What each paper is about


def test_one_choice_of_lora_switch_holds_in_all_layers(adapters: Mapping[str, Adapter]) -> None:
    model = attached(attach_lora_switch, adapters)
    switched = [module for module in model.modules() if isinstance(module, SwitchedLinear)]
    assert len(switched) == 14  # poems changes all linear layers
    assert [module.is_first for module in switched].count(True) == 1
    assert len({id(module.switch) for module in switched}) == 1


@pytest.mark.parametrize("ids", [IDS, ONE], ids=["batch", "one token"])
def test_lora_switch_leaves_the_weights_as_they_were(adapters: Mapping[str, Adapter], ids: Tensor) -> None:
    model, base = attached(attach_lora_switch, adapters), tiny_model()
    before = logits(model, ids)
    for _ in range(3):
        assert torch.equal(logits(model, ids), before)
        for name, weight in base.named_parameters():
            own = name if name in dict(model.named_parameters()) else name.replace(".weight", ".base_layer.weight")
            assert torch.equal(model.get_parameter(own), weight), name


def test_lora_switch_merges_where_there_is_one_token_and_only_there(adapters: Mapping[str, Adapter]) -> None:
    model = attached(attach_lora_switch, adapters)
    layer = model.get_submodule("model.layers.1.self_attn.v_proj")
    assert isinstance(layer, SwitchedLinear)
    logits(model, ONE)
    merged = layer.merged.clone()
    assert not torch.equal(merged, layer.base_layer.weight)
    logits(model, IDS)
    assert torch.equal(layer.merged, merged)
    assert not layer.switch.is_merged


def test_mola_has_more_experts_in_higher_layers(adapters: Mapping[str, Adapter]) -> None:
    model = attached(mola, adapters)
    counts = {name: len(module.a) for name, module in model.named_modules() if isinstance(module, GatedLinear)}
    assert counts == {
        # the lower layer has math and units alone, which change q and v
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.0.self_attn.v_proj": 2,
        **{name: 3 for name in linear_layers(tiny_model()) if ".1." in name},
    }
    assert {len(module.gate.weight) for module in model.modules() if isinstance(module, GatedLinear)} == {2, 3}


def test_mola_divides_the_layers_into_as_many_runs_as_there_are_numbers(tmp_path: Path) -> None:
    model = tiny_model()
    path = make_adapter(model, tmp_path / "one", seed=1)
    eight = {str(i): read_adapter(path, str(i)) for i in range(8)}
    attach_mola(model, eight)  # 2, 4, 6, 8 on two layers
    counts = [len(module.a) for module in model.modules() if isinstance(module, GatedLinear)]
    assert counts == [2, 2, 6, 6]


@pytest.mark.parametrize("ids", [IDS, ONE], ids=["batch", "one token"])
def test_pesc_is_the_base_while_its_up_projections_are_zero(adapters: Mapping[str, Adapter], ids: Tensor) -> None:
    model = pesc(tiny_model(), adapters)
    assert sum(isinstance(module, BottleneckExperts) for module in model.modules()) == 2
    assert torch.equal(logits(model, ids), logits(tiny_model(), ids))


def test_meteora_and_moral_are_one_equation(adapters: Mapping[str, Adapter]) -> None:
    assert error(logits(attached(attach_meteora, adapters)), logits(attached(attach_moral, adapters))) < 1e-5


# What all have in common


@pytest.mark.parametrize("method", ALL)
def test_a_batch_is_its_rows_alone(method: str, adapters: Mapping[str, Adapter]) -> None:
    model = attached(ALL[method], adapters)
    padded = IDS.clone()
    padded[1, :3] = 258
    mask = (padded != 258).long()
    together = logits(model, padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row, ids in enumerate([IDS[:1], IDS[1:2, 3:], IDS[2:]]):
        assert error(together[row : row + 1, -ids.shape[1] :], logits(model, ids)) < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ALL)
def test_generate_with_a_cache_says_what_whole_passes_say(
    method: str, rows: int, adapters: Mapping[str, Adapter]
) -> None:
    model = attached(ALL[method], adapters)
    ids = IDS[:rows]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None)
    for _ in range(6):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALL)
def test_detach_gives_the_base_back(method: str, dtype: torch.dtype, adapters: Mapping[str, Adapter]) -> None:
    model = tiny_model(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    wanted = logits(model), logits(model, ONE)
    ALL[method](model, adapters)
    wake(model)
    changed = logits(model), logits(model, ONE)
    assert detach(model) is model
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert len({weight.untyped_storage().data_ptr() for weight in after.values()}) == len(after)
    for ours, base, ids in zip(changed, wanted, (IDS, ONE), strict=True):
        assert not torch.equal(ours, base)
        assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("method", ALL)
def test_the_seed_says_which_weights_are_drawn(method: str, adapters: Mapping[str, Adapter]) -> None:
    one, same, other = (logits(attached(ALL[method], adapters, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("method", ALL)
def test_a_model_that_carries_something_is_refused(method: str, adapters: Mapping[str, Adapter]) -> None:
    model = attached(attach_meteora, adapters)
    with pytest.raises(ModelError, match="has a baseline attached already"):
        ALL[method](model, adapters)


@pytest.mark.parametrize("method", ON_LORAS)
def test_a_model_under_our_engine_is_refused(method: str, adapters: Mapping[str, Adapter]) -> None:
    model = tiny_model()
    attach(model, AdapterBank(linear_layers(model), adapters.values()))
    with pytest.raises(ModelError, match="fused layers attached already"):
        ON_LORAS[method](model, adapters)


@pytest.mark.parametrize("method", ON_LORAS)
def test_an_adapter_of_another_base_is_refused(method: str, tmp_path: Path, adapters: dict[str, Adapter]) -> None:
    path = make_adapter(tiny_model("gpt2"), tmp_path / "gpt2", seed=1, target_modules=["c_attn"])
    with pytest.raises(AdapterError, match="trained on another architecture"):
        ON_LORAS[method](tiny_model(), {**adapters, "gpt2": read_adapter(path)})


@pytest.mark.parametrize("method", ALL)
def test_wrong_numbers_are_refused(method: str, adapters: Mapping[str, Adapter]) -> None:
    model = tiny_model()
    modules, weights = dict(model.named_modules()), {weight.data_ptr() for weight in model.parameters()}
    with pytest.raises(ValueError, match="top_k=4 of"):
        ALL[method](model, adapters, top_k=4)
    assert dict(model.named_modules()) == modules
    assert {weight.data_ptr() for weight in model.parameters()} == weights
    with pytest.raises(ValueError, match=r"no adapters to choose from|asks for 3 adapters"):
        ALL[method](tiny_model(), {})


def test_mola_and_pesc_say_what_they_miss(tmp_path: Path, adapters: Mapping[str, Adapter]) -> None:
    with pytest.raises(ValueError, match="asks for 8 adapters, but there are 3"):
        attach_mola(tiny_model(), adapters)
    model = tiny_model()
    with pytest.raises(ValueError, match="top_k=2 of 1 adapters"):
        attach_mola(model, adapters, num_experts=(3, 1))
    assert not any(isinstance(module, GatedLinear) for module in model.modules())
    head = read_adapter(make_adapter(tiny_model(), tmp_path / "head", seed=1, target_modules=["lm_head"]))
    with pytest.raises(AdapterError, match="lm_head lies in no numbered layer"):
        attach_mola(tiny_model(), {"a": head}, num_experts=(1,), top_k=1)
    headless = tiny_model()
    headless.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match="has no module named mlp"):
        attach_pesc(headless, adapters)


def test_lora_switch_refuses_what_it_cannot_merge_into(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    path = make_adapter(model, tmp_path / "gpt2", seed=1, target_modules=["c_attn"])
    with pytest.raises(ModelError, match="c_attn is a Conv1D"):
        attach_lora_switch(model, {"one": read_adapter(path)}, top_k=1)
