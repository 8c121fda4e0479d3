from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file
from torch import Tensor, nn

import dlp_lora.training.adapters as adapters_module
import dlp_lora.training.cpu as cpu_module
import dlp_lora.training.loop as loop_module
from conftest import ARCHITECTURES, byte_tokenizer, lively_model
from dlp_lora.bank.adapter_files import WEIGHTS_FILE
from dlp_lora.tasks import Example, Task
from dlp_lora.training.adapters import lora_config, lora_on, train_adapter
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.batches import has_dropout
from dlp_lora.training.cpu import NAME, lean_passes
from dlp_lora.training.loop import backward

SIBLINGS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Of four lengths, and one beginning.
BATCH = [([*range(60, 75), *range(3 + n, 3 + 6 * n)], list(range(n + 1))) for n in (4, 1, 3, 2)]
TOY = Task(name="toy", train=tuple(Example(prompt="q" * i + ":", answer="yes") for i in range(1, 15)), test=())
QUICK = AdapterTrainingArgs(prompt_format="plain", batch_size=4, learning_rate=1e-3)


def eager_model(architecture: str = "llama", *, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = lively_model(architecture).to(dtype)
    model.set_attn_implementation("eager")
    return model


@contextmanager
def peft_on(model: Any, args: AdapterTrainingArgs) -> Iterator[Any]:
    """The LoRA of `lora_on` in PEFT's own computation."""
    torch.manual_seed(args.seed)
    yield get_peft_model(model, lora_config(args))


def gradients(
    lora_on: Any, model: Any, args: AdapterTrainingArgs, *, share: bool = False
) -> tuple[float, dict[str, Tensor]]:
    with lora_on(model, args) as peft_model:
        peft_model.train()
        torch.manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        loss = backward(peft_model, BATCH, share=share and not has_dropout(peft_model))
        found = {n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad}
    assert found
    assert all(grad is not None and grad.dtype == torch.float32 for grad in found.values())
    return loss, found


def assert_gradients_are_pefts(model: Any, theirs: Any, args: AdapterTrainingArgs) -> None:
    loss, found = gradients(lora_on, model, args, share=True)
    expected_loss, expected = gradients(peft_on, theirs, args)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("max_tokens", [2048, 70], ids=["whole", "in parts"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "architecture, targets",
    [
        ("llama", SIBLINGS),
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("k_proj", "down_proj")),
        ("qwen2", SIBLINGS),  # has biases
        *((architecture, "all-linear") for architecture in ARCHITECTURES),
    ],
)
def test_gradients_are_those_of_peft(
    architecture: str, targets: Any, use_rslora: bool, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "MAX_TOKENS", max_tokens)
    args = replace(QUICK, r=3, target_modules=targets, use_rslora=use_rslora)
    assert_gradients_are_pefts(eager_model(architecture), eager_model(architecture), args)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_long_texts_are_those_of_peft(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, num_calls = F.scaled_dot_product_attention, 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return fused(*args, **kwargs)

    monkeypatch.setattr(cpu_module, "LONG", 25)  # keys; the longest of the batch has 43 tokens
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    args = replace(QUICK, target_modules="all-linear")
    assert_gradients_are_pefts(eager_model(architecture), eager_model(architecture), args)
    assert (num_calls > 0) == (architecture != "gpt2")  # which has attention of its own


def test_gradients_are_those_of_peft_with_checkpointed_layers() -> None:
    model = eager_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_gradients_are_pefts(model, eager_model(), replace(QUICK, target_modules=SIBLINGS))


def test_gradients_in_bfloat16_are_as_near_to_those_in_float32_as_pefts() -> None:
    exact, ours, theirs = (
        torch.cat([grad.flatten() for grad in gradients(lora_on, eager_model(dtype=dtype), QUICK)[1].values()])
        for lora_on, dtype in ((peft_on, torch.float32), (lora_on, torch.bfloat16), (peft_on, torch.bfloat16))
    )
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()


def test_a_trained_adapter_is_that_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_adapter(eager_model(), byte_tokenizer(), TOY, tmp_path / "ours", QUICK)
    monkeypatch.setattr(adapters_module, "lora_on", peft_on)
    train_adapter(eager_model(), byte_tokenizer(), TOY, tmp_path / "theirs", QUICK)
    ours, theirs = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "architecture, args, is_ours",
    [
        ("llama", QUICK, True),
        ("llama", replace(QUICK, target_modules="all-linear"), True),
        ("llama", replace(QUICK, lora_dropout=0.1), False),
        ("gpt2", replace(QUICK, target_modules=("c_attn",)), False),
    ],
    ids=["default", "all-linear", "dropout", "not nn.Linear"],
)
def test_layers_with_dropout_or_of_other_kinds_stay_with_peft(
    architecture: str, args: AdapterTrainingArgs, is_ours: bool
) -> None:
    with lora_on(eager_model(architecture), args) as peft_model:
        layers = [module for module in peft_model.modules() if isinstance(module, Linear)]
        assert layers
        assert all(("forward" in vars(layer)) == is_ours for layer in layers)


def test_a_layer_with_a_hook_stays_with_peft() -> None:
    model = eager_model()
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    with lora_on(model, QUICK) as peft_model:
        attention = peft_model.base_model.model.model.layers[0].self_attn
        ours = [name for name in SIBLINGS if "forward" in vars(getattr(attention, name))]
    assert ours == ["q_proj", "v_proj", "o_proj"]


# Attention and norms


def norms(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_attention_and_norms_are_replaced_for_a_while(architecture: str) -> None:
    model = eager_model(architecture)
    with lean_passes(model):
        assert (model.config._attn_implementation == "eager") == (architecture == "gpt2")
        # Gemma's norm multiplies by one plus its weight.
        assert all(("forward" in vars(norm)) == (architecture != "gemma") for norm in norms(model))
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_give_what_those_of_transformers_give(dtype: torch.dtype) -> None:
    model = eager_model(dtype=dtype)
    norm, x = model.model.norm.requires_grad_(False), torch.randn(3, 5, 32, dtype=dtype, requires_grad=True)
    nn.init.normal_(norm.weight)
    grad = torch.randn(3, 5, 32, dtype=dtype)
    y, dx = norm(x), torch.autograd.grad(norm(x), x, grad)[0]
    with lean_passes(model):
        assert torch.equal(norm(x), y)
        found = torch.autograd.grad(norm(x), x, grad)[0]
    assert (found - dx).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * dx.norm()


def test_other_attention_is_left_alone() -> None:
    model = eager_model()
    model.set_attn_implementation("sdpa")
    with lean_passes(model):
        assert model.config._attn_implementation == "sdpa"


def test_adapters_are_trained_with_attention_of_our_own_on_a_cpu() -> None:
    model = eager_model()
    model.set_attn_implementation("sdpa")
    with lora_on(model, QUICK):
        assert model.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"


def test_without_the_tricks_all_passes_are_those_of_transformers_and_peft() -> None:
    model = eager_model()
    model.set_attn_implementation("sdpa")
    with lora_on(model, replace(QUICK, cpu_tricks=False)) as peft_model:
        assert model.config._attn_implementation == "sdpa"
        assert not any("forward" in vars(module) for module in peft_model.modules())
    assert replace(QUICK, cpu_tricks=False).identity() == {**QUICK.identity(), "cpu_tricks": False}


def test_attention_with_dropout_is_that_of_transformers() -> None:
    model = eager_model().train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = torch.arange(40).view(2, 20)
    torch.manual_seed(5)
    expected = model(input_ids=ids).logits
    with lean_passes(model):
        torch.manual_seed(5)
        found = model(input_ids=ids).logits
    assert torch.equal(found, expected)
