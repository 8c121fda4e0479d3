"""Rows of several mixtures in one pass: each part of the model gets the right gate, or the pass is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

import dlp_lora
from conftest import EveryK, HashRouter, byte_tokenizer, lively_model, make_adapter
from dlp_lora import Engine, ModelError, Switching

TOKENIZER = byte_tokenizer()
IMAGE = 261


def tokens_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(F.relu(self.up(x)))
        return found


class Sparse(nn.Module):
    """Experts of linear layers, as remote code writes them: each gets the tokens of all rows that chose it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.parts = nn.Linear(32, 2, bias=False), experts
        self.shared_expert = Expert()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = self.gate(flat).argmax(-1)
        y = self.shared_expert(flat)
        for i, expert in enumerate(self.parts.children()):
            places = (chosen == i).nonzero()[:, 0]
            y[places] += expert(flat[places])
        return y.view(x.shape)


class Pair(nn.Module):
    """Experts that no name and no list shows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Expert(), Expert()


class Dense(Sparse):
    """Experts that each read every token, and whose outputs are weighed."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        outputs = [expert(x) * weights[..., i, None] for i, expert in enumerate(self.parts.children())]
        return self.shared_expert(x) + sum(outputs)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: nn.ModuleList([Expert(), Expert()]),
    "dict": lambda: nn.ModuleDict({"a": Expert(), "b": Expert()}),
    "attributes": Pair,
}


def sparse_model(kind: str, block: type[Sparse] = Sparse) -> PreTrainedModel:
    model: Any = lively_model()
    torch.manual_seed(3)
    for layer in model.model.layers:
        layer.mlp = block(KINDS[kind]())
        for parameter in layer.mlp.parameters():
            parameter.data.normal_(std=0.3)
    return model.eval()


def sparse_engine(kind: str, folder: Path, targets: Any, block: type[Sparse] = Sparse) -> Engine:
    for seed, name in enumerate(("a", "b")):
        make_adapter(sparse_model(kind, block), folder / name, seed=seed, scale=0.3, target_modules=targets)
    return dlp_lora.load(sparse_model(kind, block), tokenizer=TOKENIZER, adapters=folder)


def alone(engine: Engine, ids: Tensor) -> Tensor:
    rows = []
    for row, name in zip(ids, ("a", "b"), strict=True):
        with engine.fixed({name: 1.0}):
            rows.append(engine.model(row[None]).logits)
    return torch.cat(rows)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_linear_layers_refuse_rows_of_several_mixtures(kind: str, tmp_path: Path) -> None:
    engine = sparse_engine(kind, tmp_path, r".*parts.*\.(up|down)")
    for seed in range(12):
        ids = torch.randint(97, 122, (2, 4), generator=torch.Generator().manual_seed(seed))
        with engine.fixed({"a": 1.0}):
            engine.model(ids)
        with engine.fixed([{"a": 1.0}, {"b": 1.0}]), pytest.raises(ModelError, match="of several mixtures cannot tell"):
            engine.model(ids)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_every_token_beside_experts_takes_rows_of_several_mixtures(kind: str, tmp_path: Path) -> None:
    engine = sparse_engine(kind, tmp_path, r".*(shared_expert\.(up|down)|q_proj)")
    ids = torch.randint(97, 122, (2, 4))
    with engine.fixed([{"a": 1.0}, {"b": 1.0}]):
        torch.testing.assert_close(engine.model(ids).logits, alone(engine, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_read_every_token_take_rows_of_several_mixtures(kind: str, tmp_path: Path) -> None:
    engine = sparse_engine(kind, tmp_path, r".*parts.*\.(up|down)", Dense)
    ids = torch.randint(97, 122, (2, 4))
    with engine.fixed([{"a": 1.0}, {"b": 1.0}]):
        torch.testing.assert_close(engine.model(ids).logits, alone(engine, ids), rtol=1e-4, atol=1e-4)


def llava() -> PreTrainedModel:
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(
                **small, vocab_size=270, num_key_value_heads=2, bos_token_id=257, eos_token_id=256, pad_token_id=258
            ),
            vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=14, projection_dim=32),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def with_images(*rows: tuple[int, str]) -> dict[str, Tensor]:
    """Rows of so many images and a text."""
    texts = [[262, *[IMAGE] * 4, 263] * number + tokens_of(text) for number, text in rows]
    width = max(map(len, texts))
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.tensor([[258] * (width - len(row)) + row for row in texts]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in texts]),
        "pixel_values": torch.randn(sum(number for number, _ in rows), 3, 28, 28, generator=generator),
    }


@pytest.fixture
def vision_engine(tmp_path: Path) -> Engine:
    for seed, name in enumerate(("math", "poems", "units")):
        make_adapter(llava(), tmp_path / name, seed=seed, scale=0.15, target_modules="all-linear")
    return dlp_lora.load(llava(), tokenizer=TOKENIZER, adapters=tmp_path)


@torch.no_grad()
def test_rows_of_as_many_images_each_have_their_mixture_in_the_vision_layers_too(vision_engine: Engine) -> None:
    inputs = with_images((1, "What is it?"), (1, "And what is this, then?"))
    with vision_engine.fixed([{"math": 1.0}, {"units": 1.0}]):
        found = vision_engine.model(**inputs).logits
    for i, name in enumerate(("math", "units")):
        with vision_engine.fixed({name: 1.0}):
            torch.testing.assert_close(found[i], vision_engine.model(**inputs).logits[i], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("numbers", [(2, 0), (1, 3), (1, 2)])
def test_rows_of_unlike_numbers_of_images_are_refused(vision_engine: Engine, numbers: tuple[int, int]) -> None:
    inputs = with_images((numbers[0], "What is it?"), (numbers[1], "And what is this, then?"))
    with (
        vision_engine.fixed([{"math": 1.0}, {"units": 1.0}]),
        pytest.raises(ModelError, match="reads images, of which rows have unlike numbers"),
    ):
        vision_engine.model(**inputs)
    with vision_engine.fixed({"math": 1.0}):
        vision_engine.model(**inputs)


@pytest.mark.parametrize("rows", [[(1, "What is it?")], [(2, "What is it?"), (0, "Why is it not so?")]], ids=len)
def test_a_switch_encodes_the_images_of_the_prompt_again(tmp_path: Path, rows: list[tuple[int, str]]) -> None:
    for seed, name in enumerate(("math", "poems", "units")):
        make_adapter(llava(), tmp_path / name, seed=seed, scale=0.15, target_modules=["q_proj", "v_proj"])
    inputs = with_images(*rows)
    engine = dlp_lora.load(
        llava(),
        tokenizer=TOKENIZER,
        adapters=tmp_path,
        router=HashRouter(),
        segmenter=partial(EveryK, 6),
        switching=Switching(min_tokens=1, margin=0.0),
        kv_policy="recompute",
    )
    ascii_only = sorted({*range(270)} - {*tokens_of("".join(map(chr, range(32, 127))))})
    asked: dict[str, Any] = {"suppress_tokens": ascii_only, "do_sample": False, "return_dict_in_generate": True}
    output = engine.model.generate(**inputs, **asked, max_new_tokens=20, output_logits=True)
    num_prompt = inputs["input_ids"].shape[1]
    num_switches = 0
    for row, trace in enumerate(engine.last_traces or ()):
        for sentence in (s for s in trace if s.switched):
            num_switches += 1
            whole = output.sequences[:, : num_prompt + sentence.start + 1]
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(whole[:, num_prompt:])], dim=1)
            with engine.fixed(sentence.mixture):
                again = {**inputs, "input_ids": whole, "attention_mask": mask}
                fresh = engine.model.generate(**again, **asked, max_new_tokens=1, output_logits=True).logits[0][row]
            torch.testing.assert_close(output.logits[sentence.start + 1][row], fresh, rtol=1e-3, atol=1e-3)
    assert num_switches
