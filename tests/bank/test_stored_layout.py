import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from conftest import lively_model, tiny_model
from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.check import model_layout
from dlp_lora.bank.stored_layout import TYPES, layout_of

SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def small(model_type: str, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZE, **settings))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", sorted(TYPES))
def test_the_headers_say_of_each_type_what_the_model_says(model_type: str, tied: bool, tmp_path: Path) -> None:
    model = small(model_type, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    stored = layout_of(tmp_path)
    assert stored is not None
    assert stored.layers == linear_layers(model)
    named = model.named_parameters(remove_duplicate=False)
    assert stored.parameters == {name: tuple(weight.shape) for name, weight in named}


def test_a_model_in_several_files_has_the_layout_of_one_in_one(tmp_path: Path) -> None:
    model = lively_model()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stored = layout_of(tmp_path)
    assert stored is not None
    assert stored.layers == linear_layers(model)


def test_the_layout_of_a_folder_imports_no_torch(tmp_path: Path) -> None:
    lively_model().save_pretrained(tmp_path)
    code = (
        "import sys; from dlp_lora.bank.stored_layout import layout_of; "
        "assert layout_of(sys.argv[1]).layers; assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_other_names_of_weights_are_left_to_transformers(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)
    assert layout_of(tmp_path) is None
    assert model_layout(tmp_path) == linear_layers(model)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None},
        {"model_type": "mine"},
    ],
    ids=str,
)
def test_headers_do_not_settle_models_that_are_built_otherwise(change: dict[str, Any], tmp_path: Path) -> None:
    lively_model().save_pretrained(tmp_path)
    assert layout_of(tmp_path) is not None
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert layout_of(tmp_path) is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_missing_or_damaged_is_left_to_transformers(name: str, tmp_path: Path) -> None:
    lively_model().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe{")
    assert layout_of(tmp_path) is None
    (tmp_path / name).unlink()
    assert layout_of(tmp_path) is None
    assert layout_of(tmp_path / "nowhere") is None


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_peft_renames_nothing_in_a_type_that_headers_settle(kind: str) -> None:
    assert get_checkpoint_conversion_mapping(kind) is None
