"""The estimate of docs/scale.md is the one of its script."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from estimate_scale import (  # noqa: E402
    GPU,
    NO_LOADING,
    SMALL,
    Load,
    Model,
    answer_s,
    answers_in_slots,
    check_routed,
    checks,
    estimate,
    machine_of,
    memory_table,
    misses,
    num_distinct,
    only_qv,
    shares,
    slots_table,
    table,
)

GPUS, LLAMA, LOAD = GPU(), Model(), Load()


def cells(text: str) -> set[tuple[str, ...]]:
    """The rows of tables, without code marks."""
    lines = [line.strip("| ").replace("`", "") for line in text.splitlines() if line.startswith("|")]
    return {tuple(cell.strip() for cell in line.split("|")) for line in lines if not set(line) <= set("-:| ")}


def test_the_page_has_the_rows_that_the_script_prints() -> None:
    page = cells((ROOT / "docs" / "scale.md").read_text(encoding="utf-8"))
    for printed in (table(LOAD, GPUS, only_qv(LLAMA)), slots_table(LOAD, GPUS, LLAMA), memory_table(LLAMA)):
        rows = {row for row in cells(printed) if any(cell[:1].isdigit() for cell in row)}
        told = {tuple(cell.replace("by sentence, resident", "by sentence, a resident") for cell in row) for row in rows}
        assert told
        assert told <= page


def test_a_batch_that_fills_the_slots_has_as_many_mixtures_as_there_are_slots() -> None:
    p = shares(5000, 1.0)
    assert sum(p) == pytest.approx(1)
    batch = answers_in_slots(p, 32, 1000)
    assert batch >= 32
    assert num_distinct(p, batch) == pytest.approx(32, rel=1e-3)


def test_a_larger_memory_misses_less_and_one_for_all_misses_nothing() -> None:
    p = shares(500, 1.0)
    found = [misses(p, size) for size in (1, 50, 250, 500)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0, abs=1e-6)


def test_more_switches_and_fewer_slots_carry_fewer_requests_and_a_full_gpu_answers_none() -> None:
    rate = estimate("recompute", LOAD, GPUS, LLAMA).requests_s
    assert estimate("recompute", replace(LOAD, switch_rate=0.5), GPUS, LLAMA).requests_s < rate
    assert estimate("recompute", replace(LOAD, max_loras=8), GPUS, LLAMA).requests_s < rate
    seconds = [answer_s("recompute", LOAD, GPUS, LLAMA, share * rate) for share in (0.1, 0.7, 0.95, 1.0)]
    assert seconds == sorted(seconds)
    assert seconds[-1] == float("inf")


def test_the_page_says_how_long_an_answer_takes_at_a_share_of_what_a_gpu_carries() -> None:
    page = " ".join((ROOT / "docs" / "scale.md").read_text(encoding="utf-8").split())
    rate = estimate("recompute", LOAD, GPUS, LLAMA).requests_s
    idle, half, most, full = (answer_s("recompute", LOAD, GPUS, LLAMA, s * rate) for s in (0.1, 0.5, 0.7, 0.95))
    assert f"about {idle:.1f} s on a nearly idle GPU" in page
    assert f"{half:.1f} s at half" in page
    assert f"{most:.1f} s at 70 % and {full:.1f} s at 95 %" in page
    assert f"at most 70 %: {0.7 * rate:.1f} requests per second" in page


def test_a_measured_machine_takes_the_times_that_were_measured() -> None:
    load = replace(NO_LOADING, prompt=80, answer=32, max_batch=1)
    machine = machine_of(load, step_ms=75.0, token_ms=0.8, bandwidth_gb_s=15.0)
    found = estimate("request", load, machine, SMALL)
    assert (found.batch, found.load_ms, found.switch_ms) == (1, 0, 0)
    assert found.step_ms == pytest.approx(75)
    assert found.prompt_ms == pytest.approx(80 * 0.8)
    assert found.decode_ms == pytest.approx(32 * 75)


def test_with_the_measured_time_of_a_step_the_gain_of_a_batch_is_predicted_within_fifteen_percent() -> None:
    found = {check.what: check for check in checks()}
    streams = {what: check for what, check in found.items() if "streams over 1" in what}
    assert len(streams) == 6
    for what, check in streams.items():
        assert abs(check.deviation) < (0.15 if "measured time of a step" in what else 0.35)


def test_a_switch_under_recompute_costs_the_encoding_of_its_context_and_under_keep_nothing() -> None:
    sizes = {
        "streams": 2,
        "prompt_tokens": 80,
        "answer_tokens": 20,
        "switches": 0.5,
        "gap_ms_p50": 90,
        "tokens_per_s": 9,
    }
    rows = [{"name": f"dlp-lora serve, {kv_policy}", **sizes} for kv_policy in ("fixed", "keep", "recompute")]
    keep, recompute = check_routed({"bandwidth_gb_s": 15.0, "rows": rows}, step_ms=75.0, token_ms=0.8)
    assert keep.predicted == pytest.approx(1e3 * 20 / (80 * 0.8 + 20 * 90 / 2))
    assert recompute.predicted == pytest.approx(1e3 * 20 / (80 * 0.8 + 0.5 * (80 + 20 / 2) * 0.8 + 20 * 90 / 2))
