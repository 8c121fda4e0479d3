"""What is released: the wheel and the source distribution, and what their metadata say."""

import importlib
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import dlp_lora
from conftest import byte_tokenizer, lively_model
from dlp_lora import MiniMLP
from dlp_lora.router import MiniMLPConfig

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the two distributions, built by the packages of the group `dev`."""
    for package in ("build", "hatchling"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install --group dev")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def wheel_files(dist: Path) -> dict[str, bytes]:
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def metadata(dist: Path) -> Message:
    return message_from_bytes(next(data for name, data in wheel_files(dist).items() if name.endswith("/METADATA")))


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    names = set(wheel_files(dist))
    tracked = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "dlp_lora").rglob("*.*")}
    tracked = {name for name in tracked if "__pycache__" not in name}
    assert {name for name in names if ".dist-info/" not in name} == tracked
    assert "dlp_lora/py.typed" in names
    assert "dlp_lora/serve/page/index.html" in names


def test_the_wheel_says_what_it_is_for_whom(dist: Path) -> None:
    found = metadata(dist)
    classifiers = found.get_all("Classifier", [])
    assert found["Name"] == "dlp-lora"
    assert found["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in classifiers
    assert "Programming Language :: Python :: 3.11" in classifiers
    assert any("arxiv.org/abs/2410.01497" in url for url in found.get_all("Project-URL", []))
    assert "lora" in found["Keywords"].split(",")
    assert set(found.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert found.get_payload().startswith("# dlp-lora")


def test_the_source_distribution_can_be_built_and_tested(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    for name in ("pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "tests/conftest.py"):
        assert name in names
    assert not [name for name in names if name.startswith(("results/", ".venv/", "runs/"))]


def test_every_place_names_the_same_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == PROJECT["version"]


def test_every_extra_is_tried_by_the_release_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = runpy.run_path(str(ROOT / "scripts" / "check_release.py"))
    assert set(script["EXTRAS"]) == set(PROJECT["optional-dependencies"])


@pytest.mark.clients
@pytest.mark.timeout(3600)
def test_the_wheel_runs_the_readme_the_command_and_the_server(
    tmp_path: Path, lively_adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `scripts/check_release.py` does, with a bundle of a tiny model in the demo's place and fewer extras."""
    pytest.importorskip("build", reason="build is not installed: pip install --group dev")
    model = lively_model()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    router = MiniMLP(("math", "poems", "units"), byte_tokenizer().backend_tokenizer, MiniMLPConfig(dim=8, hidden=8))
    engine = dlp_lora.load(tmp_path / "model", adapters=lively_adapters, router=router)
    engine.save_pretrained(tmp_path / "demo" / "bundle")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    importlib.import_module("check_release").check(tmp_path, ["serve"], model=str(tmp_path / "model"))
