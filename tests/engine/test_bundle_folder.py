import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from conftest import byte_tokenizer, make_adapter, tiny_model
from dlp_lora.bank.adapter_files import find_adapters
from dlp_lora.bank.peft_format import read_adapter
from dlp_lora.engine.base import Base
from dlp_lora.engine.bundle import Bundle, is_bundle, read_bundle, write_bundle
from dlp_lora.errors import BundleError
from dlp_lora.policy import RoutingSettings, Switching, TopP
from dlp_lora.router import Context, MiniMLP, MiniMLPConfig

BASE = Base(name="Qwen/Qwen2-1.5B", origin="hub")
POLICY = TopP(p=0.7, weighting="paper")
SETTINGS = RoutingSettings(
    policy=POLICY, switching=Switching(min_tokens=9), kv_policy="keep", prompt_routing="sentences"
)


def write(path: Path, adapters: Mapping[str, Path], **changes: Any) -> Path:
    parts: dict[str, Any] = {
        "base": BASE,
        "adapters": adapters,
        "router": None,
        "settings": SETTINGS,
    }
    write_bundle(path, **{**parts, **changes})
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, root = tiny_model("llama"), tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("math", "units", "poems")):
        make_adapter(model, root / name, seed=seed, r=2 + seed)
    return root


@pytest.fixture
def adapters(made: Path, tmp_path: Path) -> dict[str, Path]:
    """Three adapters, to be damaged."""
    shutil.copytree(made, tmp_path / "adapters")
    return {name: tmp_path / "adapters" / name for name in ("math", "units", "poems")}


@pytest.fixture
def bundle(adapters: Mapping[str, Path], tmp_path: Path) -> Path:
    return write(tmp_path / "bundle", adapters)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((bundle / "bundle.json").read_text())
    change(data)
    (bundle / "bundle.json").write_text(json.dumps(data))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_bundle_is_read_as_it_was_written(bundle: Path, adapters: Mapping[str, Path]) -> None:
    assert is_bundle(bundle)
    assert is_bundle(str(bundle))
    assert read_bundle(bundle) == Bundle(
        path=bundle,
        base=BASE,
        adapters={name: bundle / "adapters" / name for name in adapters},
        router=None,
        settings=SETTINGS,
    )
    assert list(read_bundle(bundle).adapters) == list(adapters)


def test_the_adapters_of_a_bundle_are_ordinary_peft_folders(bundle: Path, adapters: Mapping[str, Path]) -> None:
    assert find_adapters(bundle / "adapters") == dict(sorted(read_bundle(bundle).adapters.items()))
    for name, path in adapters.items():
        copied, original = read_adapter(bundle / "adapters" / name).modules, read_adapter(path).modules
        assert copied.keys() == original.keys()
        for module, lora in copied.items():
            assert torch.equal(lora.a, original[module].a)
            assert torch.equal(lora.b, original[module].b)
            assert lora.scaling == original[module].scaling


def test_a_bundle_moves_as_one_folder(bundle: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(bundle, tmp_path / "elsewhere"))
    assert all(path.is_relative_to(moved) for path in read_bundle(moved).adapters.values())


def test_a_bundles_router_gives_the_probabilities_of_the_one_saved(
    adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    router = some_router(adapters).eval()
    read = read_bundle(write(tmp_path / "bundle", adapters, router=router))
    assert read.router == tmp_path / "bundle" / "router"
    loaded = MiniMLP.from_pretrained(read.router)
    contexts = [Context(prompt="2 + 2 = ", answer="It is ", sentence="4")]
    assert loaded.names == router.names
    assert torch.equal(loaded.probabilities(contexts), router.probabilities(contexts))


def test_a_bundle_may_be_written_over_the_one_its_adapters_come_from(bundle: Path) -> None:
    before = contents(bundle / "adapters")
    write(bundle, read_bundle(bundle).adapters, settings=RoutingSettings())
    assert read_bundle(bundle).settings == RoutingSettings()
    assert contents(bundle / "adapters") == before


def older(data: dict[str, Any]) -> None:
    """As bundles were written before, routing settings beside the rest."""
    data.update(format=1, base_model="Qwen/Qwen2-1.5B", **data.pop("settings"))


def test_a_bundle_of_the_first_format_keeps_its_settings(bundle: Path) -> None:
    edit(bundle, older)
    assert read_bundle(bundle).settings == SETTINGS
    edit(bundle, lambda data: data.pop("prompt_routing"))  # the oldest
    assert read_bundle(bundle).settings == replace(SETTINGS, prompt_routing="whole")
    assert read_bundle(bundle).base == BASE


def test_an_adapter_dropped_from_a_bundle_is_gone_from_its_folder(bundle: Path, adapters: Mapping[str, Path]) -> None:
    write(bundle, {"math": adapters["math"]})
    assert [path.name for path in (bundle / "adapters").iterdir()] == ["math"]


def test_a_writing_that_fails_leaves_the_previous_bundle(bundle: Path, adapters: Mapping[str, Path]) -> None:
    before = contents(bundle)
    (adapters["units"] / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"units/adapter_model\.safetensors"):
        write(bundle, adapters)
    assert contents(bundle) == before
    assert [p.name for p in bundle.parent.iterdir() if p.name.startswith(".")] == []


def test_a_bundle_whose_replacement_was_killed_is_found(bundle: Path) -> None:
    bundle.rename(bundle.with_name(".bundle.previous"))
    assert is_bundle(bundle)
    assert len(read_bundle(bundle).adapters) == 3


# What is refused


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "/etc"])
def test_a_name_that_cannot_name_a_folder_is_refused(name: str, adapters: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the adapter name '.*' cannot name a folder; rename the adapter"):
        write(tmp_path / "bundle", {name: adapters["math"]})
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["../../adapters/math", "/etc", ".."])
def test_a_bundle_that_names_a_folder_outside_it_is_refused(name: str, bundle: Path) -> None:
    edit(bundle, lambda data: data["adapters"].update({name: data["adapters"].pop("math")}))
    with pytest.raises(BundleError, match=r"the adapter name '.*' cannot name a folder"):
        read_bundle(bundle)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BundleError, match=rf"{path.name} is not a bundle: it has no bundle\.json; make one with"):
            read_bundle(path)


def test_a_bundle_of_a_later_format_is_refused(bundle: Path) -> None:
    edit(bundle, lambda data: data.update(format=99))
    with pytest.raises(BundleError, match="bundle has bundle format 99; this version reads up to 3; upgrade dlp-lora"):
        read_bundle(bundle)


@pytest.mark.parametrize("text", [b"", b'{"format": 1,', b"[1]", b'"text"', b"null", b"\xff\xfe", b"{}"])
def test_a_damaged_bundle_is_refused(text: bytes, bundle: Path) -> None:
    (bundle / "bundle.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"bundle/bundle\.json is damaged \(.*\); make the bundle again"):
        read_bundle(bundle)


@pytest.mark.parametrize("key", ["base_model", "adapters", "router", "settings", "policy", "switching"])
def test_a_bundle_that_lacks_a_part_is_refused(key: str, bundle: Path) -> None:
    edit(bundle, lambda data: (data if key in data else data["settings"]).pop(key))
    with pytest.raises(BundleError, match=rf"bundle\.json is damaged \(KeyError\('{key}'\)\)"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": None},
        {"base_model": 7},
        {"adapters": ["math", "units"]},
        {"adapters": None},
        {"adapters": "math"},
        {"settings": None},
        {"settings": {"colour": "red"}},
        {"policy": "TopP"},
        {"policy": {}},
        {"policy": {"type": "Best"}},
        {"policy": {"type": "TopP", "p": 7}},
        {"policy": {"type": "TopP", "p": "0.6"}},
        {"policy": {"type": "TopP", "q": 0.6}},
        {"switching": []},
        {"switching": {"sometimes": True}},
        {"kv_policy": "forget"},
        {"prompt_routing": "words"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_a_bundle_that_holds_something_else_is_refused(change: dict[str, Any], bundle: Path) -> None:
    edit(bundle, lambda data: (data if change.keys() <= data.keys() else data["settings"]).update(change))
    with pytest.raises(BundleError, match=r"bundle\.json is damaged \(.*\); make the bundle again"):
        read_bundle(bundle)


def test_an_adapter_that_was_changed_is_noticed(bundle: Path) -> None:
    file = bundle / "adapters" / "units" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1e-6
    save_file(tensors, file)
    with pytest.raises(BundleError, match="bundle: its adapter 'units' is not the one that was saved; make the bundle"):
        read_bundle(bundle)


def some_router(names: Mapping[str, Path], **changes: int) -> MiniMLP:
    tokenizer = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    return MiniMLP(list(names), tokenizer, MiniMLPConfig(dim=4, hidden=8, **changes))


def test_a_router_that_was_exchanged_is_noticed(adapters: Mapping[str, Path], tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle", adapters, router=some_router(adapters))
    some_router(adapters, max_chars=99).save_pretrained(bundle / "router")
    with pytest.raises(BundleError, match="bundle: its router is not the one that was saved; make the bundle again"):
        read_bundle(bundle)


def test_an_older_bundle_has_no_hash_of_its_router(adapters: Mapping[str, Path], tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle", adapters, router=some_router(adapters))
    file = bundle / "bundle.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "router": True}))
    assert read_bundle(bundle).router == bundle / "router"


def test_an_adapter_whose_settings_were_changed_is_noticed(bundle: Path) -> None:
    file = bundle / "adapters" / "math" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(BundleError, match="bundle: its adapter 'math' is not the one that was saved"):
        read_bundle(bundle)


def test_adapters_that_were_swapped_are_noticed(bundle: Path) -> None:
    math, poems = bundle / "adapters" / "math", bundle / "adapters" / "poems"
    math.rename(bundle / "swap")
    poems.rename(math)
    (bundle / "swap").rename(poems)
    with pytest.raises(BundleError, match="its adapter 'math' is not the one that was saved"):
        read_bundle(bundle)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", ""])
def test_a_missing_adapter_is_noticed(file: str, bundle: Path) -> None:
    gone = bundle / "adapters" / "poems" / file
    gone.unlink() if file else shutil.rmtree(gone)
    with pytest.raises(BundleError, match=r"bundle: its adapter 'poems' is missing or unreadable"):
        read_bundle(bundle)
