import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from dlp_lora.bank.limits import Limits, Within
from dlp_lora.errors import RouterError
from dlp_lora.policy import (
    FusionPolicy,
    Mixture,
    Only,
    Threshold,
    TopK,
    TopP,
    Uniform,
    choose,
    mixture_of,
    policy_from_dict,
    policy_to_dict,
    with_p,
)

ROUTED = {"math": 0.5, "units": 0.3, "poems": 0.15, "dates": 0.05}
SELECTING: list[Callable[..., FusionPolicy]] = [TopP, Threshold, TopK]


@st.composite
def probabilities(draw: st.DrawFn) -> dict[str, float]:
    """A router's output: a softmax over one to eight adapters, with ties among them."""
    logits = draw(st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0, 4.0]) | st.floats(-8, 8), min_size=1, max_size=8))
    total = sum(math.exp(x) for x in logits)
    return {f"adapter-{i}": math.exp(x) / total for i, x in enumerate(logits)}


# TopP: the smallest set of most likely adapters whose mass reaches p


@pytest.mark.parametrize(
    ("p", "selected"),
    [
        (0.05, ["math"]),
        (0.5, ["math"]),
        (0.50001, ["math", "units"]),
        (0.6, ["math", "units"]),
        (0.8, ["math", "units"]),
        (0.80001, ["math", "units", "poems"]),
        (0.95, ["math", "units", "poems"]),
        (1.0, ["math", "units", "poems", "dates"]),
    ],
)
def test_top_p_takes_adapters_until_their_mass_reaches_p(p: float, selected: list[str]) -> None:
    assert list(TopP(p=p)(ROUTED)) == selected


def test_top_p_counts_a_mass_of_exactly_p_as_reached() -> None:
    assert set(TopP(p=0.6)({"a": 0.3, "b": 0.3, "c": 0.2, "d": 0.2})) == {"a", "b"}
    assert set(TopP(p=0.6)({"a": 0.6, "b": 0.4})) == {"a"}
    # In binary 0.7 + 0.1 falls short of 0.8.
    assert set(TopP(p=0.8)({"a": 0.7, "b": 0.1, "c": 0.1, "d": 0.1})) == {"a", "b"}


def test_top_p_forgives_float32_sums_but_not_more() -> None:
    assert set(TopP(p=0.6)({"a": 0.5999999, "b": 0.4000001})) == {"a"}
    assert set(TopP(p=0.6)({"a": 0.5999, "b": 0.4001})) == {"a", "b"}


def test_top_p_breaks_ties_by_the_adapter_named_first() -> None:
    assert list(TopP(p=0.5)({"z": 0.25, "a": 0.25, "m": 0.25, "b": 0.25})) == ["z", "a"]
    assert list(TopP(p=0.2)({"z": 0.25, "a": 0.25, "m": 0.5})) == ["m"]


def test_top_p_never_selects_none() -> None:
    assert list(TopP(p=0.01)({"a": 0.5, "b": 0.5})) == ["a"]
    assert TopP(p=1.0)({"only": 0.2}) == {"only": 1.0}


def test_top_p_of_a_certain_router_is_one_adapter_at_full_weight() -> None:
    certain = {"a": 0.0, "b": 1.0, "c": 0.0}
    for weighting in ("renormalised", "paper"):
        assert TopP(p=0.6, weighting=weighting)(certain) == {"b": 1.0}
        assert TopP(p=1.0, weighting=weighting)(certain) == {"b": 1.0}


# Eq. 4, top-k, one's own choice, all


def test_threshold_takes_every_adapter_at_p_or_above() -> None:
    assert list(Threshold(p=0.15)(ROUTED)) == ["math", "units", "poems"]
    assert list(Threshold(p=0.150001)(ROUTED)) == ["math", "units"]


def test_threshold_that_no_adapter_reaches_gives_the_base_model() -> None:
    mixture = Threshold(p=0.6)(ROUTED)
    assert mixture == Mixture()
    assert not mixture


@pytest.mark.parametrize(("k", "selected"), [(1, ["math"]), (2, ["math", "units"]), (9, list(ROUTED))])
def test_top_k_takes_k_adapters_or_as_many_as_there_are(k: int, selected: list[str]) -> None:
    assert list(TopK(k=k)(ROUTED)) == selected


def test_top_k_breaks_ties_by_the_adapter_named_first() -> None:
    assert list(TopK(k=2)({"z": 0.2, "a": 0.2, "m": 0.6})) == ["m", "z"]


def test_only_takes_its_adapter_whatever_the_router_says() -> None:
    assert Only("dates")(ROUTED) == {"dates": 1.0}


def test_only_refuses_an_unknown_adapter_and_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Only\('cooking'\): no such adapter; there are dates, math, poems, units"):
        Only("cooking")(ROUTED)


def test_uniform_takes_every_adapter_alike() -> None:
    assert Uniform()(ROUTED) == dict.fromkeys(ROUTED, 0.25)
    assert Uniform()({}) == Mixture()


@pytest.mark.parametrize("policy", [TopP(p=0.6), Threshold(p=0.1), TopK(k=2)])
def test_no_adapters_give_the_base_model(policy: FusionPolicy) -> None:
    assert policy({}) == Mixture()


# Eq. 5, and what it is compared with


def test_paper_weighting_gives_the_weights_of_figure_3() -> None:
    mixture = TopP(p=1.0, weighting="paper")({"first": 0.51, "second": 0.49})
    assert {name: round(100 * weight, 1) for name, weight in mixture.items()} == {"first": 50.5, "second": 49.5}


def test_renormalised_weighting_keeps_the_routers_proportions() -> None:
    assert TopP(p=0.8)(ROUTED) == pytest.approx({"math": 0.625, "units": 0.375})
    assert TopK(k=3)(ROUTED) == pytest.approx({"math": 50 / 95, "units": 30 / 95, "poems": 15 / 95})


def test_paper_weighting_gives_a_hopeless_runner_up_a_quarter() -> None:
    mixture = TopK(k=2, weighting="paper")({"sure": 0.99, "hopeless": 0.01})
    assert mixture["sure"] == pytest.approx(1 / (1 + math.exp(-0.98)))
    assert mixture["hopeless"] == pytest.approx(0.2729, abs=1e-4)


@given(st.floats(0, 1))
def test_paper_weighting_squeezes_any_pair_between_a_half_and_0_7311(p: float) -> None:
    mixture = TopK(k=2, weighting="paper")({"a": p, "b": 1 - p})
    assert 0.5 <= max(mixture.values()) <= 0.7311


@pytest.mark.parametrize("make", SELECTING)
def test_below_min_confidence_no_adapter_is_fused(make: Callable[..., FusionPolicy]) -> None:
    assert make(min_confidence=0.500001)(ROUTED) == Mixture()
    assert "math" in make(min_confidence=0.5)(ROUTED)


# What is refused


@pytest.mark.parametrize("make", SELECTING)
@pytest.mark.parametrize("p", [math.nan, math.inf, -0.01, 1.01])
def test_what_is_no_probability_is_refused(make: Callable[..., FusionPolicy], p: float) -> None:
    with pytest.raises(ValueError, match=r"the router gave adapter 'bad' the probability .* not in \[0, 1\]"):
        make()({"good": 0.5, "bad": p})


@pytest.mark.parametrize("make", SELECTING)
def test_a_probability_may_exceed_1_by_a_rounding_error(make: Callable[..., FusionPolicy]) -> None:
    assert make()({"a": 1.0000001, "b": 0.0}) == {"a": 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopP(p=0), r"TopP\.p must be in \(0, 1\], got 0"),
        (lambda: TopP(p=1.1), r"TopP\.p must be in \(0, 1\], got 1\.1"),
        (lambda: TopP(p=math.nan), r"TopP\.p must be in \(0, 1\], got nan"),
        (lambda: Threshold(p=0), r"Threshold\.p must be in \(0, 1\], got 0"),
        (lambda: Threshold(p=2), r"Threshold\.p must be in \(0, 1\], got 2"),
        (lambda: TopK(k=0), r"TopK\.k must be a whole number of at least 1, got 0"),
        (lambda: TopK(k=1.5), r"TopK\.k must be a whole number of at least 1, got 1\.5"),
        (lambda: TopP(weighting="softmax"), r"weighting must be one of .*renormalised.*paper.*, got 'softmax'"),
        (lambda: Threshold(min_confidence=1.5), r"min_confidence must be in \[0, 1\], got 1\.5"),
        (lambda: TopK(min_confidence=math.nan), r"min_confidence must be in \[0, 1\], got nan"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_refused(make: Callable[[], FusionPolicy], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Against the reference


@given(probabilities(), st.floats(0.01, 1), st.sampled_from(["renormalised", "paper"]))
def test_top_p_is_the_papers_nucleus(routed: dict[str, float], p: float, weighting: str) -> None:
    selected = reference.nucleus(routed, p)
    weigh = reference.renormalised_weights if weighting == "renormalised" else reference.eq5_softmax_weights
    assert TopP(p=p, weighting=weighting)(routed) == pytest.approx(weigh(routed, selected))


@given(probabilities(), st.floats(0.01, 1), st.sampled_from(["renormalised", "paper"]))
def test_threshold_is_equation_4(routed: dict[str, float], p: float, weighting: str) -> None:
    selected = reference.eq4_threshold(routed, p)
    weigh = reference.renormalised_weights if weighting == "renormalised" else reference.eq5_softmax_weights
    assert Threshold(p=p, weighting=weighting)(routed) == pytest.approx(weigh(routed, selected))


@given(probabilities(), st.floats(0.01, 1))
def test_top_p_is_minimal_and_never_empty(routed: dict[str, float], p: float) -> None:
    mixture = TopP(p=p)(routed)
    kept = sorted((routed[name] for name in mixture), reverse=True)
    assert kept
    assert kept[-1] >= max((q for name, q in routed.items() if name not in mixture), default=0)
    assert sum(kept[:-1]) < p
    assert sum(kept) >= p - 2e-6


@given(
    probabilities(),
    st.builds(TopP, p=st.floats(0.01, 1), weighting=st.sampled_from(["renormalised", "paper"]))
    | st.builds(Threshold, p=st.floats(0.01, 1), weighting=st.sampled_from(["renormalised", "paper"]))
    | st.builds(TopK, k=st.integers(1, 9), weighting=st.sampled_from(["renormalised", "paper"]))
    | st.just(Uniform())
    | st.just(Only("adapter-0")),
)
def test_weights_are_positive_and_sum_to_1_or_there_are_none(routed: dict[str, float], policy: FusionPolicy) -> None:
    mixture = policy(routed)
    if mixture:
        assert sum(mixture.values()) == pytest.approx(1)
        assert min(mixture.values()) > 0
    else:
        assert isinstance(policy, Threshold)
        assert max(routed.values()) < policy.p


# Mixture


def test_a_mixture_lists_the_heaviest_adapter_first() -> None:
    assert list(Mixture({"a": 0.1, "b": 0.7, "c": 0.2}).items()) == [("b", 0.7), ("c", 0.2), ("a", 0.1)]
    assert list(Mixture({"z": 0.5, "a": 0.5})) == ["z", "a"]
    assert repr(Mixture({"units": 0.4, "math": 0.6})) == "Mixture(math=0.6, units=0.4)"


def test_a_mixture_cannot_be_changed() -> None:
    weights = {"a": 1.0}
    mixture = Mixture(weights)
    weights["a"] = 2.0
    assert mixture["a"] == 1.0
    with pytest.raises(TypeError):
        mixture["a"] = 2.0  # type: ignore[index]
    with pytest.raises(TypeError):
        del mixture["a"]  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        mixture.weights = weights  # type: ignore[attr-defined]


def test_mixtures_of_equal_weights_are_equal_and_hash_alike() -> None:
    first, second = Mixture({"a": 0.5, "b": 0.5}), Mixture({"b": 0.5, "a": 0.5})
    assert first == second == {"a": 0.5, "b": 0.5}
    assert hash(first) == hash(second)
    assert len({first, second, Mixture(), Mixture({}), Mixture({"a": 1}), Mixture({"a": 1.0})}) == 3
    assert first != Mixture({"a": 0.5})
    assert first != Mixture({"a": 0.4, "b": 0.6})


def test_a_mixture_may_hold_any_finite_weights() -> None:
    assert dict(Mixture({"a": -2, "b": 0, "c": 3.5})) == {"c": 3.5, "b": 0.0, "a": -2.0}


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, True, False, "0.5", None])
@pytest.mark.usefixtures("unchecked")
def test_a_mixture_refuses_what_is_no_finite_number(weight: object) -> None:
    with pytest.raises(ValueError, match=f"the weight of adapter 'a' must be a finite number, got {weight!r}"):
        Mixture({"a": weight})  # type: ignore[dict-item]


# Saving


@pytest.mark.parametrize(
    "policy",
    [
        TopP(p=0.7),
        TopP(p=0.7, weighting="paper", min_confidence=0.2),
        Threshold(p=0.3, min_confidence=0.4),
        TopK(k=3, weighting="paper"),
        Only("math"),
        Uniform(),
    ],
)
def test_a_policy_survives_its_dict(policy: FusionPolicy) -> None:
    assert policy_from_dict(policy_to_dict(policy)) == policy


def test_a_policy_of_ones_own_cannot_be_saved_by_name() -> None:
    with pytest.raises(ValueError, match="function is not one of TopP, Threshold, TopK, Only, Uniform"):
        policy_to_dict(lambda probabilities: Mixture())


@pytest.mark.parametrize("data", [{"type": "Best"}, {}, {"p": 0.5}])
def test_a_policy_of_unknown_name_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no policy .*; there are TopP, Threshold, TopK, Only, Uniform"):
        policy_from_dict(data)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"type": "TopP", "q": 0.5}, "TopP has no setting 'q'; it has weighting, min_confidence, p"),
        ({"type": "TopP", "p": "half"}, "TopP.p must be a number, got 'half'"),
        ({"type": "TopK", "k": True}, "TopK.k must be a whole number, got True"),
        ({"type": "Only"}, "Only needs its name"),
        ({"type": "Only", "name": 3}, "Only.name must be a string, got 3"),
        ({"type": "Uniform", "p": 0.5}, "Uniform has no setting 'p'; it has none"),
    ],
)
def test_settings_that_a_policy_does_not_have_are_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        policy_from_dict(data)


@pytest.mark.parametrize("policy", [TopP(), Threshold(), TopK(), Only("a"), Uniform(), lambda p: Mixture()])
def test_whatever_turns_probabilities_into_a_mixture_is_a_policy(policy: object) -> None:
    assert isinstance(policy, FusionPolicy)


@pytest.mark.parametrize("unsure", ["base", "keep", "likeliest"])
@pytest.mark.parametrize("row", [{"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.2}, {"a": 0.0, "b": 0.0}])
def test_a_policy_that_ignores_the_router_chooses_where_none_fits_too(row: dict[str, float], unsure: Any) -> None:
    assert choose(Only("a"), row, unsure)[1] == Mixture({"a": 1.0})
    assert choose(Uniform(), row, unsure)[1] == Mixture({"a": 0.5, "b": 0.5})
    limits = Limits(max_rank=8, rank_of=lambda name: 4)  # as with vLLM
    assert choose(Within(Only("a"), limits), row, unsure)[1] == Mixture({"a": 1.0})
    assert choose(Within(TopK(1), limits), row, unsure)[1] == choose(TopK(1), row, unsure)[1]


@pytest.mark.parametrize("row", [{}, {"a": 0.1, "b": 0.2}, {"a": 0.0}])
def test_an_adapter_that_is_gone_is_not_chosen_where_none_fits(row: dict[str, float]) -> None:
    assert choose(Only("c"), row)[1] == Mixture()
    assert choose(Uniform(), {})[1] == Mixture()


@pytest.mark.parametrize("text", ["math=", "=0.5", "math=x", "math,units=", " = "])
def test_a_mixture_without_a_name_or_a_weight_after_its_sign_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not NAME=WEIGHT"):
        mixture_of(text)
    assert mixture_of(" math , units = 0.5 ") == Mixture({"math": 1.0, "units": 0.5})


@pytest.mark.parametrize("policy", [TopP(0.6), TopK(1), Threshold(0.3)], ids=repr)
def test_where_none_of_them_is_the_likeliest_no_policy_chooses(policy: FusionPolicy) -> None:
    among = {"a": 0.625, "b": 0.375}
    assert choose(policy, {"a": 0.3125, "b": 0.1875}) == (among, Mixture())
    assert choose(policy, {"a": 0.375, "b": 0.225}) == (pytest.approx(among), pytest.approx(policy(among)))
    assert choose(policy, {"a": 0.0, "b": 0.0}) == ({"a": 0.0, "b": 0.0}, Mixture())
    whole = {"a": 0.6, "b": 0.4}
    assert choose(policy, whole) == (whole, policy(whole))


@pytest.mark.parametrize("p", [math.nan, math.inf, -0.1, 1.5])
def test_what_is_no_probability_is_the_routers_error_not_the_base_model(p: float) -> None:
    with pytest.raises(RouterError, match="expected a number from 0 to 1; train it again"):
        choose(TopP(), {"math": 0.5, "units": p})


def test_another_p_keeps_the_rest_of_top_p_and_takes_the_place_of_other_policies() -> None:
    assert with_p(TopP(0.9, weighting="paper", min_confidence=0.4), 0.5) == TopP(
        0.5, weighting="paper", min_confidence=0.4
    )
    assert with_p(TopK(2), 0.5) == TopP(0.5)
