import copy
import json
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)

import dlp_lora
from conftest import EOS, EveryK, HashRouter, byte_tokenizer, lively_model, tiny_model
from dlp_lora import Context, Engine, FusionPolicy, Generation, Mixture, PromptError, Threshold, TopK, TopP
from dlp_lora.bank.adapter_files import find_adapters
from dlp_lora.bank.attach import attach, linear_layers
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import read_adapter
from dlp_lora.engine.cache import rows_of

MakeEngine = Callable[..., Engine]
TOKENIZER = byte_tokenizer()
EOS_ID, PAD_ID = 256, 258
# Every token but the visible ASCII characters and the space, so that each token is one character.
NOT_ASCII = sorted(set(range(260)) - {TOKENIZER(chr(c))["input_ids"][0] for c in range(32, 127)})
ASCII: dict[str, Any] = {"suppress_tokens": NOT_ASCII, "max_new_tokens": 20, "do_sample": False}
PROMPTS = ["Tell me a tale", "Why?", "How far is it to the moon"]


class EndAt(LogitsProcessor):
    """Ends chosen rows of a batch after a number of new tokens."""

    def __init__(self, ends: dict[int, int], *, eos: int = EOS_ID) -> None:
        self.ends, self.eos = ends, eos
        self.length = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.length = self.length or input_ids.shape[1]
        for row, end in self.ends.items():
            if input_ids.shape[1] - self.length == end:
                scores[row] = float("-inf")
                scores[row, self.eos] = 0.0
        return scores


def tokens_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def left_padded(*prompts: str, pad: int = PAD_ID) -> dict[str, Tensor]:
    rows = [tokens_of(prompt) for prompt in prompts]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def check_trace(generation: Generation, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> None:
    assert generation.text == tokenizer.decode(generation.tokens, skip_special_tokens=True)
    assert "".join(sentence.text for sentence in generation.trace) == generation.text
    assert generation.trace[0].start == 0
    assert generation.trace[-1].end == len(generation.tokens)
    for before, after in pairwise(generation.trace):
        assert before.end == after.start
        assert after.switched == (before.mixture != after.mixture)
    for sentence in generation.trace:
        assert sentence.abstained == (not sentence.mixture)
        assert sentence.route_ms >= 0
        assert sentence.fuse_ms >= 0


def same_trace(one: Generation, other: Generation) -> None:
    def told(generation: Generation) -> list[Any]:
        return [(s.text, s.start, s.end, s.mixture, s.switched, s.abstained) for s in generation.trace]

    assert one.tokens == other.tokens
    assert told(one) == told(other)


class ByHand:
    """The method as a plain loop: no controller, no hooks, no `generate`, one row, one character a token."""

    def __init__(self, adapters: Path, *, every: int = 6) -> None:
        self.model = lively_model()
        self.bank = AdapterBank(
            linear_layers(self.model), [read_adapter(path, name) for name, path in find_adapters(adapters).items()]
        )
        attach(self.model, self.bank)
        self.router = HashRouter()
        self.every = every

    def decide(self, policy: FusionPolicy, *context: str) -> Mixture:
        probabilities = self.router.probabilities([Context(*context)])[0].tolist()
        return policy(dict(zip(self.router.names, probabilities, strict=True)))

    @torch.no_grad()
    def greedy(
        self, prompt: str, policy: FusionPolicy, *, num_tokens: int, recompute: bool = False
    ) -> tuple[list[int], list[Mixture], Tensor]:
        ids = tokens_of(prompt)
        answer: list[int] = []
        logits: list[Tensor] = []
        mixtures = [self.decide(policy, prompt.strip())]
        self.bank.fuse(mixtures)
        output = self.model(torch.tensor([ids]))
        while True:
            logits.append(output.logits[0, -1])
            scores = logits[-1].clone()
            scores[NOT_ASCII] = float("-inf")
            answer.append(int(scores.argmax()))
            if len(answer) == num_tokens:
                return answer, mixtures, torch.stack(logits)
            opens = len(answer) > 1 and (len(answer) - 1) % self.every == 0
            if opens:
                text = TOKENIZER.decode(answer)
                mixtures.append(self.decide(policy, prompt.strip(), text[:-1], text[-1]))
                self.bank.fuse([mixtures[-1]])
            if recompute:
                output = self.model(torch.tensor([ids + answer]), use_cache=False)
            else:
                output = self.model(torch.tensor([answer[-1:]]), past_key_values=output.past_key_values)


@pytest.fixture(scope="module")
def by_hand(lively_adapters: Path) -> ByHand:
    return ByHand(lively_adapters)


@torch.no_grad()
def logits_of(engine: Engine, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Tokens (batch, new) and raw logits (batch, new, vocab) of the model's own generate."""
    output = engine.model.generate(**inputs, **ASCII, return_dict_in_generate=True, output_logits=True)
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, dim=1)


class TestGreedy:
    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    @pytest.mark.parametrize("policy", [TopP(p=0.6), TopK(k=2), Threshold(p=0.45)], ids=repr)
    def test_generating_is_the_plain_loop_that_routes_at_each_sentence(
        self, make_engine: MakeEngine, by_hand: ByHand, policy: FusionPolicy, kv_policy: str
    ) -> None:
        engine = make_engine(policy=policy, kv_policy=kv_policy)
        answer, mixtures, logits = by_hand.greedy(PROMPTS[0], policy, num_tokens=20, recompute=kv_policy == "recompute")
        assert len(set(mixtures)) > 1
        generation = engine.generate(PROMPTS[0], **ASCII)
        assert list(generation.tokens) == answer
        assert [s.mixture for s in generation.trace] == mixtures
        assert [(s.start, s.end) for s in generation.trace] == [(0, 6), (6, 12), (12, 18), (18, 20)]
        check_trace(generation)
        tokens, found = logits_of(engine, **left_padded(PROMPTS[0]))
        assert tokens[0].tolist() == answer
        torch.testing.assert_close(found[0], logits, rtol=1e-4, atol=1e-4)

    def test_keeping_and_recomputing_differ_once_the_mixture_switched(self, make_engine: MakeEngine) -> None:
        keep, recompute = (
            logits_of(make_engine(policy=TopK(k=2), kv_policy=kv_policy), **left_padded(PROMPTS[0]))[1]
            for kv_policy in ("keep", "recompute")
        )
        torch.testing.assert_close(keep[:, :7], recompute[:, :7])
        assert (keep[:, 7] - recompute[:, 7]).abs().max() > 1e-2

    def test_a_constant_mixture_is_the_same_kept_or_recomputed(self, make_engine: MakeEngine) -> None:
        policy = dlp_lora.Only("math")
        keep = logits_of(make_engine(policy=policy), **left_padded(*PROMPTS))
        recompute = logits_of(make_engine(policy=policy, kv_policy="recompute"), **left_padded(*PROMPTS))
        assert torch.equal(keep[0], recompute[0])
        torch.testing.assert_close(keep[1], recompute[1], rtol=1e-5, atol=1e-5)

    def test_the_routers_context_is_prompt_answer_and_first_token(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        router = engine.router
        assert isinstance(router, HashRouter)
        text = engine.generate("  Why?\n", **ASCII).text
        assert router.asked == [Context("Why?"), *(Context("Why?", text[:i], text[i]) for i in (6, 12, 18))]

    @pytest.mark.parametrize("architecture", ["gpt2", "gemma"])
    def test_generate_is_the_models_own_generate_in_other_architectures(
        self, architecture: str, tmp_path: Path
    ) -> None:
        from conftest import USUAL_TARGETS, make_adapter

        model = lively_model(architecture)
        for seed, name in enumerate(("math", "poems", "units")):
            targets = USUAL_TARGETS[architecture]
            make_adapter(
                model,
                tmp_path / name,
                seed=seed,
                scale=0.3,
                target_modules=targets,
                fan_in_fan_out=architecture == "gpt2",
            )
        engine = dlp_lora.load(
            model, tokenizer=TOKENIZER, adapters=tmp_path, router=HashRouter(), segmenter=lambda: EveryK(6)
        )
        generation = engine.generate(PROMPTS[0], **ASCII)
        check_trace(generation)
        tokens, _ = logits_of(engine, **left_padded(PROMPTS[0]))
        assert list(generation.tokens) == tokens[0].tolist()
        with engine.disabled():
            assert engine.generate(PROMPTS[0], **ASCII).tokens != generation.tokens


class TestBatches:
    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    @pytest.mark.parametrize("prompts", [PROMPTS, ["Tell", "Why?", "Moon"]], ids=["left-padded", "of one length"])
    def test_a_batch_equals_its_rows_alone(
        self, make_engine: MakeEngine, prompts: Sequence[str], kv_policy: str
    ) -> None:
        engine = make_engine(policy=TopK(k=2), kv_policy=kv_policy)
        together = engine.generate(prompts, **ASCII)
        tokens, logits = logits_of(engine, **left_padded(*prompts))
        assert len({generation.trace[0].mixture for generation in together}) == 3
        for i, prompt in enumerate(prompts):
            alone = engine.generate(prompt, **ASCII)
            same_trace(alone, together[i])
            check_trace(together[i])
            row_tokens, row_logits = logits_of(engine, **left_padded(prompt))
            assert row_tokens[0].tolist() == tokens[i].tolist() == list(alone.tokens)
            torch.testing.assert_close(row_logits[0], logits[i], rtol=1e-4, atol=1e-4)

    def test_rows_switch_at_their_own_times(self, make_engine: MakeEngine) -> None:
        # Bytes at random: characters, and so sentences, end at different tokens in each row.
        engine = make_engine()
        together = engine.generate(PROMPTS, max_new_tokens=24, do_sample=False)
        assert len({tuple(s.start for s in generation.trace) for generation in together}) > 1
        for prompt, generation in zip(PROMPTS, together, strict=True):
            check_trace(generation)
            same_trace(engine.generate(prompt, max_new_tokens=24, do_sample=False), generation)

    def test_a_row_that_ended_early_is_routed_no_more_and_loses_its_padding(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        router = engine.router
        assert isinstance(router, HashRouter)
        processor = LogitsProcessorList([EndAt({0: 8})])
        ended, other = engine.generate(PROMPTS[:2], max_new_tokens=20, do_sample=False, logits_processor=processor)
        assert len(ended.tokens) == 9
        assert ended.tokens[-1] == EOS_ID
        assert len(other.tokens) == 20
        check_trace(ended)
        check_trace(other)
        assert len([c for c in router.asked if c.prompt == PROMPTS[0]]) == len(ended.trace)

    @pytest.mark.parametrize("pad", [PAD_ID, EOS_ID, 40], ids=["own", "eos", "a letter"])
    @pytest.mark.parametrize("eos", [EOS_ID, 30, [30, EOS_ID]])
    def test_rows_end_at_the_eos_that_the_call_names(
        self, make_engine: MakeEngine, pad: int, eos: int | list[int]
    ) -> None:
        engine = make_engine()
        end = eos if isinstance(eos, int) else eos[0]
        settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": eos, "pad_token_id": pad}
        processors = [LogitsProcessorList([EndAt({row: 8}, eos=end)]) for row in (0, 0)]
        alone = engine.generate(PROMPTS[0], logits_processor=processors[0], **settings)
        ended, other = engine.generate(PROMPTS[:2], logits_processor=processors[1], **settings)
        assert len(alone.tokens) == 9
        same_trace(alone, ended)
        check_trace(ended)
        check_trace(other)

    @pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2]], ids=["one row", "two rows"])
    def test_no_eos_ends_a_row_if_the_call_says_so(self, make_engine: MakeEngine, prompts: list[str]) -> None:
        engine = make_engine()
        settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        inputs = engine.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        processors = [LogitsProcessorList([EndAt({0: 8})]) for _ in range(2)]
        wanted = engine.model.generate(**inputs, logits_processor=processors[0], **settings)[:, -20:].tolist()
        found = engine.generate(prompts, logits_processor=processors[1], **settings)
        assert [list(generation.tokens) for generation in found] == wanted
        assert found[0].tokens[8] == EOS_ID
        for generation in found:
            check_trace(generation)

    def test_an_eos_of_the_tokenizer_alone_ends_nothing(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.model.generation_config.eos_token_id = 30
        engine.tokenizer.eos_token = EOS
        processor = LogitsProcessorList([EndAt({0: 4})])  # <|im_end|>, which the model does not stop at
        generation = engine.generate(PROMPTS[0], logits_processor=processor, max_new_tokens=12, do_sample=False)
        check_trace(generation)

    def test_a_row_that_a_stop_string_ends_loses_its_padding(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        alone = engine.generate(PROMPTS[0], **ASCII)
        stop = alone.text[9:11]
        settings = {**ASCII, "stop_strings": stop, "tokenizer": engine.tokenizer}
        stopped = engine.generate(PROMPTS[0], **settings)
        assert stopped.text.endswith(stop)
        row, other = engine.generate(PROMPTS[:2], **settings)
        same_trace(row, stopped)
        check_trace(row)
        check_trace(other)

    @pytest.mark.parametrize("num_prompts", [1, 2])
    def test_a_padding_token_that_the_model_wrote_last_belongs_to_the_answer(
        self, make_engine: MakeEngine, num_prompts: int
    ) -> None:
        engine = make_engine()
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
        processor = LogitsProcessorList([EndAt({0: 7}, eos=PAD_ID)])
        inputs = engine.tokenizer(PROMPTS[0], return_tensors="pt")
        expected = engine.model.generate(**inputs, logits_processor=processor, **settings)[0, -8:].tolist()
        assert expected[-1] == PAD_ID
        answers = engine.generate(PROMPTS[:num_prompts], logits_processor=processor, **settings)
        assert list(answers[0].tokens) == expected
        check_trace(answers[0])
        stream = engine.stream(PROMPTS[0], logits_processor=processor, **settings)
        assert "".join(stream) == stream.generation.text
        assert list(stream.generation.tokens) == expected

    def test_left_padding_given_to_the_model_changes_nothing(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        inputs = left_padded(PROMPTS[1])
        padded = {name: torch.nn.functional.pad(x, (9, 0), value=0) for name, x in inputs.items()}
        padded["input_ids"][:, :9] = 40  # not a special token: only the mask says that it is padding
        tokens, logits = logits_of(engine, **inputs)
        padded_tokens, padded_logits = logits_of(engine, **padded)
        assert torch.equal(tokens, padded_tokens)
        torch.testing.assert_close(logits, padded_logits, rtol=1e-4, atol=1e-4)

    def test_each_row_may_have_a_mixture_of_its_own_fixed(self, make_engine: MakeEngine) -> None:
        engine = make_engine(router=None)
        mixtures = [{"math": 1.0}, {}, {"units": 0.5, "poems": 0.5}]
        with engine.fixed(mixtures):
            together = engine.generate(PROMPTS, **ASCII)
        for prompt, mixture, generation in zip(PROMPTS, mixtures, together, strict=True):
            with engine.fixed(mixture):
                same_trace(engine.generate(prompt, **ASCII), generation)
            assert {s.mixture for s in generation.trace} == {Mixture(mixture)}
            assert not any(s.probabilities or s.switched for s in generation.trace)


class TestStream:
    @pytest.mark.parametrize("settings", [ASCII, {"max_new_tokens": 24}, {"max_new_tokens": 24, "do_sample": True}])
    def test_streaming_is_generating(self, make_engine: MakeEngine, settings: dict[str, Any]) -> None:
        engine = make_engine()
        generation = engine.generate(PROMPTS[0], seed=5, **settings)
        pieces = list(engine.stream(PROMPTS[0], seed=5, **settings))
        assert len(pieces) > 3
        assert "".join(pieces) == generation.text
        for piece in pieces:
            assert piece.mixture == generation.trace[piece.sentence].mixture

    def test_pieces_of_a_sentence_make_its_text(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        generation = engine.generate(PROMPTS[0], **ASCII)
        pieces = list(engine.stream(PROMPTS[0], **ASCII))
        for i, sentence in enumerate(generation.trace):
            assert "".join(piece for piece in pieces if piece.sentence == i) == sentence.text

    def test_a_stream_ends_at_eos(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        processor = LogitsProcessorList([EndAt({0: 8})])
        text = "".join(engine.stream(PROMPTS[0], **ASCII, logits_processor=processor))
        assert text == engine.generate(PROMPTS[0], **ASCII).text[:8]

    def test_a_chat_is_streamed_through_its_template(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        chat = [{"role": "user", "content": "Why?"}]
        assert "".join(engine.stream(chat, **ASCII)) == engine.generate(chat, **ASCII).text

    def test_leaving_a_stream_early_stops_the_model(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        router = engine.router
        assert isinstance(router, HashRouter)
        threads = threading.active_count()
        stream = engine.stream(PROMPTS[0], **{**ASCII, "max_new_tokens": 400})
        assert next(stream)
        stream.close()
        assert threading.active_count() == threads
        assert len(router.asked) < 50
        assert len(engine.generate(PROMPTS[0], **ASCII).tokens) == 20

    def test_an_error_while_streaming_reaches_the_reader(self, make_engine: MakeEngine) -> None:
        class FailsAtTheThird(HashRouter):
            def probabilities(self, contexts: Sequence[Context]) -> Tensor:
                if len(self.asked) == 2:
                    raise RuntimeError("the router broke")
                return super().probabilities(contexts)

        engine = make_engine(router=FailsAtTheThird())
        pieces: list[str] = []
        with pytest.raises(RuntimeError, match="the router broke"):
            pieces.extend(engine.stream(PROMPTS[0], **ASCII))
        assert len("".join(pieces)) == 12

    def test_the_models_own_streamers_route(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        streamer = TextIteratorStreamer(engine.tokenizer, skip_prompt=True, skip_special_tokens=True)
        engine.model.generate(**left_padded(PROMPTS[0]), **ASCII, streamer=streamer)
        assert "".join(streamer) == engine.generate(PROMPTS[0], **ASCII).text


class TestBase:
    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": False},
            {"do_sample": True, "temperature": 0.8},
            {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
        ],
        ids=["greedy", "sampling", "beams"],
    )
    def test_disabled_is_the_untouched_model_bit_for_bit(
        self, make_engine: MakeEngine, settings: dict[str, Any]
    ) -> None:
        settings = {**settings, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
        engine, untouched = make_engine(), lively_model()
        engine.generate(PROMPTS, max_new_tokens=8)
        inputs = left_padded(*PROMPTS)
        torch.manual_seed(7)
        expected = untouched.generate(**inputs, **settings)
        torch.manual_seed(7)
        with engine.disabled():
            found = engine.model.generate(**inputs, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))

    def test_disabled_generations_have_a_trace_of_the_base_alone(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with engine.disabled():
            generation = engine.generate(PROMPTS[0], **ASCII)
        assert generation.tokens == tuple(
            lively_model().generate(**left_padded(PROMPTS[0]), **ASCII)[0, len(PROMPTS[0]) :].tolist()
        )
        assert generation.text == "".join(s.text for s in generation.trace)
        assert all(s.mixture == Mixture() and not s.probabilities and not s.abstained for s in generation.trace)

    def test_detaching_gives_the_untouched_model_back_bit_for_bit(self, make_engine: MakeEngine) -> None:
        engine, untouched = make_engine(), lively_model()
        engine.generate(PROMPTS, **ASCII)
        model = engine.detach()
        assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
        for name, parameter in untouched.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter)
        ids = torch.tensor([tokens_of(PROMPTS[0])])
        assert torch.equal(model(ids).logits, untouched(ids).logits)

    def test_leaving_the_engine_detaches_it(self, make_engine: MakeEngine) -> None:
        with make_engine() as engine:
            model = engine.model
        ids = torch.tensor([tokens_of(PROMPTS[0])])
        assert torch.equal(model(ids).logits, lively_model()(ids).logits)


class TestSampling:
    def test_a_seed_repeats_the_answer_and_another_gives_another(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        texts = [engine.generate(PROMPTS[0], do_sample=True, max_new_tokens=16, seed=s).text for s in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_a_seed_leaves_the_global_generator_alone(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        state = torch.get_rng_state()
        engine.generate(PROMPTS[0], do_sample=True, max_new_tokens=4, seed=1)
        list(engine.stream(PROMPTS[0], do_sample=True, max_new_tokens=4, seed=1))
        assert torch.equal(torch.get_rng_state(), state)
        engine.generate(PROMPTS[0], do_sample=True, max_new_tokens=4)
        assert not torch.equal(torch.get_rng_state(), state)

    def test_several_return_sequences_have_each_their_trace(self, make_engine: MakeEngine) -> None:
        settings = {**ASCII, "do_sample": True, "num_return_sequences": 3}
        generations = make_engine().generate(PROMPTS[:2], seed=3, **settings)
        assert len(generations) == 6
        assert len({generation.text for generation in generations}) == 6
        for generation in generations:
            check_trace(generation)
        assert len({g.trace[0].mixture for g in generations[:3]}) == 1
        assert len({g.trace[1].mixture for g in generations[:3]}) > 1

    def test_several_sequences_of_one_prompt_come_as_a_list(self, make_engine: MakeEngine) -> None:
        generations = make_engine().generate(PROMPTS[0], max_new_tokens=2, do_sample=True, num_return_sequences=2)
        assert [type(generation) for generation in generations] == [Generation, Generation]


@torch.no_grad()
def score_alone(engine: Engine, prompt: str, answer: Sequence[int]) -> float:
    """The log-probability of an answer, token by token, routed on its own."""
    output = engine.model(torch.tensor([tokens_of(prompt)]))
    total = 0.0
    for token in answer:
        total += output.logits[0, -1].log_softmax(dim=-1)[token].item()
        output = engine.model(torch.tensor([[token]]), past_key_values=output.past_key_values)
    return total


class TestBeams:
    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    def test_each_beam_is_scored_as_its_tokens_alone(self, make_engine: MakeEngine, kv_policy: str) -> None:
        # Were a row's history not to follow its beam, it would be routed on another beam's text.
        engine = make_engine(segmenter=lambda: EveryK(3), kv_policy=kv_policy)
        beams = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0, "max_new_tokens": 14}
        output = engine.model.generate(
            **left_padded(*PROMPTS[:2]), **beams, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        moves = output.beam_indices[:, :14] % 4
        assert len({tuple(row.tolist()) for row in moves}) > 1  # beams did cross
        answers = output.sequences[:, len(PROMPTS[0]) :].tolist()
        for i, (answer, score) in enumerate(zip(answers, output.sequences_scores.tolist(), strict=True)):
            assert score_alone(engine, PROMPTS[i // 4], answer) == pytest.approx(score, abs=2e-3)

    def test_a_beams_trace_is_that_of_its_tokens(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        generations = engine.generate(PROMPTS[:2], **ASCII, num_beams=4, num_return_sequences=2)
        assert len(generations) == 4
        for i, generation in enumerate(generations):
            check_trace(generation)
            score_alone(engine, PROMPTS[i // 2], generation.tokens)
            trace = engine.last_traces[0]
            assert [s.mixture for s in trace] == [s.mixture for s in generation.trace]
            assert [s.start for s in trace] == [s.start for s in generation.trace]

    def test_one_beam_answer_of_one_prompt_comes_bare(self, make_engine: MakeEngine) -> None:
        assert isinstance(make_engine().generate(PROMPTS[0], max_new_tokens=2, num_beams=2), Generation)

    def test_settings_may_come_as_a_generation_config(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        config = GenerationConfig(num_beams=3, max_new_tokens=14, do_sample=False, eos_token_id=30, pad_token_id=40)
        generation = engine.generate(PROMPTS[0], generation_config=config)
        check_trace(generation)
        tokens = engine.model.generate(**left_padded(PROMPTS[0]), generation_config=config)
        assert list(generation.tokens) == tokens[0, len(PROMPTS[0]) :].tolist()

    def test_beams_may_be_fixed_to_one_mixture_a_prompt(self, make_engine: MakeEngine) -> None:
        engine = make_engine(router=None)
        mixtures = [{"math": 1.0}, {"units": 1.0}]
        settings = {**ASCII, "num_beams": 3}
        with engine.fixed(mixtures):
            together = engine.generate(PROMPTS[:2], **settings)
        for prompt, mixture, generation in zip(PROMPTS, mixtures, together, strict=False):
            with engine.fixed(mixture):
                same_trace(engine.generate(prompt, **settings), generation)


class TestPrompts:
    def test_messages_go_through_the_chat_template(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
        text = engine.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        tokens, _ = logits_of(engine, **left_padded(text))
        assert list(engine.generate(chat, **ASCII).tokens) == tokens[0].tolist()

    def test_a_chat_is_routed_on_its_contents(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        router = engine.router
        assert isinstance(router, HashRouter)
        chat = [("system", "Be kind."), ("user", "Why?"), ("assistant", "So."), ("user", "But why?")]
        engine.generate([{"role": role, "content": content} for role, content in chat], max_new_tokens=2)
        assert router.asked[0] == Context("But why?", history="Be kind.\nWhy?\nSo.")

    def test_a_list_of_strings_or_of_chats_gives_a_list(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        for prompts in (PROMPTS, chats):
            together = engine.generate(prompts, **ASCII)
            assert [g.tokens for g in together] == [engine.generate(p, **ASCII).tokens for p in prompts]
        assert [type(g) for g in engine.generate(PROMPTS[:1], max_new_tokens=2)] == [Generation]

    @pytest.mark.parametrize("prompt", ["", "  \n\t", [{"role": "user", "content": " "}]], ids=repr)
    def test_an_empty_prompt_is_refused(self, make_engine: MakeEngine, prompt: Any) -> None:
        engine = make_engine()
        with pytest.raises(PromptError, match="the prompt is empty; give at least one token"):
            engine.generate(prompt)
        with pytest.raises(PromptError, match="prompt 1: the prompt is empty"):
            engine.generate([PROMPTS[0] if isinstance(prompt, str) else [{"role": "user", "content": "x"}], prompt])

    def test_an_empty_list_of_prompts_is_refused(self, make_engine: MakeEngine) -> None:
        with pytest.raises(PromptError, match="there is no prompt"):
            make_engine().generate([])

    def test_a_prompt_beyond_the_models_context_is_refused_with_both_lengths(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with pytest.raises(PromptError, match=r"prompt 1 has 500 tokens, and 13 new ones .* context is 512"):
            engine.generate(["short", "x" * 500], max_new_tokens=13)
        assert engine.generate("x" * 500, max_new_tokens=12).tokens
        for way in (
            {"generation_config": GenerationConfig(max_new_tokens=13)},
            {"max_length": 513},
            {"generation_config": GenerationConfig(max_length=513)},
        ):
            with pytest.raises(PromptError, match=r"prompt 1 has 500 tokens, and 13 new ones .* context is 512"):
                engine.generate(["short", "x" * 500], **way)
        engine.model.generation_config.max_new_tokens = 13
        with pytest.raises(PromptError, match=r"500 tokens, and 13 new ones"):
            engine.generate("x" * 500)
        assert engine.generate("x" * 500, max_length=512, max_new_tokens=None).tokens

    def test_messages_without_a_chat_template_are_refused(self, make_engine: MakeEngine) -> None:
        engine = make_engine(tokenizer=byte_tokenizer(chat_template=None))
        with pytest.raises(PromptError, match="no chat template; give the prompt as a string"):
            engine.generate([{"role": "user", "content": "Why?"}])

    @pytest.mark.parametrize("name", ["return_dict_in_generate", "input_ids", "inputs_embeds", "attention_mask"])
    def test_arguments_that_engine_generate_sets_itself_are_refused(self, make_engine: MakeEngine, name: str) -> None:
        for answer in (make_engine().generate, make_engine().stream):
            with pytest.raises(ValueError, match=rf"{name} is not an argument of engine\.generate"):
                answer("Why?", **{name: torch.zeros(1, 2)})

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"use_cache": False}, "follows the KV cache; leave use_cache on"),
            ({"return_dict_in_generate": True}, "return_dict_in_generate is not an argument"),
            ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens reads several tokens at once"),
        ],
    )
    def test_what_cannot_be_followed_is_refused(
        self, make_engine: MakeEngine, settings: dict[str, Any], message: str
    ) -> None:
        engine = make_engine()
        for answer in (engine.generate, engine.stream):
            with pytest.raises(ValueError, match=message):
                answer("Why?", **settings)

    def test_reading_ahead_is_refused_wherever_it_is_set(self, make_engine: MakeEngine) -> None:
        engine, message = make_engine(), "prompt_lookup_num_tokens reads several tokens at once"
        for answer in (engine.generate, engine.stream):
            with pytest.raises(ValueError, match=message):
                answer("Why?", generation_config=GenerationConfig(prompt_lookup_num_tokens=3))
        engine.model.generation_config.prompt_lookup_num_tokens = 3
        with pytest.raises(ValueError, match=message):
            engine.generate("Why?")

    @pytest.mark.parametrize(
        "prompt, shown",
        [
            (TOKENIZER("Why?"), "BatchEncoding"),
            ({"role": "user", "content": "Why?"}, "dict"),
            (torch.tensor([[5, 6]]), "Tensor"),
            ([5, 6], "int"),
            (["Why?", None], "NoneType"),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_a_prompt_that_is_neither_text_nor_messages_is_refused(
        self, make_engine: MakeEngine, prompt: Any, shown: str
    ) -> None:
        with pytest.raises(
            PromptError, match=rf"a string or a list of messages .* got {shown} .*engine\.model\.generate"
        ):
            make_engine().generate(prompt)

    @pytest.mark.usefixtures("unchecked")
    def test_the_content_of_a_message_is_text(self, make_engine: MakeEngine) -> None:
        with pytest.raises(PromptError, match="content of a message must be a string or parts of text, got int"):
            make_engine().generate([{"role": "user", "content": 5}])

    def test_a_detached_engine_answers_no_more(self, make_engine: MakeEngine) -> None:
        with make_engine() as engine:
            engine.generate("Why?", **ASCII)
        for answer in (engine.generate, engine.stream):
            with pytest.raises(ValueError, match=r"was detached from its model; make another one with dlp_lora\.load"):
                answer("Why?", **ASCII)

    def test_as_many_mixtures_are_fixed_as_there_are_prompts_or_one(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        mixtures = [{"math": 1.0}, {"poems": 1.0}]
        with engine.fixed(mixtures), pytest.raises(ValueError, match="2 mixtures were fixed for 4 prompts; give one"):
            engine.generate([*PROMPTS, "And?"], **ASCII)
        with engine.fixed(mixtures):
            found = engine.generate(PROMPTS[:2], **ASCII, num_beams=2, num_return_sequences=2)
        assert [dict(each.trace[0].mixture) for each in found] == [mixtures[0]] * 2 + [mixtures[1]] * 2

    @pytest.mark.parametrize("mixture", ["math", ["math", "poems"]])
    @pytest.mark.usefixtures("unchecked")
    def test_a_name_is_no_mixture(self, make_engine: MakeEngine, mixture: Any) -> None:
        with (
            pytest.raises(ValueError, match=r"weights by name, got 'math'; give for example \{'math': 1\.0\}"),
            make_engine().fixed(mixture),
        ):
            pass


class TestOrdinaryModel:
    def test_a_pipeline_routes(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        generator = transformers.pipeline("text-generation", model=engine.model, tokenizer=engine.tokenizer)
        [found] = generator(PROMPTS[0], return_full_text=False, **ASCII)
        expected = engine.generate(PROMPTS[0], **ASCII)
        assert found["generated_text"] == expected.text
        assert len({s.mixture for s in expected.trace}) > 1
        chat = [{"role": "user", "content": "Why?"}]
        [found] = generator(chat, return_full_text=False, **ASCII)
        assert found["generated_text"] == engine.generate(chat, **ASCII).text

    def test_a_loss_is_that_of_the_mixture_that_the_router_picks(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        inputs = left_padded(*PROMPTS)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = engine.model(**inputs, labels=labels).loss
        router = HashRouter()
        picked = []
        for row in router.probabilities([Context(prompt) for prompt in PROMPTS]).tolist():
            picked.append(engine.policy(dict(zip(router.names, row, strict=True))))
        with engine.fixed(picked):
            assert engine.model(**inputs, labels=labels).loss.item() == loss.item()
        with engine.disabled():
            assert engine.model(**inputs, labels=labels).loss.item() != pytest.approx(loss.item(), abs=1e-3)

    def test_gradients_flow_through_the_fused_layers(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with torch.inference_mode():
            engine.generate(PROMPTS, max_new_tokens=2)
        inputs = left_padded(*PROMPTS)
        engine.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradient = engine.model.get_input_embeddings().weight.grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        with engine.disabled():
            engine.model.zero_grad()
            engine.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert not torch.allclose(engine.model.get_input_embeddings().weight.grad, gradient)

    def test_an_engine_that_was_made_and_changed_in_inference_mode_answers_and_trains_outside(
        self, make_engine: MakeEngine, lively_adapters: Path, tmp_path: Path
    ) -> None:
        lively_model().save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        wanted = make_engine().generate(PROMPTS[0], mixture={"math": 1.0}, **ASCII)
        with torch.inference_mode():
            engine = dlp_lora.load(tmp_path, adapters=lively_adapters, paths="stacked")
            inside = engine.generate(PROMPTS[0], mixture={"math": 1.0}, **ASCII)
            engine.put_adapters({"math": lively_adapters / "math"})
            with engine.merged({"math": 1.0}):
                assert torch.is_inference_mode_enabled()
            engine.compile(max_rank=32)
        assert inside.tokens == engine.generate(PROMPTS[0], mixture={"math": 1.0}, **ASCII).tokens == wanted.tokens
        with torch.inference_mode():
            model = engine.detach()
        inputs = left_padded(*PROMPTS)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()

    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    def test_a_decoding_loop_of_ones_own_routes(self, make_engine: MakeEngine, kv_policy: str) -> None:
        engine = make_engine(kv_policy=kv_policy)
        answer: list[int] = []
        with torch.no_grad():
            output = engine.model(torch.tensor([tokens_of(PROMPTS[0])]))
            for _ in range(20):
                scores = output.logits[0, -1].clone()
                scores[NOT_ASCII] = float("-inf")
                answer.append(int(scores.argmax()))
                output = engine.model(torch.tensor([answer[-1:]]), past_key_values=output.past_key_values)
                assert output.logits.shape[:2] == (1, 1)
        assert answer == list(engine.generate(PROMPTS[0], **ASCII).tokens)

    def test_embeddings_need_a_fixed_mixture(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        ids = torch.tensor([tokens_of(PROMPTS[0])])
        embeddings = engine.model.get_input_embeddings()(ids)
        with pytest.raises(PromptError, match=r"inputs_embeds; pass input_ids or use engine\.fixed"):
            engine.model(inputs_embeds=embeddings)
        with engine.fixed({"math": 1.0}):
            assert torch.equal(engine.model(inputs_embeds=embeddings).logits, engine.model(ids).logits)

    def test_a_cache_begun_with_embeddings_has_no_rows_of_the_pass_before(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.model(**left_padded(PROMPTS[0]))
        embeddings = engine.model.get_input_embeddings()(left_padded(PROMPTS[1])["input_ids"])
        with engine.fixed({"math": 1.0}):
            cache = engine.model(inputs_embeds=embeddings, use_cache=True).past_key_values
        assert rows_of(cache) is None


class TestSettings:
    def test_using_changes_settings_for_a_while(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        before = engine.generate(PROMPTS[0], **ASCII)
        policy, switching, router = engine.policy, engine.switching, engine.router
        other = {"policy": dlp_lora.Uniform(), "switching": dlp_lora.Switching(min_tokens=9), "kv_policy": "keep"}
        with engine.using(**other):
            assert (engine.policy, engine.switching, engine.kv_policy) == tuple(other.values())
            mixtures = {s.mixture for s in engine.generate(PROMPTS[0], **ASCII).trace}
            assert [round(weight, 6) for (mixture,) in [mixtures] for weight in mixture.values()] == [0.333333] * 3
        with pytest.raises(KeyError, match="out"), engine.using(router=HashRouter(["units", "math", "poems"])):
            raise KeyError("out")
        assert (engine.policy, engine.switching, engine.kv_policy) == (policy, switching, "recompute")
        assert engine.router is router
        same_trace(engine.generate(PROMPTS[0], **ASCII), before)

    def test_using_refuses_what_it_does_not_know(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with (
            pytest.raises(
                ValueError,
                match=r"prompt_routing, settings, router, segmenter, routing_log, not polcy",
            ),
            engine.using(polcy=TopP()),
        ):
            pass
        with (
            pytest.raises(dlp_lora.RouterError, match="does not know the adapters poems, units"),
            engine.using(router=HashRouter(["math"])),
        ):
            pass

    @pytest.mark.usefixtures("unchecked")
    def test_using_refuses_an_unknown_kv_policy(self, make_engine: MakeEngine) -> None:
        with (
            pytest.raises(ValueError, match="kv_policy must be 'keep' or 'recompute', got 'forget'"),
            make_engine().using(kv_policy="forget"),
        ):
            pass

    def test_fixed_names_the_adapters_there_are(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with (
            pytest.raises(dlp_lora.AdapterError, match="no adapter maths; there are math, poems, units"),
            engine.fixed({"maths": 1.0}),
        ):
            pass

    def test_fixed_needs_a_mixture(self, make_engine: MakeEngine) -> None:
        with pytest.raises(ValueError, match="needs a mixture"), make_engine().fixed([]):
            pass

    def test_fixed_mixtures_must_fit_the_batch(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with (
            engine.fixed([{"math": 1.0}, {"units": 1.0}]),
            pytest.raises(ValueError, match="2 mixtures were fixed for a batch of 3 rows"),
        ):
            engine.model.generate(**left_padded(*PROMPTS), max_new_tokens=2)

    def test_fixed_contexts_nest(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with engine.fixed({"math": 1.0}):
            outer = engine.generate(PROMPTS[0], **ASCII)
            with engine.fixed({"units": 1.0}):
                assert engine.generate(PROMPTS[0], **ASCII).tokens != outer.tokens
            same_trace(engine.generate(PROMPTS[0], **ASCII), outer)

    def test_without_router_or_fixed_mixture_nothing_is_generated(self, make_engine: MakeEngine) -> None:
        engine = make_engine(router=None)
        with pytest.raises(dlp_lora.RouterError, match=r"no router; choose a mixture with engine\.fixed\(\)"):
            engine.generate(PROMPTS[0], max_new_tokens=2)
        with engine.disabled():
            assert engine.generate(PROMPTS[0], max_new_tokens=2).tokens


class TestResults:
    def test_a_generation_is_json_data(self, make_engine: MakeEngine) -> None:
        generation = make_engine().generate(PROMPTS[0], max_new_tokens=24, do_sample=False)
        data = json.loads(json.dumps(generation.to_dict()))
        assert data["text"] == generation.text
        assert [s["mixture"] for s in data["trace"]] == [dict(s.mixture) for s in generation.trace]
        assert [(s["start"], s["end"], s["text"]) for s in data["trace"]] == [
            (s.start, s.end, s.text) for s in generation.trace
        ]
        assert set(data["trace"][0]["probabilities"]) == {"math", "poems", "units"}

    def test_times_are_told_where_the_router_was_asked(self, make_engine: MakeEngine) -> None:
        generation = make_engine().generate(PROMPTS[0], **ASCII)
        assert all(s.route_ms > 0 and s.fuse_ms > 0 for s in generation.trace)

    @pytest.mark.parametrize("method", ["generate", "stream"])
    def test_the_models_generation_settings_are_left_alone(self, make_engine: MakeEngine, method: str) -> None:
        engine = make_engine()
        before = copy.deepcopy(engine.model.generation_config.to_dict())
        answer = getattr(engine, method)(PROMPTS[0], max_new_tokens=3, eos_token_id=30, pad_token_id=40)
        assert answer if isinstance(answer, Generation) else list(answer)
        assert engine.model.generation_config.to_dict() == before


def test_half_precision_models_route_too(lively_adapters: Path) -> None:
    model: PreTrainedModel = tiny_model(dtype=torch.bfloat16)
    engine = dlp_lora.load(
        model, tokenizer=TOKENIZER, adapters=lively_adapters, router=HashRouter(), segmenter=lambda: EveryK(6)
    )
    for generation in engine.generate(PROMPTS, **ASCII):
        check_trace(generation)
