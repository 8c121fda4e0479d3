"""Dependent prompts: a later part needs the answer to an earlier one, or a text that stands before both.

Such a prompt must not be cut into questions that are answered apart. The kinds are procedural, several wordings each,
and their answers are exact.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlp_lora.tasks import Example, Task
from dlp_lora.tasks.templates import date_reasoning, letter_order, object_counting, sequence, unit_conversion

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ines", "Jonas")
FRUIT = ("apples", "pears", "plums", "lemons", "figs", "melons")
# Spanish nouns with their article, and adjectives in the masculine and feminine form.
NOUNS = (
    ("house", "La casa", 1), ("table", "La mesa", 1), ("door", "La puerta", 1), ("night", "La noche", 1),
    ("book", "El libro", 0), ("tree", "El árbol", 0), ("dog", "El perro", 0), ("garden", "El jardín", 0),
)  # fmt: skip
ADJECTIVES = (
    ("red", "rojo", "roja"), ("small", "pequeño", "pequeña"), ("new", "nuevo", "nueva"),
    ("old", "viejo", "vieja"), ("white", "blanco", "blanca"), ("long", "largo", "larga"),
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
    """A count of objects, and what is left of them."""
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
    """A Spanish translation, and what it is made of."""
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
SEPARATORS = (" ", " ", "\n", "\n\n")


def dependent_prompts(num: int, *, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)) -> list[Dependent]:
    """Draws `num` different prompts, the kinds in turn."""
    rng = random.Random(f"dependent {seed}")
    found: dict[str, Dependent] = {}
    while len(found) < num:
        prompt = KINDS[kinds[len(found) % len(kinds)]](rng)
        found.setdefault(prompt.prompt, prompt)
    return list(found.values())


def dependent_task(*, num_train: int, num_test: int, seed: int = 0, name: str = "two_steps") -> Task:
    """The prompts as a task to learn; none is in both halves."""
    drawn = [dependent.example for dependent in dependent_prompts(num_train + num_test, seed=seed)]
    return Task(name=name, train=tuple(drawn[num_test:]), test=tuple(drawn[:num_test]))


def _two(kind: str, first: str, then: str, values: tuple[str, str]) -> Dependent:
    # The separator follows from the text, so that a prompt is drawn by its kind's generator alone.
    separator = SEPARATORS[sum(map(ord, first + then)) % len(SEPARATORS)]
    return Dependent(kind=kind, prompt=f"{first}{separator}{then}", values=values)
