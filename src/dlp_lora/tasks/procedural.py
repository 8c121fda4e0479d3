"""The package's tasks, made from a seed: a name in, a Task out, without a download."""

import random
from collections.abc import Callable
from functools import partial
from itertools import chain, count

from dlp_lora.errors import TaskError
from dlp_lora.tasks import templates as questions
from dlp_lora.tasks.task import Example, Task
from dlp_lora.tasks.templates import Question

NUM_MISSES_ALLOWED = 10_000
TEST_SHARE = 1 / 8  # of the facts
MIN_TEST_FACTS = 2
NUM_FACTS_TRIED = 500

PROCEDURAL: dict[str, Callable[[random.Random], Question]] = {
    "arithmetic": questions.arithmetic,
    "unit_conversion": questions.unit_conversion,
    "object_counting": questions.object_counting,
    "date_reasoning": questions.date_reasoning,
    "letter_order": questions.letter_order,
    "sequence": questions.sequence,
    "code_word": questions.code_word,
}
"""The function that makes one question, by the task's name."""


def procedural_task(name: str, *, num_train: int = 400, num_test: int = 50, seed: int = 0) -> Task:
    """The named task of `PROCEDURAL`, the same one for the same seed in every process.

    No prompt comes twice, and no test question is a training question in other words. With more examples of the same
    seed, the first ones stay the same.
    """
    if name not in PROCEDURAL:
        raise TaskError(f"no procedural task {name!r}; choose from {', '.join(PROCEDURAL)}")
    if num_train < 1 or num_test < 0:
        raise ValueError(f"num_train={num_train}, num_test={num_test}; expected at least 1 and 0")
    rng, is_held_out = random.Random(f"{name} {seed}"), _split(name, seed)
    train: list[Example] = []
    test: list[Example] = []
    prompts: set[str] = set()
    num_misses = 0
    while len(train) < num_train or len(test) < num_test:
        question = PROCEDURAL[name](rng)
        side, size = (test, num_test) if is_held_out(question.fact) else (train, num_train)
        if question.prompt not in prompts and len(side) < size:
            prompts.add(question.prompt)
            side.append(_example(question))
            num_misses = 0
        elif (num_misses := num_misses + 1) > NUM_MISSES_ALLOWED:
            raise ValueError(
                f"{name} ran out of different questions at {len(train)} of num_train={num_train} and "
                f"{len(test)} of num_test={num_test}; ask for fewer"
            )
    return Task(name=name, train=tuple(train), test=tuple(test))


def _split(name: str, seed: int) -> Callable[[str], bool]:
    """Decides whether a fact is for testing. If a small task gets too few of these, the draw is repeated."""
    rng = random.Random(f"{name} {seed} facts")
    facts = {PROCEDURAL[name](rng).fact for _ in range(NUM_FACTS_TRIED)}
    draws = chain([f"{name} {seed}"], (f"{name} {seed} {draw}" for draw in count(1)))
    splits = (partial(_is_held_out, draw) for draw in draws)
    return next(split for split in splits if sum(map(split, facts)) >= MIN_TEST_FACTS)


def _is_held_out(draw: str, fact: str) -> bool:
    # A string seeds the same way everywhere, which hash() does not.
    return random.Random(f"{draw} {fact}").random() < TEST_SHARE


def _example(question: Question) -> Example:
    return Example(prompt=question.prompt, answer=question.answer, references=(question.answer, *question.values))
