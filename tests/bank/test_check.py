import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import dlp_lora
from conftest import ARCHITECTURES, byte_tokenizer, lively_model, make_adapter, tiny_model
from dlp_lora import AdapterError, Engine, ModelError
from dlp_lora.bank.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.check import check_adapters, model_layout
from dlp_lora.bank.export import export_mixture

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


def test_one_bad_folder_never_ends_the_check_of_the_others(adapters: Mapping[str, Path]) -> None:
    root = adapters["math"].parent

    def broken(name: str, **changes: Any) -> Path:
        folder = Path(shutil.copytree(adapters["math"], root / name))
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))
        return folder

    broken("glob", alpha_pattern={"*q_proj": 4})
    broken("numbers", target_modules=[1, 2])
    broken("deep", base_model_name_or_path={"a": 1}, revision=[[]], task_type=3)
    broken("a=1,b")
    (broken("nested") / CONFIG_FILE).write_text("[" * 100_000)
    (broken("folder") / WEIGHTS_FILE).unlink()
    (root / "folder" / WEIGHTS_FILE).mkdir()
    checks = {check.name: check for check in check_adapters(linear_layers(tiny_model()), root)}
    assert {name for name, check in checks.items() if check.fits} == {"math", "poems", "units", "deep"}
    assert "not a regular expression" in checks["glob"].reason
    assert all(check.reason for check in checks.values() if not check.fits)


def test_what_is_to_be_known_of_an_adapter_that_fits_is_told(adapters: Mapping[str, Path]) -> None:
    file = adapters["math"] / WEIGHTS_FILE
    save_file({k: 0 * t if "lora_B" in k else t for k, t in load_file(file).items()}, file)
    config = json.loads((adapters["units"] / CONFIG_FILE).read_text())
    config |= {"alpha_pattern": {"k_proj": 4}, "target_modules": ["q_proj", "v_proj", "c_attn"]}
    (adapters["units"] / CONFIG_FILE).write_text(json.dumps(config))
    checks = {check.name: check for check in check_adapters(linear_layers(tiny_model()), adapters)}
    assert all(check.fits for check in checks.values())
    assert "changes nothing: all of its lora_B are zero" in checks["math"].reason
    assert "its alpha_pattern has 'k_proj', which matches none of its modules" in checks["units"].reason
    assert "its target_modules has 'c_attn', which it has no weights for" in checks["units"].reason
    assert not checks["poems"].reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0, -0.0])
def test_numbers_are_seen_in_every_precision(dtype: torch.dtype, number: float, adapters: Mapping[str, Path]) -> None:
    if dtype is torch.float8_e4m3fn and math.isinf(number):
        pytest.skip("this type has no infinity")
    file = adapters["math"] / WEIGHTS_FILE
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = torch.full_like(tensor, number).to(dtype)
    save_file(tensors, file)
    (check,) = check_adapters(None, adapters["math"])
    assert check.fits == (number == 0)
    assert ("changes nothing" if number == 0 else "holds NaN or infinite numbers") in check.reason


def test_a_check_without_a_model_imports_no_torch(adapters: Mapping[str, Path]) -> None:
    code = (
        "import sys\nfrom dlp_lora.bank.check import check_adapters\n"
        "checks = check_adapters(None, sys.argv[1])\nassert all(c.fits for c in checks), checks\n"
        "print(len(checks), sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(adapters["math"].parent)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "3 []\n"


def base_folder(path: Path) -> Path:
    tiny_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_a_check_compares_copies_of_base_weights_with_the_stored_ones(tmp_path: Path) -> None:
    layout = model_layout(base_folder(tmp_path / "base"))
    folder = make_adapter(tiny_model(), tmp_path / "head", seed=1, modules_to_save=["lm_head"])
    (check,) = check_adapters(layout, folder)
    assert check.fits, check.reason
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({k: t + 1 if "lm_head" in k else t for k, t in tensors.items()}, folder / WEIGHTS_FILE)
    (check,) = check_adapters(layout, folder)
    assert not check.fits
    assert "modules_to_save=['lm_head']: it replaces whole layers" in check.reason
    (tmp_path / "base" / "model.safetensors").unlink()
    (check,) = check_adapters(model_layout(tmp_path / "base"), folder)
    assert not check.fits
    assert "only the base model can show whether it was changed" in check.reason


def test_a_tokenizer_or_template_that_is_not_the_bases_is_told(tmp_path: Path) -> None:
    layout = model_layout(base_folder(tmp_path / "base"))
    names = ("same", "template", "tokens", "none")
    folders = {name: make_adapter(tiny_model(), tmp_path / name, seed=1) for name in names}
    byte_tokenizer().save_pretrained(folders["same"])
    byte_tokenizer(chat_template="{{ messages[0].content }}").save_pretrained(folders["template"])
    other = byte_tokenizer()
    other.add_tokens(["<think>"])
    other.save_pretrained(folders["tokens"])
    checks = {check.name: check for check in check_adapters(layout, folders)}
    assert all(check.fits for check in checks.values())
    assert not checks["same"].reason
    assert not checks["none"].reason
    assert "brings a chat template, which differs from the base's" in checks["template"].reason
    assert "brings a tokenizer with 1 tokens that the base lacks (<think>)" in checks["tokens"].reason


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path) -> None:
    layout = model_layout(base_folder(tmp_path / "base"))
    folder = make_adapter(tiny_model(), tmp_path / "it", seed=1)
    byte_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(data))
    assert "2 tokens have other numbers" in check_adapters(layout, folder)[0].reason
    data["model"]["vocab"] = json.loads((tmp_path / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    file.write_text(json.dumps({**data, "normalizer": {"type": "Lowercase"}}))
    assert "cuts text otherwise than the base's" in check_adapters(layout, folder)[0].reason
    file.write_text("{")
    assert check_adapters(layout, folder)[0].fits


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
