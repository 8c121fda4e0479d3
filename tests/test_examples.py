import runpy
import sys
from pathlib import Path

import pytest

import dlp_lora
from conftest import byte_tokenizer, lively_model
from dlp_lora import MiniMLP
from dlp_lora.router import MiniMLPConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("math", "poems", "units")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, lively_adapters: Path) -> dict[str, Path]:
    """A tiny base model, adapters, a router of random weights and a bundle of them."""
    root = tmp_path_factory.mktemp("examples")
    lively_model().save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    MiniMLP(NAMES, byte_tokenizer().backend_tokenizer, MiniMLPConfig(dim=8, hidden=8)).save_pretrained(root / "router")
    engine = dlp_lora.load(root / "model", adapters=lively_adapters, router=root / "router")
    engine.save_pretrained(root / "bundle")
    return {"adapters": lively_adapters, **{name: root / name for name in ("model", "router", "bundle")}}


def run(name: str, *args: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"quickstart.py", "own_policy.py", "own_tasks.py"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_page(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40


def test_the_quickstart_answers_with_a_bundle_and_with_its_parts(
    parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--max-new-tokens", "6", "Hello", "Bye")
    run("quickstart.py", "--model", parts["bundle"], *quick, monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    assert "Hello\n  Mixture(" in shown
    assert "math alone: " in shown
    by_parts = ("--model", parts["model"], "--adapters", parts["adapters"], "--router", parts["router"])
    run("quickstart.py", *by_parts, *quick, monkeypatch=monkeypatch)
    assert capsys.readouterr().out == shown


def test_the_own_policy_decides_the_mixture(
    parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", parts["bundle"], "--max-new-tokens", "6", "--floor")
    run("own_policy.py", *args, "0", monkeypatch=monkeypatch)
    own, _, _ = capsys.readouterr().out.partition("TopP")
    assert all(f"{name}=" in own for name in NAMES)
    run("own_policy.py", *args, "1", monkeypatch=monkeypatch)
    assert capsys.readouterr().out.startswith("Sharpened\n  Mixture(): ")


def test_the_own_tasks_become_a_bundle(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", parts["model"], "--out", tmp_path, "--size", "12")
    run("own_tasks.py", *args, monkeypatch=monkeypatch)
    assert "held-out prompts" in capsys.readouterr().out
    engine = dlp_lora.load(tmp_path / "bundle")
    assert engine.bank.names == ("doubling", "greeting")
    assert engine.generate("What is 3 doubled?", max_new_tokens=4, do_sample=False).trace
