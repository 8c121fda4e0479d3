"""kv_policy="recompute": a row that switches is encoded again, in place, as after a fresh start."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import QuantizedLayer

import dlp_lora
from conftest import (
    ARCHITECTURES,
    USUAL_TARGETS,
    EveryK,
    HashRouter,
    as_after_a_fresh_start,
    byte_tokenizer,
    lively_model,
    make_adapter,
    tiny_model,
)
from dlp_lora import Engine, Switching, TopK
from dlp_lora.engine.cache import cache_argument, cache_of, check_rewritable, empty_like, write_rows

MakeEngine = Callable[..., Engine]
TOKENIZER = byte_tokenizer()
PROMPTS = ["Tell me a tale", "Why?", "How far is it to the moon"]
GREEDY: dict[str, Any] = {"max_new_tokens": 26, "do_sample": False}
STATIC: dict[str, Any] = {**GREEDY, "cache_implementation": "static", "max_cache_len": 64}


def tokens_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_each_sentence_is_that_of_a_fresh_start_with_its_mixture(make_engine: MakeEngine, prompt: str) -> None:
    engine = make_engine(policy=TopK(k=2))
    answer = engine.generate(prompt, **GREEDY)
    assert sum(sentence.switched for sentence in answer.trace) >= 2
    assert as_after_a_fresh_start(engine, prompt, answer)[:-1] == list(answer.tokens[1:])
    assert all((sentence.encode_ms > 0) == sentence.switched for sentence in answer.trace)


@pytest.mark.parametrize("options", [GREEDY, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("prompt_routing", ["questions", "sentences"])
def test_a_batch_is_its_rows_alone(make_engine: MakeEngine, options: dict[str, Any], prompt_routing: str) -> None:
    engine = make_engine(policy=TopK(k=2), prompt_routing=prompt_routing)
    together = engine.generate(PROMPTS, **options)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = engine.generate(prompt, **options)
        assert alone.tokens == answer.tokens
        assert [s.mixture for s in alone.trace] == [s.mixture for s in answer.trace]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_static_and_dynamic_caches_give_one_answer(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    for seed, adapter in enumerate(HashRouter().names):
        make_adapter(model, tmp_path / adapter, seed=seed, scale=0.3, target_modules=USUAL_TARGETS[name])
    engine = dlp_lora.load(
        model,
        tokenizer=TOKENIZER,
        adapters=tmp_path,
        router=HashRouter(),
        policy=TopK(k=2),
        segmenter=partial(EveryK, 6),
        switching=Switching(margin=0.0),
    )
    dynamic, static = (engine.generate(PROMPTS, **options) for options in (GREEDY, STATIC))
    assert any(sentence.switched for answer in dynamic for sentence in answer.trace)
    assert [answer.tokens for answer in dynamic] == [answer.tokens for answer in static]


def sliding(**settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    small = lively_model().config
    config = MistralConfig(
        **{
            name: getattr(small, name)
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        },
        num_key_value_heads=2,
        eos_token_id=None,
        sliding_window=8,
        **settings,
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("options", [GREEDY, STATIC], ids=["dynamic", "static"])
def test_a_sliding_window_is_written_again_too(tmp_path: Path, options: dict[str, Any]) -> None:
    model = sliding()
    for seed, adapter in enumerate(HashRouter().names):
        make_adapter(model, tmp_path / adapter, seed=seed, scale=0.3)
    engine = dlp_lora.load(
        model,
        tokenizer=TOKENIZER,
        adapters=tmp_path,
        router=HashRouter(),
        segmenter=partial(EveryK, 6),
        switching=Switching(margin=0.0),
    )
    for prompt in PROMPTS:
        answer = engine.generate(prompt, **options)
        assert any(sentence.switched for sentence in answer.trace)
        assert as_after_a_fresh_start(engine, prompt, answer)[:-1] == list(answer.tokens[1:])


def test_beams_and_several_sequences_are_recomputed(make_engine: MakeEngine) -> None:
    engine = make_engine(policy=TopK(k=2))
    for answers in (
        engine.generate(PROMPTS[0], **GREEDY, num_beams=3, num_return_sequences=2),
        engine.generate(PROMPTS[0], max_new_tokens=26, do_sample=True, seed=1, num_return_sequences=2),
    ):
        assert len(answers) == 2
        assert any(s.switched for answer in answers for s in answer.trace)


def test_a_step_keeps_its_shapes_at_a_switch(make_engine: MakeEngine) -> None:
    engine = make_engine(policy=TopK(k=2))
    ids = torch.tensor([tokens_of(PROMPTS[0])])
    engine.model.set_attn_implementation("eager")
    output = engine.model.generate(
        ids, **GREEDY, return_dict_in_generate=True, output_hidden_states=True, output_attentions=True
    )
    assert any(sentence.switched for sentence in engine.last_trace or ())
    assert {step[-1].shape[1] for step in output.hidden_states[1:]} == {1}
    assert {step[-1].shape[2] for step in output.attentions[1:]} == {1}


@pytest.mark.usefixtures("unchecked")
def test_a_switch_within_a_compiled_answer_compiles_nothing(make_engine: MakeEngine) -> None:
    engine, plain = make_engine(policy=TopK(k=2)), make_engine(policy=TopK(k=2))
    engine.compile(max_rank=32, backend="eager")
    for prompt in PROMPTS:
        compiled, wanted = (e.generate(prompt, **STATIC) for e in (engine, plain))
        assert compiled.tokens == wanted.tokens
        assert any(sentence.switched for sentence in compiled.trace)


def test_only_rows_that_switch_are_encoded_again(make_engine: MakeEngine) -> None:
    engine = make_engine(policy=TopK(k=2))
    rows = torch.tensor([tokens_of("Hello there"), tokens_of("Goodbye now")])
    lengths: list[tuple[int, int]] = []
    handle = engine.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: lengths.append(tuple(args[0].shape))
    )
    with torch.no_grad():
        cache = cache_of(engine.model(rows, use_cache=True))
        for token in tokens_of("abcdefghijklmn"):
            engine.model(torch.tensor([[token], [token]]), **cache_argument(cache))
    handle.remove()
    switched = [sum(s.switched for s in trace) for trace in engine.last_traces or ()]
    again = [shape for shape in lengths[1:] if shape[1] > 1]
    assert sum(rows for rows, _ in again) == sum(switched) > 0
    assert len(lengths) - 1 - len(again) == 14


@pytest.mark.parametrize("make", [DynamicCache, partial(StaticCache, max_cache_len=32)], ids=["dynamic", "static"])
def test_rows_are_written_where_they_lie(make: Callable[..., Any], llama: PreTrainedModel) -> None:
    ids = torch.arange(40, 52).reshape(3, 4)
    cache = make(config=llama.config)
    with torch.no_grad():
        llama(ids, **cache_argument(cache))
        other = empty_like(cache)
        llama(ids[:1] + 20, **cache_argument(other))
    before = [(layer.keys.data_ptr(), layer.keys.clone()) for layer in cache.layers]
    write_rows(cache, [2], other, source_rows=[0])
    for layer, new, (address, old) in zip(cache.layers, other.layers, before, strict=True):
        assert layer.keys.data_ptr() == address
        assert torch.equal(layer.keys[2], new.keys[0])
        assert torch.equal(layer.keys[:2], old[:2])


def test_a_cache_without_a_tensor_a_row_is_refused_at_the_prompt(make_engine: MakeEngine) -> None:
    class Packed(QuantizedLayer):
        def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
            return tensor

        def _dequantize(self, q_tensor: Tensor) -> Tensor:
            return q_tensor

    cache = DynamicCache(config=lively_model().config)
    cache.layers = [Packed() for _ in cache.layers]
    engine = make_engine()
    ids = torch.tensor([tokens_of("Hello there")])
    with pytest.raises(ValueError, match=r"a DynamicCache of Packeds does not allow; .* or use kv_policy='keep'"):
        engine.model(ids, **cache_argument(cache))
    with engine.using(kv_policy="keep"), torch.no_grad():
        engine.model(ids, **cache_argument(cache))


def test_an_offloaded_cache_is_refused_by_name(llama: PreTrainedModel) -> None:
    cache = DynamicCache(config=llama.config)
    cache.offloading = True
    with pytest.raises(ValueError, match="of offloaded DynamicLayers does not allow"):
        check_rewritable(cache)


def test_the_next_turn_on_a_cache_encodes_what_it_holds_again(make_engine: MakeEngine) -> None:
    engine = make_engine(policy=TopK(k=1))
    first, turn = tokens_of("Tell me a tale"), tokens_of(" of the moon, then why")
    with torch.no_grad():
        cache = cache_of(engine.model(torch.tensor([first]), use_cache=True))
        before = engine.last_trace[0].mixture  # type: ignore[index]
        found = engine.model(torch.tensor([turn]), **cache_argument(cache)).logits
        after = engine.last_trace[0].mixture  # type: ignore[index]
        assert before != after
        with engine.fixed(after):
            fresh = engine.model(torch.tensor([first + turn])).logits[:, len(first) :]
    torch.testing.assert_close(found, fresh, atol=1e-5, rtol=1e-4)
