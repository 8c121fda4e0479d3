"""Options that say from where on the hub things come reach the repository that they name."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import dlp_lora
from commands import json_lines, ok, run
from conftest import byte_tokenizer, lively_model
from dlp_lora import BundleError, MiniMLP, ModelError, RouterError
from dlp_lora.engine.bundle import read_bundle
from dlp_lora.engine.outline import read_outline
from dlp_lora.router import MiniMLPConfig
from dlp_lora.router.encoder import TextEncoder
from dlp_lora.tasks import Example, Task, write_task
from hub import LocalHub, local_hub

NAMES = ("math", "poems", "units")
QUICK = ("--max-new-tokens", "6", "--json")
TOKEN = "hf_secret"


def write_base(folder: Path, seed: int = 0) -> Path:
    lively_model(seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, lively_adapters: Path) -> Path:
    root = tmp_path_factory.mktemp("parts")
    write_base(root / "base")
    write_base(root / "other", seed=5)
    MiniMLP(NAMES, byte_tokenizer().backend_tokenizer, MiniMLPConfig(dim=8, hidden=8)).save_pretrained(root / "router")
    engine = dlp_lora.load(root / "base", adapters=lively_adapters, router=root / "router")
    engine.save_pretrained(root / "bundle")
    return root


@pytest.fixture
def hub(parts: Path, lively_adapters: Path, tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub(tmp_path / "cache") as found:
        found.add("owner/base", parts / "other")
        found.add("owner/base", parts / "base", revision="v1")
        found.add("owner/adapters", lively_adapters, revision="v2")
        found.add("owner/router", parts / "router", revision="v3", token=TOKEN)
        found.add("owner/bundle", parts / "bundle", revision="v4")
        yield found


def test_each_part_comes_at_its_revision(hub: LocalHub, parts: Path) -> None:
    expected = json_lines(ok("generate", "Why?", "--bundle", parts / "bundle", *QUICK))
    names = ("--model", "owner/base", "--adapters", "owner/adapters", "--router", "owner/router")
    revisions = ("--revision", "v1", "--adapter-revision", "v2", "--router-revision", "v3", "--token", TOKEN)
    refused = run("generate", "Why?", *names, *revisions[:-2])
    assert refused.exit_code == 1
    assert "owner/router at revision 'v3' is not a folder, and cannot be loaded from the hub" in refused.stderr
    (found,) = json_lines(ok("generate", "Why?", *names, *revisions, *QUICK))
    assert found["text"] == expected[0]["text"]
    bundle = ("--bundle", "owner/bundle", "--revision", "v4", "--model", "owner/base", "--base-revision", "v1")
    (found,) = json_lines(ok("generate", "Why?", *bundle, *QUICK))
    assert found["text"] == expected[0]["text"]


def test_a_prompt_is_routed_by_what_lies_on_the_hub(hub: LocalHub, parts: Path) -> None:
    expected = ok("route", "Why?", "--router", parts / "router")
    there = ("--router", "owner/router", "--router-revision", "v3", "--token", TOKEN)
    assert ok("route", "Why?", *there) == expected
    assert ok("route", "Why?", "--bundle", "owner/bundle", "--revision", "v4") == expected


def test_subfolders_of_folders_are_found_too(parts: Path) -> None:
    ask = ("generate", "Why?", "--max-new-tokens", "6")
    assert ok(*ask, "--bundle", parts, "--subfolder", "bundle") == ok(*ask, "--bundle", parts / "bundle")
    assert ok("route", "Why?", "--router", parts, "--router-subfolder", "router") == ok(
        "route", "Why?", "--router", parts / "router"
    )


def test_a_mixture_is_exported_from_a_bundle_on_the_hub(hub: LocalHub, parts: Path, tmp_path: Path) -> None:
    there = ("--bundle", "owner/bundle", "--revision", "v4", "--model", parts / "base")
    ok("export", "math=1", *there, "--out", tmp_path / "mixed")
    assert (tmp_path / "mixed" / "adapter_config.json").is_file()


def test_an_adapter_is_trained_on_the_revision_that_was_named(hub: LocalHub, tmp_path: Path) -> None:
    examples = tuple(Example(prompt=f"What is {i}?", answer="It is.") for i in range(4))
    write_task(tmp_path / "data" / "sums", Task(name="sums", train=examples, test=()))
    train = (
        "train-adapter",
        tmp_path / "data" / "sums",
        "--model",
        "owner/base",
        "--target-modules",
        "q_proj",
        "--json",
    )
    hashes = {}
    for revision in ("v1", "main"):
        out = tmp_path / revision
        ok(*train, "--out", out, "--revision", revision)
        hashes[revision] = (out / "sums" / "adapter_model.safetensors").read_bytes()
    assert hashes["v1"] != hashes["main"]


def test_no_server_is_asked_for_what_must_be_here(hub: LocalHub) -> None:
    result = run("generate", "Why?", "--bundle", "owner/bundle", "--revision", "v4", "--local-files-only")
    assert result.exit_code == 1
    assert "owner/bundle at revision 'v4' is not a folder, and cannot be loaded from the hub" in result.stderr
    assert not hub.requests


def test_code_of_a_repository_runs_only_where_it_is_trusted(
    parts: Path, lively_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_base(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    ask = ("generate", "Why?", "--model", tmp_path / "base", "--adapters", lively_adapters, "--fixed", "math", *QUICK)
    refused = run(*ask, stdin="y\n" * 9)  # transformers would ask
    assert refused.exit_code == 1
    assert "trust_remote_code" in refused.stderr
    monkeypatch.setattr("sys.stdin", StringIO("y\n" * 9))
    with pytest.raises(ModelError, match="contains custom code"):
        read_outline(base_model=str(tmp_path / "base"), adapters=lively_adapters)
    with pytest.raises(RouterError, match="contains custom code"):
        TextEncoder.from_pretrained(tmp_path / "base")
    (found,) = json_lines(ok(*ask, "--trust-remote-code"))
    (plain,) = json_lines(ok("generate", "Why?", "--bundle", parts / "bundle", "--fixed", "math", *QUICK))
    assert found["text"] == plain["text"]


def test_adapters_are_checked_against_the_revision_that_was_named(
    hub: LocalHub, parts: Path, lively_adapters: Path, tmp_path: Path
) -> None:
    wide = LlamaConfig(**{**lively_model().config.to_dict(), "hidden_size": 64})
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    hub.add("owner/sizes", tmp_path / "wide")
    hub.add("owner/sizes", parts / "base", revision="v1", token=TOKEN)
    check = ("check", lively_adapters, "--model", "owner/sizes", "--json")
    at_v1 = ("--revision", "v1", "--token", TOKEN, "--cache-dir", tmp_path / "downloads")
    assert all(check["fits"] for check in json.loads(ok(*check, *at_v1)))
    assert not any("safetensors" in request for request in hub.requests)
    assert any((tmp_path / "downloads").rglob("config.json"))
    of_main = run(*check, "--token", TOKEN)
    assert of_main.exit_code == 1
    assert not any(check["fits"] for check in json.loads(of_main.stdout))
    asked = len(hub.requests)
    ok(*check, *at_v1, "--local-files-only")
    assert len(hub.requests) == asked
    ok("check", lively_adapters, "--model", parts, "--subfolder", "base")


def test_a_bundle_is_made_for_the_revision_that_was_named(
    hub: LocalHub, parts: Path, lively_adapters: Path, tmp_path: Path
) -> None:
    make = ("bundle", "--adapters", parts / "bundle" / "adapters", "--router", parts / "router")
    ok(*make, "--model", "owner/base", "--revision", "v1", "--out", tmp_path / "bundle")
    written = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["base_model"]
    assert (written["name"], written["origin"], written["path"]) == ("owner/base", "hub", None)
    ok(*make, "--model", parts, "--subfolder", "base", "--out", tmp_path / "other")
    assert read_bundle(tmp_path / "other").base_model == str(parts / "base")
    dlp_lora.load(parts, subfolder="base", adapters=lively_adapters).save_pretrained(tmp_path / "third")
    assert read_bundle(tmp_path / "third").base_model == str(parts / "base")
    assert "revision" not in json.loads((parts / "bundle" / "bundle.json").read_text())["base_model"]


@pytest.mark.parametrize("way", ["by the command", "by an engine"])
def test_a_bundle_keeps_the_revision_and_the_folder_of_its_base(
    way: str, hub: LocalHub, parts: Path, lively_adapters: Path, tmp_path: Path
) -> None:
    write_base(tmp_path / "repository" / "sub")
    hub.add("owner/base", tmp_path / "repository", revision="v5")
    bundle = tmp_path / "bundle"
    if way == "by the command":
        make = ("bundle", "--adapters", lively_adapters, "--router", parts / "router", "--out", bundle)
        ok(*make, "--model", "owner/base", "--revision", "v5", "--subfolder", "sub")
    else:
        place = {"revision": "v5", "subfolder": "sub"}
        dlp_lora.load("owner/base", **place, adapters=lively_adapters, router=parts / "router").save_pretrained(bundle)
        assert read_bundle(bundle).base.fingerprint is not None
    assert str(read_bundle(bundle).base) == "'owner/base', revision 'v5', subfolder 'sub'"
    ask = ("generate", "Why?", "--bundle")
    (found,) = json_lines(ok(*ask, bundle, *QUICK))
    (wanted,) = json_lines(ok(*ask, parts / "bundle", *QUICK))
    assert found["text"] == wanted["text"]
    (other,) = json_lines(ok(*ask, bundle, "--model", parts / "other", *QUICK))
    assert other["text"] != wanted["text"]
    again = dlp_lora.load(bundle)
    again.save_pretrained(bundle)
    assert read_bundle(bundle).base.place == {"revision": "v5", "subfolder": "sub"}
    with pytest.raises(BundleError, match="made for 'owner/base', revision 'v5', subfolder 'sub', and another program"):
        read_outline(bundle)
    assert read_outline(bundle, base_model=str(parts / "base")).adapters.keys() == {*NAMES}


def test_routers_are_made_with_the_revision_that_was_named(
    hub: LocalHub, parts: Path, lively_adapters: Path, tmp_path: Path
) -> None:
    made = ("router-from-adapters", lively_adapters)
    there = ("--model", "owner/base", "--revision", "v1")
    ok(*made, *there, "--out", tmp_path / "there")
    ok(*made, "--model", parts / "base", "--out", tmp_path / "here")
    weights = [(tmp_path / name / "router.safetensors").read_bytes() for name in ("there", "here")]
    assert weights[0] == weights[1]


def test_a_router_is_trained_with_the_tokenizer_or_encoder_at_its_revision(
    hub: LocalHub, parts: Path, tmp_path: Path
) -> None:
    for name in ("math", "poems"):
        examples = tuple(Example(prompt=f"{name} {i}", answer="1") for i in range(8))
        write_task(tmp_path / "data" / name, Task(name=name, train=examples, test=()))
    hub.add("owner/tokenizer", parts / "base", revision="v5", token=TOKEN)
    train = ("train-router", "--data", tmp_path / "data", "--epochs", "1", "--out", tmp_path / "router")
    there = ("--revision", "v5", "--token", TOKEN)
    refused = run(*train, "--tokenizer", "owner/tokenizer", *there[:-2])
    assert "no tokenizer can be loaded from 'owner/tokenizer'" in refused.stderr
    ok(*train, "--tokenizer", "owner/tokenizer", *there)
    missing = run(*train, "--router-kind", "encoder", "--encoder", "owner/tokenizer", "--revision", "v6", *there[2:])
    assert "owner/tokenizer at revision 'v6' is not a folder, and cannot be loaded from the hub" in missing.stderr
