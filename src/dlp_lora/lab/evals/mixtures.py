"""Do mixtures matter: questions that need two adapters at once, answered by single adapters and by mixtures.

Three kinds. Made: a skill of one procedural task, answered in the format of another. Crossed: a question of one of the
paper's tasks in the format of another. Near: tasks that no adapter learned, between several that some did. Adapters and
mixtures are chosen on the first questions of each, and measured on the others.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dlp_lora.lab.evals.bootstrap import draws, interval
from dlp_lora.lab.evals.methods import Key, Method
from dlp_lora.lab.evals.metrics import exact_match
from dlp_lora.policy import FusionPolicy, Mixture, TopK, TopP, Weighting
from dlp_lora.tasks import Example, Task, procedural_task

NUM_SINGLES = 4  # adapters that are tried alone: those of the pair, then those that the router names
NUM_RESAMPLES = 2000
STEPS = "####"  # before the result of an answer in steps


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Questions that ask for several adapters; of its test part the first `num_chosen` choose among methods.

    `pair` are the adapters that should be fused. `kind` is "made", "crossed" or "near".
    """

    kind: str
    task: Task
    pair: tuple[str, ...]
    num_chosen: int


# Made: a skill in a format


@dataclass(frozen=True, kw_only=True)
class Format:
    """How an answer is written, and how a prompt asks for that."""

    asks: str
    write: Callable[[str], str]


FORMATS: Mapping[str, Format] = {
    "json": Format(asks="Reply in JSON.", write=lambda value: json.dumps({"answer": value})),
    "stars": Format(asks="Put the answer between stars.", write=lambda value: f"*** {value} ***"),
}
LEARNED_WITH = ("arithmetic", "object_counting")  # tasks in whose answers the formats are learned


def format_task(name: str, *, num_train: int, seed: int = 0) -> Task:
    """Teaches a format on tasks of which no adapter is asked."""
    each = -(-num_train // len(LEARNED_WITH))
    tasks = [procedural_task(task, num_train=each, num_test=0, seed=seed) for task in LEARNED_WITH]
    train = [_formatted(example, FORMATS[name]) for task in tasks for example in task.train]
    random.Random(f"{name} {seed}").shuffle(train)
    return Task(name=name, train=tuple(train), test=())


def made(skills: Sequence[str], *, num_chosen: int, num_test: int, seed: int = 0) -> list[Mixed]:
    """Questions of the skills, procedural tasks, each asked for in each format."""
    found = []
    for skill in skills:
        task = procedural_task(skill, num_train=1, num_test=num_chosen + num_test, seed=seed)
        for name, form in FORMATS.items():
            test = tuple(_formatted(example, form) for example in task.test)
            mixed = Task(name=f"{skill} in {name}", train=(), test=test)
            found.append(Mixed(kind="made", task=mixed, pair=(skill, name), num_chosen=num_chosen))
    return found


def _formatted(example: Example, form: Format) -> Example:
    return Example(prompt=f"{example.prompt} {form.asks}", answer=form.write(example.references[-1]))


# Crossed: a question of a task in the format of another

Cross = Callable[[Example, random.Random], Example | None]
"""Rewrites an example; None if this is impossible."""

NUMBERS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
)


def _counting_as_choices(example: Example, rng: random.Random) -> Example | None:
    if example.answer not in NUMBERS:
        return None
    question = example.prompt.removeprefix("Q: ").removesuffix("\nA:")
    others = rng.sample([number for number in NUMBERS if number != example.answer], 4)
    return _with_choices(question, [f"{number}." for number in (example.answer, *others)], rng)


def _conversion_as_question(example: Example, rng: random.Random) -> Example | None:
    stem = example.prompt.partition("\nchoice:")[0]
    before, _, asked = stem.rpartition("When converted to units of ")
    unit, _, amount = asked.removesuffix(" is").partition(", ")
    if not amount:
        return None
    bare = [choice.removesuffix(".") for choice in example.choices or ()]
    prompt = f"Q: {before}How much is {amount} in {unit}?\nA:"
    return Example(prompt=prompt, answer=example.answer.removesuffix("."), choices=tuple(bare))


def _relabelled(labels: Mapping[str, str], ask: Callable[[str], str]) -> Cross:
    def cross(example: Example, rng: random.Random) -> Example | None:
        if example.answer not in labels:
            return None
        return Example(prompt=ask(example.prompt), answer=labels[example.answer], choices=tuple(labels.values()))

    return cross


def _yes_or_no_as_choices(example: Example, rng: random.Random) -> Example | None:
    word = example.answer.partition(".")[0].lower()
    if word not in ("yes", "no"):
        return None
    return Example(
        prompt=example.prompt.replace("\nA:", "\nchoice: yes\nchoice: no\nA:"), answer=word, choices=("yes", "no")
    )


def _with_hint_in_steps(example: Example, rng: random.Random) -> Example | None:
    question = example.prompt.partition(":")[2].partition("\n")[0].strip()
    number = example.answer.split()[0].strip("$%")
    return Example(prompt=question, answer=f"{STEPS} {number}") if question and number[:1].isdigit() else None


def _steps_as_choices(example: Example, rng: random.Random) -> Example | None:
    number = example.answer.rpartition(f"{STEPS} ")[2].replace(",", "")
    if not number.isdigit() or int(number) < 4:
        return None
    others = rng.sample([n for n in range(int(number) // 2, 2 * int(number) + 4) if n != int(number)], 4)
    head = "What is the answer to the following math word problem, with the given hint?:"
    found = _with_choices(f"{head}{example.prompt}", [number, *map(str, others)], rng)
    return replace(found, prompt=f"{found.prompt}A:")


def _with_choices(question: str, choices: Sequence[str], rng: random.Random) -> Example:
    """A question with its choices in any order; the first is right."""
    shuffled = rng.sample(choices, len(choices))
    lines = "".join(f"choice: {choice}\n" for choice in shuffled)
    return Example(prompt=f"{question}\n{lines}", answer=choices[0], choices=tuple(shuffled))


def _as_valid(prompt: str) -> str:
    return prompt.replace("\nchoice: correct\nchoice: incorrect\nThe above reasoning is", "\nValid/Invalid?")


def _as_correct(prompt: str) -> str:
    choices = "\nchoice: correct\nchoice: incorrect\nThe above sequence is"
    return prompt.removesuffix("\nValid/Invalid?") + choices


CROSSES: Mapping[tuple[str, str], Cross] = {
    ("object_counting", "unit_conversion"): _counting_as_choices,
    ("unit_conversion", "object_counting"): _conversion_as_question,
    ("winowhy", "cs_algorithms"): _relabelled({"correct": "Valid", "incorrect": "Invalid"}, _as_valid),
    ("cs_algorithms", "winowhy"): _relabelled({"Valid": "correct", "Invalid": "incorrect"}, _as_correct),
    ("strategyqa", "reasoning_about_colored_objects"): _yes_or_no_as_choices,
    ("elementary_math_qa", "gsm8k"): _with_hint_in_steps,
    ("gsm8k", "elementary_math_qa"): _steps_as_choices,
}
"""By content and format."""


def crossed(tasks: Mapping[str, Task], *, num_chosen: int, num_test: int, seed: int = 0) -> list[Mixed]:
    """Questions of a task in the format of another: those that choose are training questions, the others test ones."""
    found = []
    for (content, form), cross in CROSSES.items():
        if content in tasks and form in tasks:
            rng = random.Random(f"{content} {form} {seed}")
            parts = [
                _rewritten(tasks[content].train, cross, rng, num_chosen),
                _rewritten(tasks[content].test, cross, rng, num_test),
            ]
            mixed = Task(name=f"{content} as {form}", train=(), test=(*parts[0], *parts[1]))
            found.append(Mixed(kind="crossed", task=mixed, pair=(content, form), num_chosen=len(parts[0])))
    return found


def _rewritten(examples: Sequence[Example], cross: Cross, rng: random.Random, num: int) -> list[Example]:
    drawn = rng.sample(examples, len(examples))
    found = [example for each in drawn if (example := cross(each, rng)) is not None]
    return found[:num]


# Near: tasks between several adapters


def near(
    tasks: Sequence[Task],
    rows_of: Callable[[Sequence[str]], Sequence[Mapping[str, float]]],
    *,
    num_tasks: int,
    num_chosen: int,
    num_test: int,
    seed: int = 0,
) -> list[Mixed]:
    """Those tasks whose training prompts lie most between two adapters, as the router has it.

    `rows_of` gives the adapters' probabilities among themselves, for prompts.
    """
    found = []
    for task in tasks:
        rng = random.Random(f"{task.name} {seed}")
        chosen = rng.sample(task.train, min(num_chosen, len(task.train)))
        test = rng.sample(task.test, min(num_test, len(task.test)))
        mean = _mean(rows_of([example.prompt for example in chosen]))
        first, second = sorted(mean, key=lambda name: -mean[name])[:2]
        mixed = Task(name=task.name, train=(), test=(*chosen, *test))
        pair = Mixed(kind="near", task=mixed, pair=(first, second), num_chosen=len(chosen))
        found.append((mean[second], pair))
    return [pair for _, pair in sorted(found, key=lambda own: -own[0])[:num_tasks]]


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


# Methods

POLICIES: Mapping[str, Callable[[Weighting], FusionPolicy]] = {
    "top 2": lambda weighting: TopK(2, weighting=weighting),
    "top 3": lambda weighting: TopK(3, weighting=weighting),
    "top-p 0.9": lambda weighting: TopP(0.9, weighting=weighting),
}
PAIRS: Mapping[str, tuple[float, float]] = {
    "the pair, 1/2 each": (0.5, 0.5),
    "the pair, 2/3 and 1/3": (2 / 3, 1 / 3),
    "the pair, 1/3 and 2/3": (1 / 3, 2 / 3),
    "the pair, 1 each": (1.0, 1.0),
}
"""Fixed weights of the two adapters, for the best possible choice."""


def methods(mixed: Sequence[Mixed], rows: Mapping[Key, Mapping[str, float]]) -> dict[str, list[Method]]:
    """The base, single adapters and mixtures, by group; `rows` are the adapters' probabilities for each question."""
    pairs = {each.task.name: each.pair for each in mixed}
    singles = {each.task.name: _singles(each, rows) for each in mixed}

    def alone(place: int) -> Callable[[Key, Sequence[str]], Mixture]:
        return lambda key, names: Mixture({singles[key[0]][place]: 1.0})

    def fused(weights: tuple[float, float]) -> Callable[[Key, Sequence[str]], Mixture]:
        return lambda key, names: Mixture(dict(zip(pairs[key[0]], weights, strict=True)))

    def routed(policy: FusionPolicy) -> Callable[[Key, Sequence[str]], Mixture]:
        return lambda key, names: policy(rows[key])

    num_singles = min(len(own) for own in singles.values())
    return {
        "base": [Method(name="base", about="the base model alone", mixture=lambda key, names: Mixture())],
        "single": [Method(name=f"single {i + 1}", about="one adapter", mixture=alone(i)) for i in range(num_singles)],
        **{
            weighting: [
                Method(name=f"{name}, {weighting}", about="as the router has it", mixture=routed(make(weighting)))
                for name, make in POLICIES.items()
            ]
            for weighting in ("renormalised", "paper")
        },
        "pair": [
            Method(name=name, about="the two adapters", mixture=fused(weights)) for name, weights in PAIRS.items()
        ],
    }


def _singles(mixed: Mixed, rows: Mapping[Key, Mapping[str, float]]) -> list[str]:
    mean = _mean([rows[mixed.task.name, i] for i in range(mixed.num_chosen)])
    others = sorted((name for name in mean if name not in mixed.pair), key=lambda name: -mean[name])
    return [*mixed.pair, *others][:NUM_SINGLES]


# Scores


def right(rows: Sequence[Mapping[str, Any]], task: Task) -> Bool[np.ndarray, " questions"]:
    """The right answers of a method: by the likeliest choice, else by the text; for steps, by their result."""
    found = np.zeros(len(task.test), dtype=bool)
    for row in rows:
        example = task.test[row["index"]]
        if "likelihoods" in row:
            found[row["index"]] = (example.choices or ())[int(np.argmax(row["likelihoods"]))] in example.accepted
        else:
            text = row["text"]
            text = STEPS + text.rpartition(STEPS)[2] if STEPS in example.answer and STEPS in text else text
            found[row["index"]] = exact_match(text, example.accepted)
    return found


def compared(
    mixed: Sequence[Mixed],
    groups: Mapping[str, Sequence[Method]],
    answers: Mapping[str, Mapping[str, Bool[np.ndarray, " questions"]]],
) -> dict[str, Any]:
    """The best method of each group where methods are chosen, on the other questions; and mixtures less singles.

    `answers` are by method, then task.
    """
    tasks: dict[str, Any] = {}
    best: dict[str, dict[str, Bool[np.ndarray, " tested"]]] = {}
    for each in mixed:
        name, num = each.task.name, each.num_chosen
        tasks[name] = {"kind": each.kind, "pair": list(each.pair), "num": len(each.task.test) - num, "best": {}}
        for group, own in groups.items():
            scores = {method.name: answers[method.name][name] for method in own}
            chosen = max(scores, key=lambda method: float(scores[method][:num].mean()))
            best.setdefault(group, {})[name] = scores[chosen][num:]
            tasks[name]["best"][group] = {"method": chosen, "right": round(float(scores[chosen][num:].mean()), 4)}
        all_scores = {
            m.name: round(float(answers[m.name][name][num:].mean()), 4) for own in groups.values() for m in own
        }
        tasks[name]["right"] = all_scores
    kinds = dict.fromkeys(each.kind for each in mixed)
    return {
        "tasks": tasks,
        "mixture_less_single": {
            kind: {
                group: _difference(
                    [(best[group][e.task.name], best["single"][e.task.name]) for e in mixed if e.kind == kind]
                )
                for group in groups
                if group not in ("base", "single")
            }
            for kind in kinds
        },
    }


def _difference(
    pairs: Sequence[tuple[Bool[np.ndarray, " tested"], Bool[np.ndarray, " tested"]]],
) -> dict[str, Any]:
    """The mean over tasks of the first's lead over the second, with its 95 % interval over questions."""
    gaps: list[Float[np.ndarray, " tested"]] = [a.astype(float) - b.astype(float) for a, b in pairs]
    places_of = draws(*map(len, gaps), num_resamples=NUM_RESAMPLES)
    drawn = [own[places].mean(axis=1) for own, places in zip(gaps, places_of, strict=True)]
    low, high = interval(np.mean(drawn, axis=0))
    value = float(np.mean([own.mean() for own in gaps]))
    return {"value": round(value, 4), "interval": [round(low, 4), round(high, 4)], "tasks": len(gaps)}
