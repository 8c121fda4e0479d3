"""Repositories of the hub, from a cache as downloads leave it: no server is asked."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import dlp_lora
from conftest import CHAT_TEMPLATE, byte_tokenizer, lively_model, make_adapter
from dlp_lora import AdapterError, BundleError, Engine, MiniMLP, ModelError, RouterError
from dlp_lora.bank.check import model_layout
from dlp_lora.router import MiniMLPConfig
from hub import local_hub

IDS = torch.tensor([[1, 2, 3]])
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Cache:
    """A hub cache: repositories with the revisions main and v1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, **revisions: Callable[[Path], object]) -> None:
        """Adds a repository; each revision writes its files into a folder."""
        root = self.folder / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        for revision, write in revisions.items():
            (root / "refs" / revision).write_text(COMMITS[revision])
            folder = root / "snapshots" / COMMITS[revision]
            folder.mkdir(parents=True)
            write(folder)

    def load(self, model: Any, **arguments: Any) -> Engine:
        return dlp_lora.load(model, cache_dir=self.folder, local_files_only=True, **arguments)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "hub")


def base(seed: int = 0, template: str = CHAT_TEMPLATE, subfolder: str = "") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        lively_model(seed=seed).save_pretrained(folder / subfolder)
        byte_tokenizer(chat_template=template).save_pretrained(folder / subfolder)

    return write


def adapter(seed: int, subfolder: str = "") -> Callable[[Path], object]:
    return lambda folder: make_adapter(lively_model(), folder / subfolder, seed=seed, scale=0.3)


def router(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        MiniMLP(names, byte_tokenizer().backend_tokenizer, MiniMLPConfig(dim=8, hidden=8)).save_pretrained(folder)

    return write


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def fixed_logits(engine: Engine, name: str) -> torch.Tensor:
    with engine.fixed({name: 1.0}):
        return logits(engine.model)


OTHER = CHAT_TEMPLATE.replace("assistant", "model")


@pytest.mark.parametrize("revision, seed, template", [(None, 0, CHAT_TEMPLATE), ("v1", 5, OTHER)])
def test_a_revision_is_that_of_weights_tokenizer_and_chat_template(
    cache: Cache, lively_adapters: Path, revision: str | None, seed: int, template: str
) -> None:
    cache.add("owner/base", main=base(), v1=base(5, OTHER))
    engine = cache.load("owner/base", adapters=lively_adapters, revision=revision)
    assert engine.tokenizer.chat_template == template
    with engine.disabled():
        assert torch.equal(logits(engine.model), logits(lively_model(seed=seed)))


def test_a_subfolder_is_that_of_model_and_tokenizer(cache: Cache, lively_adapters: Path, tmp_path: Path) -> None:
    cache.add("owner/base", main=base(5, OTHER, "sub"))
    base(5, OTHER, "sub")(tmp_path / "local")
    for source in ("owner/base", tmp_path / "local"):
        engine = cache.load(source, adapters=lively_adapters, subfolder="sub")
        assert engine.tokenizer.chat_template == OTHER
        with engine.disabled():
            assert torch.equal(logits(engine.model), logits(lively_model(seed=5)))


def test_adapters_and_routers_have_revisions_and_subfolders_of_their_own(cache: Cache, tmp_path: Path) -> None:
    cache.add("owner/base", main=base())
    cache.add("owner/loras", main=adapter(1, "math"), v1=adapter(2, "math"))
    cache.add("owner/units", main=adapter(3))
    cache.add("owner/router", main=router("other"), v1=router("math", "units"))
    engine = cache.load(
        "owner/base",
        adapters={"math": "owner/loras", "units": "owner/units"},
        adapter_revision={"math": "v1"},
        adapter_subfolder={"math": "math"},
        router="owner/router",
        router_revision="v1",
    )
    for name, seed in (("math", 2), ("units", 3)):
        adapter(seed)(tmp_path / name)
        local = dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters={name: tmp_path / name})
        assert torch.equal(fixed_logits(engine, name), fixed_logits(local, name))
    assert engine.router is not None
    assert engine.router.names == ("math", "units")
    with pytest.raises(ValueError, match="adapter_revision has maths; the adapters are math"):
        cache.load("owner/base", adapters={"math": "owner/loras"}, adapter_revision={"maths": "v1"})


def test_a_folder_has_no_revision(lively_adapters: Path, tmp_path: Path) -> None:
    router("math", "poems", "units")(tmp_path / "router")
    with pytest.raises(AdapterError, match="is a folder, which has no revision"):
        dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters, adapter_revision="v1")
    with pytest.raises(RouterError, match="is a folder, which has no revision"):
        dlp_lora.load_router(tmp_path / "router", revision="v1")


def test_a_base_that_is_here_is_loaded_without_a_question_to_the_hub(
    cache: Cache, tmp_path: Path, lively_adapters: Path
) -> None:
    """transformers looks for an adapter beside the base, too, and would ask the hub for it."""
    cache.add("owner/base", main=base())
    with local_hub(tmp_path / "downloads") as hub:
        cache.load("owner/base", adapters=lively_adapters)
    assert not [request for request in hub.requests if "owner/base" in request]


def test_an_adapter_of_the_hub_is_named_after_its_repository_or_subfolder(cache: Cache) -> None:
    cache.add("owner/base", main=base())
    cache.add("owner/units", main=adapter(3))
    cache.add("owner/loras", main=adapter(1, "math"))
    engine = cache.load("owner/base", adapters="owner/units")
    reach: dict[str, Any] = {"cache_dir": cache.folder, "local_files_only": True}
    assert engine.add_adapter("owner/loras", subfolder="math", **reach) == "math"
    engine.remove_adapter("units")
    assert engine.add_adapter("owner/units", **reach) == "units"
    assert engine.bank.names == ("math", "units")


def test_a_bundle_and_its_base_have_a_revision_each(cache: Cache, lively_adapters: Path) -> None:
    cache.add("owner/base", main=base(), v1=base(5))
    engine = cache.load("owner/base", adapters=lively_adapters)
    cache.add("owner/bundle", v1=engine.save_pretrained)
    again = cache.load("owner/bundle", revision="v1", base_revision="v1", base_model="owner/base")
    with again.disabled():
        assert torch.equal(logits(again.model), logits(lively_model(seed=5)))
    with pytest.raises(ValueError, match="are for bundles, but the first argument is not a bundle"):
        cache.load("owner/base", adapters=lively_adapters, base_revision="v1")


def test_an_empty_subfolder_is_none_and_one_outside_is_refused(
    cache: Cache, lively_adapters: Path, tmp_path: Path
) -> None:
    cache.add("owner/base", main=base())
    base()(tmp_path / "local")
    router("math", "poems", "units")(tmp_path / "router")
    parts: dict[str, Any] = {"adapters": lively_adapters, "adapter_subfolder": "", "router_subfolder": ""}
    for source in ("owner/base", tmp_path / "local"):
        engine = cache.load(source, subfolder="", router=tmp_path / "router", **parts)
        assert engine.bank.names == ("math", "poems", "units")
        engine.save_pretrained(tmp_path / "bundle")
    assert model_layout(tmp_path / "local", subfolder="") == engine.bank.base
    assert cache.load(tmp_path / "bundle", subfolder="", base_subfolder="").router is not None
    for outside in ("..", "../local", "sub/../..", str(tmp_path / "local")):
        with pytest.raises(ModelError, match=f"local has no folder '{outside}' inside it; give a subfolder without"):
            cache.load(tmp_path / "local", adapters=lively_adapters, subfolder=outside)
        with pytest.raises(BundleError, match="inside it; give a subfolder without"):
            cache.load(tmp_path / "bundle", base_subfolder=outside)
        with pytest.raises(AdapterError, match="inside it; give a subfolder without"):
            cache.load("owner/base", adapters=lively_adapters, adapter_subfolder=outside)
        with pytest.raises(BundleError, match="inside it; give a subfolder without"):
            cache.load(tmp_path / "bundle", subfolder=outside)


def test_what_is_not_in_the_cache_is_refused_with_its_revision(cache: Cache, lively_adapters: Path) -> None:
    cache.add("owner/base", main=base())
    with pytest.raises(ModelError, match=r"'owner/base' \(revision 'v2', cache_dir .*\) cannot be loaded"):
        cache.load("owner/base", adapters=lively_adapters, revision="v2")
    with pytest.raises(AdapterError, match="owner/none at revision 'v1' is not a folder, and cannot be loaded"):
        cache.load("owner/base", adapters={"a": "owner/none"}, adapter_revision="v1")
    with pytest.raises(RouterError, match="owner/none is not a folder, and cannot be loaded"):
        cache.load("owner/base", adapters=lively_adapters, router="owner/none")


def test_a_base_without_a_tokenizer_is_refused_with_the_whole_reason(lively_adapters: Path, tmp_path: Path) -> None:
    lively_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer that can be loaded; give one with tokenizer=") as error:
        dlp_lora.load(tmp_path, adapters=lively_adapters)
    assert not str(error.value).rstrip().endswith(":")
    assert len(str(error.value).splitlines()) == 1


def test_from_pretrained_is_load(lively_adapters: Path, tmp_path: Path) -> None:
    base()(tmp_path)
    engine = Engine.from_pretrained(tmp_path, adapters=lively_adapters)
    assert torch.equal(
        fixed_logits(engine, "math"), fixed_logits(dlp_lora.load(tmp_path, adapters=lively_adapters), "math")
    )


@pytest.mark.models
def test_one_prompt_is_a_generation_and_several_are_a_list_to_a_type_checker(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs mypy")
    file = tmp_path / "calls.py"
    file.write_text(
        "from typing import assert_type\n"
        "from dlp_lora import Engine, Generation\n"
        "def calls(engine: Engine, chat: list[dict[str, str]]) -> None:\n"
        "    assert_type(engine.generate('Why?'), Generation)\n"
        "    assert_type(engine.generate('Why?', max_new_tokens=3), Generation)\n"
        "    assert_type(engine.generate(chat), Generation)\n"
        "    assert_type(engine.generate(['Why?', 'How?']), list[Generation])\n"
        "    assert_type(engine.generate([chat, chat]), list[Generation])\n"
        "    assert_type(engine.generate('Why?', num_return_sequences=2), list[Generation])\n"
    )
    # With the settings and the cache of the project, whose imports take minutes the first time.
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(file)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
