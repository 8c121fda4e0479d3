import random
from collections import Counter

import pytest

from dlp_lora import Context
from dlp_lora.tasks import Example
from dlp_lora.training.contexts import KINDS, MIX, draw_contexts, first_word

TASKS = [
    [
        Example(prompt=f"{name} question {i} is this. Is it easy? Say {name}.", answer=f"{name} one. {name} two.")
        for i in range(4)
    ]
    for name in ("Red", "Green", "Blue")
]
NAMES = ("Red", "Green", "Blue")


def drawn(kind: str, num: int = 20) -> list[tuple[Context, str]]:
    samples = draw_contexts(TASKS, num, {kind: 1.0}, random.Random(0))
    return [(sample.context, NAMES[sample.label]) for sample in samples]


@pytest.mark.parametrize("kind", KINDS)
def test_so_many_contexts_are_drawn_of_each_example(kind: str) -> None:
    found = drawn(kind, num=5)
    assert Counter(label for _, label in found) == dict.fromkeys(NAMES, 20)
    assert drawn(kind, num=5) == found


def test_kinds_come_as_often_as_the_mix_says() -> None:
    samples = draw_contexts(TASKS, 500, {"whole": 3.0, "answer": 1.0, "serial": 0.0}, random.Random(0))
    whole = sum(not s.context.answer for s in samples) / len(samples)
    assert whole == pytest.approx(0.75, abs=0.03)
    assert set(MIX) == set(KINDS)


def test_what_is_asked_now_is_of_the_labels_task_whatever_was_said_before() -> None:
    found = drawn("after_history")
    assert all(label in context.prompt for context, label in found)
    assert any(other in context.history for context, label in found for other in NAMES if other != label)


def test_a_sentence_is_one_of_the_tasks_prompts_and_follows_those_before_it() -> None:
    for context, label in drawn("sentence"):
        assert context.prompt.strip() in (f"Say {label}.", "Is it easy?") or context.prompt.startswith(label)
        if context.prompt.startswith("Say"):
            assert context.history.endswith("Is it easy? ")


def test_a_sentence_alone_has_no_history() -> None:
    found = drawn("alone")
    assert {context.history for context, _ in found} == {""}
    assert all(context.prompt.strip()[-1] in ".?" and context.prompt.count(" ") < 7 for context, _ in found)


def test_a_cut_prompt_is_a_beginning_of_whole_words() -> None:
    for context, label in drawn("cut"):
        assert any(f"{example.prompt} ".startswith(f"{context.prompt} ") for example in TASKS[NAMES.index(label)])


def test_a_disguised_prompt_has_slips_or_stands_among_other_words() -> None:
    found = [(context.prompt, example) for context, example in drawn("disguised")]
    asked = {name: [e.prompt for e in TASKS[NAMES.index(name)]] for name in NAMES}
    whole = [(text, name) for text, name in found if any(prompt in text for prompt in asked[name])]
    assert 0.5 < len(whole) / len(found) < 0.9
    assert sum(text not in asked[name] for text, name in whole) / len(whole) > 0.8


def test_an_answer_is_given_up_to_the_first_word_of_its_next_sentence() -> None:
    for context, label in drawn("answer"):
        assert (context.answer, context.sentence) == (f"{label} one. ", label)


def test_of_two_questions_the_first_that_is_not_answered_is_the_label() -> None:
    found = drawn("serial", num=60)
    for context, label in found:
        asked = [word for word in context.prompt.split() if word in NAMES]
        num_answered = context.answer.count("two.")
        assert asked[num_answered] == label
        assert context.sentence == (label if num_answered else "")
    assert {context.answer.count("two.") for context, _ in found} == {0, 1}


@pytest.mark.parametrize("text, word", [("It is so.", "It"), ("", ""), ("  So", "So"), (" \n", " \n")])
def test_the_first_word_of_a_sentence(text: str, word: str) -> None:
    assert first_word(text) == word


def test_an_answer_of_one_sentence_is_cut_anywhere() -> None:
    tasks = [[Example(prompt=f"{name}?", answer="yes")] for name in NAMES]
    samples = draw_contexts(tasks, 50, {"answer": 1.0}, random.Random(0))
    assert {s.context.answer for s in samples} == {"", "y", "ye", "yes"}


def test_one_task_alone_can_be_drawn_from() -> None:
    assert len(draw_contexts(TASKS[:1], 10, MIX, random.Random(0))) == 40


@pytest.mark.parametrize("sizes", [(4, 4, 4), (1, 40, 3), (2, 7, 100)])
def test_every_task_is_drawn_as_often_whatever_its_size(sizes: tuple[int, ...]) -> None:
    tasks = [[Example(prompt=f"{t} {i}", answer="a") for i in range(size)] for t, size in enumerate(sizes)]
    samples = draw_contexts(tasks, 6, {"whole": 1.0}, random.Random(0))
    counts = Counter(sample.label for sample in samples)
    assert set(counts.values()) == {round(6 * sum(sizes) / len(sizes))}
    for label, size in enumerate(sizes):
        own = Counter(sample.context.prompt for sample in samples if sample.label == label)
        assert max(own.values()) - min(own.values()) <= 1
        assert len(own) == min(size, counts[label])


def test_tasks_of_few_examples_are_drawn_from_until_there_is_enough() -> None:
    samples = draw_contexts(TASKS, 2, {"whole": 1.0}, random.Random(0), at_least=10)
    assert Counter(sample.label for sample in samples) == {0: 10, 1: 10, 2: 10}
