"""Mixtures are rounded to whole 64ths and fitted into a rank, and stay as near as they can."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlp_lora import Mixture, TopP
from dlp_lora.bank.limits import PARTS, Limits, Within, parts, rounded

WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.001, 1.0), min_size=1)


@given(WEIGHTS)
def test_rounded_weights_sum_to_1_and_none_is_zero(weights: dict[str, float]) -> None:
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    units = parts(shares)
    assert sum(units.values()) == PARTS
    assert all(unit >= 1 for unit in units.values())
    small = [name for name, share in shares.items() if share * PARTS < 1]
    if not small:
        assert all(abs(units[name] - share * PARTS) < 1 for name, share in shares.items())
    assert rounded(rounded(shares)) == rounded(shares)


@given(WEIGHTS)
def test_a_heavier_adapter_never_gets_less(weights: dict[str, float]) -> None:
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    units = parts(shares)
    assert all(units[a] >= units[b] for a in shares for b in shares if shares[a] > shares[b] + 1e-9)


def test_weights_that_do_not_sum_to_1_keep_their_sum() -> None:
    assert rounded({"a": 1.5, "b": 0.5}) == Mixture({"a": 1.5, "b": 0.5})
    assert rounded({"a": 1.0, "b": -0.25, "c": 0.0}) == Mixture({"a": 1.0, "b": -0.25})
    assert rounded({"a": -0.001}) == Mixture({"a": -1 / 64})
    assert rounded({}) == Mixture()


def test_the_lightest_are_left_out_until_the_others_fit_and_share_their_weight() -> None:
    limits = Limits(max_rank=12, rank_of={"a": 8, "b": 4, "c": 1}.__getitem__)
    fitted = limits.fit(Mixture({"a": 0.5, "b": 0.25, "c": 0.25}))
    assert fitted == Mixture({"a": 43 / 64, "b": 21 / 64})
    assert fitted.left_out == ("c",)
    assert limits.fit(Mixture({"b": 0.5, "c": 0.5})).left_out == ()
    assert Within(TopP(1.0), limits)({"a": 0.5, "b": 0.3, "c": 0.2}).left_out == ("c",)


def test_a_callers_mixture_of_too_large_a_rank_is_refused() -> None:
    limits = Limits(max_rank=8, rank_of={"a": 8, "b": 4}.__getitem__)
    assert limits.check(Mixture({"a": 0.999})) == Mixture({"a": 1.0})
    with pytest.raises(ValueError, match=r"have a rank of 12 together, and this server takes 8; .* --max-rank 12"):
        limits.check(Mixture({"a": 0.5, "b": 0.5}))


@pytest.mark.parametrize(
    "weights", [{"a": 1e300, "b": 1e200}, {"a": 1e308, "b": 1e308, "c": 1e-308}, {"a": 1e25, "b": 3e9}]
)
def test_weights_of_any_size_are_rounded_at_once(weights: dict[str, float]) -> None:
    assert rounded(weights) == pytest.approx(weights, rel=1e-9, abs=1 / 64)
