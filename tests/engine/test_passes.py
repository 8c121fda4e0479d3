"""A pass whose text is not known is refused, and never routed as a prompt."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

import dlp_lora
from conftest import HashRouter, byte_tokenizer, lively_model, make_adapter
from dlp_lora import Engine, ModelError, PromptError
from dlp_lora.engine.cache import cache_argument

MakeEngine = Callable[..., Engine]
TOKENIZER = byte_tokenizer()


def tokens_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([tokens_of(text)])


def greedy(engine: Engine, text: str, **kwargs: Any) -> torch.Tensor:
    return engine.model.generate(ids_of(text), **{"max_new_tokens": 12, "do_sample": False, **kwargs})


SMALL: Mapping[str, Any] = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
NO_CACHE: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "openai-gpt": (lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**SMALL)), ["c_attn"]),
    "rwkv": (
        lambda: RwkvForCausalLM(
            RwkvConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64)
        ),
        ["key", "value"],
    ),
    "minimax": (
        lambda: MiniMaxForCausalLM(
            MiniMaxConfig(
                vocab_size=260,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                num_local_experts=2,
                layer_types=["linear_attention", "full_attention"],
                block_size=16,
            )
        ),
        ["q_proj"],
    ),
}


@pytest.mark.parametrize("family", NO_CACHE)
def test_a_model_without_a_cache_of_transformers_is_refused_at_load_and_stays_as_it_was(
    family: str, tmp_path: Path
) -> None:
    make, targets = NO_CACHE[family]
    model = make()
    make_adapter(model, tmp_path / "a", seed=1, target_modules=targets)
    before = [*model.modules()]
    with pytest.raises(ModelError, match=f"{type(model).__name__} keeps no KV cache of transformers"):
        dlp_lora.load(model, tokenizer=TOKENIZER, adapters=tmp_path)
    assert [*model.modules()] == before


def test_a_model_that_gives_no_cache_is_refused_at_its_first_pass(make_engine: MakeEngine) -> None:
    engine = make_engine()
    plain = engine._controller._plain
    engine._controller._plain = lambda **kwargs: plain(**{**kwargs, "use_cache": False, **cache_argument(None)})
    with pytest.raises(ModelError, match=r"gives .* so its answers cannot be followed"):
        engine.generate("Why?", max_new_tokens=3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"prompt_lookup_num_tokens": 4}, "prompt_lookup_num_tokens has the model read several guessed tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale runs the model over another prompt"),
        ({"guidance_scale": 1.5, "negative_prompt_ids": ids_of("x")}, "guidance_scale runs the model over"),
        ({"use_cache": False}, "follows the KV cache; leave use_cache on"),
    ],
)
def test_what_cannot_be_routed_is_refused_at_the_start_and_works_under_a_fixed_mixture(
    make_engine: MakeEngine, setting: dict[str, Any], message: str
) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        greedy(engine, "Tell me a tale", **setting)
    assert engine.router is not None
    with engine.fixed({"math": 1.0}):
        plain = greedy(engine, "Tell me a tale")
        answer = greedy(engine, "Tell me a tale", **setting)
    assert "guidance_scale" in setting or torch.equal(answer, plain)


def test_assisted_generation_is_refused_and_lossless_under_a_fixed_mixture(make_engine: MakeEngine) -> None:
    engine, assistant = make_engine(), lively_model(seed=5)
    with pytest.raises(ValueError, match="assistant_model has the model read several guessed tokens"):
        greedy(engine, "Tell me a tale", assistant_model=assistant)
    with engine.fixed({"math": 1.0}):
        assert torch.equal(
            greedy(engine, "Tell me a tale", assistant_model=assistant), greedy(engine, "Tell me a tale")
        )


def test_a_contrast_pass_of_a_processor_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, engine.model, use_cache=True)
    with pytest.raises(ValueError, match="guidance_scale runs the model over another prompt"):
        greedy(engine, "Why?", logits_processor=LogitsProcessorList([processor]))

    def contrast(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        other: torch.Tensor = engine.model(ids[:, -1:]).logits[:, -1]
        return scores - other

    with pytest.raises(PromptError, match="a second prompt within one call of generate"):
        greedy(engine, "Why?", logits_processor=LogitsProcessorList([contrast]))


def test_continuous_batching_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for start in (
        lambda: engine.model.generate_batch([tokens_of("Why?")]),
        lambda: engine.model.init_continuous_batching(),
    ):
        with pytest.raises(ModelError, match="continuous batching packs the tokens of all requests into one row"):
            start()


def test_packed_rows_are_refused_and_work_under_a_fixed_mixture(make_engine: MakeEngine) -> None:
    engine = make_engine()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    ids = ids_of("Why?How")
    with pytest.raises(PromptError, match="several sequences are packed into one row"):
        engine.model(ids, position_ids=positions)
    with pytest.raises(PromptError, match="several sequences are packed into one row"):
        engine.model(ids, cu_seq_lens_q=torch.tensor([0, 4, 7]))
    with engine.fixed({"math": 1.0}):
        engine.model(ids, position_ids=positions)
    left_padded = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    engine.model(ids, attention_mask=left_padded, position_ids=torch.tensor([[1, 1, 1, 0, 1, 2, 3]]))


def test_a_cache_that_others_have_filled_is_refused_and_works_under_a_fixed_mixture(make_engine: MakeEngine) -> None:
    engine = make_engine()
    cache = DynamicCache()
    lively_model()(ids_of("Tell me"), past_key_values=cache)
    with pytest.raises(PromptError, match="holds 7 tokens, of which this engine has read 0"):
        engine.model(ids_of(" a tale"), past_key_values=cache)
    with engine.fixed({"math": 1.0}):
        engine.model(ids_of(" a tale"), past_key_values=cache)


@pytest.mark.parametrize("chunk", [1, 4, 13])
def test_the_last_token_of_a_prompt_is_prompt_though_it_comes_alone(make_engine: MakeEngine, chunk: int) -> None:
    engine = make_engine()
    prompt = "Tell me a tale"
    router = engine.router
    assert isinstance(router, HashRouter)
    alone = engine.generate(prompt, max_new_tokens=8, do_sample=False)
    router.asked.clear()
    chunked = engine.generate(prompt, max_new_tokens=8, do_sample=False, prefill_chunk_size=chunk)
    assert chunked.tokens == alone.tokens
    assert [s.mixture for s in chunked.trace] == [s.mixture for s in alone.trace]
    assert prompt in [context.prompt for context in router.asked]
    cache = DynamicCache()
    engine.model(ids_of(prompt[:-1]), past_key_values=cache)
    router.asked.clear()
    greedy(engine, prompt, past_key_values=cache)
    assert router.asked[0].prompt == prompt


class TestSettingsOfTheBase:
    @pytest.mark.parametrize(
        "setting",
        [{"use_cache": False}, {"stop_strings": ["zz"]}, {"return_dict_in_generate": True}, {"output_scores": True}],
        ids=lambda setting: next(iter(setting)),
    )
    def test_they_do_not_block_an_answer(self, make_engine: MakeEngine, setting: dict[str, Any]) -> None:
        engine = make_engine()
        alone = engine.generate("Why?", max_new_tokens=6, do_sample=False)
        engine.model.generation_config = GenerationConfig(eos_token_id=256, pad_token_id=258, **setting)
        again = engine.generate("Why?", max_new_tokens=6, do_sample=False)
        assert (again.tokens, [s.mixture for s in again.trace]) == (alone.tokens, [s.mixture for s in alone.trace])
        stream = engine.stream("Why?", max_new_tokens=6, do_sample=False)
        assert "".join(stream) == alone.text
        output = greedy(engine, "Why?", max_new_tokens=6)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        assert sequences[0, 4:].tolist() == list(alone.tokens)


def test_a_stream_of_several_answers_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for name in ("num_return_sequences", "num_beams"):
        with pytest.raises(ValueError, match=f"one answer, but {name} is 2; use engine.generate"):
            engine.stream("Why?", max_new_tokens=2, **{name: 2})


def test_an_answer_that_the_passes_did_not_follow_has_no_trace(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def decode(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        model(input_ids)
        return torch.cat([input_ids, ids_of("made up")], dim=1)

    with pytest.raises(ModelError, match="did not follow its answer token by token"):
        engine.generate("Why?", max_new_tokens=8, custom_generate=decode)


class TestPadding:
    TEXTS = ("Tell me a tale", "Why?", "How far is it to the moon")

    @pytest.mark.parametrize("filler", [0, 256, 258])
    @pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "without a mask"])
    def test_on_the_right_is_never_read_as_text(self, make_engine: MakeEngine, filler: int, is_masked: bool) -> None:
        engine = make_engine()
        rows = [tokens_of(text) for text in self.TEXTS]
        width = max(map(len, rows))
        ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        router = engine.router
        assert isinstance(router, HashRouter)
        with torch.no_grad():
            found = engine.model(ids, attention_mask=mask if is_masked else None).logits
            assert [context.prompt for context in router.asked[:3]] == list(self.TEXTS)
            for row, logits in zip(rows, found, strict=True):
                alone = engine.model(torch.tensor([row])).logits[0]
                torch.testing.assert_close(logits[: len(row)], alone, rtol=1e-4, atol=1e-4)

    def test_a_text_that_ends_with_token_zero_keeps_it(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        router = engine.router
        assert isinstance(router, HashRouter)
        zero = TOKENIZER.decode([0])
        engine.model(torch.tensor([[*tokens_of("Why"), 0, 0], [*tokens_of("What"), 0]]))
        assert [context.prompt for context in router.asked[:2]] == ["Why" + zero, "What" + zero]

    def test_a_mask_as_wide_as_a_static_cache_is_read_where_the_tokens_are(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        router = engine.router
        assert isinstance(router, HashRouter)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1] + [1] * 10])
        cases = engine._controller  # reads the mask before any model does
        rows = cases.replay({"input_ids": torch.tensor([[258, 258, *tokens_of("Why?")]]), "attention_mask": mask}, [[]])
        assert rows[0].prompt.text == "Why?"
