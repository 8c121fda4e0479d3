import json
import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import dlp_lora
from conftest import byte_tokenizer, lively_model
from dlp_lora import BundleError, Engine, MiniMLP, RouterError
from dlp_lora.bank.adapter_files import find_adapters
from dlp_lora.default_model import NAME
from dlp_lora.engine.base import Base
from dlp_lora.engine.bundle import read_bundle
from dlp_lora.engine.outline import read_outline
from dlp_lora.router import Measured, MiniMLPConfig
from hub import LocalHub, local_hub

NAMES = ("math", "poems", "units")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, lively_adapters: Path) -> Path:
    """A folder with a base model and a bundle for it."""
    root = tmp_path_factory.mktemp("made")
    lively_model().save_pretrained(root / "models" / "tiny-base")
    byte_tokenizer().save_pretrained(root / "models" / "tiny-base")
    with engine_on(root / "models" / "tiny-base", lively_adapters) as engine:
        engine.save_pretrained(root / "bundles" / "mine")
    return root


def engine_on(base: Path, adapters: Path) -> Engine:
    router = MiniMLP(NAMES, byte_tokenizer().backend_tokenizer, MiniMLPConfig(dim=4, hidden=8)).eval()
    router.measured = Measured(accuracy=0.984, num_prompts=260)
    return dlp_lora.load(base, adapters=adapters, router=router)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "there"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub(tmp_path / "hub-cache") as found:
        yield found


def written(bundle: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((bundle / "bundle.json").read_text())
    return found


def test_a_bundle_and_its_base_move_together_and_no_absolute_path_goes_along(made: Path, root: Path) -> None:
    base = written(root / "bundles" / "mine")["base_model"]
    assert isinstance(base, dict)
    assert (base["name"], base["origin"], base["path"]) == ("tiny-base", "folder", "../../models/tiny-base")
    assert str(made) not in (root / "bundles" / "mine" / "bundle.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert dlp_lora.load(root / "bundles" / "mine").bank.names == NAMES


def test_a_link_to_a_bundle_finds_the_base_beside_the_bundle(root: Path, tmp_path: Path) -> None:
    link = tmp_path / "releases" / "current"
    link.parent.mkdir()
    os.symlink(root / "bundles" / "mine", link)
    assert read_bundle(link).base.find(link) == str(root / "models" / "tiny-base")
    assert dlp_lora.load(link).bank.names == NAMES


def test_a_router_for_other_adapters_is_refused_without_a_model_too(root: Path, lively_adapters: Path) -> None:
    bundle = read_bundle(root / "bundles" / "mine")
    adapters = root / "adapters"
    shutil.copytree(lively_adapters / "math", adapters / "math")
    shutil.copytree(lively_adapters / "units", adapters / "cooking")
    with pytest.raises(RouterError, match=r"the router knows poems, units, .* does not know the adapters cooking"):
        read_outline(base_model=str(root / "models" / "tiny-base"), adapters=adapters, router=bundle.router)


def test_without_its_base_a_bundle_says_for_which_it_was_made(root: Path) -> None:
    shutil.rmtree(root / "models")
    with pytest.raises(
        BundleError, match=r"was made for 'tiny-base' \(the folder .*\), which is not here; give --model"
    ):
        dlp_lora.load(root / "bundles" / "mine")


def test_another_base_is_warned_about(root: Path, tmp_path: Path) -> None:
    lively_model(seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    told = r"mine was made for 'tiny-base', but the base model '.*other' is another one: its weights are"
    with pytest.warns(UserWarning, match=told):
        dlp_lora.load(root / "bundles" / "mine", base_model=tmp_path / "other")


def test_a_base_that_the_hub_has_not_is_named(root: Path, hub: LocalHub) -> None:
    file = root / "bundles" / "mine" / "bundle.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "base_model": Base(name="someone/tiny-base", origin="hub").to_dict()}))
    with pytest.raises(BundleError, match=r"was made for 'someone/tiny-base', the base model .*; give --model"):
        dlp_lora.load(root / "bundles" / "mine")
    hub.add("someone/tiny-base", root / "models" / "tiny-base")
    assert dlp_lora.load(root / "bundles" / "mine").bank.names == NAMES


def test_the_embedded_model_is_named_not_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLP_LORA_CACHE", str(tmp_path / "cache"))
    lively_model().save_pretrained(tmp_path / "cache" / NAME)
    base = Base.of(str(tmp_path / "cache" / NAME), bundle=tmp_path / "bundle")
    assert (base.name, base.origin, base.path) == (NAME, "embedded", None)
    before = Base.from_source(f"/home/someone/.cache/dlp-lora/{NAME}")  # as bundles said before
    assert before.find(tmp_path / "bundle") == base.find(tmp_path / "bundle") == str(tmp_path / "cache" / NAME)


def test_a_model_in_a_cache_of_the_hub_has_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "models--someone--tiny" / "snapshots" / "abc123"
    lively_model().save_pretrained(folder)
    base = Base.of(str(folder), bundle=tmp_path / "bundle")
    assert (base.name, base.origin, base.path) == ("someone/tiny", "hub", None)


def test_all_files_of_a_bundle_may_be_read_by_others(root: Path) -> None:
    files = [path for path in (root / "bundles" / "mine").rglob("*") if path.is_file()]
    assert {file.name for file in files} > {"bundle.json", "README.md", "router.safetensors"}
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == {oct(0o666 & ~_umask())}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_card_says_base_adapters_router_and_how_to_load(root: Path) -> None:
    card = (root / "bundles" / "mine" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["library_name"]) == ("tiny-base", "dlp-lora")
    for line in ("| math | 4 | q_proj, v_proj |", "| units | 8 | q_proj, v_proj |", 'dlp_lora.load("mine")'):
        assert line in card
    assert "Router: MiniMLP, right on 98.4% of 260 test prompts." in card


def test_an_owners_card_stays_and_ours_is_written_again(root: Path, tmp_path: Path) -> None:
    engine = dlp_lora.load(root / "bundles" / "mine")
    card = tmp_path / "bundle" / "README.md"
    engine.save_pretrained(card.parent)
    card.write_text(card.read_text() + "stale")
    engine.save_pretrained(card.parent)
    assert "stale" not in card.read_text()
    card.write_text("# Mine")
    engine.save_pretrained(card.parent)
    assert card.read_text() == "# Mine"


def test_a_bundle_goes_to_the_hub_and_comes_back(root: Path, hub: LocalHub, tmp_path: Path) -> None:
    engine = dlp_lora.load(root / "bundles" / "mine")
    address = engine.push_to_hub("someone/pile", token="secret", revision="v1", commit_message="First")
    repository = hub.repositories["someone/pile"]
    assert (repository.is_private, repository.token, repository.messages) == (True, "secret", ["First"])
    assert "/someone/pile/" in address
    assert repository.branches["main"] == {}
    files = hub.files("someone/pile", "v1")
    assert str(tmp_path).encode() not in files["bundle.json"]
    assert b'dlp_lora.load("someone/pile")' in files["README.md"]
    for name, data in files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(data)
    assert read_bundle(tmp_path / "back").base.name == "tiny-base"
    math = find_adapters(root / "bundles" / "mine" / "adapters")["math"]
    other = dlp_lora.load(root / "models" / "tiny-base", adapters={"math": math})
    repository.branches["v1"]["README.md"] = b"# Mine"
    other.push_to_hub("someone/pile", token="secret", revision="v1")
    files = hub.files("someone/pile", "v1")
    assert {name.split("/")[1] for name in files if name.startswith("adapters/")} == {"math"}
    assert not [name for name in files if name.startswith("router/")]
    assert files["README.md"] == b"# Mine"


def test_a_refusal_of_the_hub_is_told(root: Path, hub: LocalHub) -> None:
    engine = dlp_lora.load(root / "bundles" / "mine")
    engine.push_to_hub("someone/pile", token="secret")
    with pytest.raises(BundleError, match=r"cannot be uploaded to 'someone/pile': .*"):
        engine.push_to_hub("someone/pile", token="wrong")


def test_what_engine_bundle_and_router_contain_is_in_their_repr(root: Path) -> None:
    engine = dlp_lora.load(root / "bundles" / "mine")
    found = read_bundle(root / "bundles" / "mine")
    for text in map(repr, (engine, engine.router, found)):
        assert "3 adapters: math, poems, units" in text
    assert "right on 98.4% of 260 test prompts" in repr(engine.router)
    assert "router: MiniMLP(" in repr(engine)
    assert "for 'tiny-base' (the folder ../../models/tiny-base)" in repr(found)
