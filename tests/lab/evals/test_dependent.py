from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlp_lora import Engine, Generation
from dlp_lora.errors import RecordError
from dlp_lora.lab.evals.dependent import (
    KINDS,
    WAYS,
    Dependent,
    _scored,
    answer_dependent,
    dependent_prompts,
    dependent_scores,
    dependent_task,
)
from dlp_lora.progress import Progress


def test_prompts_are_different_of_all_kinds_in_turn_and_the_same_for_the_same_seed() -> None:
    prompts = dependent_prompts(70)
    assert len({each.prompt for each in prompts}) == 70
    assert [each.kind for each in prompts[:7]] == list(KINDS)
    assert prompts == dependent_prompts(70)
    assert prompts != dependent_prompts(70, seed=1)
    assert {"\n" in each.prompt for each in prompts} == {True, False}


def test_more_prompts_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="different dependent prompts; ask for fewer than 100000"):
        dependent_prompts(100_000, kinds=["translate_and_count"])


def test_as_a_task_an_answer_has_a_line_for_each_value() -> None:
    task = dependent_task(num_train=20, num_test=6)
    assert (len(task.train), len(task.test)) == (20, 6)
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.test}
    assert all(len(example.answer.split("\n")) == 2 for example in task.train)


@pytest.mark.parametrize(
    "text, first, both",
    [
        ("3000\n3020", True, True),
        ("It is 3000 metres. With 20 more, 3020.", True, True),
        ("3020", False, False),
        ("3020\n3000", True, False),
        ("3000 3000", True, False),
        ("", False, False),
    ],
)
def test_an_answer_is_right_if_the_second_value_stands_behind_the_first(text: str, first: bool, both: bool) -> None:
    (prompt,) = dependent_prompts(1)
    prompt = type(prompt)(kind="convert_and_add", prompt="Convert 3 km. Add 20 to it.", values=("3000", "3020"))
    found = _scored(prompt, Generation(text=text, tokens=(), trace=()))
    assert (found["first_right"], found["right"]) == (first, both)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_answers_every_prompt(make_engine: Callable[..., Engine], tmp_path: Path, way: str) -> None:
    prompts, seen = dependent_prompts(5), list[Any]()
    settings: dict[str, Any] = {"identity": {}, "max_new_tokens": 4, "batch_size": 2}
    rows = answer_dependent(make_engine(), way, prompts, tmp_path / "rows.jsonl", on_progress=seen.append, **settings)
    assert [row["prompt"] for row in rows] == [each.prompt for each in prompts]
    assert seen == [Progress("rows", done, 5) for done in (0, 2, 4, 5)]
    scores = dependent_scores(rows)
    assert set(scores) == {*(each.kind for each in prompts), "all"}
    assert scores["all"]["num_prompts"] == 5


def test_a_stopped_run_goes_on_with_its_answers(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    prompts, file, seen = dependent_prompts(5), tmp_path / "rows.jsonl", list[Any]()
    settings: dict[str, Any] = {"identity": {}, "max_new_tokens": 4, "batch_size": 2}
    engine = make_engine()
    first = answer_dependent(engine, "keep", prompts, file, **settings)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]))  # the settings, a batch, and a half of the next one
    again = answer_dependent(engine, "keep", prompts, file, on_progress=seen.append, **settings)
    assert [row["text"] for row in again] == [row["text"] for row in first]
    assert again[:2] == first[:2]
    assert [progress.done for progress in seen] == [2, 4, 5]
    with pytest.raises(RecordError, match="max_new_tokens was 4 and is 8"):
        answer_dependent(engine, "keep", prompts, file, **{**settings, "max_new_tokens": 8})


@pytest.mark.parametrize("prompts", [dependent_prompts(5, seed=1), dependent_prompts(3), dependent_prompts(5)[::-1]])
def test_answers_to_other_prompts_are_not_taken(
    make_engine: Callable[..., Engine], tmp_path: Path, prompts: list[Dependent]
) -> None:
    engine, file = make_engine(), tmp_path / "rows.jsonl"
    settings: dict[str, Any] = {"identity": {}, "max_new_tokens": 4, "batch_size": 2}
    first = answer_dependent(engine, "keep", dependent_prompts(5), file, **settings)
    before = file.read_bytes()
    with pytest.raises(RecordError, match=r"rows\.jsonl holds answers to other prompts; remove it"):
        answer_dependent(engine, "keep", prompts, file, **settings)
    assert file.read_bytes() == before
    more = answer_dependent(engine, "keep", dependent_prompts(7), file, **settings)
    assert more[:4] == first[:4]


def test_a_pause_in_a_batch_does_not_count_as_the_time_of_a_prompt() -> None:
    row = {"kind": "convert_and_add", "right": True, "first_right": True, "is_cut": False}
    scores = dependent_scores([{**row, "seconds": seconds} for seconds in (0.5, 900.0, 0.7)])
    assert scores["all"]["seconds"] == 0.7
