import json
from pathlib import Path
from typing import Any

import pytest

from dlp_lora.errors import TaskError
from dlp_lora.tasks import CATALOG, COMPOSITES, PROCEDURAL, Example, Task, composite, kind_of, procedural_task
from dlp_lora.tasks.catalog import expand_composites
from dlp_lora.tasks.manifest import TaskInfo, read_manifest

# As the rows of the paper's Tables 1 and 2 are named, in their order.
TABLE_1 = (
    "AbsNarr", "ConParaKC", "CSAlg", "DisflQA", "ElemMath", "EpiReason", "FormFall", "LangID", "LogDeduc", "ObjCount",
    "PlayDiag", "QuesSel", "ColorReason", "TrackObj", "UnitConv", "VitaFact", "WinoWhy",
)  # fmt: skip
TABLE_2 = ("GSM8K", "CNNDM", "LingPuzz", "NewsDE", "NewsES", "NewsIT", "StratQA", "TopChat", "ALPACA")


def task(*answers: str, choices: tuple[str, ...] | None = None, name: str = "mine") -> Task:
    examples = [Example(prompt=f"Question {i}?", answer=answer, choices=choices) for i, answer in enumerate(answers)]
    return Task(name=name, train=tuple(examples[:1]), test=tuple(examples[1:]))


def test_the_catalog_is_the_papers_tables_in_their_order() -> None:
    assert tuple(task.paper_name for task in CATALOG.values()) == TABLE_1 + TABLE_2
    assert [task.kind for task in CATALOG.values()] == ["mcq"] * 17 + ["qa"] * 9
    assert all(name == task.name for name, task in CATALOG.items())


def test_the_17_are_scored_by_accuracy_and_the_9_by_bleu_and_rouge() -> None:
    assert {CATALOG[name].metrics for name in composite("composite-17")} == {("accuracy",)}
    assert {CATALOG[name].metrics for name in composite("composite-9")} == {("bleu", "rouge1", "rougeL")}


def test_every_task_says_where_its_data_is() -> None:
    assert sum(task.source.bigbench == task.name for task in CATALOG.values()) == 20
    sources = [str(task.source) for task in CATALOG.values()]
    assert len(set(sources)) == 26
    assert all(source.split()[0].count("/") == 1 for source in sources)


def test_the_composites_pool_the_kinds() -> None:
    assert {name: len(tasks) for name, tasks in COMPOSITES.items()} == {
        "composite-9": 9,
        "composite-17": 17,
        "composite-26": 26,
    }
    assert set(composite("composite-26")) == set(composite("composite-9")) | set(composite("composite-17"))


@pytest.mark.parametrize(
    "names, tasks",
    [
        ("winowhy", ("winowhy",)),
        (" winowhy , gsm8k,", ("winowhy", "gsm8k")),
        (["gsm8k", "winowhy", "gsm8k"], ("gsm8k", "winowhy")),
        ("gsm8k,composite-9", ("gsm8k", *(name for name in COMPOSITES["composite-9"] if name != "gsm8k"))),
    ],
)
def test_a_composite_may_be_any_list(names: str | list[str], tasks: tuple[str, ...]) -> None:
    assert composite(names) == tasks


@pytest.mark.parametrize("names", ["winowhy,wino", "composite-5"])
def test_an_unknown_name_lists_what_there_is(names: str) -> None:
    with pytest.raises(TaskError, match=f"no task '{names.split(',')[-1]}' in the catalog; .*composite-17.*winowhy"):
        composite(names)


@pytest.mark.parametrize("names", ["", " , ", []])
def test_no_name_at_all_is_an_error(names: str | list[str]) -> None:
    with pytest.raises(TaskError, match="no task is named; choose from composite-9"):
        composite(names)


def test_the_names_of_a_users_own_tasks_are_left_as_they_are() -> None:
    assert expand_composites("mine,composite-9")[:2] == ("mine", "gsm8k")


@pytest.mark.parametrize(
    "task, kind",
    [
        (task("yes", "no", choices=("yes", "no")), "mcq"),
        (task("a" * 200, choices=("a" * 200, "b")), "mcq"),
        (task("seven", "12 March"), "mcq"),
        (task("seven", "It all began when the seven of them met, on a cold evening in March."), "qa"),
        (task("one\ntwo"), "qa"),
    ],
)
def test_the_kind_of_a_users_own_task_follows_from_its_answers(task: Task, kind: str) -> None:
    assert kind_of(task) == kind


@pytest.mark.parametrize("name", PROCEDURAL)
def test_the_packages_own_tasks_are_scored_by_accuracy(name: str) -> None:
    assert kind_of(procedural_task(name, num_train=50, num_test=10)) == "mcq"


def test_the_catalog_knows_the_kind_better_than_the_answers_do() -> None:
    assert kind_of(task("yes", name="strategyqa")) == "qa"


def test_the_manifest_has_the_last_word_on_the_kind() -> None:
    assert kind_of(task("yes", name="strategyqa"), {"strategyqa": TaskInfo(kind="mcq")}) == "mcq"
    assert kind_of(task("yes"), {"mine": TaskInfo(kind="qa")}) == "qa"
    assert kind_of(task("yes"), {"mine": TaskInfo(paper_name="Mine"), "other": TaskInfo(kind="qa")}) == "mcq"


def manifest(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return folder


def test_a_manifest_is_read_by_task_and_other_keys_are_ignored(tmp_path: Path) -> None:
    entry = {
        "paper_name": "WinoWhy",
        "kind": "mcq",
        "random_guess_accuracy_test": 0.5,
        "majority_answer_accuracy_test": 1,
        "licence": "Apache-2.0",
    }
    found = read_manifest(manifest(tmp_path, {"split": "seed 0", "tasks": {"winowhy": entry, "mine": {"kind": None}}}))
    assert found == {
        "winowhy": TaskInfo(paper_name="WinoWhy", kind="mcq", chance=0.5, majority=1.0),
        "mine": TaskInfo(),
    }


def test_a_folder_without_a_manifest_has_nothing_to_say(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == {}
    assert read_manifest(str(tmp_path / "nowhere")) == {}


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"tasks": ', r"not JSON \(Expecting value"),
        ('{"tasks": {"a": {"kind": "qa"}, "a": {"kind": "mcq"}}}', "the key 'a' is in one object twice"),
        ("[1, 2]", 'has no "tasks"'),
        ({"task": {}}, 'has no "tasks"'),
        ({"tasks": ["winowhy"]}, 'has no "tasks"'),
        ({"tasks": {"mine": "qa"}}, "the entry of 'mine' is 'qa'; expected an object"),
        ({"tasks": {"mine": {"kind": "mqc"}}}, "the kind of 'mine' is 'mqc'; expected 'mcq' or 'qa'"),
        ({"tasks": {"mine": {"kind": ["qa"]}}}, r"the kind of 'mine' is \['qa'\]"),
        ({"tasks": {"mine": {"paper_name": 7}}}, "the paper_name of 'mine' is 7; expected a string"),
        (
            {"tasks": {"mine": {"random_guess_accuracy_test": 50}}},
            "the random_guess_accuracy_test of 'mine' is 50; expected a number from 0 to 1",
        ),
        (
            {"tasks": {"mine": {"majority_answer_accuracy_test": True}}},
            "majority_answer_accuracy_test of 'mine' is True",
        ),
    ],
)
def test_a_broken_manifest_is_an_error_that_names_the_file(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(TaskError, match=rf"manifest\.json.*{message}"):
        read_manifest(manifest(tmp_path, content))


def test_a_manifest_that_is_not_utf_8_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b'{"tasks": {"caf\xe9": {}}}')
    with pytest.raises(TaskError, match=r"manifest\.json: not JSON .*utf-8"):
        read_manifest(tmp_path)
