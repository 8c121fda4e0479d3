"""A matrix of adapter folders, as strangers write them: each is applied as PEFT applies it, or refused by name."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import dlp_lora
from conftest import _SMALL, ARCHITECTURES, byte_tokenizer, make_adapter
from dlp_lora import AdapterError
from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.check import check_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
IDS = torch.arange(97, 109)[None]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
Keys = dict[str, Tensor]


def gemma3() -> PreTrainedModel:
    config = Gemma3Config(
        text_config={**_SMALL, "head_dim": 8, "sliding_window": 64},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=250,
        boi_token_index=251,
        eoi_token_index=252,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def llava() -> PreTrainedModel:
    text = {"model_type": "llama", **_SMALL, "tie_word_embeddings": False}
    vision = {"model_type": "clip_vision_model", **VISION, "projection_dim": 16}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=250))


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(**_SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)
    return Qwen3MoeForCausalLM(config)


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    **ARCHITECTURES,
    "gemma3": gemma3,
    "llava": llava,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
}
USUAL = {"phi3": ["qkv_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"]}


def base(family: str) -> PreTrainedModel:
    """A tiny model whose logits depend on its layers."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def made(folder: Path, family: str, **config: Any) -> Path:
    """An adapter of a family; on a multimodal one, of its text model."""
    config = {"target_modules": USUAL.get(family, ["q_proj", "v_proj"]), **config}
    if family in ("gemma3", "llava") and isinstance(config["target_modules"], list):
        config["target_modules"] = rf".*language_model.*\.({'|'.join(config['target_modules'])})"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_adapter(base(family), folder, seed=1, scale=0.3, **config)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rekey(folder: Path, change: Callable[[Keys], Keys]) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def renamed(change: Callable[[str], str]) -> Callable[[Keys], Keys]:
    return lambda tensors: {change(key): t for key, t in tensors.items()}


@torch.no_grad()
def peft_logits(folder: Path, family: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base(family), folder).eval()(IDS).logits


@torch.no_grad()
def our_logits(folder: Path, family: str, **settings: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = dlp_lora.load(base(family), tokenizer=byte_tokenizer(), adapters={"it": folder}, **settings)
    with engine.fixed({"it": 1.0}):
        return engine.model(IDS).logits


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def assert_fits(folder: Path, family: str) -> str:
    model = base(family)
    (check,) = check_adapters(linear_layers(model), folder)
    assert check.fits, check.reason
    return check.reason


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Settings that PEFT takes when the adapter is made

MADE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank and alpha": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 8, "use_rslora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.2},
    "a bias that is not saved": {"bias": "all"},
    "biases of the LoRA's layers": {"bias": "lora_only"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "no init": {"init_lora_weights": False},
    "tying": {"ensure_weight_tying": True},
    "the head, unchanged": {"modules_to_save": ["lm_head"]},
    "tokens, unchanged": {"trainable_token_indices": [3, 5]},
    "tokens by layer, unchanged": {"trainable_token_indices": {"embed_tokens": [7]}},
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize("config", MADE.values(), ids=MADE.keys())
def test_what_peft_saves_is_applied_as_peft_applies_it(config: dict[str, Any], family: str, tmp_path: Path) -> None:
    if family == "gpt2" and isinstance(config.get("trainable_token_indices"), dict):
        config = {"trainable_token_indices": {"wte": [7]}}
    folder = made(tmp_path / "it", family, **config)
    theirs = peft_logits(folder, family)
    assert_same(our_logits(folder, family), theirs)
    assert not torch.allclose(theirs, base(family)(IDS).logits, atol=1e-2)
    assert_fits(folder, family)


TARGETS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    "full names": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]},
    "one layer": {"layers_to_transform": 1},
    "layers by a pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "layers by patterns": {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    "without some": {"exclude_modules": ["v_proj"]},
    "without a pattern": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0.*q_proj"},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6}},
    "alphas": {"alpha_pattern": {"q_proj": 3, "^model.layers.0.*v_proj": 5}},
    "ranks, alphas and rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {".*v_proj": 3}},
    "a segment is no end": {"rank_pattern": {"proj": 9}, "alpha_pattern": {"self_attn": 3}},
    "rslora and ranks of layers": {
        "use_rslora": True,
        "r": 6,
        "lora_alpha": 5,
        "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 3, "v_proj": 12},
    },
    "alphas by alternatives": {"alpha_pattern": {"(q|k)_proj": 2.5, r".*layers\.1.*v_proj": 9}},
    "the first of two alphas": {"alpha_pattern": {".*_proj": 2, "q_proj": 20}},
    "a rank of one module": {"rank_pattern": {r"^model.layers.0.self_attn.q_proj$": 1}},
    "a part of a name is no name": {"rank_pattern": {"j": 9, "q_proj": 5}},
    "layers and one more than there are": {"layers_to_transform": [1, 5]},
    "without a module and a name": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj", "o_proj"],
    },
    "all-linear without a pattern": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "a pattern with anchors": {
        "target_modules": r"^model\.layers\.\d+\.(self_attn\.(q|o)|mlp\.down)_proj$",
    },
    "a parameter": {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]},
    "parameters, ranks and alphas": {
        "target_parameters": ["self_attn.o_proj.weight", "layers.1.mlp.up_proj.weight"],
        "rank_pattern": {"o_proj": 2, "up_proj.weight": 6},
        "alpha_pattern": {r"o_proj\.weight": 3},
    },
    "a parameter and rslora": {
        "target_modules": [],
        "target_parameters": ["q_proj.weight"],
        "use_rslora": True,
    },
    "more targets than PEFT lists": {
        "target_modules": [f"layers.{i}.self_attn.{p}_proj" for i in (0, 1, *range(2, 12)) for p in "qv"]
    },
}


@pytest.mark.parametrize("config", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_targets_and_patterns_are_those_of_peft(config: dict[str, Any], family: str, tmp_path: Path) -> None:
    if family == "qwen2" and config.get("target_modules") == ["q_proj", "lm_head"]:
        pytest.skip("the head of the tiny Qwen2 is tied")
    folder = made(tmp_path / "it", family, **config)
    assert_same(our_logits(folder, family), peft_logits(folder, family))
    assert_fits(folder, family)


# Settings that were edited, or written by other tools

EDITED: dict[str, dict[str, Any]] = {
    "fewer targets": {"target_modules": ["q_proj"]},
    "a narrower pattern": {"target_modules": r".*layers\.0.*q_proj"},
    "exclude_modules": {"exclude_modules": ["v_proj"]},
    "a pattern that excludes": {"exclude_modules": r".*\.1\..*"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_to_transform of another list": {"layers_to_transform": [1], "layers_pattern": ["layers"]},
    "more targets": {"target_modules": ["q_proj", "v_proj", "up_proj", "c_attn"]},
    "all-linear": {"target_modules": "all-linear"},
    "ALL-LINEAR": {"target_modules": "All-Linear"},
    "no targets": {"target_modules": None},
    "ms-swift": {"lora_dtype": "AUTO", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06},
    "a model's config": {"_from_model_config": True, "transformers_version": "4.40.0"},
    "dtype": {"dtype": "torch.float16"},
    "velora": {"velora_config": {"init_type": "batch_average", "num_groups": 64, "scale": 1.0}},
    "loftq without loftq": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    "a bias without one": {"bias": "lora_only"},
    "no task": {"task_type": None},
    "an early version": {"peft_version": None, "alpha_pattern": {}, "rank_pattern": {}},
    "another alpha": {"lora_alpha": 0.5},
    "an alpha below zero": {"lora_alpha": -4},
    "an alpha of zero": {"lora_alpha": 0},
    "a path of Windows": {"base_model_name_or_path": "D:\\models\\Llama-2-7b\\"},
    "a share of Windows": {"base_model_name_or_path": r"\\server\share\llama"},
    "no base": {"base_model_name_or_path": None},
    "kinds that are off": {
        "use_dora": False,
        "use_qalora": False,
        "use_bdlora": None,
        "alora_invocation_tokens": None,
        "lora_bias": False,
    },
    "DoRA by 0": {"use_dora": 0},
    "a bias on B that is not there": {"lora_bias": True},
    "the other orientation": {"fan_in_fan_out": True},
    "PEFT 0.2": {"enable_lora": None, "merge_weights": False, "peft_version": None},
    "PEFT 0.2 of GPT-2": {"enable_lora": [True, False, True], "merge_weights": False},
    "a pattern of one name": {"target_modules": "q_proj"},
    "a pattern that ends": {"target_modules": ".*q_proj"},
    "one layer as a number": {"layers_to_transform": 0},
    "no layers": {"layers_to_transform": []},
    "nothing to save": {"modules_to_save": []},
    "a parameter that is not there": {"target_parameters": ["mlp.nothing"]},
    "another task": {"task_type": "FEATURE_EXTRACTION"},
    "a rank of zero": {"r": 0},
    "a rank that is no whole number": {"r": 4.5},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("changes", EDITED.values(), ids=EDITED.keys())
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_edited_settings_mean_what_they_mean_to_peft(changes: dict[str, Any], family: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "it", family)
    edit(folder, **changes)
    try:
        theirs = peft_logits(folder, family)
    except (TypeError, ValueError, RuntimeError):
        with pytest.raises(AdapterError, match="it"):
            our_logits(folder, family)
    else:
        assert_same(our_logits(folder, family), theirs)
        assert_fits(folder, family)


# Keys

KEYS: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda k: k.replace(".weight", ".default.weight"),
    "another adapter's name": lambda k: k.replace(".weight", ".squad-v2.weight"),
    "no prefix": lambda k: k.removeprefix(PREFIX),
    "torch.compile": lambda k: "_orig_mod." + k,
    "torch.compile inside": lambda k: k.replace(PREFIX, PREFIX + "_orig_mod."),
    "DDP": lambda k: "module." + k,
    "DDP inside": lambda k: k.replace(PREFIX, PREFIX + "module."),
    "DDP and torch.compile": lambda k: "module._orig_mod." + k,
    "FSDP": lambda k: k.replace(".0.", ".0._fsdp_wrapped_module."),
    "FSDP at the top": lambda k: "_fsdp_wrapped_module." + k,
    "checkpointing": lambda k: k.replace(".1.", ".1._checkpoint_wrapped_module."),
    "DeepSpeed": lambda k: "_forward_module.module." + k,
    "Lightning": lambda k: "model." + k,
    "PEFT twice": lambda k: PREFIX + k,
    "PEFT twice, a name": lambda k: PREFIX + k.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("change", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_keys_of_wrapped_models_are_those_of_the_plain_one(
    change: Callable[[str], str], family: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "it", family)
    theirs = peft_logits(folder, family)
    rekey(folder, renamed(change))
    assert_same(our_logits(folder, family), theirs)
    assert_same(our_logits(folder, family, budget_mb=1e-6), theirs)
    assert_fits(folder, family)


@pytest.mark.parametrize("family", ["gemma3", "llava"])
@pytest.mark.parametrize("old", ["language_model.model", "model.language_model.model"])
@pytest.mark.parametrize("ranks", [{}, {"rank_pattern": {r"model\.language_model\.layers\.0\..*q_proj": 2}}], ids=str)
def test_older_names_of_multimodal_models_are_found(
    family: str, old: str, ranks: dict[str, Any], tmp_path: Path
) -> None:
    folder = made(tmp_path / "it", family, **ranks)
    rekey(folder, renamed(lambda k: k.replace("model.language_model", old)))
    theirs = peft_logits(folder, family)
    assert not torch.allclose(theirs, base(family)(IDS).logits, atol=1e-2)  # PEFT applies it
    assert_same(our_logits(folder, family), theirs)
    assert_same(our_logits(folder, family, budget_mb=1e-6), theirs)
    assert_fits(folder, family)


def test_an_adapter_of_the_text_model_alone_is_put_on_it(tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llava", target_modules=["q_proj", "o_proj"])
    theirs = peft_logits(folder, "llava")
    rekey(folder, renamed(lambda k: k.replace("model.language_model.", "model.")))  # as LlamaForCausalLM has them
    edit(folder, target_modules=["q_proj", "o_proj"])
    assert_same(our_logits(folder, "llava"), theirs)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "", "llm.model."])
def test_an_adapter_of_a_larger_model_is_put_on_its_text_model(prefix: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama")
    theirs = peft_logits(folder, "llama")
    rekey(folder, renamed(lambda k: k.replace(PREFIX + "model.", PREFIX + prefix)))
    assert_same(our_logits(folder, "llama"), theirs)


def test_other_parts_of_a_larger_model_are_refused_by_what_they_are(tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama")
    rekey(folder, renamed(lambda k: k.replace("model.layers.1", "model.vision_tower.encoder.layers.1")))
    with pytest.raises(
        AdapterError, match=r"vision_tower.* is not\. Layers of that kind are called like model\.layers"
    ):
        our_logits(folder, "llama")


def test_a_model_of_more_layers_or_other_ones_is_another_architecture(tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama")
    rekey(folder, renamed(lambda k: k.replace("layers.1", "layers.7")))
    with pytest.raises(AdapterError, match=r"trained on another architecture .*with more layers than the base model"):
        our_logits(folder, "llama")
    with pytest.raises(AdapterError, match=r"trained on another architecture .*the base model has no c_attn"):
        our_logits(made(tmp_path / "gpt2", "gpt2"), "llama")


def test_weights_of_several_adapters_in_one_file(tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama")
    theirs = peft_logits(folder, "llama")

    def both(first: str, second: str) -> Callable[[Keys], Keys]:
        return lambda tensors: {
            key.replace(".weight", f".{name}.weight"): (t if name == first else 2 * t)
            for key, t in tensors.items()
            for name in (first, second)
        }

    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    rekey(folder, both("default", "other"))
    assert_same(peft_logits(folder, "llama"), theirs)
    assert_same(our_logits(folder, "llama"), theirs)
    assert "also holds weights of the adapters other" in assert_fits(folder, "llama")
    rekey(plain, both("one", "two"))
    with pytest.raises(
        AdapterError, match=r"the weights of several adapters \(one, two\); save each in a separate folder"
    ):
        our_logits(plain, "llama")


DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("halves", ["AB", "A"])
def test_weights_of_any_precision_are_those_that_peft_computes_with(
    dtype: torch.dtype, halves: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "it", "llama")
    rekey(
        folder, lambda tensors: {k: t.to(dtype) if k.split(".lora_")[1][0] in halves else t for k, t in tensors.items()}
    )
    assert_same(our_logits(folder, "llama"), peft_logits(folder, "llama"))
    assert_same(our_logits(folder, "llama", budget_mb=1e-6), peft_logits(folder, "llama"))
    assert_fits(folder, "llama")


BESIDE: dict[str, Keys] = {
    "an optimiser's": {"optimizer.state": torch.ones(2)},
    "a LoRA that is not targeted": {
        PREFIX + "model.layers.0.self_attn.rotary.lora_A.weight": torch.ones(4, 8),
        PREFIX + "model.layers.0.self_attn.rotary.lora_B.weight": torch.ones(8, 4),
    },
}


@pytest.mark.parametrize("more", BESIDE.values(), ids=BESIDE.keys())
def test_weights_that_peft_has_no_place_for_are_left_out(more: Keys, tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama")
    rekey(folder, lambda tensors: {**tensors, **more})
    assert_same(our_logits(folder, "llama"), peft_logits(folder, "llama"))
    assert_fits(folder, "llama")


MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Conv1D as PEFT finds it": ("gpt2", {"fan_in_fan_out": False, "target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "fused layers of ranks": (
        "phi3",
        {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"], "rank_pattern": {"gate_up_proj": 7}},
    ),
    "a tied head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "a tied head by name": ("qwen2", {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    "both parts of a multimodal model": ("gemma3", {"target_modules": r".*\.(q_proj|v_proj)"}),
    "a vision tower's own layers": (
        "gemma3",
        {"target_modules": r".*(vision_tower|language_model).*(q_proj|fc1)"},
    ),
    "a projector": ("llava", {"target_modules": r".*(linear_1|q_proj)"}),
    "a parameter beside experts": ("mixtral", {"target_parameters": ["o_proj.weight"]}),
}


@pytest.mark.parametrize("family, config", MORE_FAMILIES.values(), ids=MORE_FAMILIES.keys())
def test_layers_of_other_families_are_those_that_peft_changes(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = made(tmp_path / "it", family, **config)
    assert_same(our_logits(folder, family), peft_logits(folder, family))
    assert_fits(folder, family)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_only_the_settings_say_whether_a_parameters_lora_is_applied(family: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "it", family, target_parameters=["self_attn.o_proj.weight"])
    edit(folder, target_parameters=None)
    assert_same(our_logits(folder, family), peft_logits(folder, family))
    assert "o_proj, are not applied, as in PEFT" in assert_fits(folder, family)


@pytest.mark.parametrize(
    ("family", "parameter", "message"),
    [
        (
            "qwen3_moe",
            "mlp.experts.gate_up_proj",
            r"experts\.gate_up_proj, which is no linear layer in this base but a",
        ),
        ("gpt2", "attn.c_proj.weight", r"c_proj\.weight as a parameter, which a Conv1D holds the other way round"),
        ("llama", "embed_tokens.weight", r"embed_tokens\.weight, which is no linear layer in this base but a"),
    ],
)
def test_parameters_that_are_no_linear_layers_are_refused(
    family: str, parameter: str, message: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "it", family, target_modules=[], target_parameters=[parameter])
    with pytest.raises(AdapterError, match=message):
        our_logits(folder, family)


def test_a_zero_bias_on_b_and_a_zero_embedding_change_nothing(tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama", lora_bias=True)
    rekey(folder, lambda tensors: {key: t * 0 if key.endswith("bias") else t for key, t in tensors.items()})
    assert_same(our_logits(folder, "llama"), peft_logits(folder, "llama"))
    assert "B.bias' changes nothing and is left out" in assert_fits(folder, "llama")
    folder = made(tmp_path / "embedding", "llama", target_modules=["q_proj", "embed_tokens"])
    rekey(folder, lambda tensors: {key: t * 0 if "embedding_B" in key else t for key, t in tensors.items()})
    assert_same(our_logits(folder, "llama"), peft_logits(folder, "llama"))


# Weights beside the LoRAs


def changed(part: str) -> Callable[[Keys], Keys]:
    return lambda tensors: {key: t + 0.5 if part in key else t for key, t in tensors.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    ("config", "part", "message"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            "lm_head",
            r"modules_to_save=\['lm_head'\]: it replaces whole layers of the",
        ),
        (
            {"trainable_token_indices": [3, 5]},
            "trainable_tokens",
            r"trainable_token_indices=\[3, 5\]: it changes token",
        ),
        ({"bias": "all"}, "bias", r"has trained biases \(bias='all'\).*; retrain with bias='none'"),
        ({"bias": "lora_only"}, "bias", r"has trained biases \(bias='lora_only'\).*; retrain with bias='none'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_was_trained_beside_the_loras_is_refused_by_name(
    family: str, config: dict[str, Any], part: str, message: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "it", family, **config)
    rekey(folder, changed(part))
    if not any(part in key for key in load_file(folder / WEIGHTS)):
        assert (family, part) == ("llama", "bias")
        assert_same(our_logits(folder, family), peft_logits(folder, family))
        return
    with pytest.raises(AdapterError, match=message):
        our_logits(folder, family)
    (check,) = check_adapters(linear_layers(base(family)), folder)
    assert not check.fits
    assert "retrain" in check.reason


def test_what_was_trained_and_is_not_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama", modules_to_save=["lm_head"])
    rekey(folder, lambda tensors: {key: t for key, t in tensors.items() if "lora_" in key})
    with pytest.raises(AdapterError, match=r"modules_to_save=\['lm_head'\]: lm_head was trained, but its weights are"):
        our_logits(folder, "llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_of_base_weights_are_compared_with_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama")
    theirs, model = peft_logits(folder, "llama"), base("llama")
    copies = {
        PREFIX + "model.embed_tokens.weight": model.get_input_embeddings().weight.detach().to(dtype),
        PREFIX + "lm_head.weight": model.get_output_embeddings().weight.detach().to(dtype),
        PREFIX + "model.norm.weight": model.get_decoder().norm.weight.detach().to(dtype),
        PREFIX + "v_head.summary.weight": torch.ones(1, 32),
    }
    rekey(folder, lambda tensors: {**tensors, **copies})
    assert_same(our_logits(folder, "llama"), theirs)
    assert "v_head" in assert_fits(folder, "llama")
    rekey(folder, changed("embed_tokens"))
    with pytest.raises(AdapterError, match=r"copy of the base model's model\.embed_tokens\.weight that differs"):
        our_logits(folder, "llama")
    (check,) = check_adapters(linear_layers(model), folder)
    assert not check.fits


def test_embeddings_of_more_tokens_are_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama")
    rows = torch.cat([base("llama").get_input_embeddings().weight.detach(), torch.ones(2, 32)])
    rekey(folder, lambda tensors: {**tensors, PREFIX + "model.embed_tokens.weight": rows})
    with pytest.raises(AdapterError, match=r"copy of the base model's model\.embed_tokens\.weight that differs"):
        our_logits(folder, "llama")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True: DoRA rescales"),
        ({"lora_bias": True}, r"lora_B\.bias'.*a trained bias on B"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"lora_embedding_A'.*it adapts the token embeddings"),
    ],
    ids=str,
)
def test_other_kinds_of_lora_are_refused_by_what_is_in_the_weights(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "it", "llama", **config)
    with pytest.raises(AdapterError, match=message):
        our_logits(folder, "llama")


def test_dora_is_seen_in_the_weights_whatever_the_settings_say(tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama", use_dora=True)
    edit(folder, use_dora=False)
    with pytest.raises(AdapterError, match=r"lora_magnitude_vector'.*DoRA rescales"):
        our_logits(folder, "llama")


def test_embeddings_that_the_settings_leave_out_are_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path / "it", "llama", target_modules=["q_proj", "embed_tokens"])
    edit(folder, target_modules=["q_proj"])
    assert_same(our_logits(folder, "llama"), peft_logits(folder, "llama"))


# Experts


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_refused_by_what_they_are(family: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "it", family, target_modules="all-linear")
    with pytest.raises(AdapterError, match=r"experts\.(down|gate_up)_proj, which is no linear layer in this base"):
        our_logits(folder, family)
    assert "architecture" not in check_adapters(linear_layers(base(family)), folder)[0].reason


def old_mixtral(folder: Path, targets: list[str]) -> Path:
    """As transformers 4 has the experts: linear layers of their own."""
    made(folder, "mixtral")
    generator = torch.Generator().manual_seed(0)

    def lora(name: str, d_in: int, d_out: int) -> Keys:
        start = f"{PREFIX}model.layers.{name}.lora_"
        return {
            f"{start}A.weight": torch.randn(4, d_in, generator=generator),
            f"{start}B.weight": torch.randn(d_out, 4, generator=generator),
        }

    def with_experts(tensors: Keys) -> Keys:
        for i in range(2):
            for x in range(4):
                for name, (d_in, d_out) in {"w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}.items():
                    tensors |= lora(f"{i}.block_sparse_moe.experts.{x}.{name}", d_in, d_out)
        return tensors

    rekey(folder, with_experts)
    edit(folder, target_modules=targets)
    return folder


def test_experts_of_an_older_version_are_the_same_parameters(tmp_path: Path) -> None:
    folder = old_mixtral(tmp_path / "it", ["q_proj", "v_proj", "w1", "w2", "w3"])
    assert not torch.allclose(peft_logits(folder, "mixtral"), base("mixtral")(IDS).logits, atol=1e-2)
    with pytest.raises(
        AdapterError, match=r"w\d adapts model\.layers.*, which is no linear layer in this base but a bare"
    ):
        our_logits(folder, "mixtral")


def test_experts_that_the_settings_leave_out_are_left_out(tmp_path: Path) -> None:
    folder = old_mixtral(tmp_path / "it", ["q_proj", "v_proj"])
    assert_same(our_logits(folder, "mixtral"), peft_logits(folder, "mixtral"))
