"""Questions apart: as good as asked one at a time, in one call."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextStreamer

from conftest import WordRouter
from dlp_lora import Context, Engine, Generation, Mixture, RoutingSettings, TopK
from dlp_lora.engine.prompts import encode_prompt

MakeEngine = Callable[..., Engine]
QUESTIONS = ("Add the sum?", "A rhyme in verse?", "How long is an inch?")
PROMPT = "\n\n".join(QUESTIONS)
SHORT: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False}


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine(router=WordRouter(), policy=TopK(1), prompt_routing="apart")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def same(found: Generation, expected: Generation) -> None:
    assert (found.text, found.tokens, found.prompt_tokens) == (expected.text, expected.tokens, expected.prompt_tokens)
    assert [(s.text, s.start, s.end, s.mixture) for s in found.trace] == [
        (s.text, s.start, s.end, s.mixture) for s in expected.trace
    ]


@pytest.mark.parametrize("end", ["", "\n", " \n"])
def test_each_question_is_answered_as_if_it_were_asked_alone(engine: Engine, end: str) -> None:
    answer = engine.generate(PROMPT + end, **SHORT)
    assert len(answer.parts) == len(QUESTIONS)
    for part, question in zip(answer.parts, QUESTIONS, strict=True):
        tail = end if end else ""
        same(part, engine.generate(question + tail, **SHORT))
    assert len({part.trace[0].mixture for part in answer.parts}) == 3


def test_a_question_of_a_chat_keeps_the_system_prompt_and_the_earlier_turns(engine: Engine) -> None:
    before = [{"role": "system", "content": "Be brief."}, user("Hello!"), {"role": "assistant", "content": "Hi."}]
    answer = engine.generate([*before, user(PROMPT)], **SHORT)
    assert len(answer.parts) == 3
    for part, question in zip(answer.parts, QUESTIONS, strict=True):
        same(part, engine.generate([*before, user(question)], **SHORT))


def test_a_text_of_the_chat_template_is_cut_within_it(engine: Engine) -> None:
    chat: Any = [{"role": "system", "content": "Be brief."}, user(PROMPT)]
    text = str(engine.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    found, expected = engine.generate(text, **SHORT), engine.generate(chat, **SHORT)
    for part, other in zip(found.parts, expected.parts, strict=True):
        same(part, other)


def test_the_text_joins_the_answers_and_the_trace_runs_through_all_of_them(engine: Engine) -> None:
    answer = engine.generate(PROMPT, **SHORT)
    assert answer.text == "\n".join(part.text for part in answer.parts)
    assert answer.tokens == tuple(token for part in answer.parts for token in part.tokens)
    assert "".join(sentence.text for sentence in answer.trace) == answer.text
    spans = [(sentence.start, sentence.end) for sentence in answer.trace]
    assert spans[0][0] == 0
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    numbers = [len(part.trace) for part in answer.parts]
    assert len(answer.trace) == sum(numbers)
    for sentence, before in zip(answer.trace[1:], answer.trace, strict=False):
        assert sentence.switched == (sentence.mixture != before.mixture)
    assert answer.num_prompt_tokens == sum(len(part.prompt_tokens) for part in answer.parts)
    assert len(json.loads(json.dumps(answer.to_dict()))["parts"]) == 3


def test_a_part_can_be_replayed_from_what_it_says(engine: Engine) -> None:
    for part in engine.generate(PROMPT, **SHORT).parts:
        assert part.trace[0].mixture
        ids = torch.tensor([part.prompt_tokens])
        mixtures = [sentence.mixture for sentence in part.trace]
        if len({*mixtures}) == 1:  # one mixture from the prompt on
            with engine.fixed(mixtures[0]):
                output = engine.model.generate(ids, attention_mask=torch.ones_like(ids), **SHORT)
            assert tuple(output[0, ids.shape[1] :].tolist()) == part.tokens


def test_several_prompts_are_answered_in_one_batch_each_cut_or_not(engine: Engine) -> None:
    prompts = ["Add the sum?", PROMPT, "Add it. Now what? Give me a rhyme."]
    rows: list[int] = []
    handle = engine.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].shape[0])
    )
    together = engine.generate(prompts, **SHORT)
    handle.remove()
    assert rows[0] == 6
    assert [len(answer.parts) for answer in together] == [0, 3, 2]
    for prompt, found in zip(prompts, together, strict=True):
        same(found, engine.generate(prompt, **SHORT))


@pytest.mark.parametrize("prompt", ["Add the sum?", "Hello there. What is the sum?", "Add the sum. Then add it twice."])
def test_a_prompt_that_is_not_cut_is_answered_as_with_questions(engine: Engine, prompt: str) -> None:
    found = engine.generate(prompt, **SHORT)
    assert found.parts == ()
    same(found, engine.generate(prompt, settings=RoutingSettings(policy=TopK(1), prompt_routing="questions"), **SHORT))


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"fixed": 1}])
def test_beams_several_answers_and_fixed_mixtures_are_not_cut(engine: Engine, settings: dict[str, Any]) -> None:
    arguments = {**SHORT, **settings}
    if arguments.pop("fixed", 0):
        arguments["mixture"] = {"math": 1.0}
    answers = engine.generate(PROMPT, **arguments)
    assert all(answer.parts == () for answer in (answers if isinstance(answers, list) else [answers]))


@pytest.mark.parametrize(
    "name", ["streamer", "past_key_values", "logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria"]
)
def test_a_prompt_is_not_cut_for_what_is_made_for_one_row_or_one_answer(engine: Engine, name: str) -> None:
    objects: dict[str, Any] = {
        "streamer": TextStreamer(engine.tokenizer),  # it refuses several rows
        "past_key_values": DynamicCache(config=engine.model.config),
        "logits_processor": [lambda ids, scores: scores],  # maybe a grammar
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(engine.model.config.vocab_size)),
        "stopping_criteria": [lambda ids, scores: False],  # one bool stops every row of a batch
    }
    found = engine.generate(PROMPT, **SHORT, **{name: objects[name]})
    with engine.using(prompt_routing="questions"):
        same(found, engine.generate(PROMPT, **SHORT))
    assert len(engine.generate(PROMPT, **SHORT, logits_processor=[], stopping_criteria=[]).parts) == 3


@pytest.mark.parametrize("prompt", ["<|im_start|>", "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"])
def test_a_prompt_without_text_is_answered(engine: Engine, prompt: str) -> None:
    found = engine.generate(prompt, **SHORT)
    with engine.using(prompt_routing="questions"):
        same(found, engine.generate(prompt, **SHORT))


def test_a_text_of_the_chat_template_whose_last_turn_is_a_tools_is_not_cut(engine: Engine) -> None:
    calling: Any = [user(PROMPT), {"role": "assistant", "content": "A call."}]
    for result in ("3", PROMPT):
        chat: Any = [*calling, {"role": "tool", "content": result}]
        text = str(engine.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        for prompt in (chat, text):
            assert engine.generate(prompt, **SHORT).parts == ()


def test_a_prompt_of_very_many_questions_has_one_context(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlp_lora.engine.engine.MAX_PARTS", 2)
    whole, cut = engine.generate([PROMPT, "\n".join(QUESTIONS[:2])], **SHORT)
    assert (len(whole.parts), len(cut.parts)) == (0, 2)


def test_penalties_for_repetition_do_not_reach_the_padding_of_shorter_questions(engine: Engine) -> None:
    engine.tokenizer.pad_token = engine.tokenizer.eos_token
    engine.model.generation_config.pad_token_id = engine.tokenizer.pad_token_id
    ids: list[torch.Tensor] = []
    settings = {**SHORT, "repetition_penalty": 1.5}
    handle = engine.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: ids.append(inputs[0]))
    answer = engine.generate(PROMPT, **settings)
    handle.remove()
    assert not (ids[0] == engine.tokenizer.eos_token_id).any()
    for part, question in zip(answer.parts, QUESTIONS, strict=True):
        same(part, engine.generate(question, **settings))


def test_a_chat_with_tools_is_not_cut(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ tools }}" + engine.tokenizer.chat_template)
    assert len(engine.generate([user(PROMPT)], **SHORT).parts) == 3
    assert engine.generate([user(PROMPT)], tools=[tool], **SHORT).parts == ()


@pytest.mark.parametrize("prompt", [PROMPT, "Add the sum?", "Hello there. What is the sum?"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_router_reads_each_text_of_a_prompt_once(make_engine: MakeEngine, prompt: str, stream: bool) -> None:
    router = WordRouter()
    engine = make_engine(router=router, policy=TopK(1))
    if stream:
        list(engine.stream(prompt, **SHORT))
    else:
        engine.generate(prompt, **SHORT)
    assert router.asked.count(Context(prompt)) == 1


def test_what_was_read_of_a_prompt_is_kept_only_until_its_row_starts(engine: Engine) -> None:
    call = engine.call.changed({"known": {}})
    prompt = encode_prompt(engine.tokenizer, "Hello there. What is the sum?")
    assert engine.apart(prompt, call=call) == [prompt]
    assert call.known
    engine.start_row(prompt.tokens, call=call)
    assert not call.known


def test_it_is_the_default(make_engine: MakeEngine) -> None:
    engine = make_engine(router=WordRouter(), policy=TopK(1))
    assert RoutingSettings().prompt_routing == engine.prompt_routing == "apart"
    assert len(engine.generate(PROMPT, **SHORT).parts) == 3


def test_a_stream_gives_the_answers_in_the_order_of_the_prompt(engine: Engine) -> None:
    expected = engine.generate(PROMPT, **SHORT)
    stream = engine.stream(PROMPT, **SHORT)
    pieces = list(stream)
    assert "".join(pieces) == expected.text
    same(stream.generation, expected)
    for part, other in zip(stream.generation.parts, expected.parts, strict=True):
        same(part, other)
    texts = [""] * len(expected.trace)
    for piece in pieces:
        assert piece.mixture == expected.trace[piece.sentence].mixture
        texts[piece.sentence] += piece
    assert texts == [sentence.text for sentence in expected.trace]
    numbers = [piece.sentence for piece in pieces]
    assert numbers == sorted(numbers)


def test_limits_hold_for_each_question_and_one_that_has_ended_does_not_end_the_others(engine: Engine) -> None:
    alone = engine.generate(QUESTIONS[0], **SHORT).text
    stop = next(character for character in alone[1:-3] if character.isascii() and character.isprintable())
    answer = engine.generate(PROMPT, **SHORT, stop_strings=[stop], tokenizer=engine.tokenizer)
    for part, question in zip(answer.parts, QUESTIONS, strict=True):
        same(part, engine.generate(question, **SHORT, stop_strings=[stop], tokenizer=engine.tokenizer))
    assert len(answer.parts[0].tokens) < 14
    stream = engine.stream(PROMPT, **SHORT, stop_strings=[stop], tokenizer=engine.tokenizer)
    pieces = list(stream)
    assert "".join(pieces) == answer.text
    same(stream.generation, answer)
    # The second answer comes piece by piece, although the first one has ended at a stop string.
    first = len(answer.parts[0].trace)
    second = range(first, first + len(answer.parts[1].trace))
    assert sum(piece.sentence in second for piece in pieces) > len(second)


def test_a_stream_that_is_left_early_has_what_was_written(engine: Engine) -> None:
    stream = engine.stream(PROMPT, **SHORT)
    first = next(stream)
    stream.close()
    assert len(stream.generation.parts) == 3
    assert stream.generation.text.startswith(first)


def test_the_model_itself_has_one_context_and_routes_the_questions_in_turn(engine: Engine) -> None:
    ids = engine.tokenizer(PROMPT, return_tensors="pt")
    output = engine.model.generate(**ids, **SHORT)
    with engine.using(prompt_routing="questions"):
        expected = engine.generate(PROMPT, **SHORT)
    assert tuple(output[0, ids["input_ids"].shape[1] :].tolist()) == expected.tokens


class _OnlyShared(WordRouter):
    """As WordRouter, where any other words make a text fit less."""

    def _row(self, text: str) -> list[float]:
        row = super()._row(text)
        return [0.9 * value for value in row] if "please" in text.lower() else row


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_line_that_is_about_all_questions_stands_with_each(make_engine: MakeEngine, where: str) -> None:
    engine = make_engine(router=_OnlyShared(), policy=TopK(1), prompt_routing="apart")
    line, questions = "Please be brief.", QUESTIONS[:2]
    order = [line, *questions] if where == "first" else [*questions, line]
    answer = engine.generate("\n".join(order), **SHORT)
    for part, question in zip(answer.parts, questions, strict=True):
        shared = (line, question) if where == "first" else (question, line)
        same(part, engine.generate("\n".join(shared), **SHORT))


def test_a_bundle_keeps_the_setting(engine: Engine, tmp_path: Any) -> None:
    assert RoutingSettings.from_dict(engine.settings.to_dict()).prompt_routing == "apart"
    assert engine.route(PROMPT)[1] == Mixture({"math": 1.0})
    assert engine.route(Context("Add it?"))[1] == Mixture({"math": 1.0})
