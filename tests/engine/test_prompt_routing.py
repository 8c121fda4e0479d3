"""Every sentence of a prompt under its own mixture: Eq. 6 over batch x sentences x adapters."""

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import dlp_lora
import reference
from conftest import CHAT_TEMPLATE, EveryK, HashRouter, byte_tokenizer, lively_model, make_adapter, watching
from dlp_lora import Context, Engine, Mixture, SentenceSegmenter, Switching, TopK
from dlp_lora.bank.adapter_files import find_adapters
from dlp_lora.engine.cache import cache_of, rows_of

MakeEngine = Callable[..., Engine]
TOKENIZER = byte_tokenizer()
K = 6  # characters of a sentence, as the engines of these tests cut them
POLICY = TopK(k=2)
PROMPTS = ["Tell me a tale of", "Why is it so?", "How far is the moon from here"]
NOT_ASCII = sorted(set(range(260)) - {TOKENIZER(chr(c))["input_ids"][0] for c in range(32, 127)})
ASCII: dict[str, Any] = {"suppress_tokens": NOT_ASCII, "max_new_tokens": 14, "do_sample": False}


def tokens_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def padded(*prompts: str, side: str = "left") -> dict[str, Tensor]:
    rows = [tokens_of(prompt) for prompt in prompts]
    width = max(map(len, rows))
    pads = [([258] * (width - len(row)), [0] * (width - len(row))) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, (pad, _) in zip(rows, pads, strict=True)]
    mask = [no + [1] * len(r) if side == "left" else [1] * len(r) + no for r, (_, no) in zip(rows, pads, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def route(*context: str, history: str = "") -> Mixture:
    """What the engines of these tests choose."""
    router = HashRouter()
    [probabilities] = router.probabilities([Context(*context, history=history)]).tolist()
    return POLICY(dict(zip(router.names, probabilities, strict=True)))


def by_token(prompt: str) -> list[Mixture]:
    """The mixture of each token of a prompt, by hand: one character a token, K a sentence, the last is the answer's."""
    cut = [prompt[i : i + K] for i in range(0, len(prompt), K)]
    mixtures = [route(sentence.strip()) for sentence in cut for _ in sentence]
    return [*mixtures[:-1], route(prompt.strip())]


def expected(folder: Path, mixtures: Sequence[Sequence[Mixture]], ids: Tensor) -> Tensor:
    """The logits by the plain loop over tokens, in float64."""
    model = reference.with_mixtures_by_token(lively_model(), mixtures, find_adapters(folder))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@torch.no_grad()
def steps(engine: Engine, tokens: Sequence[int], cache: Any) -> Tensor:
    logits = [engine.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1] for token in tokens]
    return torch.stack(logits)


@pytest.fixture
def make(make_engine: MakeEngine) -> MakeEngine:
    return partial(make_engine, policy=POLICY, prompt_routing="sentences")


@pytest.fixture
def engine(make: MakeEngine) -> Engine:
    return make()


class TestPrefill:
    @pytest.mark.parametrize("grad", [False, True], ids=["stacked", "concatenated"])
    def test_every_token_has_the_mixture_of_its_sentence(
        self, engine: Engine, lively_adapters: Path, grad: bool
    ) -> None:
        prompts = ["Tell me a tale of", "Why is it so? Yes"]  # of one length
        assert all(len(set(by_token(prompt))) > 2 for prompt in prompts)
        ids = padded(*prompts)["input_ids"]
        with torch.set_grad_enabled(grad):
            found = engine.model(ids).logits
        wanted = expected(lively_adapters, [by_token(prompt) for prompt in prompts], ids)
        assert error(found, wanted) < 1e-5
        with engine.using(prompt_routing="whole"), torch.no_grad():
            assert error(engine.model(ids).logits, wanted) > 1e-2

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_rows_of_a_ragged_batch_are_the_rows_alone(self, engine: Engine, lively_adapters: Path, side: str) -> None:
        inputs = padded(*PROMPTS, side=side)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            together = engine.model(**inputs, position_ids=positions).logits
        for row, mask, prompt in zip(together, inputs["attention_mask"].bool(), PROMPTS, strict=True):
            ids = torch.tensor([tokens_of(prompt)])
            assert error(row[mask], expected(lively_adapters, [by_token(prompt)], ids)[0]) < 1e-5

    def test_the_last_token_alone_is_encoded_under_the_mixture_of_the_answer(self, engine: Engine) -> None:
        with watching(engine) as passes:
            output = engine.model(torch.tensor([tokens_of(PROMPTS[0])]))
        assert passes[0].gates[0] is not None
        [row] = rows_of(cache_of(output)).rows
        assert [(s.start, s.end) for s in row.prompt_trace] == [(0, 6), (6, 12), (12, 16)]
        assert row.mixture == route(PROMPTS[0])

    def test_the_router_is_asked_once_for_all_sentences_of_all_rows(self, make: MakeEngine) -> None:
        class Counting(HashRouter):
            calls = 0

            def probabilities(self, contexts: Sequence[Context]) -> Tensor:
                self.calls += 1
                return super().probabilities(contexts)

        engine = make(router=Counting())
        engine.model(**padded(*PROMPTS[:2]))
        router = engine.router
        assert isinstance(router, Counting)
        assert router.calls == 1
        assert router.asked == [
            Context("Tell me a tale of"),
            Context("Why is it so?"),
            Context("Tell m"),
            Context("e a ta", history="Tell m"),
            Context("le of", history="Tell me a ta"),
            Context("Why is"),
            Context("it so", history="Why is"),
            # The third, "?", is the last token.
        ]

    def test_decoding_fuses_the_answers_mixture_alone(self, engine: Engine) -> None:
        with torch.no_grad(), watching(engine) as passes:
            output = engine.model(torch.tensor([tokens_of(PROMPTS[0])]))
            steps(engine, [40], output.past_key_values)
        wide, narrow = passes
        assert {gate.shape[:2] for gate in wide.gates} == {(1, len(PROMPTS[0]))}
        assert narrow.gates == [None] * len(wide.gates)
        ranks = {"math": 4, "poems": 2, "units": 8}
        assert narrow.ranks[0] == sum(ranks[name] for name in route(PROMPTS[0]))
        assert all(group.active is None for group in engine.bank.groups)  # nothing stays behind

    def test_equal_mixtures_need_no_gate(self, make: MakeEngine) -> None:
        engine = make(policy=dlp_lora.Only("math"))
        ids = torch.tensor([tokens_of(PROMPTS[0])])
        with torch.no_grad():
            with watching(engine) as passes:
                logits = engine.model(ids).logits
            assert set(passes[0].gates) == {None}
            with engine.using(prompt_routing="whole"):
                assert torch.equal(engine.model(ids).logits, logits)

    @pytest.mark.parametrize("prompt", ["Q", "Qu", "   .\n", "<|im_end|><|im_end|>"], ids=repr)
    def test_a_prompt_of_next_to_nothing_is_answered(self, make: MakeEngine, prompt: str) -> None:
        engine = make(segmenter=SentenceSegmenter)
        assert engine.generate(prompt, max_new_tokens=3).tokens

    @pytest.mark.filterwarnings("ignore")
    def test_a_head_that_is_adapted_is_gated_by_the_last_tokens(self, tmp_path: Path) -> None:
        model = lively_model()
        for seed, name in enumerate(("math", "poems", "units")):
            make_adapter(model, tmp_path / name, seed=seed, scale=0.3, target_modules=["q_proj", "lm_head"])
        settings = {"tokenizer": TOKENIZER, "router": HashRouter(), "policy": POLICY, "segmenter": partial(EveryK, K)}
        switching = Switching(min_tokens=1, margin=0.0)
        engine = dlp_lora.load(model, adapters=tmp_path, switching=switching, prompt_routing="sentences", **settings)
        ids = padded("Tell me a tale of", "Why is it so? Yes")["input_ids"]
        with torch.no_grad():
            logits = engine.model(ids).logits
            assert error(engine.model(ids, logits_to_keep=3).logits, logits[:, -3:]) < 1e-5
            with pytest.raises(ValueError, match="logits_to_keep must be a number, not positions"):
                engine.model(ids, logits_to_keep=torch.tensor([2, 5]))
        prompts = ["Tell me a tale of", "Why is it so? Yes"]
        wanted = expected(tmp_path, [by_token(prompt) for prompt in prompts], ids)
        assert error(logits, wanted) < 1e-5

    def test_a_loss_is_that_of_the_sentences_mixtures(self, engine: Engine, lively_adapters: Path) -> None:
        ids = torch.tensor([tokens_of(PROMPTS[2])])
        loss = engine.model(ids, labels=ids).loss
        loss.backward()
        assert engine.model.get_input_embeddings().weight.grad.isfinite().all()
        wanted = expected(lively_adapters, [by_token(PROMPTS[2])], ids)[0]
        assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(wanted[:-1], ids[0, 1:]).item(), rel=1e-4)


class TestAnswers:
    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    def test_an_answer_is_the_plain_loop_over_tokens(
        self, make: MakeEngine, lively_adapters: Path, kv_policy: str
    ) -> None:
        engine = make(kv_policy=kv_policy)
        prompt = PROMPTS[0]
        output = engine.model.generate(**padded(prompt), **ASCII, return_dict_in_generate=True, output_logits=True)
        answer = output.sequences[0, len(prompt) :].tolist()
        text = TOKENIZER.decode(answer)
        starts = [0, 6, 12]
        openings = [route(prompt), *(route(prompt, text[:i], text[i]) for i in starts[1:])]
        assert len(set(openings)) > 1
        own = by_token(prompt)
        spoken = [openings[i // K] for i in range(len(answer))]
        for i, logits in enumerate(output.logits):
            # The answer, and with it the prompt's last token, is encoded again; the prompt's sentences stay theirs.
            now = spoken[i - 1] if i else openings[0]
            mixtures = [*own[:-1], now, *[now] * i] if kv_policy == "recompute" else [*own, *spoken[:i]]
            ids = torch.tensor([[*tokens_of(prompt), *answer[:i]]])
            assert error(logits, expected(lively_adapters, [mixtures], ids)[:, -1]) < 2e-5

    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    def test_a_batch_equals_its_rows_alone(self, make: MakeEngine, kv_policy: str) -> None:
        engine = make(kv_policy=kv_policy)
        together = engine.generate(PROMPTS, **ASCII)
        for prompt, found in zip(PROMPTS, together, strict=True):
            alone = engine.generate(prompt, **ASCII)
            assert alone.tokens == found.tokens
            for one, other in ((alone.trace, found.trace), (alone.prompt_trace, found.prompt_trace)):
                told = [[(s.text, s.start, s.end, s.mixture, s.switched) for s in trace] for trace in (one, other)]
                assert told[0] == told[1]

    def test_the_opening_is_routed_as_without_sentences(self, engine: Engine) -> None:
        found = engine.generate(PROMPTS[0], **ASCII)
        with engine.using(prompt_routing="whole"):
            whole = engine.generate(PROMPTS[0], **ASCII)
        assert found.trace[0].mixture == whole.trace[0].mixture
        assert found.trace[0].probabilities == whole.trace[0].probabilities
        assert whole.prompt_trace == ()

    def test_streaming_is_generating(self, engine: Engine) -> None:
        assert "".join(engine.stream(PROMPTS[0], **ASCII)) == engine.generate(PROMPTS[0], **ASCII).text

    def test_a_static_cache_gives_the_same_answer(self, engine: Engine) -> None:
        wanted = engine.generate(PROMPTS[:2], **ASCII)
        found = engine.generate(PROMPTS[:2], **ASCII, cache_implementation="static")
        assert [g.tokens for g in found] == [g.tokens for g in wanted]

    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    def test_each_beam_is_scored_as_its_tokens_alone(self, make: MakeEngine, kv_policy: str) -> None:
        engine = make(segmenter=partial(EveryK, 3), kv_policy=kv_policy)
        beams = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "max_new_tokens": 10}
        output = engine.model.generate(
            **padded(*PROMPTS[:2]), **beams, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
        answers = output.sequences[:, len(PROMPTS[0]) :].tolist()
        for i, (answer, score) in enumerate(zip(answers, output.sequences_scores.tolist(), strict=True)):
            with torch.no_grad():
                out = engine.model(torch.tensor([tokens_of(PROMPTS[i // 3])]))
                told = torch.cat([out.logits[0, -1:], steps(engine, answer[:-1], out.past_key_values)])
            alone = told.log_softmax(-1)[range(len(answer)), answer].sum().item()
            assert alone == pytest.approx(score, abs=2e-3)

    def test_beams_keep_the_prompts_trace(self, engine: Engine) -> None:
        wanted = [g.prompt_trace for g in engine.generate(PROMPTS[:2], **ASCII)]
        found = engine.generate(PROMPTS[:2], **ASCII, num_beams=3)
        assert [[s.mixture for s in g.prompt_trace] for g in found] == [[s.mixture for s in t] for t in wanted]

    def test_a_fixed_mixture_is_that_of_every_sentence_and_asks_no_router(self, engine: Engine) -> None:
        router = engine.router
        assert isinstance(router, HashRouter)
        with engine.fixed({"math": 0.4, "units": 0.6}):
            found = engine.generate(PROMPTS[0], **ASCII)
            with engine.using(prompt_routing="whole"):
                assert engine.generate(PROMPTS[0], **ASCII).tokens == found.tokens
        assert not router.asked
        assert {s.mixture for s in found.prompt_trace} == {Mixture({"math": 0.4, "units": 0.6})}
        assert not any(s.switched or s.probabilities for s in found.prompt_trace)

    def test_a_mixture_fixed_amid_an_answer_encodes_all_of_it_anew(self, make: MakeEngine) -> None:
        engine = make(kv_policy="recompute")
        with torch.no_grad():
            cache = engine.model(torch.tensor([tokens_of(PROMPTS[0])])).past_key_values
            with engine.fixed({"poems": 1.0}):
                found = steps(engine, tokens_of("Y"), cache)
                wanted = engine.model(torch.tensor([tokens_of(PROMPTS[0] + "Y")])).logits[0, -1:]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    def test_disabled_is_the_base_bit_for_bit(self, engine: Engine) -> None:
        ids = torch.tensor([tokens_of(PROMPTS[0])])
        engine.model(ids)
        with engine.disabled(), torch.no_grad():
            assert torch.equal(engine.model(ids).logits, lively_model()(ids).logits)


class TestTrace:
    CHAT = (
        ("system", "Be kind. Be brief."),
        ("user", "how far is it? Say it in miles."),
        ("assistant", "Far. Very far."),
        ("user", "and in kilometres?"),
    )
    SENTENCES = (
        *("Be kind. ", "Be brief.\n", "how far is it? ", "Say it in miles.\n", "Far. ", "Very far.\n"),
        "and in kilometres?\n",
    )

    def test_sentences_of_a_chat_tile_its_tokens_up_to_the_generation_prompt(self, make: MakeEngine) -> None:
        engine = make(segmenter=SentenceSegmenter)
        chat = [{"role": role, "content": content} for role, content in self.CHAT]
        trace = engine.generate(chat, max_new_tokens=2).prompt_trace
        assert tuple(s.text for s in trace) == self.SENTENCES
        ids = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        parts = [TOKENIZER.decode(ids[s.start : s.end]) for s in trace]
        assert parts == [
            "<|im_start|>system\nBe kind. ",
            "Be brief.",
            "<|im_end|>\n<|im_start|>user\nhow far is it? ",
            "Say it in miles.",
            "<|im_end|>\n<|im_start|>assistant\nFar. ",
            "Very far.",
            "<|im_end|>\n<|im_start|>user\nand in kilometres?",
        ]
        assert TOKENIZER.decode(ids[trace[-1].end :]) == "<|im_end|>\n<|im_start|>assistant\n"

    def test_the_router_reads_a_sentence_and_what_stands_before_it(self, make: MakeEngine) -> None:
        engine = make(segmenter=SentenceSegmenter)
        router = engine.router
        assert isinstance(router, HashRouter)
        engine.generate([{"role": role, "content": content} for role, content in self.CHAT], max_new_tokens=1)
        befores = ["".join(self.SENTENCES[:i]).strip() for i in range(len(self.SENTENCES))]
        assert router.asked[1:] == [
            Context(sentence.strip(), history=before) for sentence, before in zip(self.SENTENCES, befores, strict=True)
        ]

    def test_padding_does_not_move_the_spans(self, engine: Engine) -> None:
        alone = engine.generate(PROMPTS[1], max_new_tokens=2).prompt_trace
        together = engine.generate(PROMPTS, max_new_tokens=2)[1].prompt_trace
        assert [(s.text, s.start, s.end) for s in together] == [(s.text, s.start, s.end) for s in alone]

    def test_probabilities_and_switches_are_told(self, engine: Engine) -> None:
        trace = engine.generate(PROMPTS[0], max_new_tokens=2).prompt_trace
        assert not trace[0].switched
        for before, after in pairwise(trace):
            assert before.end == after.start
            assert after.switched == (before.mixture != after.mixture)
        assert all(POLICY(s.probabilities) == s.mixture and s.route_ms > 0 for s in trace)

    def test_a_trace_is_json_data(self, engine: Engine) -> None:
        found = engine.generate(PROMPTS[0], max_new_tokens=2)
        data = json.loads(json.dumps(found.to_dict()))
        assert [s["mixture"] for s in data["prompt_trace"]] == [dict(s.mixture) for s in found.prompt_trace]
        with engine.using(prompt_routing="whole"):
            assert set(engine.generate(PROMPTS[0], max_new_tokens=2).to_dict()) == {"text", "trace"}

    @pytest.mark.parametrize(
        "min_tokens, texts",
        [
            (1, ["Go! ", "No? ", "Come along. ", "So? ", "Do."]),
            (5, ["Go! No? ", "Come along. ", "So? Do."]),
            (99, ["Go! No? Come along. So? Do."]),
        ],
    )
    def test_a_sentence_shorter_than_min_tokens_is_not_left(
        self, make: MakeEngine, min_tokens: int, texts: list[str]
    ) -> None:
        engine = make(segmenter=SentenceSegmenter, switching=Switching(min_tokens=min_tokens, margin=0.0))
        trace = engine.generate("Go! No? Come along. So? Do.", max_new_tokens=1).prompt_trace
        assert [s.text for s in trace] == texts

    @pytest.mark.parametrize("margin, adapters", [(0.0, "abab"), (0.2, "aaab"), (1.0, "aaaa")])
    def test_the_mixture_stays_while_no_adapter_leads_it_by_the_margin(
        self, make: MakeEngine, margin: float, adapters: str
    ) -> None:
        table = {"Aha.": (0.6, 0.4), "Bye.": (0.45, 0.55), "Come.": (0.5, 0.4), "Down": (0.2, 0.8), "whole": (0.3, 0.7)}

        class LabelRouter(HashRouter):
            def probabilities(self, contexts: Sequence[Context]) -> Tensor:
                return torch.tensor([[*table.get(c.prompt, table["whole"]), 0.0] for c in contexts])

        engine = make(
            router=LabelRouter(),
            segmenter=SentenceSegmenter,
            policy=TopK(k=1),
            switching=Switching(min_tokens=1, margin=margin),
        )
        found = engine.generate("Aha. Bye. Come. Down", max_new_tokens=1)
        names = {"a": "math", "b": "poems"}
        assert [next(iter(s.mixture)) for s in found.prompt_trace] == [names[a] for a in adapters]
        assert next(iter(found.trace[0].mixture)) == "poems"  # the answer's opening is not held back


class TestCaches:
    def test_a_prompt_in_chunks_routes_each_chunk_by_the_text_so_far(
        self, make: MakeEngine, lively_adapters: Path
    ) -> None:
        engine, prompt, cut = make(kv_policy="keep"), PROMPTS[2], 15
        with torch.no_grad(), watching(engine) as passes:
            first = engine.model(torch.tensor([tokens_of(prompt[:cut])]))
            second = engine.model(torch.tensor([tokens_of(prompt[cut:])]), past_key_values=first.past_key_values)
        # A chunk ends as an answer would begin.
        mixtures = [*by_token(prompt[:cut]), *by_token(prompt)[cut:]]
        wanted = expected(lively_adapters, [mixtures], torch.tensor([tokens_of(prompt)]))
        assert error(torch.cat([first.logits, second.logits], dim=1), wanted) < 1e-5
        used = {name for mixture in by_token(prompt)[cut:] for name in mixture}
        q_ranks = {"math": 4, "poems": 2, "units": 8}
        assert passes[-1].ranks[0] >= sum(q_ranks[name] for name in used)

    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    def test_a_next_turn_keeps_the_cache_or_encodes_all_sentences_anew(
        self, make: MakeEngine, lively_adapters: Path, kv_policy: str
    ) -> None:
        engine = make(kv_policy=kv_policy)
        prompt, answer, turn = PROMPTS[0], " So.", " But why is it?"
        whole = prompt + answer + turn
        with torch.no_grad():
            cache = engine.model(torch.tensor([tokens_of(prompt)])).past_key_values
            steps(engine, tokens_of(answer), cache)
            found = engine.model(torch.tensor([tokens_of(turn)]), past_key_values=cache).logits
        mixtures = by_token(whole)
        if kv_policy == "keep":
            mixtures[: len(prompt + answer)] = [*by_token(prompt), *[route(prompt)] * len(answer)]
        wanted = expected(lively_adapters, [mixtures], torch.tensor([tokens_of(whole)]))[:, -len(turn) :]
        assert error(found, wanted) < 1e-5

    def test_a_cropped_cache_is_routed_on_what_is_left(self, engine: Engine) -> None:
        with torch.no_grad():
            cache = engine.model(torch.tensor([tokens_of(PROMPTS[2])])).past_key_values
            cache.crop(10 - len(PROMPTS[2]))
            found = engine.model(torch.tensor([tokens_of("!?")]), past_key_values=cache)
        [row] = rows_of(cache).rows
        assert row.prompt.text == PROMPTS[2][:10] + "!?"
        assert "".join(s.text for s in row.prompt_trace) == row.prompt.text
        assert found.logits.shape[1] == 2

    def test_a_copied_and_a_selected_cache_keep_the_sentences(self, make: MakeEngine) -> None:
        engine = make(kv_policy="recompute", segmenter=partial(EveryK, 3))
        prompts = ["Why is it?", "How is it?", "Who is it?"]
        with torch.no_grad():
            cache = engine.model(torch.tensor([tokens_of(prompt) for prompt in prompts])).past_key_values
            assert isinstance(cache, DynamicCache)
            cache = copy.deepcopy(cache)
            cache.batch_select_indices(torch.tensor([2, 0]))
            answers = torch.tensor([tokens_of("abcdef"), tokens_of("ghijkl")])
            found = [engine.model(ids[:, None], past_key_values=cache).logits[:, -1] for ids in answers.T]
        for i, prompt in enumerate(["Who is it?", "Why is it?"]):
            with torch.no_grad():
                own = engine.model(torch.tensor([tokens_of(prompt)])).past_key_values
            alone = steps(engine, answers[i].tolist(), own)
            torch.testing.assert_close(torch.stack(found, dim=1)[i], alone, rtol=1e-4, atol=1e-4)


class TestSettings:
    def test_prompts_are_not_cut_into_sentences_unless_told_so(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        assert engine.prompt_routing == "apart"
        assert not engine.generate(PROMPTS[0], max_new_tokens=1).prompt_trace
        with engine.using(prompt_routing="sentences"):
            assert engine.prompt_routing == "sentences"
            assert engine.generate(PROMPTS[0], max_new_tokens=1).prompt_trace
        assert engine.prompt_routing == "apart"

    @pytest.mark.usefixtures("unchecked")
    def test_another_word_is_refused(self, make_engine: MakeEngine, engine: Engine) -> None:
        message = "prompt_routing must be 'whole' or 'questions' or 'apart' or 'sentences', got 'words'"
        with pytest.raises(ValueError, match=message):
            make_engine(prompt_routing="words")
        with pytest.raises(ValueError, match=message), engine.using(prompt_routing="words"):
            pass

    def test_the_template_of_these_tests_is_the_usual_one(self) -> None:
        assert TOKENIZER.chat_template == CHAT_TEMPLATE
