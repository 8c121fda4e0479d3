"""Samples: test questions in, a router's contexts with their tasks out.

Pure functions, the same samples for the same seed. `serial` and `junctions` give texts that are routed sentence by
sentence: what is routed is then the context's prompt, what came before is its history.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

from tokenizers import Tokenizer

from dlp_lora.router import Context
from dlp_lora.sentences import split
from dlp_lora.tasks.task import Example, Task
from dlp_lora.training.contexts import first_word, whole_examples

BETWEEN_QUESTIONS = "\n\n"
MIN_WORDS = 6  # of a sentence that is cut in half

# Small talk before a question, in other words than those of the routers' training.
SMALL_TALK = {
    "a greeting": "Hi there!\nHello! How can I help you today?",
    "thanks": "Thanks!\nYou're welcome.",
    "a system prompt": "You are a helpful assistant.",
    "a system prompt and a greeting": "You are a helpful assistant.\nHi there!\nHello! How can I help you today?",
    "another question": "What is the capital of France?\nParis.",
    "a complaint": "That's not what I meant.\nI apologise for the confusion. Could you tell me more?",
}


@dataclass(frozen=True)
class Sample:
    """A router's context, and the right task."""

    context: Context
    task: str


@dataclass(frozen=True)
class Question:
    """An example and the task that it belongs to."""

    task: str
    example: Example


T = TypeVar("T")

Walk = tuple[Sample, ...]
"""The sentences of one text, in order."""


@dataclass(frozen=True)
class Junction:
    """A sentence that begins in one task and ends in another, and the next sentences of the latter.

    `words` has one sample a word, each with the sentence up to that word. `others` are the sentences that follow;
    `apart` are the same sentences if the second task's sentence stands alone.
    """

    words: Walk
    others: Walk
    apart: Walk


def questions(tasks: Sequence[Task], *, limit: int | None = None, train: bool = False) -> list[Question]:
    """The test examples of the tasks, or their training examples: at most `limit` of each, evenly spaced.

    Parts of a longer answer are left out: their prompts belong to several tasks.
    """
    found = []
    for task in tasks:
        examples = evenly(whole_examples(task.train if train else task.test), limit)
        found += [Question(task.name, example) for example in examples]
    return found


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the items, evenly spaced."""
    step = max(1.0, len(items) / limit) if limit else 1.0
    return [items[int(i * step)] for i in range(int(len(items) / step + 1e-9))]


def whole(asked: Sequence[Question]) -> list[Sample]:
    """The whole prompts."""
    return [Sample(Context(q.example.prompt), q.task) for q in asked]


def first_sentence(asked: Sequence[Question]) -> list[Sample]:
    """The first sentence of each prompt, and nothing else."""
    return [Sample(Context(split(q.example.prompt)[0].strip()), q.task) for q in asked]


def random_sentence(asked: Sequence[Question], *, seed: int) -> list[Sample]:
    """One sentence of each prompt, and nothing else."""
    rng = random.Random(f"random sentence {seed}")
    return [Sample(Context(rng.choice(split(q.example.prompt)).strip()), q.task) for q in asked]


def cut(asked: Sequence[Question], num_tokens: int, tokenizer: Tokenizer) -> list[Sample]:
    """The first tokens of each prompt; a prompt that is no longer is whole."""
    return [Sample(Context(_first_tokens(q.example.prompt, num_tokens, tokenizer)), q.task) for q in asked]


def answer_sentence(asked: Sequence[Question], number: int, *, seed: int, or_later: bool = False) -> list[Sample]:
    """The opening of that sentence of each answer (from 1), or of a later one: prompt, answer so far, its first word.

    Answers that have no such sentence are left out.
    """
    rng = random.Random(f"answers {number} {seed}")
    samples = []
    for q in asked:
        sentences = split(q.example.answer)
        if len(sentences) < number:
            continue
        i = rng.randrange(number - 1, len(sentences)) if or_later else number - 1
        context = Context(q.example.prompt, "".join(sentences[:i]), first_word(sentences[i]))
        samples.append(Sample(context, q.task))
    return samples


def conversations(asked: Sequence[Question], n: int, *, answers: bool, seed: int) -> list[Sample]:
    """Each question as the newest of `n` of different tasks, in random order, with or without the answers between."""
    rng = random.Random(f"conversations {n} {seed}")
    by_task = _by_task(asked)
    samples = []
    for q in asked:
        names = rng.sample([name for name in by_task if name != q.task], n - 1)
        earlier = [rng.choice(by_task[name]).example for name in names]
        turns = [turn for e in earlier for turn in ((e.prompt, e.answer) if answers else (e.prompt,))]
        samples.append(Sample(Context(q.example.prompt, history="\n".join(turns)), q.task))
    return samples


def after(asked: Sequence[Question], history: str) -> list[Sample]:
    """The whole prompts after something that was said before."""
    return [Sample(Context(q.example.prompt, history=history), q.task) for q in asked]


def serial(asked: Sequence[Question], n: int, *, seed: int) -> list[Walk]:
    """Prompts of `n` questions of different tasks, sentence by sentence; each question opens one prompt in `n`."""
    rng = random.Random(f"serial {n} {seed}")
    by_task = _by_task(asked)
    walks = []
    for first in rng.sample(asked, -(-len(asked) // n)):
        names = rng.sample([name for name in by_task if name != first.task], n - 1)
        walks.append(_walk([first, *(rng.choice(by_task[name]) for name in names)]))
    return walks


def junctions(asked: Sequence[Question], *, seed: int, num_others: int = 2) -> list[Junction]:
    """Each question that can be broken off in the middle of a sentence, and goes on in another task's."""
    rng = random.Random(f"junctions {seed}")
    places = {q: _long_sentences(q) for q in asked}
    # The second task's sentence is not its last, so that there is one to follow.
    ends = [(q, i) for q, own in places.items() for i in own if i + 1 < len(split(q.example.prompt))]
    found = []
    for q, own in places.items():
        others = [end for end in rng.sample(ends, min(20, len(ends))) if end[0].task != q.task]
        if own and others:
            found.append(_junction(q, rng.choice(own), *others[0], num_others))
    return found


def other_than(asked: Sequence[Question], rng: random.Random) -> list[Question]:
    """For each question one of another task.

    Raises:
        ValueError: if all are of one task.
    """
    by_task = _by_task(asked)
    if len(by_task) < 2:
        raise ValueError(f"questions of another task need two tasks, got {', '.join(by_task)} alone")
    return [rng.choice(by_task[rng.choice([name for name in by_task if name != q.task])]) for q in asked]


def has_changed(walk: Walk) -> list[bool]:
    """Of each sentence of a walk, whether it is the first of another task than the one before."""
    return [False, *(a.task != b.task for a, b in pairwise(walk))]


def _walk(asked: Sequence[Question]) -> Walk:
    text = BETWEEN_QUESTIONS.join(q.example.prompt for q in asked)
    ends = list(accumulate(len(q.example.prompt) + len(BETWEEN_QUESTIONS) for q in asked))
    samples, start = [], 0
    for sentence in split(text):
        owner = next(q.task for q, end in zip(asked, ends, strict=True) if start < end)
        samples.append(Sample(Context(sentence.strip(), history=text[:start]), owner))
        start += len(sentence)
    return tuple(samples)


def _junction(q: Question, i: int, other: Question, j: int, num_others: int) -> Junction:
    before, after = split(q.example.prompt), split(other.example.prompt)
    opening, ending = before[i].split(), after[j].split()
    opening, ending = opening[: len(opening) // 2], ending[len(ending) // 2 :]
    words = opening + ending
    given, whole = "".join(before[:i]), "".join(before[: i + 1]).rstrip()
    samples = [
        Sample(Context(" ".join(words[: k + 1]), history=given), q.task if k < len(opening) else other.task)
        for k in range(len(words))
    ]
    rest = after[j + 1 : j + 1 + num_others]

    def following(history: str) -> Walk:
        return tuple(
            Sample(Context(sentence.strip(), history=history + "".join(rest[:k])), other.task)
            for k, sentence in enumerate(rest)
        )

    return Junction(
        words=tuple(samples),
        others=following(f"{given}{' '.join(words)}\n"),
        apart=following(f"{whole}\n{after[j]}"),
    )


def _long_sentences(q: Question) -> list[int]:
    return [i for i, sentence in enumerate(split(q.example.prompt)) if len(sentence.split()) >= MIN_WORDS]


def _by_task(asked: Sequence[Question]) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for q in asked:
        found.setdefault(q.task, []).append(q)
    return found


def _first_tokens(text: str, num_tokens: int, tokenizer: Tokenizer) -> str:
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    return text if len(offsets) <= num_tokens else text[: offsets[num_tokens - 1][1]]
