"""Questions that ask for two adapters at once."""

import json
import random
import runpy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import HashRouter
from dlp_lora import Engine
from dlp_lora.errors import RecordError
from dlp_lora.lab.evals.methods import Method
from dlp_lora.lab.evals.mixtures import (
    CROSSES,
    FORMATS,
    Mixed,
    compared,
    crossed,
    format_task,
    made,
    methods,
    near,
    right,
)
from dlp_lora.policy import Mixture
from dlp_lora.progress import unseen
from dlp_lora.tasks import Example, Task

EXAMPLES = {
    "object_counting": Example(prompt="Q: I have a flute and two trumpets. How many do I have?\nA:", answer="three"),
    "unit_conversion": Example(
        prompt="When converted to units of m, 3 km is\nchoice: 3000 m.\nchoice: 30 m.\n",
        answer="3000 m.",
        choices=("3000 m.", "30 m."),
    ),
    "winowhy": Example(
        prompt="He fell because he ran.\nchoice: correct\nchoice: incorrect\nThe above reasoning is",
        answer="correct",
        choices=("correct", "incorrect"),
    ),
    "cs_algorithms": Example(
        prompt="Sequence: ( )\nValid/Invalid?", answer="Valid", choices=("Valid", "Invalid")
    ),
    "strategyqa": Example(prompt="Q: Are there bones in fish?\nA:", answer="Yes. Most fish have them."),
    "elementary_math_qa": Example(
        prompt="What is the answer to the following math word problem, with the given hint?:what is 2 plus 3 ?\n"
        "add both.\nchoice: 5\nchoice: 6\nA:",
        answer="5",
        choices=("5", "6"),
    ),
    "gsm8k": Example(prompt="Ann has 20 pears and eats 8. How many are left?", answer="20-8=12\n#### 12"),
}  # fmt: skip


@pytest.mark.parametrize("names", CROSSES)
def test_a_crossed_question_has_the_content_of_one_task_and_the_format_of_another(names: tuple[str, str]) -> None:
    content, form = names
    found = CROSSES[names](EXAMPLES[content], random.Random(0))
    assert found is not None
    words = set(EXAMPLES[content].prompt.split()) & set(found.prompt.split())
    assert len(words) >= 2
    labels = {"object_counting": "Q:", "unit_conversion": "choice:", "winowhy": "choice: incorrect",
              "cs_algorithms": "Valid/Invalid?", "reasoning_about_colored_objects": "choice: no",
              "elementary_math_qa": "choice:"}  # fmt: skip
    assert labels.get(form, "") in found.prompt
    if found.choices:
        assert len(set(found.choices)) == len(found.choices)


def test_crossed_answers_are_those_of_the_question() -> None:
    found = {names: CROSSES[names](EXAMPLES[names[0]], random.Random(0)) for names in CROSSES}
    answers = {names[0]: example.answer for names, example in found.items() if example}
    assert answers == {
        "object_counting": "three.",
        "unit_conversion": "3000 m",
        "winowhy": "Valid",
        "cs_algorithms": "correct",
        "strategyqa": "yes",
        "elementary_math_qa": "#### 5",
        "gsm8k": "12",
    }


def test_only_crosses_of_tasks_that_are_there_are_asked_and_methods_are_chosen_on_training_questions() -> None:
    tasks = {
        name: Task(name=name, train=(EXAMPLES[name],) * 3, test=(EXAMPLES[name],) * 5)
        for name in ("object_counting", "unit_conversion", "gsm8k")
    }
    found = crossed(tasks, num_chosen=2, num_test=4)
    assert [each.pair for each in found] == [
        ("object_counting", "unit_conversion"),
        ("unit_conversion", "object_counting"),
    ]
    assert [(each.num_chosen, len(each.task.test)) for each in found] == [(2, 6), (2, 6)]


def test_a_skill_is_asked_in_a_format_that_was_learned_with_other_skills() -> None:
    found = made(["sequence"], num_chosen=2, num_test=3)
    assert [each.task.name for each in found] == ["sequence in json", "sequence in stars"]
    for each, form in zip(found, FORMATS.values(), strict=True):
        assert all(example.prompt.endswith(form.asks) for example in each.task.test)
        assert len(each.task.test) == 5
    value = json.loads(found[0].task.test[0].answer)["answer"]
    assert found[1].task.test[0].answer == f"*** {value} ***"
    learned = format_task("json", num_train=6)
    assert len(learned.train) == 6
    assert all(json.loads(example.answer)["answer"] for example in learned.train)


def test_near_tasks_are_those_whose_prompts_lie_most_between_two_adapters() -> None:
    tasks = [Task(name=name, train=(Example(prompt=name, answer="x"),) * 4, test=(Example(prompt=name, answer="x"),))
             for name in ("sure", "torn")]  # fmt: skip
    rows = {"sure": {"a": 0.9, "b": 0.1, "c": 0.0}, "torn": {"a": 0.1, "b": 0.4, "c": 0.5}}
    (found,) = near(tasks, lambda prompts: [rows[prompt] for prompt in prompts], num_tasks=1, num_chosen=2, num_test=9)
    assert (found.task.name, found.pair, found.num_chosen) == ("torn", ("c", "b"), 2)


def mixed(num_chosen: int = 2) -> Mixed:
    examples = tuple(Example(prompt=str(i), answer="yes", choices=("yes", "no")) for i in range(4))
    return Mixed(kind="made", task=Task(name="t", train=(), test=examples), pair=("b", "c"), num_chosen=num_chosen)


def test_singles_are_the_pair_then_what_the_router_names_and_mixtures_follow_its_weights() -> None:
    rows = {("t", i): {"a": 0.6, "b": 0.3, "c": 0.1, "d": 0.0} for i in range(4)}
    groups = methods([mixed()], rows)
    names = ["a", "b", "c", "d"]

    def mixtures(group: str) -> list[Mixture]:
        return [method.mixture(("t", 0), names) for method in groups[group] if method.mixture is not None]

    assert mixtures("base") == [Mixture()]
    assert mixtures("single") == [Mixture({name: 1.0}) for name in "bcad"]
    assert mixtures("renormalised")[0] == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert mixtures("paper")[0]["a"] == pytest.approx(np.exp(0.6) / (np.exp(0.6) + np.exp(0.3)))
    assert mixtures("pair")[0] == Mixture({"b": 0.5, "c": 0.5})
    assert mixtures("pair")[-1] == Mixture({"b": 1.0, "c": 1.0})


def test_an_answer_is_right_by_its_likeliest_choice_its_text_or_the_result_of_its_steps() -> None:
    examples = (
        Example(prompt="?", answer="yes", choices=("yes", "no")),
        Example(prompt="?", answer="three"),
        Example(prompt="?", answer="#### 12"),
        Example(prompt="?", answer="#### 12"),
    )
    rows = [
        {"index": 0, "text": "no", "likelihoods": [-1.0, -2.0]},
        {"index": 1, "text": "Three."},
        {"index": 2, "text": "20-8=12\n#### 12"},
        {"index": 3, "text": "It is 12"},
    ]
    assert right(rows, Task(name="t", train=(), test=examples)).tolist() == [True, True, True, False]


def test_methods_are_chosen_on_the_first_questions_and_compared_on_the_others() -> None:
    groups = {
        "base": [Method(name="base", about="")],
        "single": [Method(name="s1", about=""), Method(name="s2", about="")],
        "paper": [Method(name="m", about="")],
    }
    scores = {"base": [0, 0, 0, 0], "s1": [1, 1, 0, 1], "s2": [0, 0, 1, 1], "m": [0, 1, 1, 1]}
    answers = {name: {"t": np.array(own, dtype=bool)} for name, own in scores.items()}
    found = compared([mixed()], groups, answers)
    assert found["tasks"]["t"]["best"]["single"] == {"method": "s1", "right": 0.5}
    assert found["tasks"]["t"]["right"] == {"base": 0.0, "s1": 0.5, "s2": 1.0, "m": 1.0}
    assert found["mixture_less_single"]["made"]["paper"]["value"] == 0.5
    low, high = found["mixture_less_single"]["made"]["paper"]["interval"]
    assert 0 <= low <= 0.5 <= high <= 1


class SaltedRouter(HashRouter):
    """Routers of different salts are different."""

    def __init__(self, salt: str) -> None:
        super().__init__()
        self.salt = salt

    def save_pretrained(self, path: str | Path) -> None:
        Path(path).mkdir()
        Path(path, "router_config.json").write_text(self.salt)


def test_answers_under_the_mixtures_of_another_router_are_refused(
    make_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    measured = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "measure_mixtures.py"))["_measured"]
    one = mixed()
    asked = [replace(one, pair=("math", "poems"), task=replace(one.task, name="math"))]

    def run(salt: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = measured(
            make_engine(), SaltedRouter(salt), asked, tmp_path / "run", "plain", unseen
        )  # fmt: skip
        return found

    assert run("a") == run("a")
    with pytest.raises(RecordError, match=r"base\.jsonl holds answers under other settings: router was .*; remove it"):
        run("b")
