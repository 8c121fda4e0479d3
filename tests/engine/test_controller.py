import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

import dlp_lora
from conftest import EveryK, HashRouter, byte_tokenizer, lively_model
from dlp_lora import Context, Engine, Generation, Mixture, Sentence, SentenceSegmenter, Switching, Threshold, TopK, TopP
from dlp_lora.engine.cache import CACHE_NAME, CACHE_NAMES
from dlp_lora.errors import PromptError
from dlp_lora.sentences import split

MakeEngine = Callable[..., Engine]
TOKENIZER = byte_tokenizer()
EOS_ID = 256
STORY = "Dr. No is 3.5 m tall. Is he? Yes, e.g. on Main St. today.\n\nHe left. 他走了。然后呢？ Bye 👋🏽! The end."
SENTENCES = split(STORY)


def tokens_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


class Dictate(LogitsProcessor):
    """Makes each row say given tokens, and end-of-sequence behind them."""

    def __init__(self, *answers: Sequence[int]) -> None:
        self.answers = answers
        self.length = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.length = self.length or input_ids.shape[1]
        step = input_ids.shape[1] - self.length
        forced = torch.full_like(scores, float("-inf"))
        for row, answer in enumerate(self.answers):
            forced[row, answer[step] if step < len(answer) else EOS_ID] = 0.0
        return forced


def dictated(engine: Engine, prompt: Any, *answers: str | Sequence[int], **kwargs: Any) -> Any:
    """What the engine makes of answers that it is made to give."""
    tokens = [tokens_of(answer) if isinstance(answer, str) else answer for answer in answers]
    processor = LogitsProcessorList([Dictate(*tokens)])
    return engine.generate(
        prompt, logits_processor=processor, max_new_tokens=max(map(len, tokens)) + 1, do_sample=False, **kwargs
    )


class Table:
    """Gives the probabilities that a table lists for a first character of a sentence; "" is the prompt's."""

    names = ("math", "poems", "units")

    def __init__(self, table: Mapping[str, Sequence[float]]) -> None:
        self.table = table

    def probabilities(self, contexts: Sequence[Context]) -> Tensor:
        return torch.tensor([list(self.table[c.sentence[:1]]) for c in contexts])

    def save_pretrained(self, path: Any) -> None:
        raise NotImplementedError


def mixtures_of(generation: Generation) -> list[dict[str, float]]:
    return [{name: round(weight, 4) for name, weight in s.mixture.items()} for s in generation.trace]


def row_of(engine: Engine) -> list[Sentence]:
    """The trace of a decoding loop of one's own."""
    return engine.last_traces[0]


@torch.no_grad()
def steps(engine: Engine, tokens: Sequence[int], cache: Cache) -> Tensor:
    """Feeds tokens one at a time behind a cache; gives the logits, (seq, vocab)."""
    ids = [torch.tensor([[token]]) for token in tokens]
    return torch.stack([engine.model(i, past_key_values=cache).logits[0, -1] for i in ids])


@torch.no_grad()
def prefill(engine: Engine, prompt: str) -> Cache:
    return engine.model(torch.tensor([tokens_of(prompt)])).past_key_values


def snapshot(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    """An engine that cuts sentences by the rules for real text."""
    return make_engine(segmenter=SentenceSegmenter, policy=TopK(k=2))


class TestTrace:
    def test_sentences_of_real_text_tile_tokens_and_text(self, engine: Engine) -> None:
        generation = dictated(engine, "Tell a tale.", STORY)
        assert generation.text == STORY
        assert generation.tokens == (*tokens_of(STORY), EOS_ID)
        assert [s.text for s in generation.trace] == SENTENCES
        starts = [sum(len(tokens_of(text)) for text in SENTENCES[:i]) for i in range(len(SENTENCES) + 1)]
        # A character of several bytes opens its sentence with the byte that completes it.
        late = [len(tokens_of(text[0])) - 1 for text in SENTENCES]
        assert [s.start for s in generation.trace] == [s + n for s, n in zip(starts, late, strict=False)]
        assert max(late) == 2
        assert [s.end for s in generation.trace] == [*(s.start for s in generation.trace[1:]), starts[-1] + 1]

    def test_the_router_reads_the_history_and_the_first_character_of_a_sentence(self, engine: Engine) -> None:
        dictated(engine, "Tell a tale.", STORY)
        router = engine.router
        assert isinstance(router, HashRouter)
        histories = ["".join(SENTENCES[:i]) for i in range(len(SENTENCES))]
        assert router.asked == [
            Context("Tell a tale."),
            *(
                Context("Tell a tale.", history, text[0])
                for history, text in list(zip(histories, SENTENCES, strict=True))[1:]
            ),
        ]

    def test_switched_and_abstained_say_what_happened(self, make_engine: MakeEngine) -> None:
        table = {"": (0.8, 0.1, 0.1), "A": (0.7, 0.2, 0.1), "B": (0.1, 0.1, 0.8), "C": (0.4, 0.3, 0.3)}
        engine = make_engine(router=Table(table), segmenter=SentenceSegmenter, policy=TopP(p=0.5, min_confidence=0.5))
        generation = dictated(engine, "Q", "Ok. Aye. But. Can. Beg. Cut. Cup.")
        told = [(s.text, dict(s.mixture), s.switched, s.abstained) for s in generation.trace]
        assert told == [
            ("Ok. ", {"math": 1.0}, False, False),
            ("Aye. ", {"math": 1.0}, False, False),
            ("But. ", {"units": 1.0}, True, False),
            ("Can. ", {}, True, True),
            ("Beg. ", {"units": 1.0}, True, False),
            ("Cut. ", {}, True, True),
            ("Cup.", {}, False, True),
        ]
        assert [max(s.probabilities.values()) for s in generation.trace] == pytest.approx(
            [0.8, 0.7, 0.8, 0.4, 0.8, 0.4, 0.4]
        )

    @pytest.mark.parametrize("policy", [Threshold(p=0.9), TopP(min_confidence=0.9)], ids=repr)
    def test_a_policy_that_abstains_gives_the_base_model(self, make_engine: MakeEngine, policy: Any) -> None:
        engine = make_engine(policy=policy, router=Table({"": (0.4, 0.3, 0.3)}), segmenter=SentenceSegmenter)
        ids = torch.tensor([tokens_of("Why?")])
        logits = engine.model(ids).logits
        with engine.disabled():
            assert torch.equal(engine.model(ids).logits, logits)
        generation = engine.generate("Why?", max_new_tokens=3)
        assert [(s.mixture, s.abstained, s.switched) for s in generation.trace] == [(Mixture(), True, False)]

    def test_bytes_that_end_too_soon_are_text_all_the_same(self, engine: Engine) -> None:
        answer = tokens_of("Yes. No 👋")[:-2]
        generation = engine.generate(
            "Q",
            logits_processor=LogitsProcessorList([Dictate(answer)]),
            max_new_tokens=len(answer),
            do_sample=False,
        )
        assert generation.text == TOKENIZER.decode(answer) == "Yes. No \ufffd"
        assert [(s.text, s.start, s.end) for s in generation.trace] == [("Yes. ", 0, 5), ("No \ufffd", 5, 10)]

    def test_special_tokens_are_tokens_but_no_text(self, engine: Engine) -> None:
        answer = [*tokens_of("It is. "), 257, 257, *tokens_of("So be it.")]
        generation = dictated(engine, "Q", answer)
        assert generation.text == "It is. So be it."
        assert [(s.text, s.start, s.end) for s in generation.trace] == [("It is. ", 0, 9), ("So be it.", 9, 19)]

    def test_an_answer_of_nothing_but_eos_has_a_trace_of_one_empty_sentence(self, engine: Engine) -> None:
        generation = dictated(engine, "Q", "")
        assert (generation.text, generation.tokens) == ("", (EOS_ID,))
        assert [(s.text, s.start, s.end) for s in generation.trace] == [("", 0, 1)]

    @given(st.lists(st.integers(0, 255) | st.sampled_from(tokens_of(".!? Ab")), min_size=1, max_size=24))
    @settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_tokens_tile(self, engine: Engine, answer: list[int]) -> None:
        generation = dictated(engine, "Q", answer)
        assert generation.tokens == (*answer, EOS_ID)
        assert generation.text == TOKENIZER.decode(answer) == "".join(s.text for s in generation.trace)
        assert [generation.trace[0].start, generation.trace[-1].end] == [0, len(answer) + 1]
        assert all(one.end == two.start for one, two in pairwise(generation.trace))

    def test_a_trace_in_a_batch_is_the_trace_alone(self, engine: Engine) -> None:
        answers = [STORY, "Short. Very.", "一。二。三。 Four? Five!"]
        together = dictated(engine, ["One", "Two two", "Three three three"], *answers)
        for prompt, answer, generation in zip(["One", "Two two", "Three three three"], answers, together, strict=True):
            alone = dictated(engine, prompt, answer)
            assert alone.tokens == generation.tokens
            assert [(s.text, s.start, s.mixture) for s in alone.trace] == [
                (s.text, s.start, s.mixture) for s in generation.trace
            ]

    def test_to_dict_is_json_data_with_times(self, engine: Engine) -> None:
        generation = dictated(engine, "Q", STORY)
        data = json.loads(json.dumps([s.to_dict() for s in generation.trace]))
        assert [d["text"] for d in data] == SENTENCES
        assert set(data[0]) == {
            *("text", "start", "end", "probabilities", "mixture", "switched", "abstained", "route_ms", "fuse_ms"),
            "encode_ms",
        }
        assert all(d["route_ms"] > 0 and d["fuse_ms"] > 0 for d in data)
        assert sum(sum(d["mixture"].values()) for d in data) == pytest.approx(len(data))


class TestSwitching:
    @pytest.mark.parametrize(
        "min_tokens, starts",
        [(1, [0, 4, 8, 20, 24]), (4, [0, 4, 8, 20, 24]), (5, [0, 8, 20]), (9, [0, 20]), (21, [0, 24]), (25, [0])],
    )
    def test_a_sentence_shorter_than_min_tokens_is_not_left(
        self, make_engine: MakeEngine, min_tokens: int, starts: list[int]
    ) -> None:
        # Where min_tokens is 5: 4 - 0 is too short, 8 - 0 is not, 20 - 8 is not, 24 - 20 is.
        engine = make_engine(segmenter=SentenceSegmenter, switching=Switching(min_tokens=min_tokens, margin=0.0))
        generation = dictated(engine, "Q", "Go! No? Come along. So? Do.")
        assert [s.start for s in generation.trace] == starts
        assert "".join(s.text for s in generation.trace) == "Go! No? Come along. So? Do."

    @pytest.mark.parametrize(
        "margin, switches",
        [
            (0.0, [True, True, True]),
            (0.1, [False, False, True]),  # B leads by 0.05, C by 0.05 over math, D by 0.4
            (0.5, [False, False, False]),
        ],
    )
    def test_the_mixture_stays_while_no_adapter_leads_it_by_the_margin(
        self, make_engine: MakeEngine, margin: float, switches: list[bool]
    ) -> None:
        table = {"": (0.6, 0.3, 0.1), "B": (0.4, 0.45, 0.15), "C": (0.45, 0.05, 0.5), "D": (0.2, 0.6, 0.2)}
        engine = make_engine(
            router=Table(table),
            segmenter=SentenceSegmenter,
            policy=TopK(k=1),
            switching=Switching(min_tokens=1, margin=margin),
        )
        generation = dictated(engine, "Q", "Aha. Bye. Come. Down.")
        assert [s.switched for s in generation.trace] == [False, *switches]
        leaders = ["poems", "units", "poems"]
        expected = ["math"]
        for leader, switch in zip(leaders, switches, strict=True):
            expected.append(leader if switch else expected[-1])
        assert [list(s.mixture) for s in generation.trace] == [[name] for name in expected]
        # What the router said is told even where it was not followed.
        assert generation.trace[1].probabilities == pytest.approx({"math": 0.4, "poems": 0.45, "units": 0.15})

    def test_a_lead_of_just_the_margin_switches(self, make_engine: MakeEngine) -> None:
        table = {"": (0.75, 0.25, 0.0), "B": (0.25, 0.5, 0.25)}  # exact in binary
        for margin, adapter in ((0.25, "poems"), (0.26, "math")):
            engine = make_engine(
                router=Table(table),
                segmenter=SentenceSegmenter,
                policy=TopK(k=1),
                switching=Switching(min_tokens=1, margin=margin),
            )
            assert mixtures_of(dictated(engine, "Q", "Aha. Bye."))[1] == {adapter: 1.0}

    def test_the_margin_is_measured_from_the_heaviest_adapter_in_use(self, make_engine: MakeEngine) -> None:
        table = {"": (0.5, 0.4, 0.1), "B": (0.35, 0.4, 0.25), "C": (0.1, 0.5, 0.4)}
        engine = make_engine(
            router=Table(table),
            segmenter=SentenceSegmenter,
            policy=TopK(k=2),
            switching=Switching(min_tokens=1, margin=0.1),
        )
        first = {"math": 0.5556, "poems": 0.4444}
        assert mixtures_of(dictated(engine, "Q", "Aha. Bye. Come.")) == [
            first,
            first,
            {"poems": 0.5556, "units": 0.4444},
        ]

    def test_abstention_is_not_held_back_by_the_margin(self, make_engine: MakeEngine) -> None:
        table = {"": (0.9, 0.1, 0.0), "B": (0.4, 0.3, 0.3), "C": (0.9, 0.1, 0.0)}
        engine = make_engine(
            router=Table(table),
            segmenter=SentenceSegmenter,
            policy=TopK(k=1, min_confidence=0.5),
            switching=Switching(min_tokens=1, margin=1.0),
        )
        assert mixtures_of(dictated(engine, "Q", "Aha. Bye. Come.")) == [{"math": 1.0}, {}, {"math": 1.0}]

    def test_where_the_router_is_unsure_the_mixture_in_use_can_be_kept(self, make_engine: MakeEngine) -> None:
        table = {"": (0.4, 0.3, 0.3), "B": (0.9, 0.1, 0.0), "C": (0.4, 0.3, 0.3)}
        engine = make_engine(
            router=Table(table),
            segmenter=SentenceSegmenter,
            policy=TopK(k=1, min_confidence=0.5),
            switching=Switching(min_tokens=1, unsure="keep"),
        )
        generation = dictated(engine, "Q", "Aha. Bye. Come.")
        told = [(dict(s.mixture), s.switched, s.abstained) for s in generation.trace]
        assert told == [({}, False, True), ({"math": 1.0}, True, False), ({"math": 1.0}, False, True)]

    def test_where_none_fits_the_likeliest_can_be_used_but_for_a_text_that_says_nothing(
        self, make_engine: MakeEngine
    ) -> None:
        table = {"": (0.1, 0.1, 0.0), "B": (0.0, 0.2, 0.0), "C": (0.0, 0.0, 0.0)}
        settings: dict[str, Any] = {"router": Table(table), "segmenter": SentenceSegmenter, "policy": TopP(0.6)}
        never = make_engine(**settings, switching=Switching(unsure="likeliest"))
        told = [(dict(s.mixture), s.abstained) for s in dictated(never, "Q", "Aha. Bye. Come.").trace]
        assert told == [({"math": 0.5, "poems": 0.5}, False), ({"poems": 1.0}, False), ({}, True)]
        assert dict(never.route("Q")[1]) == {"math": 0.5, "poems": 0.5}

    def test_what_a_row_lacks_to_one_is_the_probability_that_none_fits(self, make_engine: MakeEngine) -> None:
        table = {"": (0.3, 0.3, 0.1), "B": (0.3, 0.1, 0.0)}
        engine = make_engine(router=Table(table), segmenter=SentenceSegmenter, policy=TopP(0.6))
        generation = dictated(engine, "Q", "Aha. Bye.")
        told = [({n: round(w, 3) for n, w in s.mixture.items()}, s.abstained) for s in generation.trace]
        assert told == [({"math": 0.5, "poems": 0.5}, False), ({}, True)]
        probabilities, mixture = engine.route(Context("Q"))
        assert probabilities == pytest.approx({"math": 3 / 7, "poems": 3 / 7, "units": 1 / 7})
        assert mixture == engine.route("Q")[1] == generation.trace[0].mixture

    @pytest.mark.parametrize(
        "setting, message",
        [
            ({"min_tokens": 0}, "min_tokens must be at least 1, got 0"),
            ({"margin": 1.5}, r"margin must be in \[0, 1\]"),
            ({"unsure": "ask"}, "unsure must be one of .*base.*keep.*, got 'ask'"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, setting: dict[str, Any], message: str, unchecked: None) -> None:
        with pytest.raises(ValueError, match=message):
            Switching(**setting)


class TestTimingOfASwitch:
    ANSWER = "Yes, it is. So we go."
    START = 12  # of "So"

    def test_the_first_token_of_a_sentence_is_encoded_under_the_new_mixture(self, make_engine: MakeEngine) -> None:
        engine = make_engine(kv_policy="keep", segmenter=SentenceSegmenter)
        tokens = tokens_of(self.ANSWER)
        cache = prefill(engine, "Why?")
        steps(engine, tokens[: self.START], cache)
        before = snapshot(cache)
        twin = DynamicCache()
        for i, (keys, values) in enumerate(before):
            twin.update(keys, values, i)
        old, new = copy.deepcopy(twin), twin
        logits = steps(engine, tokens[self.START : self.START + 1], cache)
        one, two = row_of(engine)
        assert one.mixture != two.mixture
        after = snapshot(cache)
        n = before[0][0].shape[-2]
        for (keys, values), (old_keys, old_values) in zip(after, before, strict=True):
            # Bit for bit: the tokens before keep what the old mixture made of them.
            assert torch.equal(keys[..., :n, :], old_keys)
            assert torch.equal(values[..., :n, :], old_values)
        ids = torch.tensor([[tokens[self.START]]])
        with torch.no_grad():
            with engine.fixed(two.mixture):
                assert torch.equal(engine.model(ids, past_key_values=new).logits[0], logits)
            with engine.fixed(one.mixture):
                assert (engine.model(ids, past_key_values=old).logits[0] - logits).abs().max() > 1e-2
        for (_, values), (_, by_new), (_, by_old) in zip(after, snapshot(new), snapshot(old), strict=True):
            assert torch.equal(values, by_new)
            assert not torch.equal(values[..., n:, :], by_old[..., n:, :])

    def test_recomputing_reencodes_every_token_under_the_new_mixture(self, make_engine: MakeEngine) -> None:
        engine = make_engine(segmenter=SentenceSegmenter, policy=TopK(k=2), kv_policy="recompute")
        tokens = tokens_of(self.ANSWER)[: self.START + 1]
        cache = prefill(engine, "Why?")
        logits = steps(engine, tokens, cache)
        one, two = row_of(engine)
        assert one.mixture != two.mixture
        whole = torch.tensor([tokens_of("Why?") + tokens])
        with torch.no_grad(), engine.fixed(two.mixture):
            output = engine.model(whole)
        torch.testing.assert_close(logits[-1], output.logits[0, -1], rtol=1e-5, atol=1e-5)
        for (keys, values), (new_keys, new_values) in zip(
            snapshot(cache), snapshot(output.past_key_values), strict=True
        ):
            torch.testing.assert_close(keys, new_keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(values, new_values, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kv_policy", ["keep", "recompute"])
    def test_replaying_a_trace_by_fixed_mixtures_reproduces_the_logits(
        self, make_engine: MakeEngine, kv_policy: str
    ) -> None:
        engine = make_engine(segmenter=SentenceSegmenter, policy=TopK(k=2), kv_policy=kv_policy)
        tokens = tokens_of(STORY)
        trace = dictated(engine, "Tell a tale.", STORY).trace
        assert len({s.mixture for s in trace}) > 2
        logits = steps(engine, tokens, prefill(engine, "Tell a tale."))
        with engine.fixed(trace[0].mixture):
            cache = prefill(engine, "Tell a tale.")
        replayed = []
        for sentence in trace:
            with engine.fixed(sentence.mixture):
                replayed.append(steps(engine, tokens[sentence.start : min(sentence.end, len(tokens))], cache))
        torch.testing.assert_close(torch.cat(replayed), logits, rtol=1e-4, atol=1e-4)

    def test_a_replay_under_other_mixtures_gives_other_logits(self, engine: Engine) -> None:
        tokens = tokens_of(STORY)
        logits = steps(engine, tokens, prefill(engine, "Tell a tale."))
        with engine.fixed(row_of(engine)[0].mixture):
            constant = steps(engine, tokens, prefill(engine, "Tell a tale."))
        second = row_of(engine)[1].start
        torch.testing.assert_close(constant[:second], logits[:second], rtol=1e-4, atol=1e-4)
        assert (constant[second] - logits[second]).abs().max() > 1e-2

    def test_fixing_another_mixture_amid_an_answer_is_in_the_trace(self, engine: Engine) -> None:
        cache = prefill(engine, "Why?")
        before = row_of(engine)[0].mixture
        steps(engine, tokens_of("Yes"), cache)
        with engine.fixed({"poems": 0.3}):
            steps(engine, tokens_of(", no"), cache)
        told = [(s.text, s.start, s.end, s.mixture, s.switched) for s in row_of(engine)]
        assert told == [("Yes", 0, 3, before, False), (", no", 3, 7, Mixture({"poems": 0.3}), True)]


class TestCaches:
    def test_a_copied_cache_goes_its_own_way(self, engine: Engine) -> None:
        cache = prefill(engine, "Tell a tale.")
        start = tokens_of("It was so. ")
        steps(engine, start, cache)
        other = copy.deepcopy(cache)
        answers = {"one": tokens_of("We ran. Then we sat."), "two": tokens_of("Nobody came. All slept.")}
        found = {"one": steps(engine, answers["one"], cache), "two": steps(engine, answers["two"], other)}
        for name, answer in answers.items():
            alone = prefill(engine, "Tell a tale.")
            expected = steps(engine, [*start, *answer], alone)[len(start) :]
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)

    def test_two_caches_may_take_turns(self, engine: Engine) -> None:
        prompts = ["Why?", "Tell a tale."]
        answers = [tokens_of("So it is. We know. All do."), tokens_of("Oh no. Then what. Go on")]
        caches = [prefill(engine, prompt) for prompt in prompts]
        turns = [
            [steps(engine, answer[i : i + 1], cache) for answer, cache in zip(answers, caches, strict=True)]
            for i in range(20)
        ]
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            alone = steps(engine, answer[:20], prefill(engine, prompt))
            torch.testing.assert_close(torch.cat([turn[i] for turn in turns]), alone, rtol=1e-5, atol=1e-5)

    def test_a_next_turn_is_routed_on_the_whole_text(self, engine: Engine) -> None:
        router = engine.router
        assert isinstance(router, HashRouter)
        cache = prefill(engine, "Why is it?")
        steps(engine, tokens_of(" So."), cache)
        with torch.no_grad():
            engine.model(torch.tensor([tokens_of(" But why?")]), past_key_values=cache)
        assert router.asked[-1] == Context("Why is it? So. But why?")
        steps(engine, tokens_of(" Aha. Indeed"), cache)
        assert router.asked[-1] == Context("Why is it? So. But why?", " Aha. ", "I")

    def test_a_next_turn_of_a_chat_is_routed_on_its_contents(self, engine: Engine) -> None:
        router = engine.router
        assert isinstance(router, HashRouter)
        chat = [{"role": "user", "content": "Why is it?"}]
        cache = prefill(engine, TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        steps(engine, tokens_of("So."), cache)
        turn = "<|im_end|>\n<|im_start|>user\nBut why?<|im_end|>\n<|im_start|>assistant\n"
        with torch.no_grad():
            engine.model(torch.tensor([tokens_of(turn)]), past_key_values=cache)
        assert router.asked == [Context("Why is it?"), Context("But why?", history="Why is it?\nSo.")]

    def test_a_next_turn_keeps_the_cache_or_recomputes_it(self, make_engine: MakeEngine) -> None:
        whole = torch.tensor([tokens_of("Why is it? But why?")])
        for kv_policy in ("keep", "recompute"):
            engine = make_engine(policy=TopK(k=2), kv_policy=kv_policy)
            cache = prefill(engine, "Why is it?")
            first = snapshot(cache)[1][1]
            with torch.no_grad():
                found = engine.model(torch.tensor([tokens_of(" But why?")]), past_key_values=cache).logits
                expected = engine.model(whole).logits[:, -9:]
            assert found.shape == expected.shape
            if kv_policy == "keep":
                assert torch.equal(snapshot(cache)[1][1][..., :10, :], first)
                assert (found - expected).abs().max() > 1e-2
            else:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("way", [*CACHE_NAMES, "by position"])
    @torch.no_grad()
    def test_a_cache_is_followed_however_it_is_given(self, engine: Engine, way: str) -> None:
        if way == "cache" and CACHE_NAME != "cache":
            pytest.skip("this version of transformers has the older name alone")
        answer = tokens_of("So it is. We know.")
        expected, trace = steps(engine, answer, prefill(engine, "Why?")), row_of(engine)
        ids = torch.tensor([[EOS_ID, *tokens_of("Why?")]])
        mask = torch.tensor([[0, *[1] * (ids.shape[1] - 1)]])
        cache, found = DynamicCache(), []
        for tokens in (ids, *torch.tensor(answer)[:, None, None]):
            if tokens is not ids:
                mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            if way == "by position":
                output = engine.model(tokens, mask, places, cache)
            else:
                output = engine.model(tokens, attention_mask=mask, position_ids=places, **{way: cache})
            found.append(output.logits[0, -1])
        torch.testing.assert_close(torch.stack(found[1:]), expected, rtol=1e-4, atol=1e-4)
        now = row_of(engine)
        assert len(now) == 2
        assert [(s.text, s.mixture) for s in now] == [(s.text, s.mixture) for s in trace]

    def test_a_cropped_cache_is_routed_on_what_is_left(self, engine: Engine) -> None:
        router = engine.router
        assert isinstance(router, HashRouter)
        cache = prefill(engine, "Why is it?")
        steps(engine, tokens_of(" So. Or not"), cache)
        cache.crop(-7)
        steps(engine, tokens_of("!"), cache)
        assert router.asked[-1] == Context("Why is it? So.!")

    def test_selected_and_repeated_rows_keep_their_histories(self, make_engine: MakeEngine) -> None:
        engine = make_engine(segmenter=partial(EveryK, 4), policy=TopK(k=2))
        prompts, answers = ["Why?", "How?", "Who?"], ["ab", "cd", "ef"]
        with torch.no_grad():
            cache = engine.model(torch.tensor([tokens_of(prompt) for prompt in prompts])).past_key_values
            for ids in torch.tensor([tokens_of(answer) for answer in answers]).T:
                engine.model(ids[:, None], past_key_values=cache)
            cache.batch_select_indices(torch.tensor([2, 0]))
            cache.batch_repeat_interleave(2)
            said = ["ghij", "klmn", "opqr", "stuv"]
            found = [
                engine.model(ids[:, None], past_key_values=cache).logits[:, -1]
                for ids in torch.tensor([tokens_of(answer) for answer in said]).T
            ]
        for i, (prompt, answer) in enumerate([("Who?", "ef"), ("Who?", "ef"), ("Why?", "ab"), ("Why?", "ab")]):
            alone = steps(engine, tokens_of(answer + said[i]), prefill(engine, prompt))[2:]
            torch.testing.assert_close(torch.stack(found, dim=1)[i], alone, rtol=1e-4, atol=1e-4)

    def test_a_static_cache_gives_the_same_answer(self, make_engine: MakeEngine) -> None:
        engine = make_engine(policy=TopK(k=2))
        expected = engine.generate("Why?", max_new_tokens=16, do_sample=False)
        found = engine.generate("Why?", max_new_tokens=16, do_sample=False, cache_implementation="static")
        assert found.tokens == expected.tokens
        assert [s.mixture for s in found.trace] == [s.mixture for s in expected.trace]

    @pytest.mark.parametrize("prompt_routing", ["questions", "sentences"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_what_pads_a_chat_under_a_static_cache_is_none_of_it(
        self, make_engine: MakeEngine, attention: str, prompt_routing: str
    ) -> None:
        engine = make_engine(policy=TopK(k=2), prompt_routing=prompt_routing)
        engine.model.set_attn_implementation(attention)
        chats = [[{"role": "user", "content": text}] for text in ("Why?", "How far is it to the moon? And back?")]
        settings: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
        together = engine.generate(chats, **settings, cache_implementation="static")
        for chat, found in zip(chats, together, strict=True):
            alone = engine.generate(chat, **settings)
            assert found.tokens == alone.tokens
            assert [s.mixture for s in found.trace] == [s.mixture for s in alone.trace]
            assert [(s.text, s.start, s.end) for s in found.prompt_trace] == [
                (s.text, s.start, s.end) for s in alone.prompt_trace
            ]

    @pytest.mark.parametrize("window", [None, 8])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_padding_is_known_from_what_a_prompt_and_what_follows_it_attend_to(
        self, lively_adapters: Path, attention: str, window: int | None
    ) -> None:
        model = lively_model("mistral")
        model.config.sliding_window = window
        model.set_attn_implementation(attention)
        router = HashRouter()
        engine = dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=lively_adapters, router=router)
        short, long = tokens_of("Why is it?"), tokens_of("How far is it to the moon")
        pad = len(long) - len(short)
        ids = torch.tensor([[258] * pad + short, long])
        mask = torch.tensor([[0] * pad + [1] * len(short), [1] * len(long)])
        cache = StaticCache(config=engine.model.config, max_cache_len=64)
        more = torch.tensor([tokens_of(" So?")] * 2)
        with torch.no_grad():
            for new in (ids, more):
                seen = torch.cat([mask, torch.ones_like(more)], dim=1)[:, : cache.get_seq_length() + new.shape[1]]
                inputs = engine.model.prepare_inputs_for_generation(
                    new, past_key_values=cache, attention_mask=seen, use_cache=True
                )
                router.asked.clear()
                engine.model(**inputs)
                said = "" if new is ids else " So?"
                assert [context.prompt for context in router.asked[:2]] == [
                    f"Why is it?{said}",
                    f"How far is it to the moon{said}",
                ]

    def test_generating_without_a_cache_is_refused(self, engine: Engine) -> None:
        with pytest.raises(ValueError, match="follows the KV cache; leave use_cache on"):
            engine.generate("Why?", max_new_tokens=2, use_cache=False)


def test_a_token_without_an_embedding_is_refused_before_the_pass(make_engine: MakeEngine) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<t1>", "<t2>"]})
    engine = make_engine(tokenizer=tokenizer)
    for ask in (
        lambda: engine.generate("hi <t2>", max_new_tokens=2),
        lambda: list(engine.stream("hi <t2>", max_new_tokens=2)),
        lambda: engine.model(torch.tensor([[97, 260]])),
    ):
        message = "holds '<t2>', token 260, but the model has embeddings of only 260 tokens"
        with pytest.raises(PromptError, match=message):
            ask()
    engine.model.config.image_token_id = 260
    with pytest.raises(IndexError):  # its embedding comes from elsewhere, in a model that has images
        engine.model(torch.tensor([[97, 260]]))
