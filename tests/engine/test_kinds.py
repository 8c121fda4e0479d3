"""Which models are loaded, on which device, and why others are refused."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import dlp_lora
from conftest import byte_tokenizer, lively_model, make_adapter, tiny_model
from dlp_lora import AdapterError, ModelError
from dlp_lora.bank.adapter_files import WEIGHTS_FILE
from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.device import check_devices, choose_device
from dlp_lora.bank.peft_format import check_base_copies, read_adapter
from dlp_lora.engine.cache import CACHE_NAME

SMALL: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "eos_token_id": 256,
    "pad_token_id": 258,
}
LLAMA: dict[str, Any] = {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
T5 = {"vocab_size": 260, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 258}
GPT = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

# Before transformers 5.24, Mamba's states were in no `Cache`.
MAMBA = "has no attention" if CACHE_NAME == "cache" else "keeps no KV cache"


def made(kind: str, config: str, **settings: Any) -> PreTrainedModel:
    """A tiny model of any class of transformers."""
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@pytest.mark.parametrize(
    "kind, config, settings, reason",
    [
        ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 258}, "is an encoder-decoder"),
        ("LlamaForSequenceClassification", "LlamaConfig", {**LLAMA, "num_labels": 3}, "gives no next token"),
        ("LlamaModel", "LlamaConfig", LLAMA, "gives no next token"),
        ("MambaForCausalLM", "MambaConfig", {**SMALL, "state_size": 4, "time_step_rank": 4}, MAMBA),
        ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT, "keeps no KV cache"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_the_reason(
    kind: str, config: str, settings: dict[str, Any], reason: str, lively_adapters: Path
) -> None:
    with pytest.raises(ModelError, match=f"{kind} {reason}") as error:
        dlp_lora.load(made(kind, config, **settings), tokenizer=byte_tokenizer(), adapters=lively_adapters)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "kind, config, settings, reason",
    [
        ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 258}, "is an encoder-decoder"),
        ("LlamaForSequenceClassification", "LlamaConfig", {**LLAMA, "num_labels": 3}, "is a classifier"),
        ("LlamaModel", "LlamaConfig", LLAMA, "no weights for lm_head.weight, which would be random"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused_with_the_reason(
    kind: str, config: str, settings: dict[str, Any], reason: str, lively_adapters: Path, tmp_path: Path
) -> None:
    made(kind, config, **settings).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        dlp_lora.load(tmp_path, adapters=lively_adapters)


def test_a_base_folder_that_holds_an_adapter_is_loaded_without_it_and_says_so(
    lively_adapters: Path, tmp_path: Path
) -> None:
    model, ids = lively_model(), torch.tensor([[1, 2, 3]])
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    make_adapter(lively_model(), tmp_path / "base", seed=5, scale=0.3)
    with pytest.warns(UserWarning, match="holds an adapter beside the base model, which is loaded without it"):
        engine = dlp_lora.load(tmp_path / "base", adapters=lively_adapters)
    with engine.disabled(), torch.no_grad():
        assert torch.equal(engine.model(ids).logits, lively_model()(ids).logits)
    with pytest.raises(ModelError, match="is an adapter, not a base model"):
        dlp_lora.load(lively_adapters / "math", adapters=lively_adapters)


class TestDevice:
    @pytest.mark.parametrize("there, device", [((), "cpu"), (("mps",), "mps"), (("cuda", "mps"), "cuda")])
    def test_auto_is_the_first_of_cuda_mps_and_cpu(
        self, there: tuple[str, ...], device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
        assert choose_device("auto").type == device

    @pytest.mark.parametrize("device", ["meta", "gpu", "cuda:77"])
    def test_a_device_that_is_not_there_gets_one_line(self, device: str) -> None:
        with pytest.raises(ValueError, match=f"there is no device '{device}' here; there is .*cpu") as error:
            choose_device(device)
        assert len(str(error.value)) < 80

    def test_the_repr_of_an_engine_shows_the_device(self, lively_adapters: Path) -> None:
        engine = dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters)
        assert f"on {engine.device}" in repr(engine)
        assert engine.device == torch.device("cpu")

    def test_weights_on_disk_are_brought_and_adapters_are_where_they_are_computed(
        self, lively_adapters: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("accelerate", reason="needs accelerate")
        lively_model().save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        parts: dict[str, Any] = {"adapters": lively_adapters, "offload_folder": str(tmp_path / "off")}
        engine = dlp_lora.load(tmp_path / "base", device_map=places, **parts)
        plain = dlp_lora.load(tmp_path / "base", adapters=lively_adapters)
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            with engine.disabled():
                assert torch.equal(engine.model(ids).logits, lively_model()(ids).logits)
            for name in plain.bank.names:
                with engine.fixed({name: 1.0}), plain.fixed({name: 1.0}):
                    torch.testing.assert_close(engine.model(ids).logits, plain.model(ids).logits)
        with engine.fixed({"poems": 1.0}), plain.fixed({"poems": 1.0}):
            options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
            assert engine.generate("Why?", **options).tokens == plain.generate("Why?", **options).tokens
        with pytest.raises(ModelError, match="is quantised, offloaded or shares"), engine.merged({"poems": 1.0}):
            pass
        with pytest.raises(ValueError, match="device= and device_map="):
            dlp_lora.load(tmp_path / "base", device_map=places, device="cpu", **parts)

    @pytest.mark.parametrize(
        "extra, name, reason",
        [
            ({"modules_to_save": ["lm_head"]}, "lm_head", r"modules_to_save=\['lm_head'\]: it replaces whole layers"),
            ({"trainable_token_indices": [3, 5]}, "trainable_tokens", r"trainable_token_indices=\[3, 5\]: it changes"),
        ],
        ids=["head", "tokens"],
    )
    def test_weights_that_were_trained_beside_the_loras_are_refused_if_the_bases_are_on_disk(
        self, tmp_path: Path, extra: dict[str, Any], name: str, reason: str
    ) -> None:
        pytest.importorskip("accelerate", reason="needs accelerate")
        lively_model().save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu"}
        places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
        same = make_adapter(lively_model(), tmp_path / "same", seed=1, **extra)
        load = partial(dlp_lora.load, tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "off"))
        assert load(adapters={"same": same}).bank.names == ("same",)
        weights = load_file(same / WEIGHTS_FILE)
        (trained,) = [weight for key, weight in weights.items() if name in key]
        trained.add_(1)
        save_file(weights, same / WEIGHTS_FILE, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=reason):
            load(adapters={"same": same})
        with pytest.raises(AdapterError, match=rf"{reason}.*the base model's weight cannot be read to compare it"):
            check_base_copies(read_adapter(same, layout=linear_layers(lively_model())), lambda _: None)

    def test_a_model_on_meta_or_on_several_devices_is_refused_by_name(self, lively_adapters: Path) -> None:
        with torch.device("meta"):
            model = made("LlamaForCausalLM", "LlamaConfig", **LLAMA)
        with pytest.raises(ModelError, match=r"model\.embed_tokens is on the meta device and has no weights"):
            dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=lively_adapters)
        spread = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "second": torch.nn.Linear(2, 2, device="meta")})
        hook = type("Hook", (), {"execution_device": "cuda:1"})()
        spread["second"]._hf_hook = hook  # type: ignore[assignment]
        with pytest.raises(ModelError, match=r"several devices \(first on cpu, second on cuda:1\)"):
            check_devices(spread)


def quantise_by_torchao(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quantise_by_quanto(model: Any) -> Any:
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    return model


def loaded_in_bits(bits: int, model: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)


@pytest.mark.parametrize(
    "quantise",
    [quantise_by_torchao, quantise_by_quanto, partial(loaded_in_bits, 8), partial(loaded_in_bits, 4)],
    ids=["torchao", "quanto", "bitsandbytes-8", "bitsandbytes-4"],
)
def test_a_quantised_base_is_fused_as_peft_fuses_it_and_not_merged(
    tmp_path: Path, quantise: Callable[[Any], Any]
) -> None:
    settings = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    model = made("LlamaForCausalLM", "LlamaConfig", **settings)
    make_adapter(model, tmp_path / "math", seed=1)
    twin = quantise(copy.deepcopy(model)).eval()  # 4-bit weights of a CPU are packed in another way once they were used
    model = quantise(model).eval()
    engine = dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters={"math": tmp_path / "math"})
    ids = torch.tensor([[1, 2, 3]])
    with engine.fixed({"math": 1.0}), torch.no_grad():
        logits = engine.model(ids).logits
    with pytest.raises(ModelError, match="is quantised"), engine.merged({"math": 1.0}):
        pass
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(twin, tmp_path / "math")(ids).logits
        engine.detach()
        base = model(ids).logits
    assert (wanted - base).abs().max() > 0.1
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_tiny_model_in_16_bits_is_still_loaded(lively_adapters: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    engine = dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=lively_adapters)
    assert engine.model.dtype == torch.bfloat16
