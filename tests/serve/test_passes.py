"""Parts that are packed into one pass are scored as each in a pass of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import USUAL_TARGETS, lively_model, make_adapter
from dlp_lora import Engine, Mixture
from dlp_lora.engine.cache import CACHE_NAME
from dlp_lora.errors import ModelError
from dlp_lora.serve.cache import SpareCache
from dlp_lora.serve.passes import Part, Passes, numbered
from serving import double_engine

MATHS, POEMS = Mixture({"math": 1.0}), Mixture({"math": 0.3, "poems": 0.7})
BASE = Mixture()


def engine_of(folder: Path, architecture: str) -> Engine:
    for i, name in enumerate(("math", "poems")):
        targets = USUAL_TARGETS[architecture]
        make_adapter(lively_model(architecture), folder / name, seed=i, scale=0.3, target_modules=targets)
    return double_engine(folder, architecture=architecture, router=None)


def begun(passes: Passes, tokens: list[int], mixture: Mixture) -> SpareCache:
    """The cache of a row whose tokens were read."""
    cache = SpareCache(num_rows=1, capacity=len(tokens))
    passes.run([Part(cache=cache, tokens=[tokens], mixtures=[[mixture] * len(tokens)])])
    cache.advance(len(tokens))
    return cache


def parts(passes: Passes) -> list[Part]:
    """Rows that decode, the middle of a prompt, the end of another and one whose tokens are all scored."""
    batch = SpareCache(num_rows=0, capacity=0)
    for tokens, mixture in (([5, 6, 7], MATHS), ([8] * 11, BASE), ([1, 2], POEMS)):
        batch.append(begun(passes, tokens, mixture))
    return [
        Part(cache=begun(passes, [3, 4, 5, 6], POEMS), tokens=[[9, 8]], mixtures=[[POEMS] * 2], wants="none"),
        Part(cache=SpareCache(num_rows=1, capacity=3), tokens=[[1, 2, 3]], mixtures=[[BASE, MATHS, MATHS]]),
        Part(cache=begun(passes, [4], MATHS), tokens=[[2, 1]], mixtures=[[MATHS] * 2], wants="all"),
        Part(cache=batch, tokens=[[9], [10], [11]], mixtures=[[MATHS], [BASE], [POEMS]]),
    ]


def keys_of(part: Part) -> list[Tensor]:
    """What the pass has written into the first layer for each row."""
    part.cache.advance(part.num_new)
    end = part.cache.columns.end
    return [part.cache.layers[0].keys[i, :, end - n : end] for i, n in enumerate(part.cache.lengths)]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma", "phi3", "gpt2"])
def test_packed_parts_are_scored_and_kept_as_alone(architecture: str, tmp_path: Path) -> None:
    passes = Passes(engine_of(tmp_path, architecture))
    assert passes.can_pack
    together, alone = parts(passes), parts(passes)
    with torch.no_grad():
        packed = passes.run(together).scores
        single = [passes.run([part]).scores[0] for part in alone]
    assert [scores.shape for scores in packed] == [(1, 0, 260), (1, 1, 260), (1, 2, 260), (3, 1, 260)]
    for a, b in zip(packed, single, strict=True):
        torch.testing.assert_close(a, b)
    for one, other in zip(together, alone, strict=True):
        for a, b in zip(keys_of(one), keys_of(other), strict=True):
            torch.testing.assert_close(a, b)


def test_a_window_of_attention_is_that_of_each_part(tmp_path: Path) -> None:
    model = lively_model("mistral")
    model.config.sliding_window = 4
    make_adapter(model, tmp_path / "math", seed=1, scale=0.3)
    make_adapter(model, tmp_path / "poems", seed=2, scale=0.3)
    engine = double_engine(tmp_path, architecture="mistral", router=None)
    engine.model.config.sliding_window = 4
    passes = Passes(engine)
    with torch.no_grad():
        packed, single = passes.run(parts(passes)).scores, [passes.run([part]).scores[0] for part in parts(passes)]
    for a, b in zip(packed, single, strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_that_attends_in_its_own_way_has_a_pass_for_each_part(lively_adapters: Path) -> None:
    engine = double_engine(lively_adapters, router=None)
    packed = Passes(engine).run(parts(Passes(engine))).scores
    engine.model.set_attn_implementation("eager")
    passes = Passes(engine)
    assert not passes.can_pack
    for a, b in zip(packed, passes.run(parts(passes)).scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # its softmax is in float32


def test_a_layer_that_does_not_attend_to_what_it_has_written_is_found_out(lively_adapters: Path) -> None:
    engine = double_engine(lively_adapters, router=None)
    passes = Passes(engine)
    some = parts(passes)
    attention: Any = engine.model.get_submodule("model.layers.1.self_attn")
    plain = attention.forward
    attention.forward = lambda **kwargs: plain(**{**kwargs, CACHE_NAME: None})
    with pytest.raises(ModelError, match="does not attend"):
        passes.run(some)


def test_the_model_attends_in_its_own_way_after_a_pack_that_failed(lively_adapters: Path) -> None:
    engine = double_engine(lively_adapters, router=None)
    passes = Passes(engine)
    wrong = parts(passes)
    wrong[1] = Part(cache=wrong[1].cache, tokens=[[1, 2, 999]], mixtures=[[MATHS] * 3])
    with pytest.raises(IndexError):
        passes.run(wrong)
    assert engine.model.config._attn_implementation == "sdpa"


def test_mixtures_are_numbered_only_where_tokens_of_a_row_differ() -> None:
    assert numbered([[MATHS, MATHS], [BASE, BASE]]) == ([MATHS, BASE], None)
    mixtures, numbers = numbered([[MATHS, BASE, MATHS]])
    assert mixtures == [MATHS, BASE]
    assert numbers is not None
    assert numbers.tolist() == [[0, 1, 0]]
