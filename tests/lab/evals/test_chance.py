import pytest

from dlp_lora.lab.evals.chance import described
from dlp_lora.tasks import Example, Task, TaskInfo


def example(answer: str, *choices: str) -> Example:
    return Example(prompt=f"{answer} {choices}?", answer=answer, choices=choices or None)


TRAIN = (example("yes"), example("Yes."), example("no"))
TASK = Task(name="own", train=TRAIN, test=(example("yes", "yes", "no"), example("no", "yes", "no", "maybe", "never")))


def test_chance_and_majority_are_what_a_person_counts() -> None:
    found = described(TASK, TaskInfo(), "mcq")
    assert found.chance == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert found.majority == 0.5  # "yes", spelt two ways
    assert found.paper_name is None


def test_what_the_manifest_says_stays() -> None:
    info = TaskInfo(paper_name="Own", chance=0.1, majority=0.2, stand_in="that")
    assert described(TASK, info, "mcq") == info


def test_a_task_of_the_catalog_has_the_papers_name() -> None:
    assert described(Task(name="gsm8k", train=TRAIN, test=()), TaskInfo(), "qa").paper_name == "GSM8K"


@pytest.mark.parametrize(
    "task, kind",
    [
        (TASK, "qa"),
        (Task(name="own", train=(), test=(example("yes", "yes", "no"), example("no"))), "mcq"),
        (Task(name="own", train=TRAIN, test=()), "mcq"),
    ],
)
def test_without_choices_or_examples_nothing_is_guessed(task: Task, kind: str) -> None:
    found = described(task, TaskInfo(), kind)
    assert (found.chance, found.majority) == (None, None)
