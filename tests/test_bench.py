import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import byte_tokenizer, lively_model
from dlp_lora import DLPLoRAError, Engine
from dlp_lora.bench import decode
from dlp_lora.bench.decode import DecodeArgs, bench_decode
from dlp_lora.environment import environment

SMALL = DecodeArgs(num_adapters=3, selected=2, r=2, new_tokens=4, rounds=2, dtypes=("float32",))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    lively_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_every_variant_has_a_row_with_its_ratio_over_the_base(model: Path) -> None:
    rounds: list[tuple[str, int, int]] = []
    args = replace(SMALL, dtypes=("float32", "bfloat16"))
    record = bench_decode(model, args, on_round=lambda *round_: rounds.append(round_))
    assert rounds == [(dtype, i, 2) for dtype in args.dtypes for i in range(3)]
    names = ["base", "base again", "dlp-lora, 2 of 3", "peft, one adapter"]
    assert [(row["name"], row["dtype"]) for row in record["rows"]] == [(n, d) for d in args.dtypes for n in names]
    for row in record["rows"]:
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["ms_per_token"] > 0
        assert row["ttft_ms"] > 0
        if row["name"] == "base":
            assert row["ratio"] == row["ratio_min"] == row["ratio_max"] == 1
    assert set(record["switch"]) == set(args.dtypes)
    assert record["model"] == "tiny"
    assert record["settings"]["new_tokens"] == 4
    assert json.loads(json.dumps(record, allow_nan=False))["rows"] == record["rows"]


def test_no_figures_are_given_when_the_disabled_engine_differs_from_the_base(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_and_perturb(*args: Any, **kwargs: Any) -> Engine:
        engine = load(*args, **kwargs)
        with torch.no_grad():
            next(engine.model.parameters()).add_(1e-3)
        return engine

    load = decode.load
    monkeypatch.setattr(decode, "load", load_and_perturb)
    with pytest.raises(DLPLoRAError, match="adapters disabled differs from the base model; no figures"):
        bench_decode(model, SMALL)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dtypes": ("float32", "half_a_float")}, "no dtype 'half_a_float'; choose from bfloat16"),
        ({"dtypes": ("nn",)}, "no dtype 'nn'"),
        ({"dtypes": ("int8",)}, "no dtype 'int8'"),
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"rounds": 0}, "rounds 1, got"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeArgs(**wrong)


def test_the_environment_names_hardware_and_versions() -> None:
    found = json.loads(json.dumps(environment()))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
