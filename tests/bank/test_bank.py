import copy
import gc
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import make_adapter, tiny_model
from dlp_lora.bank import bank as bank_module
from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.bank import AdapterBank, Plan, keep_places
from dlp_lora.bank.group import MAX_VIEWS, Group
from dlp_lora.bank.linear import FusedLinear, Outputs
from dlp_lora.bank.peft_format import Adapter, LoraWeights, read_adapter, write_adapter
from dlp_lora.bank.store import Lease
from dlp_lora.errors import AdapterChangedError, AdapterError
from dlp_lora.policy import Mixture

# Two layers of two modules: "up" maps 5 to 7 features, "down" 7 to 5.
LAYOUT = {"layers.0.up": (5, 7), "layers.0.down": (7, 5), "layers.1.up": (5, 7), "layers.1.down": (7, 5)}


def adapter(name: str, ranks: Mapping[str, int], *, scaling: float = 0.5, seed: int = 0) -> Adapter:
    """An adapter of random weights with the given rank per module."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for module, rank in ranks.items():
        d_in, d_out = LAYOUT[module]
        a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        modules[module] = LoraWeights(a=a, b=b, scaling=scaling)
    return Adapter(name=name, modules=modules, config={}, path=Path(f"adapters/{name}"))


def adapters_of(*ranks: int) -> dict[str, Adapter]:
    """Adapters a, b, c, ... of the given ranks on every module."""
    return {
        name: adapter(name, dict.fromkeys(LAYOUT, rank), seed=i)
        for i, (name, rank) in enumerate(zip("abcdefgh", ranks, strict=False))
    }


def bank_of(*ranks: int) -> AdapterBank:
    """A bank of them."""
    return AdapterBank(LAYOUT, adapters_of(*ranks).values())


def delta(adapters: Mapping[str, Adapter], mixture: Mapping[str, float], module: str) -> Tensor:
    """Eq. 6 by hand: the sum over adapters and ranks of weight * scaling * b * a, of shape (d_out, d_in)."""
    d_in, d_out = LAYOUT[module]
    total = torch.zeros(d_out, d_in, dtype=torch.float64)
    for name, weight in mixture.items():
        lora = adapters[name].modules.get(module)
        for k in range(lora.rank if lora else 0):
            total += weight * lora.scaling * torch.outer(lora.b[:, k].double(), lora.a[k].double())
    return total


def fused_delta(bank: AdapterBank, module: str, row: int = 0) -> Tensor:
    """What the bank has fused for one module of one row, as one matrix of shape (d_out, d_in)."""
    group, s, i = site(bank, module)
    pairs = None if group.active is None else group.active.pairs[s]
    if group.active is None or pairs is None:
        return torch.zeros(group.d_outs[s], group.d_in)
    a, b, rows = pairs[i]
    gate = group.active.gate
    return (a @ b if gate is None else (a * gate[row][:, rows]) @ b).T


def site(bank: AdapterBank, module: str) -> tuple[Group, int, int]:
    """The group of a module, which of its siblings it is, and of which layer."""
    return next(
        (group, s, names.index(module))
        for group in bank.groups
        for s, names in enumerate(group.modules)
        if module in names
    )


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


def gate_of(group: Group) -> Tensor | None:
    """The gate of what is active in a group."""
    return None if group.active is None else group.active.gate


def pointers(bank: AdapterBank) -> list[tuple[int, ...]]:
    return [(g._a.data_ptr(), *(b.data_ptr() for b in g._b)) for g in bank.groups]


def writes(group: Group) -> list[int]:
    """How often each buffer was written into."""
    return [buffer._version for buffer in group.buffers()]


def allocations(bank: AdapterBank) -> list[int]:
    return [group.num_allocations for group in bank.groups]


# Eq. 6


@st.composite
def banks(draw: st.DrawFn) -> list[Adapter]:
    """One to five adapters, each with its own rank per module and modules of its own."""
    ranks = st.dictionaries(st.sampled_from(sorted(LAYOUT)), st.integers(1, 6), min_size=1)
    scalings = st.sampled_from([0.25, 1.0, 2.0, 2.8284])
    return [adapter("abcde"[i], draw(ranks), scaling=draw(scalings), seed=i) for i in range(draw(st.integers(1, 5)))]


def mixtures(adapters: Sequence[Adapter]) -> st.SearchStrategy[Mixture]:
    weights = st.floats(-2, 2, allow_subnormal=False)
    return st.dictionaries(st.sampled_from([a.name for a in adapters]), weights).map(Mixture)


@settings(deadline=None)
@given(st.data())
def test_fusing_is_the_weighted_sum_of_the_adapters_row_by_row(data: st.DataObject) -> None:
    adapters = data.draw(banks())
    bank = AdapterBank(LAYOUT, adapters)
    by_name = {a.name: a for a in adapters}
    for _ in range(data.draw(st.integers(1, 3))):  # what was fused before must leave no trace
        rows = data.draw(st.lists(mixtures(adapters), min_size=1, max_size=4))
        bank.fuse(rows)
        for module in LAYOUT:
            for i, row in enumerate(rows):
                found = fused_delta(bank, module, i)
                assert_close(found, delta(by_name, row, module))


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_a_fused_layer_adds_each_rows_delta_to_the_base_layer(data: st.DataObject, batch: int, seq: int) -> None:
    adapters = data.draw(banks())
    bank = AdapterBank(LAYOUT, adapters)
    rows = data.draw(st.lists(mixtures(adapters), min_size=batch, max_size=batch))
    bank.fuse(rows)
    base = torch.nn.Linear(5, 7)
    group, s, layer = site(bank, "layers.1.up")
    x = torch.randn(batch, seq, 5)
    y = FusedLinear(base, group, s, layer, Outputs())(x)
    for i, row in enumerate(rows):
        weight = base.weight.double() + delta({a.name: a for a in adapters}, row, "layers.1.up")
        for t in range(seq):
            wanted = weight @ x[i, t].double() + base.bias.double()
            assert_close(y[i, t], wanted)


def test_equal_mixtures_need_no_gate_and_different_ones_share_one_copy_of_each_adapter() -> None:
    bank = bank_of(2, 3, 4)
    bank.fuse([Mixture({"a": 1, "b": 2}), Mixture({"b": 2, "a": 1})])
    assert all(gate_of(group) is None for group in bank.groups)
    bank.fuse([Mixture({"a": 1, "b": 2}), Mixture({"b": 0.5}), Mixture()])
    for group in bank.groups:
        assert group.active is not None
        assert group.active.gate is not None
        assert group.active.gate[:, 0].tolist() == [[1, 1, 2, 2, 2], [0, 0, 0.5, 0.5, 0.5], [0, 0, 0, 0, 0]]
        assert {pair.a.shape[1] for pairs in group.active.pairs for pair in pairs or []} == {5}


def test_modules_that_no_adapter_of_the_mixture_touches_are_left_alone() -> None:
    bank = AdapterBank(LAYOUT, [adapter("up", {"layers.0.up": 2}), adapter("down", {"layers.1.down": 2})])
    up, down = site(bank, "layers.0.up")[0], site(bank, "layers.0.down")[0]
    bank.fuse([Mixture({"up": 1})])
    assert up.active is not None
    assert down.active is None
    bank.fuse([Mixture({"down": 1})])
    assert up.active is None
    assert down.active is not None
    bank.clear()
    assert up.active is down.active is None


def test_a_zero_weight_changes_nothing() -> None:
    bank = bank_of(2, 3)
    bank.fuse([Mixture({"a": 0.7})])
    alone = [fused_delta(bank, module) for module in LAYOUT]
    bank.fuse([Mixture({"a": 0.7, "b": 0})])
    torch.testing.assert_close([fused_delta(bank, module) for module in LAYOUT], alone, rtol=0, atol=0)


# A switch allocates nothing


def test_a_thousand_switches_allocate_nothing() -> None:
    bank = bank_of(1, 4, 8)
    before = pointers(bank), allocations(bank)
    names = ["a", "b", "c"]
    for i in range(1000):
        chosen = [name for j, name in enumerate(names) if (i % 8) >> j & 1]
        first = Mixture(dict.fromkeys(chosen, (i + 1) / 7))
        bank.fuse([first] if i % 3 else [first, Mixture({"c": float(i)}), Mixture()])
    assert (pointers(bank), allocations(bank)) == before
    bank.fuse([Mixture({"a": 0.1, "b": 0.2, "c": 0.3})])
    wanted = delta(adapters_of(1, 4, 8), {"a": 0.1, "b": 0.2, "c": 0.3}, "layers.1.up")
    assert_close(fused_delta(bank, "layers.1.up"), wanted)


def test_the_same_mixture_again_writes_nothing() -> None:
    bank = bank_of(2, 3)
    for rows in ([Mixture({"a": 0.5, "b": 0.5})], [Mixture({"a": 1}), Mixture({"b": 1})]):
        bank.fuse(rows)
        before = [(writes(g), id(g.active)) for g in bank.groups]
        bank.fuse([Mixture(dict(reversed(list(row.items())))) for row in rows])
        assert [(writes(g), id(g.active)) for g in bank.groups] == before
        bank.clear()
        assert all(g.active is None for g in bank.groups)
        bank.fuse(rows)
        assert [(writes(g), id(g.active)) for g in bank.groups] == before
        bank.fuse([Mixture({"a": 0.4})])
        assert all(writes(g)[1] > earlier[1] for g, (earlier, _) in zip(bank.groups, before, strict=True))


@settings(deadline=None)
@given(st.data())
def test_whatever_was_fused_before_rows_get_their_own_sums(data: st.DataObject) -> None:
    adapters = data.draw(banks())
    bank, by_name = AdapterBank(LAYOUT, adapters), {a.name: a for a in adapters}
    for _ in range(data.draw(st.integers(1, 5))):
        rows = data.draw(st.lists(mixtures(adapters), min_size=1, max_size=4))
        bank.fuse(rows, reuse=data.draw(st.booleans()))
        for module in LAYOUT:
            for i, row in enumerate(rows):
                assert_close(fused_delta(bank, module, i), delta(by_name, row, module))


def test_rows_that_go_on_copy_only_what_is_new() -> None:
    bank = bank_of(2, 2, 2, 2, 2)
    bank.fuse([Mixture({"a": 0.5, "b": 0.5}), Mixture({"c": 1}), Mixture({"d": 1})])

    def copies(*rows: dict[str, float]) -> list[int]:
        before = [writes(group)[0] for group in bank.groups]
        bank.fuse([Mixture(row) for row in rows], reuse=True)
        return [writes(group)[0] - b for group, b in zip(bank.groups, before, strict=True)]

    assert copies({"d": 0.5, "b": 0.5}, {"a": 1}, {"c": 1}) == [0, 0]
    assert copies({"d": 1}, {"a": 1}, {"c": 1}) == [0, 0]  # b lies idle
    assert copies({"d": 1}, {"e": 1}, {"a": 0.5, "c": 0.5}) == [1, 1]  # in the place of b
    assert copies({"a": 0.5, "d": 0.5}, {"e": 1}, {"a": 1}) == [0, 0]  # c lies idle
    assert [gate.shape[-1] for group in bank.groups if (gate := gate_of(group)) is not None] == [8, 8]
    copies({"d": 1}, {"a": 1}, {"a": 1})  # a half would lie idle, so it is given up
    assert [gate.shape[-1] for group in bank.groups if (gate := gate_of(group)) is not None] == [4, 4]


def test_a_pass_that_does_not_go_on_is_the_same_to_the_last_bit_whatever_came_before() -> None:
    rows = [Mixture({"a": 0.3, "d": 0.7}), Mixture({"c": 1}), Mixture({"b": 0.9})]
    fresh, used = bank_of(3, 2, 5, 2), bank_of(3, 2, 5, 2)
    fresh.fuse(rows)
    used.fuse([Mixture({"d": 1}), Mixture({"b": 1})])
    used.fuse(rows, reuse=True)
    used.fuse(rows)
    for found, wanted in zip((g.active for g in used.groups), (g.active for g in fresh.groups), strict=True):
        assert found is not None
        assert wanted is not None
        assert found.gate is not None
        assert wanted.gate is not None
        assert torch.equal(found.gate, wanted.gate)
        for pairs, others in zip(found.pairs, wanted.pairs, strict=True):
            for pair, other in zip(pairs or (), others or (), strict=True):
                assert torch.equal(pair.a, other.a)
                assert torch.equal(pair.b, other.b)


def test_buffers_start_with_room_for_the_whole_bank() -> None:
    bank = bank_of(2, 3, 4)
    assert {group.capacity for group in bank.groups} == {9}
    before = allocations(bank)
    bank.fuse([Mixture(dict.fromkeys("abc", 1 / 3))])
    assert allocations(bank) == before


def test_a_mixture_wider_than_the_buffers_doubles_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "START_CAPACITY", 4)
    bank = bank_of(4, 1, 4)
    assert {group.capacity for group in bank.groups} == {4}
    bank.fuse([Mixture({"a": 1.0})])
    before = allocations(bank)
    steps: list[tuple[dict[str, float], int]] = [
        ({"a": 0.5, "b": 2}, 8),
        ({"a": 0.5, "c": 2}, 8),
        ({"a": 1, "b": -1, "c": 3}, 16),
        ({"c": 2}, 16),  # of a rank that was fused before the buffers grew
    ]
    for mixture, capacity in steps:
        bank.fuse([Mixture(mixture)])
        assert {group.capacity for group in bank.groups} == {capacity}
        for module in LAYOUT:
            wanted = delta(adapters_of(4, 1, 4), mixture, module)
            assert_close(fused_delta(bank, module), wanted)
    assert allocations(bank) == [n + 4 for n in before]  # A and B, twice


def test_a_fuse_that_ran_out_of_memory_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "START_CAPACITY", 4)
    bank = bank_of(4, 4)
    bank.fuse([Mixture({"a": 1.0})])
    reserve, last = Group.reserve, bank.groups[-1]

    def full(group: Group, rank: int, ranks: Sequence[int]) -> None:
        if group is last:
            raise MemoryError
        reserve(group, rank, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "reserve", full)
        with pytest.raises(MemoryError):
            bank.fuse([Mixture({"a": 1.0, "b": 1.0})])
    bank.fuse([Mixture({"a": 1.0})])
    for module in LAYOUT:
        wanted = delta(adapters_of(4, 4), {"a": 1.0}, module)
        assert_close(fused_delta(bank, module), wanted)


# Adding and removing at run time


def test_an_adapter_added_at_run_time_is_fused_from_the_next_mixture_on() -> None:
    bank = bank_of(2)
    bank.fuse([Mixture({"a": 1.0})])
    late = adapter("late", dict.fromkeys(LAYOUT, 6), seed=9)
    bank.add(late)
    assert bank.names == ("a", "late")
    assert len(bank) == 2
    for mixture in ({"a": 1.0}, {"late": 1.0}, {"a": 0.5, "late": 0.5}, {"a": 0.5}):
        bank.fuse([Mixture(mixture)])
        for module in LAYOUT:
            assert_close(fused_delta(bank, module), delta({**adapters_of(2), "late": late}, mixture, module))


def test_a_removed_adapter_is_gone_and_its_name_is_free() -> None:
    bank = bank_of(2, 3)
    bank.fuse([Mixture({"a": 1.0})])
    fused = fused_delta(bank, "layers.0.up")
    bank.remove("a")
    assert torch.equal(fused_delta(bank, "layers.0.up"), fused)
    assert bank.names == ("b",)
    assert list(bank.adapters) == ["b"]
    bank.fuse([Mixture({"b": 1.0})])
    with pytest.raises(AdapterError, match="no adapter 'a'; there are b"):
        bank.fuse([Mixture({"a": 1.0})])
    another = adapter("a", dict.fromkeys(LAYOUT, 2), seed=77)
    bank.add(another)
    bank.fuse([Mixture({"a": 1.0})])
    wanted = delta({"a": another}, {"a": 1.0}, "layers.0.up")
    assert_close(fused_delta(bank, "layers.0.up"), wanted)
    assert not torch.allclose(fused, fused_delta(bank, "layers.0.up"))


def test_touched_modules_are_those_of_some_adapter_and_their_like_in_other_layers() -> None:
    bank = AdapterBank(LAYOUT, [adapter("a", {"layers.0.up": 2})])
    assert [group.modules for group in bank.touched()] == [(("layers.0.up", "layers.1.up"),)]
    bank.remove("a")
    assert bank.touched() == []


# What is refused


def test_two_adapters_of_one_name_are_refused() -> None:
    bank = bank_of(2)
    with pytest.raises(AdapterError, match=r"two adapters are named 'a' \(the second: adapters/a\); rename one"):
        bank.add(adapter("a", {"layers.0.up": 1}))


def test_an_unknown_name_lists_the_known_ones_and_leaves_what_was_fused() -> None:
    bank = bank_of(2, 3)
    bank.fuse([Mixture({"a": 1.0})])
    before = fused_delta(bank, "layers.0.up")
    with pytest.raises(AdapterError, match="no adapter 'z'; there are a, b"):
        bank.fuse([Mixture({"b": 1.0}), Mixture({"z": 1.0})])
    assert torch.equal(fused_delta(bank, "layers.0.up"), before)
    with pytest.raises(AdapterError, match="no adapter 'z'; there are a, b"):
        bank.remove("z")
    with pytest.raises(AdapterError, match="no adapter 'z'; there are none"):
        AdapterBank(LAYOUT).fuse([Mixture({"z": 1.0})])


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    foreign = make_adapter(tiny_model("gpt2"), tmp_path / "foreign", seed=1, target_modules=["c_attn"])
    bank = AdapterBank(linear_layers(tiny_model("llama")))
    message = r"foreign: 0 of its 2 modules are linear layers .* transformer\.h\.0\.attn\.c_attn is not.*another archi"
    with pytest.raises(AdapterError, match=message):
        bank.add(read_adapter(foreign))
    assert len(bank) == 0


def test_an_adapter_that_fits_in_part_is_refused() -> None:
    bank = AdapterBank({"layers.0.up": (5, 7)})
    with pytest.raises(AdapterError, match=r"adapters/a: 1 of its 2 modules .*; layers\.1\.up is not"):
        bank.add(adapter("a", {"layers.0.up": 1, "layers.1.up": 1}))


@pytest.mark.parametrize("shape", [(6, 7), (5, 8), (7, 5)])
def test_an_adapter_of_another_size_is_refused(shape: tuple[int, int]) -> None:
    bank = AdapterBank({**LAYOUT, "layers.1.up": shape})
    message = rf"adapters/a: layers\.1\.up maps 5 to 7 features, but the base model's maps {shape[0]} to {shape[1]}"
    with pytest.raises(AdapterError, match=message):
        bank.add(adapter("a", {"layers.0.up": 2, "layers.1.up": 2}))
    assert len(bank) == 0
    assert bank.touched() == []


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
@example(12, 12, 12)
def test_no_order_of_layers_mixes_them_up(first: int, second: int, third: int) -> None:
    # Module names such as layers.10 sort before layers.2: the order is that of the layout.
    layout = {f"layers.{i}.up": (1, 1) for i in (first, 20 + second, 40 + third)}
    weights = {m: LoraWeights(a=torch.tensor([[i + 1.0]]), b=torch.ones(1, 1), scaling=1) for i, m in enumerate(layout)}
    bank = AdapterBank(layout, [Adapter(name="a", modules=dict(reversed(weights.items())), config={}, path=Path("a"))])
    bank.fuse([Mixture({"a": 1})])
    assert [fused_delta(bank, module).item() for module in layout] == [1, 2, 3]


def test_modules_of_like_names_but_other_shapes_are_fused_apart() -> None:
    layout = {"blocks.0.proj": (3, 4), "blocks.1.proj": (5, 6), "fc1": (3, 3), "fc2": (3, 3)}
    loras = {m: LoraWeights(a=torch.randn(2, i), b=torch.randn(o, 2), scaling=0.5) for m, (i, o) in layout.items()}
    bank = AdapterBank(layout, [Adapter(name="a", modules=loras, config={}, path=Path("a"))])
    bank.fuse([Mixture({"a": 2})])
    for module, lora in loras.items():
        assert_close(fused_delta(bank, module), (lora.b @ lora.a).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bank_holds_its_weights_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    adapters = {"a": adapter("a", dict.fromkeys(LAYOUT, 2)), "b": adapter("b", {"layers.0.up": 3})}
    bank = AdapterBank(LAYOUT, adapters.values(), dtype=dtype)
    bank.fuse([Mixture({"a": 0.5, "b": 0.5}), Mixture({"b": 1.0})])
    for group in bank.groups:
        assert group.active is not None or group.modules[0][0].endswith("down")
        pairs = [pair for pairs in (group.active.pairs if group.active else []) for pair in pairs or []]
        assert {t.dtype for pair in pairs for t in (pair.a, pair.b)} <= {dtype}
        gate = gate_of(group)
        assert gate is None or gate.dtype == dtype
    wanted = delta(adapters, {"a": 0.5, "b": 0.5}, "layers.0.up")
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    found = fused_delta(bank, "layers.0.up").double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


# Each adapter once


def test_the_bank_holds_the_stacked_weights_alone_and_leaves_the_given_adapter_whole() -> None:
    given = adapter("a", dict.fromkeys(LAYOUT, 2))
    bank = AdapterBank(LAYOUT, [given])
    assert given.is_loaded
    kept = bank.adapters["a"]
    assert not kept.is_loaded
    assert {name: (lora.a.shape, lora.b.shape, lora.scaling) for name, lora in kept.modules.items()} == {
        name: (lora.a.shape, lora.b.shape, lora.scaling) for name, lora in given.modules.items()
    }
    assert bank.num_parameters == sum(lora.a.numel() + lora.b.numel() for lora in given.modules.values())


# On disk


def on_disk(folder: Path, *names: str, rank: int = 2) -> list[Adapter]:
    """Adapters of random weights, written to folders and read without their weights."""
    for i, name in enumerate(names):
        made = adapter(name, dict.fromkeys(LAYOUT, rank), seed=i)
        write_adapter(folder / name, made.modules, rank=rank)
    return [read_adapter(folder / name, weights=False) for name in names]


def test_adapters_on_disk_are_fused_like_those_in_memory(tmp_path: Path) -> None:
    lazy = on_disk(tmp_path, "a", "b", "c")
    assert not any(each.is_loaded for each in lazy)
    bank = AdapterBank(LAYOUT, lazy, budget_mb=1)
    loaded = {name: read_adapter(tmp_path / name) for name in "abc"}
    assert bank.store.num_misses == 0
    for mixture in ({"a": 0.5, "c": 2.0}, {"b": 1.0}, {"a": -1.0, "b": 0.1, "c": 0.3}):
        bank.fuse([Mixture(mixture)])
        for module in LAYOUT:
            wanted = delta(loaded, mixture, module)
            assert_close(fused_delta(bank, module), wanted)
    assert bank.store.num_misses == 3  # each was loaded once, and kept


def test_a_bank_keeps_within_its_budget_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    adapters = on_disk(tmp_path, *"abcdef")
    one = sum(4 * rank * (d_in + d_out) for rank, (d_in, d_out) in ((2, shape) for shape in LAYOUT.values()))
    bank = AdapterBank(LAYOUT, adapters, budget_mb=2.5 * one / 2**20)
    for name in "abab":
        bank.fuse([Mixture({name: 1.0})])
    assert bank.store.num_misses == 2
    bank.fuse([Mixture({"c": 1.0})])  # takes the place of a
    bank.fuse([Mixture({"b": 1.0})])
    assert bank.store.num_misses == 3
    bank.fuse([Mixture({"a": 1.0})])
    assert bank.store.num_misses == 4
    for name in "abcdef" * 3:
        bank.fuse([Mixture({name: 1.0})])
        held = sum(tensor.nbytes for tensor in bank.store.tensors())
        assert held <= 2.5 * one
    bank.fuse([Mixture(dict.fromkeys("abcd", 0.25))])  # what is fused at once is held at once
    assert len(bank.store.loaded) == 4


def test_an_adapter_given_in_memory_is_never_dropped(tmp_path: Path) -> None:
    given = adapter("given", dict.fromkeys(LAYOUT, 2), seed=5)  # of a folder that does not exist
    bank = AdapterBank(LAYOUT, [given, *on_disk(tmp_path, *"abc")], budget_mb=1e-6)
    for name in ["given", *"abc", "given", *"abc"]:
        bank.fuse([Mixture({name: 1.0})])
    assert bank.store.num_misses == 6
    bank.fuse([Mixture({"given": 1.0})])
    assert_close(fused_delta(bank, "layers.1.up"), delta({"given": given}, {"given": 1.0}, "layers.1.up"))


def test_an_adapter_on_disk_may_be_dropped_though_one_in_memory_had_its_name(tmp_path: Path) -> None:
    (a,) = on_disk(tmp_path, "a")
    bank = AdapterBank(LAYOUT, [adapter("a", dict.fromkeys(LAYOUT, 2)), *on_disk(tmp_path, "b")], budget_mb=1e-6)
    bank.remove("a")
    bank.add(a)
    for name in "abab":
        bank.fuse([Mixture({name: 1.0})])
    assert bank.store.num_misses == 4


def test_an_adapter_that_changed_on_disk_is_checked_when_it_is_loaded(tmp_path: Path) -> None:
    bank = AdapterBank(LAYOUT, on_disk(tmp_path, "a", "b"), budget_mb=1)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(AdapterChangedError, match="a was written again since it was added") as caught:
        bank.fuse([Mixture({"a": 1.0})])
    assert caught.value.name == "a"
    assert "truncated or not a safetensors file" in str(caught.value.__context__)
    bank.fuse([Mixture({"b": 1.0})])


def test_another_adapter_in_the_files_of_one_is_refused(tmp_path: Path) -> None:
    bank = AdapterBank(LAYOUT, on_disk(tmp_path, "a", "b"), budget_mb=1e-6)
    for name in "ab":
        bank.fuse([Mixture({name: 1.0})])
    on_disk(tmp_path, "z", "a")  # of another seed
    with pytest.raises(AdapterError, match=r"a was written again since it was added as 'a'; remove that and add it"):
        bank.fuse([Mixture({"a": 1.0})])
    bank.remove("a")
    bank.add(read_adapter(tmp_path / "a", weights=False))
    bank.fuse([Mixture({"a": 1.0})])
    wanted = delta({"a": read_adapter(tmp_path / "a")}, {"a": 1.0}, "layers.0.up")
    assert_close(fused_delta(bank, "layers.0.up"), wanted)


def test_an_adapter_whose_files_were_written_anew_can_be_removed_while_rows_run_with_it(tmp_path: Path) -> None:
    bank = AdapterBank(LAYOUT, on_disk(tmp_path, "a", "b"), budget_mb=1e-6)
    lease = bank.lease([Mixture({"a": 1.0})])
    for name in "ab":
        bank.fuse([Mixture({name: 1.0})])
    on_disk(tmp_path, "z", "a")  # of another seed
    bank.remove("a")
    assert bank.names == ("b",)
    with pytest.raises(AdapterError, match="was written again"):
        bank.fuse([Mixture({"a": 1.0})])
    del lease
    bank.add(read_adapter(tmp_path / "a", weights=False))
    bank.fuse([Mixture({"a": 1.0})])
    wanted = delta({"a": read_adapter(tmp_path / "a")}, {"a": 1.0}, "layers.0.up")
    assert_close(fused_delta(bank, "layers.0.up"), wanted)


def test_rows_that_take_turns_do_not_evict_each_others_adapters(tmp_path: Path) -> None:
    adapters = on_disk(tmp_path, *"abcdef")
    one = sum(4 * 2 * (d_in + d_out) for d_in, d_out in LAYOUT.values())
    bank = AdapterBank(LAYOUT, adapters, budget_mb=3.5 * one / 2**20)
    first = bank.lease([Mixture({"a": 1.0, "b": 1.0})])
    for name in "abcabdabeabf":
        bank.fuse([Mixture({name: 1.0})])
    assert bank.store.num_misses == 6  # a and b once
    assert {"a", "b", "f"} == set(bank.store.loaded)
    leases = [first, bank.lease([Mixture(dict.fromkeys("abcdef", 1.0))])]
    for name in "cdef":
        assert leases
        bank.fuse([Mixture({name: 1.0})])
        assert len(bank.store.loaded) == 3  # the budget holds all the same


@pytest.mark.parametrize("budget", [0, -1.0])
def test_a_budget_of_nothing_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="budget_mb must be positive"):
        AdapterBank(LAYOUT, budget_mb=budget)


# Adding and removing under rows that run


def test_rows_that_run_with_an_adapter_keep_it_until_they_switch() -> None:
    adapters = adapters_of(2, 3)
    bank = AdapterBank(LAYOUT, adapters.values())
    rows = [Mixture({"a": 0.5, "b": 0.5}), Mixture({"b": 1.0})]
    leases = [bank.lease([row]) for row in rows]
    bank.fuse(rows)
    bank.remove("a")
    assert bank.names == ("b",)
    bank.add(adapter("c", dict.fromkeys(LAYOUT, 2), seed=7))
    for other in ([Mixture({"c": 1.0})], rows, [Mixture({"b": 1.0})], rows):  # of two caches that take turns
        bank.fuse(other)
        for module in LAYOUT:
            wanted = delta({**adapters, "c": adapter("c", dict.fromkeys(LAYOUT, 2), seed=7)}, other[0], module)
            assert_close(fused_delta(bank, module, 0), wanted)
    del leases[0]
    bank.fuse([Mixture({"c": 1.0})])
    with pytest.raises(AdapterError, match="no adapter 'a'; there are b, c"):
        bank.fuse(rows)
    assert set(bank.store.loaded) == {"b", "c"}


def test_a_name_is_not_given_again_while_rows_run_with_the_old_adapter() -> None:
    bank = bank_of(2)
    lease = bank.lease([Mixture({"a": 1.0})])
    bank.fuse([Mixture({"a": 1.0})])
    bank.remove("a")
    another = adapter("a", dict.fromkeys(LAYOUT, 3), seed=9)
    with pytest.raises(
        AdapterError, match=r"rows still run with the removed adapter 'a'; let them end .* another name"
    ):
        bank.add(another)
    bank.fuse([Mixture({"a": 1.0})])
    assert_close(fused_delta(bank, "layers.0.up"), delta(adapters_of(2), {"a": 1.0}, "layers.0.up"))
    del lease
    bank.add(another)
    bank.fuse([Mixture({"a": 1.0})])
    assert_close(fused_delta(bank, "layers.0.up"), delta({"a": another}, {"a": 1.0}, "layers.0.up"))


def test_an_adapter_takes_the_place_of_another_which_rows_keep_that_follow_their_lease() -> None:
    adapters, another = adapters_of(2, 2), adapter("a", dict.fromkeys(LAYOUT, 3), seed=9)
    bank, mixture = AdapterBank(LAYOUT, adapters.values()), Mixture({"a": 0.7, "b": 0.3})
    lease = bank.lease([mixture], follows=True)
    bank.fuse([mixture])
    bank.put([bank.store.entry_for(another, replace=True)])
    assert bank.names == ("a", "b")
    for _ in range(2):
        for each, loras in ((mixture, {**adapters, "a": another}), (lease.of(mixture), adapters)):
            bank.fuse([each])
            assert_close(fused_delta(bank, "layers.0.up"), delta(loras, mixture, "layers.0.up"))
    del lease
    bank.fuse([mixture])
    assert set(bank.store.loaded) == {"a", "b"}


def test_an_adapter_that_cannot_take_a_place_leaves_the_other_there() -> None:
    old = adapter("a", {"layers.0.up": 2})
    bank, mixture = AdapterBank({"layers.0.up": LAYOUT["layers.0.up"]}, [old]), Mixture({"a": 1.0})
    bank.fuse([mixture])
    lease = bank.lease([mixture])
    with pytest.raises(AdapterError, match="rows still run with the adapter 'a'; let them end"):
        bank.store.entry_for(adapter("a", {"layers.0.up": 3}, seed=9), replace=True)
    del lease
    with pytest.raises(AdapterError, match=r"layers\.1\.up is not"):
        bank.store.entry_for(adapter("a", {"layers.0.up": 3, "layers.1.up": 3}, seed=9), replace=True)
    bank.fuse([mixture])
    assert_close(fused_delta(bank, "layers.0.up"), delta({"a": old}, mixture, "layers.0.up"))


def test_rows_keep_a_removed_adapter_whose_files_are_gone(tmp_path: Path) -> None:
    bank = AdapterBank(LAYOUT, on_disk(tmp_path, "a", "b"), budget_mb=1e-6)
    loaded = read_adapter(tmp_path / "a")
    lease = bank.lease([Mixture({"a": 1.0})])
    bank.fuse([Mixture({"b": 1.0})])
    bank.remove("a")
    shutil.rmtree(tmp_path / "a")
    for name in "abab":
        bank.fuse([Mixture({name: 1.0})])
    bank.fuse([Mixture({"a": 1.0})])
    assert_close(fused_delta(bank, "layers.1.up"), delta({"a": loaded}, {"a": 1.0}, "layers.1.up"))
    del lease


def test_adding_moves_no_buffer() -> None:
    bank = bank_of(2, 2)
    bank.fuse([Mixture({"a": 1.0})])
    before = pointers(bank)
    for i in range(20):
        bank.add(adapter(f"late{i}", dict.fromkeys(LAYOUT, 2), seed=i))
        bank.fuse([Mixture({f"late{i}": 0.5, "b": 0.5})])
    assert pointers(bank) == before


def test_views_are_kept_for_so_many_ranks_and_for_the_padded_ones() -> None:
    sizes = {"up": range(1, 8), "down": range(1, 8)}
    bank = AdapterBank(
        LAYOUT,
        [
            adapter(f"{module}{rank}", {f"layers.{i}.{module}": rank for i in range(2)}, seed=rank)
            for module, ranks in sizes.items()
            for rank in ranks
        ],
    )
    bank.pad(40)
    bank.fuse([Mixture({"up1": 1.0})], padded=True)
    kept = [group.active.pairs for group in bank.groups]
    for mask in range(1, 1 << 7):
        names = [f"{module}{k + 1}" for module in sizes for k in range(7) if mask >> k & 1]
        bank.fuse([Mixture(dict.fromkeys(names, 1.0))])
    assert 20 < max(group.num_views for group in bank.groups) <= MAX_VIEWS
    bank.fuse([Mixture({"up1": 1.0})], padded=True)
    assert all(group.active.pairs is pairs for group, pairs in zip(bank.groups, kept, strict=True))


def test_a_mixture_that_goes_on_does_not_look_through_all_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of(2, 3)
    rows = [Mixture({"a": 1.0})]
    bank.fuse(rows)
    monkeypatch.setattr(bank.store, "adapters", None)  # there may be thousands
    bank.fuse(rows)
    bank.fuse(rows, reuse=True)


def test_a_lease_holds_neither_the_bank_nor_its_tensors_and_a_copy_is_the_same_lease() -> None:
    bank = bank_of(2)
    lease = bank.lease([Mixture({"a": 0.5}), {}])
    assert lease.names == {"a"}
    assert all(referent in (Lease, lease.names, {}, False) for referent in gc.get_referents(lease))
    copied = copy.deepcopy([lease])
    del lease
    bank.remove("a")
    bank.fuse([Mixture({"a": 0.5})])
    del copied
    with pytest.raises(AdapterError, match="no adapter 'a'; there are none"):
        bank.lease([{"a": 1.0}])


# Plans


def test_a_plan_says_what_lies_in_the_buffers() -> None:
    bank = bank_of(2, 2, 2, 2, 2)
    a, b, e = (Mixture({name: 1.0}) for name in "abe")
    assert bank.plan is None
    bank.fuse([a, a])
    assert bank.plan == Plan(rows=(a,), adapters=("a",))
    bank.fuse([b, a])
    assert bank.plan == Plan(rows=(b, a), adapters=("a", "b"))
    bank.fuse([b, e], reuse=True)
    assert bank.plan == Plan(rows=(b, e), adapters=("e", "b"))
    bank.fuse([b, e])
    assert bank.plan == Plan(rows=(b, e), adapters=("b", "e"))
    bank.clear()
    assert bank.plan == Plan(rows=(b, e), adapters=("b", "e"))
    bank.fuse([b, a], torch.tensor([[0, 1, 1]]))
    assert bank.plan == Plan(rows=(b, a), adapters=("a", "b"), by_token=True)
    bank.pad(8)
    bank.fuse([b, a], padded=True)
    assert bank.plan == Plan(rows=(b, a), adapters=("a", "b"), batch=2)
    bank.remove("e")
    assert bank.plan is None


names = st.lists(st.sampled_from("abcdefgh"), unique=True)


@given(names, names.filter(bool), st.lists(st.integers(1, 9), min_size=8, max_size=8))
def test_places_are_kept_unless_too_much_would_lie_idle(before: list[str], names: list[str], ranks: list[int]) -> None:
    rank = dict(zip("abcdefgh", ranks, strict=True))
    order = keep_places(names, before, rank=rank.__getitem__)
    assert set(order) >= set(names)
    assert len(set(order)) == len(order)
    idle = sum(rank[name] for name in order if name not in names)
    assert 4 * idle <= sum(rank[name] for name in order)
    if order != names:
        assert all(order[i] == name for i, name in enumerate(before) if name in names)
        assert set(order) <= {*names, *before}
    assert keep_places(names, order, rank=rank.__getitem__) == order  # nothing moves in the next pass


def test_an_adapter_takes_the_name_of_a_removed_one_if_who_runs_with_that_follows() -> None:
    bank, mixture = bank_of(2), Mixture({"a": 1.0})
    lease = bank.lease([mixture], follows=True)
    content = bank.content(mixture)
    bank.remove("a")
    bank.add(adapter("a", dict.fromkeys(LAYOUT, 3), seed=9))
    assert bank.content(lease.of(mixture)) == content != bank.content(mixture)
    bank.fuse([lease.of(mixture), mixture])
    new = {"a": adapter("a", dict.fromkeys(LAYOUT, 3), seed=9)}
    for row, adapters in enumerate((adapters_of(2), new)):
        assert_close(fused_delta(bank, "layers.0.up", row), delta(adapters, mixture, "layers.0.up"))
    del lease
    bank.fuse([mixture])
    assert bank.store.loaded == ("a",)


def test_what_a_mixture_is_made_of_depends_on_numbers_and_weights_and_not_on_names(tmp_path: Path) -> None:
    one, like, other = (
        adapter(name, dict.fromkeys(LAYOUT, 2), seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    bank = AdapterBank(LAYOUT, [one, like, other])
    contents = [bank.content(Mixture(m)) for m in ({"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"a": 0.5}, {})]
    assert contents[0] == contents[1]
    assert len(set(contents)) == 4


def test_adapters_on_disk_are_prepared_without_a_pass(tmp_path: Path) -> None:
    bank = AdapterBank(LAYOUT, on_disk(tmp_path, "a", "b"), budget_mb=1.0)
    assert not bank.are_ready(["a"])
    bank.prepare(["a"])
    assert bank.are_ready(["a"])
    assert bank.store.loaded == ("a",)
    bank.fuse([Mixture({"a": 1.0})])
    assert bank.store.num_misses == 1
    with pytest.raises(AdapterError, match="no adapter 'nobody'"):
        bank.prepare(["nobody"])
