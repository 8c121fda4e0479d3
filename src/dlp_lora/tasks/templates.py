"""Questions of the package's tasks: a random generator in, one question with its answer out.

Every answer is one sentence that begins with "The" and ends with a full stop. So answers to several questions can
follow each other, and the adapter can change between them. Prompts are short and have many wordings, so that the router
cannot learn a single phrase.
"""

import random
from dataclasses import dataclass

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}

# From, to, the factor, the largest number in a question.
UNITS = (
    ("kilometres", "metres", 1000, 99),
    ("kilograms", "grams", 1000, 99),
    ("litres", "millilitres", 1000, 99),
    ("metres", "centimetres", 100, 99),
    ("tonnes", "kilograms", 1000, 99),
    ("centimetres", "millimetres", 10, 99),
)
OBJECTS = (
    "fork", "spoon", "cup", "plate", "chair", "table", "lamp", "book", "pencil", "bottle", "candle", "clock",
    "drum", "flute", "trumpet", "carrot", "pear", "banana", "lemon", "apple", "orange", "onion", "egg",
)  # fmt: skip
# Short common words; the question takes words of different first letters.
WORDS = (
    "apple", "arrow", "bread", "bridge", "candle", "cloud", "dance", "door", "eagle", "earth", "field",
    "forest", "garden", "glass", "hammer", "house", "island", "ink", "jacket", "jewel", "kettle", "king",
    "ladder", "lemon", "market", "mirror", "needle", "night", "ocean", "orange", "pencil", "planet",
    "queen", "quiet", "river", "rocket", "silver", "stone", "table", "tiger", "uncle", "umbrella",
    "valley", "village", "water", "window", "yard", "yellow", "zebra", "zero",
)  # fmt: skip
# A made-up rule that no model knows: a code is the colour's initial and the shape's number.
COLOURS = (
    "red", "blue", "green", "yellow", "white", "pink", "amber", "violet",
    "orange", "silver", "navy", "cream", "lime", "teal", "khaki", "maroon",
)  # fmt: skip
SHAPE_CODES = {"tiny": 17, "round": 42, "flat": 55, "big": 68, "long": 74, "square": 93}
CONTAINERS = ("box", "tin", "bag", "jar", "parcel")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its answer; `fact` is the same for all wordings of it."""

    prompt: str
    fact: str
    answer: str
    values: tuple[str, ...]


def arithmetic(rng: random.Random) -> Question:
    """Two numbers up to 99 added or subtracted, or two up to 12 multiplied."""
    sign = rng.choice("+-*")
    a, b = (rng.randint(2, 12 if sign == "*" else 99) for _ in range(2))
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    value, phrases = {
        "+": (a + b, (f"{a} plus {b}", f"{a} + {b}", f"the sum of {a} and {b}")),
        "-": (a - b, (f"{a} minus {b}", f"{a} - {b}", f"the difference of {a} and {b}")),
        "*": (a * b, (f"{a} times {b}", f"{a} * {b}", f"the product of {a} and {b}")),
    }[sign]
    wording = rng.choice((
        "What is {}?",
        "How much is {}?",
        "Calculate {}.",
        "Work out {}.",
        "Compute {} and give the result.",
        "I need the value of {}.",
        "Tell me the result of {}.",
        "Here is a sum to do in your head: {}.",
    ))  # fmt: skip
    return Question(
        prompt=wording.format(rng.choice(phrases)),
        fact=f"{max(a, b)} {sign} {min(a, b)}",
        answer=f"The result is {value}.",
        values=(str(value),),
    )


def unit_conversion(rng: random.Random) -> Question:
    """A whole number of one unit as a whole number of a smaller one."""
    source, target, factor, largest = rng.choice(UNITS)
    n = rng.randint(2, largest)
    wording = rng.choice((
        "Convert {n} {source} to {target}.",
        "How many {target} are there in {n} {source}?",
        "What is {n} {source} in {target}?",
        "Express {n} {source} in {target}.",
        "I have {n} {source}. Change that into {target}.",
        "Write {n} {source} as {target}.",
        "How much is {n} {source} in {target}?",
        "Give {n} {source} as a number of {target}.",
    ))  # fmt: skip
    return Question(
        prompt=wording.format(n=n, source=source, target=target),
        fact=f"{n} {source}",
        answer=f"The converted value is {n * factor} {target}.",
        values=(str(n * factor), f"{n * factor} {target}"),
    )


def object_counting(rng: random.Random) -> Question:
    """Two or three kinds of objects, at most twelve objects in all."""
    kinds = rng.sample(OBJECTS, rng.randint(2, 3))
    counts = [1] * len(kinds)
    for _ in range(rng.randint(0, 12 - len(kinds))):
        i = rng.randrange(len(kinds))
        counts[i] = min(counts[i] + 1, max(NUMBER_WORDS))
    items = [_counted(kind, count) for kind, count in zip(kinds, counts, strict=True)]
    wording = rng.choice((
        "I have {}. How many objects do I have?",
        "My bag holds {}. Count the objects.",
        "On the shelf you see {}. How many things is that in all?",
        "Count everything here: {}.",
        "Anna bought {}. How many items did she buy?",
        "How many objects do I own if I own {}?",
        "Someone left behind {}. Give the number of objects.",
        "Find the total number of things: {}.",
    ))  # fmt: skip
    return Question(
        prompt=wording.format(f"{', '.join(items[:-1])} and {items[-1]}"),
        fact=" ".join(sorted(items)),
        answer=f"The count is {sum(counts)}.",
        values=(str(sum(counts)),),
    )


def date_reasoning(rng: random.Random) -> Question:
    """The date up to nine days before or after a given one, within the same month."""
    # Weekdays and months would need steps around a circle: too much for a small model and 400 examples.
    n, direction = rng.randint(1, 9), rng.choice(("after", "before"))
    earlier, month = rng.randint(1, 28 - n), rng.choice(MONTHS)
    start, value = (earlier, earlier + n) if direction == "after" else (earlier + n, earlier)
    wording = rng.choice((
        "Which date is {}?",
        "What date comes {}?",
        "Name the date that is {}.",
        "Tell me the date that falls {}.",
        "Look at the calendar: which date lies {}?",
        "Give the date {}.",
        "I need to know the date {}.",
        "Find the date {}.",
    ))  # fmt: skip
    return Question(
        prompt=wording.format(f"{n} day{'' if n == 1 else 's'} {direction} {start} {month}"),
        fact=f"{start} {value}",
        answer=f"The date is {value} {month}.",
        values=(f"{value} {month}",),
    )


def letter_order(rng: random.Random) -> Question:
    """The alphabetically first of three words that begin with different letters."""
    letters = rng.sample(sorted({word[0] for word in WORDS}), 3)
    words = [rng.choice([word for word in WORDS if word[0] == letter]) for letter in letters]
    wording = rng.choice((
        "Which of these words comes first in the alphabet: {}?",
        "Which word is first in alphabetical order: {}?",
        "Pick the word that a dictionary lists first: {}.",
        "Sort these words from A to Z and name the first one: {}.",
        "Name the alphabetically first word of {}.",
        "Here are three words: {}. Which one starts the alphabetical list?",
        "Of the words {}, which comes first from A to Z?",
        "Put {} in alphabetical order. Which word leads?",
    ))  # fmt: skip
    return Question(
        prompt=wording.format(", ".join(words)),
        fact=" ".join(sorted(words)),
        answer=f"The word is {min(words)}.",
        values=(min(words),),
    )


def sequence(rng: random.Random) -> Question:
    """The number that follows four numbers with equal steps."""
    start, step = rng.randint(1, 50), rng.randint(2, 10)
    *terms, value = (start + i * step for i in range(5))
    wording = rng.choice((
        "What number comes next: {}?",
        "Continue the sequence {}.",
        "Which number follows in the series {}?",
        "Give the next term of {}.",
        "The numbers go {}. What is the next one?",
        "Find the number that comes after {}.",
        "Complete the pattern by one number: {}.",
        "Look at the list {} and name the next number.",
    ))  # fmt: skip
    return Question(
        prompt=wording.format(", ".join(map(str, terms))),
        fact=f"{start} {step}",
        answer=f"The next number is {value}.",
        values=(str(value),),
    )


def code_word(rng: random.Random) -> Question:
    """The ticket code of a thing by its colour and shape, after a made-up rule."""
    shape, colour = rng.choice(list(SHAPE_CODES)), rng.choice(COLOURS)
    value = f"{colour[0].upper()}-{SHAPE_CODES[shape]}"
    wording = rng.choice((
        "Give the ticket code for {}.",
        "What is the ticket code of {}?",
        "Which code belongs on {}?",
        "I am sending {}. What is its ticket code?",
        "Write the ticket code for {}.",
        "Look up the code for {}.",
        "Label {} with its code.",
        "A customer hands in {}. Name the ticket code.",
    ))  # fmt: skip
    return Question(
        prompt=wording.format(f"a {shape} {colour} {rng.choice(CONTAINERS)}"),
        fact=f"{shape} {colour}",
        answer=f"The code is {value}.",
        values=(value,),
    )


def _counted(kind: str, count: int) -> str:
    if count == 1:
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    return f"{NUMBER_WORDS[count]} {kind}s"
