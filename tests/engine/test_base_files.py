"""Base models in other files than a plain folder's: code of their own, and GGUF."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dlp_lora
from conftest import byte_tokenizer, tiny_model
from dlp_lora import ModelError
from dlp_lora.default_model import PACKAGE, default_model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A base whose class lies in its folder; `tmp_path / "ran"` exists once that code has run."""
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return folder


def test_code_of_a_base_runs_only_if_it_is_trusted(
    with_code: Path, lively_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ModelError, match="trust_remote_code"):
        dlp_lora.load(with_code, adapters=lively_adapters)
    assert not (tmp_path / "ran").exists()
    with dlp_lora.load(with_code, adapters=lively_adapters, trust_remote_code=True) as engine:
        assert (tmp_path / "ran").exists()
        assert type(engine.model).__name__ == "OwnForCausalLM"
        with engine.fixed({"math": 1.0}):
            own = engine.generate("Why?", max_new_tokens=8, do_sample=False).tokens
    plain = dlp_lora.load(tiny_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters)
    with plain.fixed({"math": 1.0}):
        assert plain.generate("Why?", max_new_tokens=8, do_sample=False).tokens == own


@pytest.mark.models
def test_a_gguf_file_gives_model_and_tokenizer(tmp_path: Path) -> None:
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        pytest.skip("needs the embedded model")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    adapters = tmp_path / "adapters"
    converted = default_model()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(converted), lora).save_pretrained(adapters / "one")
    folder = tmp_path / "gguf"
    folder.mkdir()
    shutil.copy(file, folder)
    ids = torch.tensor([[1, 2, 3, 4]])
    logits = []
    for source, kwargs in ((folder, {"gguf_file": file.name}), (converted, {})):
        engine = dlp_lora.load(source, adapters=adapters, dtype=torch.float32, **kwargs)
        with engine.fixed({"one": 1.0}), torch.no_grad():
            logits.append(engine.model(ids).logits)
        assert engine.tokenizer.decode(engine.tokenizer("How far?").input_ids) == "How far?"
    torch.testing.assert_close(*logits)
