"""Dependent prompts: a later part needs the answer to an earlier one, or a text that stands before both.

Such a prompt must not be cut into questions that are answered apart. The kinds are procedural, several wordings each,
and their answers are exact.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlp_lora.engine.engine import Engine
from dlp_lora.engine.trace import Generation
from dlp_lora.errors import RecordError
from dlp_lora.kept import keep_rows, read_rows
from dlp_lora.lab.evals.bootstrap import bootstrap
from dlp_lora.lab.evals.metrics import contains, text_after
from dlp_lora.progress import OnProgress, unseen
from dlp_lora.tasks import Example, Task
from dlp_lora.tasks.formats import as_prompt
from dlp_lora.tasks.task import PromptFormat
from dlp_lora.tasks.templates import date_reasoning, letter_order, object_counting, sequence, unit_conversion

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ines", "Jonas")
FRUIT = ("apples", "pears", "plums", "lemons", "figs", "melons")
# Spanish nouns with their article, and adjectives in the masculine and feminine form.
NOUNS = (
    ("house", "La casa", 1), ("table", "La mesa", 1), ("door", "La puerta", 1), ("night", "La noche", 1),
    ("book", "El libro", 0), ("tree", "El árbol", 0), ("dog", "El perro", 0), ("garden", "El jardín", 0),
    ("street", "La calle", 1), ("window", "La ventana", 1), ("chair", "La silla", 1), ("shirt", "La camisa", 1),
    ("car", "El coche", 0), ("hat", "El sombrero", 0), ("bridge", "El puente", 0), ("shoe", "El zapato", 0),
)  # fmt: skip
ADJECTIVES = (
    ("red", "rojo", "roja"), ("small", "pequeño", "pequeña"), ("new", "nuevo", "nueva"),
    ("old", "viejo", "vieja"), ("white", "blanco", "blanca"), ("long", "largo", "larga"),
    ("black", "negro", "negra"), ("clean", "limpio", "limpia"), ("beautiful", "bonito", "bonita"),
    ("expensive", "caro", "cara"), ("cheap", "barato", "barata"), ("short", "corto", "corta"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dependent:
    """A prompt of two parts, the second of which needs the first: `values` are the two answers."""

    kind: str
    prompt: str
    values: tuple[str, str]

    @property
    def example(self) -> Example:
        """The prompt as an example to learn, an answer a line."""
        return Example(prompt=self.prompt, answer="\n".join(self.values))


def convert_and_add(rng: random.Random) -> Dependent:
    """A converted quantity, and a sum with it."""
    first, n = unit_conversion(rng), rng.randint(2, 90)
    value = int(first.values[0])
    then, total = rng.choice((
        (f"Then add {n} to it.", value + n),
        (f"Add {n} to the result.", value + n),
        (f"What do you get if you add {n} to that?", value + n),
        (f"Now take {min(n, value)} away from it.", value - min(n, value)),
        (f"And how much is that plus {n}?", value + n),
    ))  # fmt: skip
    return _two("convert_and_add", first.prompt, then, (str(value), str(total)))


def first_word_and_length(rng: random.Random) -> Dependent:
    """The first word of the alphabet, and how long it is."""
    first = letter_order(rng)
    (word,) = first.values
    then, value = rng.choice((
        ("How many letters does it have?", str(len(word))),
        ("Then count the letters of that word.", str(len(word))),
        ("What is the last letter of that word?", word[-1]),
        ("Write the word backwards.", word[::-1]),
        ("And with which letter does it end?", word[-1]),
    ))  # fmt: skip
    return _two("first_word_and_length", first.prompt, then, (word, value))


def count_and_give(rng: random.Random) -> Dependent:
    """A count of objects, and of the remaining ones."""
    first = object_counting(rng)
    (count,) = map(int, first.values)
    n = rng.randint(1, count)
    then, value = rng.choice((
        (f"If I give {n} of them away, how many are left?", count - n),
        (f"How many are there if {n} more are added?", count + n),
        (f"Then {n} of them get lost. How many remain?", count - n),
        ("And twice as many, how many is that?", 2 * count),
        ("Double that number.", 2 * count),
    ))  # fmt: skip
    return _two("count_and_give", first.prompt, then, (str(count), str(value)))


def date_and_next(rng: random.Random) -> Dependent:
    """A date, and the day after or before it."""
    first = date_reasoning(rng)
    (date,) = first.values
    day, month = date.split()
    then, value = rng.choice((
        ("And which date comes right after that one?", f"{int(day) + 1} {month}"),
        ("What is the day after it?", f"{int(day) + 1} {month}"),
        ("Then name the date one day later.", f"{int(day) + 1} {month}"),
        ("In which month is that?", month),
        ("Tell me the month of that date, too.", month),
    ))  # fmt: skip
    return _two("date_and_next", first.prompt, then, (date, value))


def sequence_and_more(rng: random.Random) -> Dependent:
    """The next number of a sequence, and a sum with it."""
    first, n = sequence(rng), rng.randint(2, 20)
    (value,) = map(int, first.values)
    then, result = rng.choice((
        (f"Subtract {min(n, value)} from that number.", value - min(n, value)),
        (f"Add {n} to it.", value + n),
        ("What is twice that number?", 2 * value),
        (f"How far is it from {value + n}?", n),
        ("Then double it.", 2 * value),
    ))  # fmt: skip
    return _two("sequence_and_more", first.prompt, then, (str(value), str(result)))


def translate_and_count(rng: random.Random) -> Dependent:
    """A Spanish translation, and its parts."""
    english, spanish, gender = rng.choice(NOUNS)
    adjective = rng.choice(ADJECTIVES)
    translation = f"{spanish} es {adjective[1 + gender]}."
    first = rng.choice((
        "Translate into Spanish: {}",
        "What is the Spanish translation of this sentence? {}",
        "Say this in Spanish: {}",
        "Put the following into Spanish. {}",
    )).format(f"The {english} is {adjective[0]}.")  # fmt: skip
    then, value = rng.choice((
        ("How many words does the translation have?", "4"),
        ("Then count its words.", "4"),
        ("What is the last word of the translation?", adjective[1 + gender]),
        ("Which word comes first in your translation?", spanish.split()[0]),
    ))  # fmt: skip
    return _two("translate_and_count", first, then, (translation, value))


def text_and_questions(rng: random.Random) -> Dependent:
    """A short text, and two questions that it answers."""
    (one, other), (fruit, kind) = rng.sample(NAMES, 2), rng.sample(FRUIT, 2)
    a, b = rng.sample(range(2, 20), 2)
    text = rng.choice((
        f"{one} has {a} {fruit} and {other} has {b} {kind}.",
        f"In the shop {one} bought {a} {fruit}, while {other} bought {b} {kind}.",
        f"There are {a} {fruit} in the bag of {one} and {b} {kind} in that of {other}.",
    ))  # fmt: skip
    first = f"How many {fruit} are {one}'s?"
    then, value = rng.choice((
        (f"And how many {kind} are {other}'s?", str(b)),
        ("Who of the two has more?", one if a > b else other),
        ("How many pieces of fruit are there in all?", str(a + b)),
        ("Who has fewer?", other if a > b else one),
    ))  # fmt: skip
    return _two("text_and_questions", f"{text} {first}", then, (str(a), value))


KINDS: dict[str, Callable[[random.Random], Dependent]] = {
    make.__name__: make
    for make in (
        *(convert_and_add, first_word_and_length, count_and_give, date_and_next, sequence_and_more),
        *(translate_and_count, text_and_questions),
    )
}
MAX_AGAIN = 1000  # draws in a row of prompts that were drawn before
SEPARATORS = (" ", " ", "\n", "\n\n")


def dependent_prompts(num: int, *, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)) -> list[Dependent]:
    """Draws `num` different prompts, the kinds in turn.

    Raises:
        ValueError: if a kind has not so many.
    """
    rng = random.Random(f"dependent {seed}")
    found: dict[str, Dependent] = {}
    num_again = 0
    while len(found) < num and num_again < MAX_AGAIN:
        prompt = KINDS[kinds[len(found) % len(kinds)]](rng)
        num_again = num_again + 1 if prompt.prompt in found else 0
        found.setdefault(prompt.prompt, prompt)
    if len(found) < num:
        raise ValueError(f"there are about {len(found)} different dependent prompts; ask for fewer than {num}")
    return list(found.values())


def dependent_task(*, num_train: int, num_test: int, seed: int = 0, name: str = "two_steps") -> Task:
    """The prompts as a task to learn; none is in both halves."""
    drawn = [dependent.example for dependent in dependent_prompts(num_train + num_test, seed=seed)]
    return Task(name=name, train=tuple(drawn[num_test:]), test=tuple(drawn[:num_test]))


WAYS: dict[str, dict[str, Any]] = {
    "keep": {"kv_policy": "keep", "prompt_routing": "questions"},
    "recompute": {"kv_policy": "recompute", "prompt_routing": "questions"},
    "by-sentence": {"kv_policy": "recompute", "prompt_routing": "sentences"},
    "apart": {"kv_policy": "recompute", "prompt_routing": "apart"},
}


def answer_dependent(
    engine: Engine,
    way: str,
    prompts: Sequence[Dependent],
    file: Path,
    *,
    identity: Mapping[str, Any],
    max_new_tokens: int = 48,
    batch_size: int = 8,
    prompt_format: PromptFormat = "auto",
    on_progress: OnProgress = unseen,
) -> list[dict[str, Any]]:
    """Answers prompts in one of the WAYS into `file`, or goes on with it.

    A row a prompt: the text, whether the values stand in it, and the time. An answer is right if both values stand in
    it, the second behind the first.

    Args:
        identity: the other settings on which answers depend.

    Raises:
        RecordError: if the file was begun with other settings or prompts.
    """
    known = [row.get("prompt") for row in read_rows(file)]
    if known != [each.prompt for each in prompts[: len(known)]]:
        raise RecordError(f"{file} holds answers to other prompts; remove it, or write somewhere else")
    settings = {"way": way, "max_new_tokens": max_new_tokens, "prompt_format": prompt_format, **identity}

    def answered(batch: Sequence[Dependent]) -> list[dict[str, Any]]:
        asked: list[Any] = [as_prompt(engine.tokenizer, each.prompt, prompt_format) for each in batch]
        start = time.perf_counter()
        with engine.using(**WAYS[way]):
            answers: list[Generation] = engine.generate(asked, max_new_tokens=max_new_tokens, do_sample=False)
        seconds = round((time.perf_counter() - start) / len(batch), 4)
        return [
            {"kind": each.kind, "prompt": each.prompt, "text": answer.text, **_scored(each, answer), "seconds": seconds}
            for each, answer in zip(batch, answers, strict=True)
        ]

    batches = [prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
    return keep_rows(file, settings, batches, answered, on_progress=on_progress)


def dependent_scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The shares of right answers and of prompts that were cut, of each kind and of all, with intervals.

    `seconds` is the median: a run may have been paused in a batch.
    """
    kinds = dict.fromkeys(row["kind"] for row in rows)
    groups = {**{kind: [row for row in rows if row["kind"] == kind] for kind in kinds}, "all": list(rows)}
    return {
        kind: {
            "right": round(float(np.mean([row["right"] for row in own])), 5),
            "interval": list(bootstrap(np.array([row["right"] for row in own], dtype=float)).rounded()),
            "first_right": round(float(np.mean([row["first_right"] for row in own])), 5),
            "cut": round(float(np.mean([row["is_cut"] for row in own])), 5),
            "seconds": round(float(np.median([row["seconds"] for row in own])), 4),
            "num_prompts": len(own),
        }
        for kind, own in groups.items()
    }


def _scored(prompt: Dependent, answer: Generation) -> dict[str, bool]:
    first, second = prompt.values
    rest = text_after(answer.text, first)
    is_right = rest is not None and contains(rest, [second])
    return {"first_right": rest is not None, "right": is_right, "is_cut": bool(answer.parts)}


def _two(kind: str, first: str, then: str, values: tuple[str, str]) -> Dependent:
    # The separator follows from the text, so that a prompt is drawn by its kind's generator alone.
    separator = SEPARATORS[sum(map(ord, first + then)) % len(SEPARATORS)]
    return Dependent(kind=kind, prompt=f"{first}{separator}{then}", values=values)
