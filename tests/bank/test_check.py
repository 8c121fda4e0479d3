import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import dlp_lora
from conftest import ARCHITECTURES, byte_tokenizer, lively_model, make_adapter, tiny_model
from dlp_lora import AdapterError, Engine, ModelError
from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.check import check_adapters, model_layout
from dlp_lora.bank.export import export_mixture
from dlp_lora.bank.peft_format import WEIGHTS_FILE

INPUTS = {"input_ids": torch.tensor([[5, 77, 12, 200, 31, 8]])}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layout_is_that_of_the_model_and_needs_no_weights(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    model.config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert model_layout(tmp_path) == linear_layers(model)


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the base model .*nowhere' cannot be read"):
        model_layout(tmp_path / "nowhere")


def test_adapters_that_fit_say_what_they_adapt(adapters: Mapping[str, Path]) -> None:
    checks = check_adapters(linear_layers(tiny_model()), adapters["math"].parent)
    assert all(check.fits and not check.reason for check in checks)
    assert {check.name: check.rank for check in checks} == {"math": 4, "poems": 2, "units": 8}
    targets = {check.name: check.targets for check in checks}
    assert targets["math"] == targets["units"] == ("q_proj", "v_proj")
    assert {"q_proj", "down_proj", "up_proj"} < set(targets["poems"])


def test_each_adapter_is_refused_for_its_own_reason(adapters: Mapping[str, Path]) -> None:
    root = adapters["math"].parent
    make_adapter(tiny_model(), root / "dora", seed=4, use_dora=True)
    make_adapter(tiny_model("gpt2"), root / "gpt2", seed=5, target_modules=["c_attn"])
    shutil.copytree(root / "math", root / "short")
    (root / "short" / WEIGHTS_FILE).write_bytes(b"12345")
    checks = {check.name: check for check in check_adapters(linear_layers(tiny_model()), root)}
    assert {name for name, check in checks.items() if check.fits} == {"math", "poems", "units"}
    assert "retrain with use_dora=False" in checks["dora"].reason
    assert "c_attn" in checks["gpt2"].reason
    assert "truncated or not a safetensors file" in checks["short"].reason


def test_a_single_adapter_folder_is_checked_under_its_name(adapters: Mapping[str, Path]) -> None:
    (check,) = check_adapters(linear_layers(tiny_model()), adapters["units"])
    assert (check.name, check.fits) == ("units", True)


def test_adapters_can_be_given_by_name(adapters: Mapping[str, Path]) -> None:
    (check,) = check_adapters(linear_layers(tiny_model()), {"other": adapters["units"]})
    assert (check.name, check.path) == ("other", adapters["units"])


def test_a_folder_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="holds no adapter"):
        check_adapters(linear_layers(tiny_model()), tmp_path)


def test_a_check_is_json_data(adapters: Mapping[str, Path]) -> None:
    checks = check_adapters(linear_layers(tiny_model()), adapters)
    data = json.loads(json.dumps([check.to_dict() for check in checks]))
    assert [row["path"] for row in data] == [str(path) for path in adapters.values()]


@pytest.fixture
def engine(lively_adapters: Path) -> Engine:
    return dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters)


@pytest.mark.parametrize(
    "mixture",
    [{"math": 1.0}, {"units": 0.5}, {"math": 0.6, "units": 0.4}, {"math": 0.7, "units": -0.2, "poems": 0.5}],
    ids=str,
)
def test_an_exported_mixture_gives_the_logits_of_the_fused_one(
    engine: Engine, mixture: dict[str, float], tmp_path: Path
) -> None:
    export_mixture(engine.bank, mixture, tmp_path / "mixed")
    with torch.no_grad():
        with engine.fixed(mixture):
            ours = engine.model(**INPUTS).logits
        theirs = PeftModel.from_pretrained(lively_model(), tmp_path / "mixed").eval()(**INPUTS).logits
        base = lively_model()(**INPUTS).logits
    # Weights of 6 times the usual size: the logits are tens, so the tolerance is relative.
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    assert not torch.allclose(theirs, base, atol=1e-1)


def test_an_exported_mixture_can_be_an_adapter_of_a_bank(engine: Engine, tmp_path: Path) -> None:
    export_mixture(engine.bank, {"math": 0.6, "poems": 0.4}, tmp_path / "mixed")
    (check,) = check_adapters(linear_layers(lively_model()), tmp_path / "mixed")
    assert (check.fits, check.rank) == (True, 6)


def test_adapters_that_stay_on_disk_are_exported_like_those_in_memory(
    engine: Engine, lively_adapters: Path, tmp_path: Path
) -> None:
    lazy = dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters, budget_mb=1e-6)
    for found, name in ((engine, "held"), (lazy, "lazy")):
        export_mixture(found.bank, {"math": 0.6, "poems": 0.4}, tmp_path / name)
    assert (tmp_path / "lazy" / WEIGHTS_FILE).read_bytes() == (tmp_path / "held" / WEIGHTS_FILE).read_bytes()


def test_an_export_leaves_other_files_where_they_are_and_adapters_of_the_bank_alone(
    engine: Engine, lively_adapters: Path, tmp_path: Path
) -> None:
    export_mixture(engine.bank, {"math": 1.0}, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-10").mkdir()
    (tmp_path / "out" / "checkpoint-10" / "state").write_text("weeks of work")
    export_mixture(engine.bank, {"units": 1.0}, tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-10" / "state").read_text() == "weeks of work"
    with pytest.raises(AdapterError, match=r"poems is the folder of the adapter 'poems', which would be lost"):
        export_mixture(engine.bank, {"math": 1.0}, lively_adapters / "poems")


def test_exporting_replaces_what_was_there(engine: Engine, tmp_path: Path) -> None:
    export_mixture(engine.bank, {"math": 1.0, "units": 1.0}, tmp_path / "mixed")
    export_mixture(engine.bank, {"math": 1.0}, tmp_path / "mixed")
    assert check_adapters(linear_layers(lively_model()), tmp_path / "mixed")[0].rank == 4


@pytest.mark.parametrize(
    "mixture, error, message",
    [
        ({}, AdapterError, "the mixture is empty; there are math, poems, units"),
        ({"maths": 1.0}, AdapterError, "no adapter maths; there are math, poems, units"),
        ({"math": float("nan")}, ValueError, "the weight of adapter 'math' must be a finite number"),
    ],
)
def test_a_mixture_that_cannot_be_written_is_refused(
    engine: Engine, mixture: dict[str, float], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export_mixture(engine.bank, mixture, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
