import gc
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import dlp_lora
from conftest import EveryK, HashRouter, byte_tokenizer, lively_model, make_adapter, tiny_model
from dlp_lora import (
    AdapterError,
    BundleError,
    Engine,
    Generation,
    MiniMLP,
    Mixture,
    ModelError,
    RouterError,
    Switching,
    TopK,
    TopP,
)
from dlp_lora.bank.export import export_mixture
from dlp_lora.engine.bundle import BUNDLE_FILE, read_bundle
from dlp_lora.engine.outline import read_outline
from dlp_lora.lab.bench.memory import held_nbytes
from dlp_lora.router import MiniMLPConfig, load_tokenizer
from dlp_lora.router.encoder import TextEncoder

NAMES = ("math", "poems", "units")
SETTINGS: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
PROMPTS = ["Tell me a tale", "Why?", "How far is it to the moon"]


def every_six() -> EveryK:
    return EveryK(6)


def mini_mlp(names: tuple[str, ...] = NAMES) -> MiniMLP:
    """A router of random weights, large enough to tell texts apart."""
    torch.manual_seed(4)
    router = MiniMLP(names, byte_tokenizer().backend_tokenizer, MiniMLPConfig(dim=16, hidden=24)).eval()
    with torch.no_grad():
        router.embedding.weight.normal_(std=3)
        for layer in router.layers:
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(2)
    return router


def same(one: Generation, other: Generation) -> None:
    assert one.tokens == other.tokens
    assert [(s.text, s.mixture, s.probabilities) for s in one.trace] == [
        (s.text, s.mixture, s.probabilities) for s in other.trace
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a base model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    lively_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def copied(adapters: Path, folder: Path) -> Path:
    return Path(shutil.copytree(adapters, folder))


@pytest.fixture
def engine(base: Path, lively_adapters: Path) -> Iterator[Engine]:
    with dlp_lora.load(
        base,
        adapters=lively_adapters,
        router=mini_mlp(),
        policy=TopK(2, weighting="paper"),
        switching=Switching(min_tokens=2, margin=0.01),
        segmenter=every_six,
        kv_policy="recompute",
        prompt_routing="sentences",
    ) as engine:
        yield engine


def folder_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def held_bytes() -> int:
    """Bytes of every tensor that lives, each place once."""
    gc.collect()
    # Other kinds of tensors, as compilation leaves behind, have no storage.
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta]
    return held_nbytes(tensors)


class TestLoad:
    def test_no_more_adapters_than_the_budget_holds_stay_in_memory(self, base: Path, lively_adapters: Path) -> None:
        whole = dlp_lora.load(base, adapters=lively_adapters)
        engine = dlp_lora.load(base, adapters=lively_adapters, budget_mb=1e-6)
        held = []
        for name in NAMES:
            with engine.fixed({name: 1.0}), whole.fixed({name: 1.0}):
                assert engine.generate("Hello", **SETTINGS).text == whole.generate("Hello", **SETTINGS).text
            held.append(len(engine.bank.tensors()))
        assert engine.bank.store.num_misses == len(NAMES)
        # Blocks of one adapter at a time: "poems" changes every layer, the others only two of them.
        assert held[0] == held[2] < held[1] < len(whole.bank.tensors())

    def test_each_adapter_is_held_once_beside_the_buffers_for_what_is_fused(self, lively_adapters: Path) -> None:
        model, tokenizer = lively_model(), byte_tokenizer()
        before = held_bytes()
        engine = dlp_lora.load(model, tokenizer=tokenizer, adapters=lively_adapters)
        once = 4 * engine.bank.num_parameters
        # Blocks, and buffers with room for all of them at once; the base weights were moved, not copied.
        assert held_bytes() - before == 2 * once

    def test_a_path_is_the_model_and_tokenizer_in_it(self, base: Path, lively_adapters: Path) -> None:
        loaded = dlp_lora.load(str(base), adapters=str(lively_adapters), router=HashRouter(), segmenter=every_six)
        in_memory = dlp_lora.load(
            lively_model(),
            tokenizer=byte_tokenizer(),
            adapters=lively_adapters,
            router=HashRouter(),
            segmenter=every_six,
        )
        same(loaded.generate(PROMPTS[0], **SETTINGS), in_memory.generate(PROMPTS[0], **SETTINGS))
        assert (loaded.policy, loaded.kv_policy, loaded.switching) == (TopP(0.6), "recompute", Switching())
        assert loaded.prompt_routing == "apart"
        assert not loaded.model.training

    def test_no_argument_is_dropped_for_a_model_in_memory_or_another_name_of_the_dtype(
        self, base: Path, lively_adapters: Path
    ) -> None:
        parts: dict[str, Any] = {"tokenizer": byte_tokenizer(), "adapters": lively_adapters}
        for strange in ({"swiching": Switching()}, {"dtype": torch.bfloat16}):
            with pytest.raises(ValueError, match=f"{next(iter(strange))}: no argument for a model that is in memory"):
                dlp_lora.load(lively_model(), **parts, **strange)
        with pytest.raises(ValueError, match="is dtype= here, not torch_dtype="):
            dlp_lora.load(base, adapters=lively_adapters, torch_dtype=torch.bfloat16)

    def test_adapters_may_be_given_by_name(self, base: Path, lively_adapters: Path) -> None:
        engine = dlp_lora.load(
            base, adapters={"sums": lively_adapters / "math", "verse": str(lively_adapters / "poems")}
        )
        assert engine.bank.names == ("sums", "verse")
        assert engine.router is None
        with engine.fixed({"sums": 1.0}):
            assert engine.generate("Why?", **SETTINGS).trace[0].mixture == Mixture({"sums": 1.0})

    def test_a_router_may_be_a_folder(self, base: Path, lively_adapters: Path, tmp_path: Path) -> None:
        mini_mlp().save_pretrained(tmp_path / "router")
        from_folder = dlp_lora.load(base, adapters=lively_adapters, router=tmp_path / "router", segmenter=every_six)
        given = dlp_lora.load(base, adapters=lively_adapters, router=mini_mlp(), segmenter=every_six)
        same(from_folder.generate(PROMPTS[0], **SETTINGS), given.generate(PROMPTS[0], **SETTINGS))

    def test_a_dtype_is_that_of_model_and_adapters(self, base: Path, lively_adapters: Path) -> None:
        engine = dlp_lora.load(base, adapters=lively_adapters, dtype=torch.bfloat16, device="cpu")
        assert engine.model.dtype == torch.bfloat16
        with engine.fixed({"math": 1.0}):
            assert engine.model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16

    def test_a_missing_model_is_refused_with_its_path(self, tmp_path: Path, lively_adapters: Path) -> None:
        for path in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
            with pytest.raises(ModelError, match=r"the base model '.*nowhere' cannot be loaded"):
                dlp_lora.load(path, adapters=lively_adapters)

    def test_a_model_of_pickled_weights_alone_is_refused(self, tmp_path: Path, lively_adapters: Path) -> None:
        model = tiny_model()
        model.config.save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError, match="cannot be loaded"):
            dlp_lora.load(tmp_path, adapters=lively_adapters)

    @pytest.mark.parametrize(
        "name, text, message",
        [
            ("model.safetensors", None, "has weights that are truncated or not in a safetensors file"),
            ("model.safetensors", "version https://git-lfs.github.com/spec/v1\n", "fetch them with `git lfs pull`"),
            ("tokenizer.json", '{"model": {"type": "Other"}, "added_tokens": []}', "has no tokenizer that can be"),
        ],
        ids=["truncated weights", "a pointer of Git LFS", "another tokenizer"],
    )
    def test_a_damaged_file_of_the_model_is_refused_in_a_line_with_its_folder(
        self, base: Path, tmp_path: Path, lively_adapters: Path, name: str, text: str | None, message: str
    ) -> None:
        folder = Path(shutil.copytree(base, tmp_path / "damaged"))
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2] if text is None else text.encode())
        with pytest.raises(ModelError, match=f"the base model '.*damaged' .*{message}") as error:
            dlp_lora.load(folder, adapters=lively_adapters)
        assert len(str(error.value).splitlines()) == 1
        if name == "tokenizer.json":
            with pytest.raises(ModelError, match=message):
                read_outline(base_model=str(folder), adapters=lively_adapters)
            with pytest.raises(RouterError, match=r"no tokenizer can be loaded from '.*damaged'"):
                load_tokenizer(folder)
        else:
            with pytest.raises(RouterError, match=r"the encoder '.*damaged' cannot be loaded"):
                TextEncoder.from_pretrained(folder)

    def test_a_model_in_memory_needs_its_tokenizer(self, lively_adapters: Path) -> None:
        with pytest.raises(ValueError, match=r"comes with its tokenizer: load\(model, tokenizer=\.\.\.\)"):
            dlp_lora.load(tiny_model(), adapters=lively_adapters)

    def test_a_path_that_is_nothing_at_all_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="nowhere is not a folder"):
            dlp_lora.load(tmp_path / "nowhere")

    def test_a_base_model_alone_is_refused(self, base: Path) -> None:
        with pytest.raises(BundleError, match="tiny-base is not a bundle; give adapters="):
            dlp_lora.load(base)

    def test_a_model_in_memory_without_adapters_is_refused_in_a_line(self) -> None:
        with pytest.raises(BundleError, match="give adapters=") as error:
            dlp_lora.load(tiny_model(), tokenizer=byte_tokenizer())
        assert len(str(error.value).splitlines()) == 1

    @pytest.mark.parametrize(
        "adapters, message",
        [("nowhere", "nowhere"), ("empty", "holds no adapter"), ({}, "give at least one adapter")],
    )
    def test_missing_adapters_are_refused(self, base: Path, tmp_path: Path, adapters: Any, message: str) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(AdapterError, match=message):
            dlp_lora.load(base, adapters=tmp_path / adapters if isinstance(adapters, str) else adapters)

    def test_an_adapter_by_name_that_is_missing_is_refused(self, base: Path, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="nowhere is not a folder"):
            dlp_lora.load(base, adapters={"math": tmp_path / "nowhere"})

    def test_a_base_model_replaces_that_of_a_bundle_only(self, base: Path, lively_adapters: Path) -> None:
        with pytest.raises(ValueError, match="the first argument is not a bundle"):
            dlp_lora.load(base, adapters=lively_adapters, base_model=base)

    def test_a_model_is_attached_to_once_at_a_time(self, lively_adapters: Path) -> None:
        model, tokenizer = lively_model(), byte_tokenizer()
        engine = dlp_lora.load(model, tokenizer=tokenizer, adapters=lively_adapters)
        with pytest.raises(ModelError, match=r"attached already; call detach\(\)"):
            dlp_lora.load(model, tokenizer=tokenizer, adapters=lively_adapters)
        engine.detach()
        dlp_lora.load(model, tokenizer=tokenizer, adapters=lively_adapters)

    @pytest.mark.parametrize(
        "names, messages",
        [
            (("math", "poems", "units", "law"), ["knows law, which no adapter is named"]),
            (("math", "units"), ["does not know the adapters poems"]),
            (("maths", "poems", "units"), ["knows maths, which no adapter", "does not know the adapters math;"]),
        ],
    )
    def test_a_router_for_other_adapters_is_refused_with_the_names(
        self, base: Path, lively_adapters: Path, names: tuple[str, ...], messages: list[str]
    ) -> None:
        with pytest.raises(RouterError, match="give the adapters it was trained for, or train it again") as error:
            dlp_lora.load(base, adapters=lively_adapters, router=HashRouter(names))
        assert all(message in str(error.value) for message in messages)
        assert str(error.value).count("know") == len(messages)

    def test_a_routers_names_may_come_in_any_order(self, base: Path, lively_adapters: Path) -> None:
        texts = [
            dlp_lora.load(base, adapters=lively_adapters, router=HashRouter(names), segmenter=every_six)
            .generate(PROMPTS[0], **SETTINGS)
            .text
            for names in (NAMES, NAMES[::-1])
        ]
        assert texts[0] == texts[1]


class TestBaseName:
    @pytest.fixture
    def named(self, tmp_path: Path) -> Path:
        make_adapter(tiny_model(), tmp_path / "adapters" / "math", seed=1, base_name="someone/Tiny-Base")
        return tmp_path / "adapters"

    def model(self, name: str) -> PreTrainedModel:
        model = tiny_model()
        model.config._name_or_path = name
        return model

    @pytest.mark.parametrize("name", ["other/Huge-Base", "models/huge-base"])
    def test_another_name_is_warned_about_with_both_names(self, named: Path, name: str) -> None:
        with pytest.warns(UserWarning, match=rf"'someone/Tiny-Base', but the base model is '{name}'"):
            dlp_lora.load(self.model(name), tokenizer=byte_tokenizer(), adapters=named)

    def test_another_name_is_an_error_under_strict(self, named: Path) -> None:
        with pytest.raises(AdapterError, match=r"'someone/Tiny-Base', but the base model is 'other/Huge-Base'"):
            dlp_lora.load(self.model("other/Huge-Base"), tokenizer=byte_tokenizer(), adapters=named, strict=True)

    @pytest.mark.parametrize("name", ["someone/Tiny-Base", "./tiny-base", "copies/tiny-base/", "Tiny-Base", ""])
    def test_a_local_copy_of_the_same_name_is_fine(self, named: Path, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            dlp_lora.load(self.model(name), tokenizer=byte_tokenizer(), adapters=named, strict=True)

    def test_a_model_loaded_from_a_path_is_named_after_its_folder(self, base: Path, tmp_path: Path) -> None:
        make_adapter(tiny_model(), tmp_path / "adapters" / "math", seed=1, base_name="someone/tiny-base")
        dlp_lora.load(base, adapters=tmp_path / "adapters", strict=True)
        shutil.copytree(base, tmp_path / "other")
        with pytest.raises(AdapterError, match="'someone/tiny-base', but the base model is"):
            dlp_lora.load(tmp_path / "other", adapters=tmp_path / "adapters", strict=True)


class TestBundle:
    def test_a_bundle_gives_the_same_generations(self, engine: Engine, tmp_path: Path) -> None:
        engine.save_pretrained(tmp_path / "bundle")
        loaded = dlp_lora.load(tmp_path / "bundle", segmenter=every_six)
        assert loaded.policy == TopK(2, weighting="paper")
        assert loaded.switching == Switching(min_tokens=2, margin=0.01)
        assert loaded.kv_policy == "recompute"
        assert loaded.prompt_routing == "sentences"
        assert loaded.bank.names == engine.bank.names
        expected = engine.generate(PROMPTS, **SETTINGS)
        assert len({s.mixture for generation in expected for s in generation.trace}) >= 3
        for found, wanted in zip(loaded.generate(PROMPTS, **SETTINGS), expected, strict=True):
            same(found, wanted)

    def test_a_bundle_of_a_bundle_is_the_same_bundle(self, engine: Engine, tmp_path: Path) -> None:
        one, two = tmp_path / "one" / "bundle", tmp_path / "two" / "bundle"  # its card has the folder's name
        engine.save_pretrained(one)
        dlp_lora.load(str(one)).save_pretrained(two)
        assert folder_of(one) == folder_of(two)

    def test_an_engine_goes_on_after_it_is_saved_over_its_bundle(self, engine: Engine, tmp_path: Path) -> None:
        engine.save_pretrained(tmp_path / "bundle")
        loaded = dlp_lora.load(tmp_path / "bundle", segmenter=every_six, budget_mb=0.001)
        for _ in range(2):
            loaded.save_pretrained(tmp_path / "bundle")
        assert read_bundle(tmp_path / "bundle").adapters.keys() == {*engine.bank.names}
        same(loaded.generate(PROMPTS[0], **SETTINGS), engine.generate(PROMPTS[0], **SETTINGS))

    def test_a_bundle_may_be_moved(self, engine: Engine, tmp_path: Path) -> None:
        engine.save_pretrained(tmp_path / "here" / "bundle")
        shutil.move(tmp_path / "here", tmp_path / "there")
        loaded = dlp_lora.load(tmp_path / "there" / "bundle", segmenter=every_six)
        same(loaded.generate(PROMPTS[0], **SETTINGS), engine.generate(PROMPTS[0], **SETTINGS))

    def test_a_bundle_may_have_no_router(self, base: Path, lively_adapters: Path, tmp_path: Path) -> None:
        dlp_lora.load(base, adapters=lively_adapters).save_pretrained(tmp_path / "bundle")
        loaded = dlp_lora.load(tmp_path / "bundle")
        assert loaded.router is None
        with loaded.fixed({"units": 1.0}):
            assert loaded.generate("Why?", **SETTINGS).tokens

    def test_arguments_win_over_the_bundle(self, engine: Engine, tmp_path: Path) -> None:
        engine.save_pretrained(tmp_path / "bundle")
        loaded = dlp_lora.load(
            tmp_path / "bundle",
            policy=TopK(k=1),
            switching=Switching(min_tokens=9),
            kv_policy="keep",
            prompt_routing="whole",
            router=HashRouter(),
        )
        assert (loaded.policy, loaded.switching, loaded.kv_policy) == (TopK(k=1), Switching(min_tokens=9), "keep")
        assert loaded.prompt_routing == "whole"
        assert isinstance(loaded.router, HashRouter)

    def test_a_bundle_may_be_put_on_another_base_model(self, engine: Engine, base: Path, tmp_path: Path) -> None:
        engine.save_pretrained(tmp_path / "bundle")
        expected = engine.generate(PROMPTS[0], **SETTINGS)
        shutil.copytree(base, tmp_path / "copy")
        for other in (tmp_path / "copy", str(tmp_path / "copy")):
            loaded = dlp_lora.load(tmp_path / "bundle", base_model=other, segmenter=every_six)
            same(loaded.generate(PROMPTS[0], **SETTINGS), expected)
        in_memory = dlp_lora.load(
            tmp_path / "bundle", base_model=lively_model(), tokenizer=byte_tokenizer(), segmenter=every_six
        )
        same(in_memory.generate(PROMPTS[0], **SETTINGS), expected)
        another = dlp_lora.load(
            tmp_path / "bundle", base_model=lively_model(seed=9), tokenizer=byte_tokenizer(), segmenter=every_six
        )
        assert another.generate(PROMPTS[0], **SETTINGS).tokens != expected.tokens

    def test_a_bundle_whose_base_model_is_gone_is_refused_with_its_name(self, engine: Engine, tmp_path: Path) -> None:
        engine.model.config._name_or_path = str(tmp_path / "gone")
        engine.save_pretrained(tmp_path / "bundle")
        with pytest.raises(BundleError, match=r"was made for 'gone' .*, which is not here; give --model"):
            dlp_lora.load(tmp_path / "bundle")

    def test_a_bundle_of_a_nameless_model_asks_for_the_base_model(self, lively_adapters: Path, tmp_path: Path) -> None:
        nameless = dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters)
        nameless.save_pretrained(tmp_path / "bundle")
        with pytest.raises((ModelError, BundleError), match="base_model"):
            dlp_lora.load(tmp_path / "bundle")

    def test_an_interrupted_save_keeps_the_bundle_that_was_there(self, engine: Engine, tmp_path: Path) -> None:
        engine.save_pretrained(tmp_path / "bundle")
        before = folder_of(tmp_path)
        with engine.using(router=HashRouter()), pytest.raises(OSError, match="the disk is full"):
            engine.save_pretrained(tmp_path / "bundle")
        assert folder_of(tmp_path) == before
        assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
        dlp_lora.load(tmp_path / "bundle")

    def test_an_interrupted_first_save_leaves_nothing(self, engine: Engine, tmp_path: Path) -> None:
        with engine.using(router=HashRouter()), pytest.raises(OSError, match="the disk is full"):
            engine.save_pretrained(tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []

    def test_saving_over_its_own_bundle_is_safe(self, engine: Engine, tmp_path: Path) -> None:
        engine.save_pretrained(tmp_path / "bundle")
        loaded = dlp_lora.load(tmp_path / "bundle", segmenter=every_six)
        loaded.policy = TopK(k=2)
        loaded.save_pretrained(tmp_path / "bundle")
        again = dlp_lora.load(tmp_path / "bundle", segmenter=every_six)
        assert again.policy == TopK(k=2)
        same(again.generate(PROMPTS[0], **SETTINGS), loaded.generate(PROMPTS[0], **SETTINGS))

    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    def test_a_bundle_keeps_its_kv_policy_and_one_with_the_default_of_before_says_so(
        self, engine: Engine, tmp_path: Path, kv_policy: str
    ) -> None:
        engine.settings = replace(engine.settings, kv_policy=kv_policy)
        engine.save_pretrained(tmp_path / "bundle")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert dlp_lora.load(tmp_path / "bundle").kv_policy == kv_policy  # it was chosen
        file = tmp_path / "bundle" / BUNDLE_FILE
        data = json.loads(file.read_text())
        file.write_text(
            json.dumps({**data, "format": 1, "base_model": engine.model.config._name_or_path, **data.pop("settings")})
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert dlp_lora.load(tmp_path / "bundle").kv_policy == kv_policy
            assert dlp_lora.load(tmp_path / "bundle", kv_policy="recompute").kv_policy == "recompute"
        told = [str(w.message) for w in caught if "was saved with kv_policy" in str(w.message)]
        assert len(told) == (kv_policy == "keep")

    def test_a_policy_of_ones_own_cannot_be_saved_by_name(self, engine: Engine, tmp_path: Path) -> None:
        def heaviest(probabilities: Any) -> Mixture:
            return Mixture({max(probabilities, key=probabilities.get): 1.0})

        engine.policy = heaviest
        assert engine.generate(PROMPTS[0], **SETTINGS).trace[0].mixture
        with pytest.raises(ValueError, match=r"function is not one of TopP, .*; it cannot be saved by name"):
            engine.save_pretrained(tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()

    @pytest.mark.parametrize(
        "text, message",
        [
            ('{"format": 1', "is damaged"),
            ("[]", "is damaged"),
            ('{"format": 1}', "is damaged .*KeyError"),
            ('{"format": 99}', "has bundle format 99; this version reads up to 3; upgrade dlp-lora"),
        ],
    )
    def test_a_damaged_bundle_is_refused(self, engine: Engine, tmp_path: Path, text: str, message: str) -> None:
        engine.save_pretrained(tmp_path / "bundle")
        (tmp_path / "bundle" / BUNDLE_FILE).write_text(text)
        with pytest.raises(BundleError, match=message):
            dlp_lora.load(tmp_path / "bundle")

    def test_an_adapter_changed_or_gone_is_refused_with_its_name(self, engine: Engine, tmp_path: Path) -> None:
        engine.save_pretrained(tmp_path / "bundle")
        file = tmp_path / "bundle" / "adapters" / "poems" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 99}))
        with pytest.raises(BundleError, match="its adapter 'poems' is not the one that was saved"):
            dlp_lora.load(tmp_path / "bundle")
        shutil.rmtree(file.parent)
        with pytest.raises(BundleError, match="its adapter 'poems' is missing or unreadable"):
            dlp_lora.load(tmp_path / "bundle")

    @pytest.mark.parametrize(
        "changes",
        [
            {"policy": {"type": "Best"}},
            {"policy": {"type": "TopP", "q": 1}},
            {"switching": {"min": 1}},
            {"kv_policy": "x"},
        ],
    )
    def test_settings_that_are_none_are_a_damaged_bundle(
        self, engine: Engine, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        engine.save_pretrained(tmp_path / "bundle")
        file = tmp_path / "bundle" / BUNDLE_FILE
        data = json.loads(file.read_text())
        file.write_text(json.dumps({**data, "settings": data["settings"] | changes}))
        with pytest.raises(BundleError, match="is damaged"):
            dlp_lora.load(tmp_path / "bundle")


def test_a_bundle_or_an_export_holds_what_the_engine_runs_with(
    base: Path, lively_adapters: Path, tmp_path: Path
) -> None:
    adapters = copied(lively_adapters, tmp_path / "adapters")
    engine = dlp_lora.load(base, adapters=adapters)
    make_adapter(lively_model(), adapters / "math", seed=77)
    for write in (engine.save_pretrained, partial(export_mixture, engine.bank, {"math": 0.5, "units": 0.5})):
        with pytest.raises(AdapterError, match="math was written again since it was added as 'math'"):
            write(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    shutil.rmtree(adapters / "math")
    with pytest.raises(AdapterError, match="the folder of the adapter 'math', cannot be read"):
        engine.save_pretrained(tmp_path / "out")
    engine.remove_adapter("math")
    engine.save_pretrained(tmp_path / "out")
    assert dlp_lora.load(tmp_path / "out").bank.names == ("poems", "units")
