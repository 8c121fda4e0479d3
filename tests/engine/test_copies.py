"""What other libraries do with `engine.model`: it is saved, copied, pickled, cast and moved as a base model."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

import dlp_lora
from conftest import byte_tokenizer, lively_model, make_adapter
from dlp_lora import DLPLoRAError, Engine
from dlp_lora.bank.linear import FusedLinear

MakeEngine = Callable[..., Engine]
IDS = torch.arange(97, 109)[None]
MIXTURE = {"math": 0.6, "poems": 0.4}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(ids).logits
    return found


def mixed(engine: Engine) -> Tensor:
    with engine.fixed(MIXTURE):
        return logits(engine.model)


@pytest.fixture(params=["stacked", "plain"])
def engine(request: pytest.FixtureRequest, make_engine: MakeEngine) -> Engine:
    return make_engine(paths=request.param)


# Saved


def assert_is_the_base(tensors: dict[str, Tensor]) -> None:
    wanted = lively_model().state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], weight) for name, weight in wanted.items())


def test_every_weight_has_a_storage_of_its_own(engine: Engine) -> None:
    before = mixed(engine)
    weights = list(engine.model.state_dict().values())
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == len(weights)
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)
    assert torch.equal(mixed(engine), before)


def test_safetensors_saves_all_weights(engine: Engine, tmp_path: Path) -> None:
    save_model(engine.model, str(tmp_path / "model.safetensors"))
    assert_is_the_base(load_file(tmp_path / "model.safetensors"))


def test_accelerate_saves_all_weights(engine: Engine, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(engine.model)
    accelerator.save_model(model, tmp_path / "model")
    assert_is_the_base(load_file(tmp_path / "model" / "model.safetensors"))
    accelerator.save_state(tmp_path / "state")
    assert_is_the_base(load_file(tmp_path / "state" / "model.safetensors"))
    before = mixed(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(mixed(engine), before)


# Copied and pickled


def test_a_copy_runs_with_its_own_weights(engine: Engine) -> None:
    wanted = logits(lively_model())
    copied = copy.deepcopy(engine.model)
    averaged = AveragedModel(engine.model)
    assert torch.equal(logits(copied), wanted)
    assert torch.equal(logits(averaged), wanted)
    for model in (copied, averaged):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert not logits(model).any()
    assert not torch.equal(mixed(engine), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation_gives_a_quantised_base(engine: Engine) -> None:
    quantised, wanted = (
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        for model in (engine.model, lively_model())
    )
    assert type(quantised.model.layers[0].self_attn.q_proj) is type(wanted.model.layers[0].self_attn.q_proj)
    assert torch.equal(logits(quantised), logits(wanted))


@pytest.mark.parametrize("dump", [torch.save, pickle.dump], ids=["torch.save", "pickle"])
def test_a_pickled_model_is_the_plain_base(engine: Engine, dump: Callable[..., None]) -> None:
    before, file = mixed(engine), io.BytesIO()
    dump(engine.model, file)
    assert b"dlp_lora" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False) if dump is torch.save else pickle.load(file)
    assert type(loaded) is LlamaForCausalLM
    assert not any(isinstance(module, FusedLinear) for module in loaded.modules())
    assert_is_the_base(loaded.state_dict())
    assert torch.equal(logits(loaded), logits(lively_model()))
    assert torch.equal(mixed(engine), before)


def test_a_pickled_cache_is_a_cache_of_transformers(engine: Engine) -> None:
    cache, file = DynamicCache(config=engine.model.config), io.BytesIO()
    with torch.no_grad(), engine.fixed(MIXTURE):
        engine.model(IDS, past_key_values=cache)
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is DynamicCache
    assert loaded.get_seq_length() == IDS.shape[1]
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(loaded.layers, cache.layers, strict=True))
    copied = copy.deepcopy(cache)  # which goes on as the cache does
    with torch.no_grad():
        found, wanted = (engine.model(IDS[:, :1], past_key_values=each).logits for each in (copied, cache))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_is_saved_as_a_bundle_alone(engine: Engine, duplicate: Callable[[Engine], Any]) -> None:
    with pytest.raises(TypeError, match="neither copied nor pickled: save_pretrained writes a bundle"):
        duplicate(engine)


# Cast and moved

CASTS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.float64),
    "there and back": lambda model: model.bfloat16().float(),
    "to its dtype": lambda model: model.to(torch.float32),
    "an assigned state dict": lambda model: model.load_state_dict(doubled(lively_model()), assign=True),
    "data": lambda model: [setattr(p, "data", p.data * 1.5) for p in model.parameters()],
    "one layer": lambda model: model.model.layers[1].self_attn.k_proj.half().float(),
    "one weight": lambda model: setattr(
        model.get_submodule("model.layers.1.mlp.up_proj").weight, "data", torch.ones(48, 32)
    ),
}


def doubled(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: 2 * weight for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_what_casts_the_model_casts_what_the_engine_computes(
    cast: Callable[[PreTrainedModel], Any], engine: Engine, lively_adapters: Path
) -> None:
    mixed(engine)
    model = lively_model()
    cast(engine.model)
    cast(model)
    dtype = model.dtype
    paths = engine.paths
    fresh = dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=lively_adapters, paths=paths)
    found, wanted = mixed(engine), mixed(fresh)
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3}.get(dtype, 1e-5)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * scale)
    with engine.disabled():
        assert torch.equal(logits(engine.model), logits(fresh.detach()))
    one, two = (e.generate("Why?", mixture=MIXTURE, max_new_tokens=5, do_sample=False) for e in (engine, engine))
    assert one.text == two.text
    added = engine.add_adapter(lively_adapters / "math", "again")
    with engine.fixed({added: 0.6, "poems": 0.4}):
        torch.testing.assert_close(logits(engine.model), found, rtol=tolerance, atol=tolerance * scale)


def test_siblings_of_unlike_precision_are_computed_one_by_one(make_engine: MakeEngine) -> None:
    engine = make_engine(paths="stacked")
    engine.model.model.layers[0].self_attn.k_proj.double()
    x = torch.randn(1, 3, 32)
    layer = engine.model.model.layers[0].self_attn
    with engine.fixed(MIXTURE), torch.no_grad():
        with pytest.raises(RuntimeError, match="dtype"):  # as the base model says
            engine.model(IDS)
        assert torch.equal(layer.q_proj(x), layer.q_proj.base_layer(x))
    layer.k_proj.float()
    assert torch.isfinite(mixed(engine)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_follows_its_model_to_another_device(engine: Engine) -> None:
    wanted = mixed(engine)
    engine.model.cuda()
    with engine.fixed(MIXTURE), torch.no_grad():
        found = engine.model(IDS.cuda()).logits
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert engine.generate("Why?", max_new_tokens=8).text
    engine.model.cpu()
    torch.testing.assert_close(mixed(engine), wanted)


# Compiled


def test_torch_compile_of_the_model_leaves_it_as_it_is_and_says_so(engine: Engine) -> None:
    torch._dynamo.reset()
    texts = [IDS, IDS[:, :5], IDS.repeat(2, 1)]
    wanted = [logits(engine.model, ids) for ids in texts]
    compiled = torch.compile(engine.model, backend="eager")
    assert all(torch.equal(logits(compiled, ids), each) for ids, each in zip(texts, wanted, strict=True))
    with pytest.raises(DLPLoRAError, match=r"engine\.compile\(\) compiles its decoding steps"):
        engine.model.compile()
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"engine\.compile\(\) compiles its decoding steps"):
        logits(torch.compile(engine.model, backend="eager", fullgraph=True))
    text = engine.generate("Why?", max_new_tokens=6).text
    engine.model.forward = torch.compile(engine.model.forward, backend="eager")  # as transformers' docs have it
    assert engine.generate("Why?", max_new_tokens=6).text == text


# PEFT on top

CONFIGS: dict[str, Any] = {
    "all-linear": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    "fused layers": LoraConfig(target_modules=["q_proj", "v_proj"]),
    "other layers": LoraConfig(target_modules=["o_proj"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_peft_on_an_attached_model_is_refused_and_changes_nothing(
    config: LoraConfig, engine: Engine, tmp_path: Path
) -> None:
    before, modules = mixed(engine), [id(module) for module in engine.model.modules()]
    saved = make_adapter(lively_model(), tmp_path / "it", seed=9)
    message = r"an engine is attached to the model.* call engine\.detach\(\)"
    with pytest.raises(DLPLoRAError, match=message):
        get_peft_model(engine.model, config)
    with pytest.raises(DLPLoRAError, match=message):
        PeftModel.from_pretrained(engine.model, saved)
    with pytest.raises(DLPLoRAError, match=message):
        inject_adapter_in_model(config, engine.model)  # as transformers' add_adapter does
    assert [id(module) for module in engine.model.modules()] == modules
    assert torch.equal(mixed(engine), before)
    assert isinstance(get_peft_model(engine.detach(), config), PeftModel)


def test_prompt_tuning_on_an_attached_model_is_refused_in_its_first_pass(engine: Engine) -> None:
    model = get_peft_model(engine.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(DLPLoRAError, match="routing reads token ids"):
        model(input_ids=IDS)
