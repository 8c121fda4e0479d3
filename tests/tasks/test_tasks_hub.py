import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dlp_lora.errors import TaskError
from dlp_lora.tasks import CATALOG, Example, Task, read_data, read_hub_tasks, write_task

datasets = pytest.importorskip("datasets", reason="needs the extra `hub`")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def mirror(root: Path, name: str, rows: Sequence[dict[str, Any]], *, test_rows: Sequence[dict[str, Any]] = ()) -> Path:
    """Writes the data set of a task as its hub repository would be: files, and a card that says which is what."""
    source = CATALOG[name].source
    folder = root / source.dataset
    folder.mkdir(parents=True)
    files = []
    for split, content in ((source.train_split, rows), (source.test_split, test_rows)):
        if split is not None:
            datasets.Dataset.from_list(list(content)).to_parquet(folder / f"{split}.parquet")
            files.append({"split": split, "path": f"{split}.parquet"})
    configs = [{"config_name": source.config or "default", "data_files": files}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n", encoding="utf-8")
    return root


def bigbench(inputs: str, targets: Sequence[str], scores: dict[str, int] | None = None) -> dict[str, Any]:
    """A row as hails/bigbench has it."""
    scores = scores or {}
    return {
        "inputs": inputs,
        "targets": list(targets),
        "multiple_choice_targets": list(scores),
        "multiple_choice_scores": list(scores.values()),
    }


def read_one(root: Path, name: str, rows: Sequence[dict[str, Any]]) -> Example:
    (task,) = read_hub_tasks(name, num_train=1, num_test=0, mirror=mirror(root, name, rows))
    return task.train[0]


@pytest.mark.parametrize(
    "name, row, prompt, choices",
    [
        pytest.param(
            "winowhy",
            bigbench("Who?\n\nHe ate. The 'he' refers to Al because \nThe above reasoning is", ["b"], {"a": 0, "b": 1}),
            "Who?\n\nHe ate. The 'he' refers to Al because\nchoice: a\nchoice: b\nThe above reasoning is",
            ("a", "b"),
            id="options stand before the line that asks",
        ),
        pytest.param(
            "tracking_shuffled_objects",
            bigbench("Bob swaps. At the end of the game, Bob has the", ["b"], {"a": 0, "b": 1}),
            "Bob swaps. At the end of the game, Bob has the\nchoice: a\nchoice: b",
            ("a", "b"),
            id="options stand at the end where no line asks",
        ),
        pytest.param(
            "language_identification",
            bigbench(
                "Select\nSentence: x:\n  choice: Thai\n  choice: Ache\nLanguage: ", ["Ache"], {"Ache": 1, "Thai": 0}
            ),
            "Select\nSentence: x:\nchoice: Thai\nchoice: Ache\nLanguage:",
            ("Thai", "Ache"),
            id="options that the source lists keep their order",
        ),
        pytest.param(
            "elementary_math_qa",
            bigbench("What?:1 + 1\n choice:3\n choice:2\nA:", ["2"], {"2": 1, "3": 0}),
            "What?:1 + 1\nchoice: 3\nchoice: 2\nA:",
            ("3", "2"),
            id="options are written one way",
        ),
        pytest.param(
            "epistemic_reasoning",
            bigbench("'a' or 'b'?\n\nPremise: x Hypothesis: y\nRelation:", ["b"], {"a": 0, "b": 1}),
            "'a' or 'b'?\n\nPremise: x Hypothesis: y\nRelation:",
            ("a", "b"),
            id="options that the text names are not listed",
        ),
        pytest.param(
            "cs_algorithms",
            bigbench("Match?\n\nSequence: ( )\nValid/Invalid?", ["b"], {"a": 0, "b": 1}),
            "Match?\n\nSequence: ( )\nValid/Invalid?",
            ("a", "b"),
            id="nor those of the part of a task that names them",
        ),
        pytest.param(
            "logical_deduction",
            bigbench("Three books.\n\n\n\nA red book. It is left.", ["b"], {"a": 0, "b": 1}),
            "Three books.\n\nA red book. It is left. Which choice is correct?\nchoice: a\nchoice: b",
            ("a", "b"),
            id="statements are asked about",
        ),
        pytest.param(
            "object_counting",
            bigbench("Q: I have two cups. How many?\nA:", ["b", "2"]),
            "Q: I have two cups. How many?\nA:",
            None,
            id="a free answer has no options",
        ),
        pytest.param(
            "strategyqa",
            bigbench("Q: Is it?\nA:", ["b"], {"Yes": 1, "No": 0}),
            "Q: Is it?\nA:",
            None,
            id="nor has an answer scored by BLEU",
        ),
    ],
)
def test_a_prompt_is_built_as_bigbench_builds_it(
    tmp_path: Path, name: str, row: dict[str, Any], prompt: str, choices: tuple[str, ...] | None
) -> None:
    example = read_one(tmp_path, name, [row])
    assert example.prompt == prompt
    assert example.choices == choices
    assert example.answer == row["targets"][0]
    assert example.references == tuple(row["targets"])


def test_a_count_that_is_listed_in_digits_and_words_has_digits_as_options_and_both_as_answers(tmp_path: Path) -> None:
    scores = {"0": 0, "zero": 0, "1": 1, "one": 1}
    example = read_one(tmp_path, "reasoning_about_colored_objects", [bigbench("Q: How many?\nA:", ["1"], scores)])
    assert example.prompt == "Q: How many?\nchoice: 0\nchoice: 1\nA:"
    assert (example.choices, example.answer, example.references) == (("0", "1"), "1", ("1", "one"))


def test_gsm8k_learns_the_worked_solution(tmp_path: Path) -> None:
    row = {"question": "1 + 1?", "answer": "It is 1 + 1 = <<1+1=2>>2.\n#### 2"}
    root = mirror(tmp_path, "gsm8k", [row], test_rows=[{"question": "2 + 2?", "answer": "#### 4"}])
    (task,) = read_hub_tasks("gsm8k", num_train=1, num_test=1, mirror=root)
    assert (task.train[0].prompt, task.train[0].answer) == (row["question"], row["answer"])
    assert task.test[0].prompt == "2 + 2?"


def test_an_instruction_is_followed_by_its_input_if_it_has_one(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name a colour.", "input": "", "output": "Red."},
        {"instruction": "Translate.", "input": "rot", "output": "red"},
        {"instruction": "Write a novel.", "input": "", "output": "x" * 1001},
    ]
    (task,) = read_hub_tasks("alpaca", num_train=2, num_test=0, mirror=mirror(tmp_path, "alpaca", rows))
    assert {(e.prompt, e.answer) for e in task.train} == {("Name a colour.", "Red."), ("Translate.\nrot", "red")}


def test_a_long_article_ends_with_a_sentence(tmp_path: Path) -> None:
    article = "A sentence of news with 40 characters. " * 60
    rows = [{"article": article, "highlights": "News ."}, {"article": "x" * 2000, "highlights": "No sentence ."}]
    root = mirror(tmp_path, "cnn_dailymail", rows, test_rows=[{"article": "Short.", "highlights": "Test ."}])
    (task,) = read_hub_tasks("cnn_dailymail", num_train=1, num_test=1, mirror=root)
    instruction, cut = task.train[0].prompt.split("\n")
    assert instruction == "Generate a summarization of the news article."
    assert cut == article[: len(cut)]
    assert cut.endswith("characters.")
    assert 1500 - 40 < len(cut) <= 1500
    assert task.test[0].prompt == f"{instruction}\nShort."


def test_translations_are_into_english_and_pairs_of_odd_length_are_left_out(tmp_path: Path) -> None:
    pairs = [
        ("Das ist ein ganz normaler Satz.", "This is an ordinary sentence."),
        (
            "Das ist ein ganz normaler Satz.",
            "This is a sentence that goes on and on, far beyond what the other one says.",
        ),
        ("Kurz.", "This is an ordinary sentence."),
        ("Das ist ein ganz normaler Satz.", "Short."),
    ]
    rows = [{"translation": {"de": de, "en": en}} for de, en in pairs]
    example = read_one(tmp_path, "news_commentary_de", rows)
    assert example.prompt == f"Den folgenden Text ins Englische übersetzen.\n{pairs[0][0]}"
    assert example.answer == pairs[0][1]


def stories(num_stories: int) -> list[dict[str, Any]]:
    return [
        bigbench(f"Story {text} of balls. At the end of the game, {who} has the", ["red"], {"red": 1, "blue": 0})
        for text in range(num_stories)
        for who in ("Alice", "Bob", "Claire", "Dave", "Eve")
    ]


def text_of(example: Example) -> str:
    return example.prompt.split(" At the end")[0]


def test_questions_about_one_text_are_all_learned_or_all_tested_on(tmp_path: Path) -> None:
    root = mirror(tmp_path, "tracking_shuffled_objects", stories(20))
    (task,) = read_hub_tasks("tracking_shuffled_objects", num_train=60, num_test=20, mirror=root)
    assert (len(task.train), len(task.test)) == (60, 20)
    assert {text_of(e) for e in task.train}.isdisjoint(text_of(e) for e in task.test)
    assert max(sum(text_of(e) == text for e in task.test) for text in map(text_of, task.test)) <= 3


def test_overlapping_rows_are_all_learned_or_all_tested_on(tmp_path: Path) -> None:
    rows = [
        bigbench(f"Dialogue:\nline {i} line {i + 1}\nAnswer:", ["same"], {"same": 1, "different": 0}) for i in range(96)
    ]
    root = mirror(tmp_path, "play_dialog_same_or_different", rows)
    (task,) = read_hub_tasks("play_dialog_same_or_different", num_train=40, num_test=4, mirror=root)

    def runs(examples: tuple[Example, ...]) -> set[int]:
        return {int(example.prompt.split()[2]) // 24 for example in examples}

    assert runs(task.train).isdisjoint(runs(task.test))


def test_the_same_seed_gives_the_same_task_and_another_seed_another(tmp_path: Path) -> None:
    root = mirror(tmp_path, "tracking_shuffled_objects", stories(20))
    first, same, other = (
        read_hub_tasks("tracking_shuffled_objects", num_train=50, num_test=10, seed=seed, mirror=root)
        for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other


def test_a_test_question_is_not_learned_even_if_the_source_has_it_in_both_parts(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(10)]
    root = mirror(tmp_path, "gsm8k", rows, test_rows=rows[:4])
    (task,) = read_hub_tasks("gsm8k", num_train=6, num_test=4, mirror=root)
    assert {e.prompt for e in task.test} == {row["question"] for row in rows[:4]}
    assert {e.prompt for e in task.train} == {row["question"] for row in rows[4:]}


def test_what_is_left_out_is_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        bigbench("1 m is", ["100 cm"], {"100 cm": 1, "1 cm": 0}),
        bigbench("1 m is", ["100 cm"], {"100 cm": 1, "1 cm": 0}),
        bigbench("2 m is", ["200 cm"], {"200 cm": 1, "2 cm": 0}),
        bigbench("2 m is", ["2 cm"], {"200 cm": 0, "2 cm": 1}),
        bigbench("5 minutes - 1 minute =", ["4"]),
        bigbench("3 m is", ["x"], {"x": 0, "y": 0}),
        bigbench("x" * 1300, ["x"], {"x": 1, "y": 0}),
        bigbench(" ", ["x"], {"x": 1, "y": 0}),
    ]
    with caplog.at_level(logging.WARNING, logger="dlp_lora"):
        example = read_one(tmp_path, "unit_conversion", rows)
    assert example.prompt == "1 m is\nchoice: 100 cm\nchoice: 1 cm"
    (message,) = caplog.messages
    assert message.startswith("unit_conversion: left out 7 of 8 rows (")
    assert "3 unusable" in message
    assert "1 too long" in message
    assert "1 repeated" in message
    assert "2 with two answers" in message


def test_too_few_rows_are_an_error_that_says_how_many_there_are(tmp_path: Path) -> None:
    root = mirror(tmp_path, "tracking_shuffled_objects", stories(3))
    with pytest.raises(TaskError, match=r"tracking_shuffled_objects: hails/bigbench .* has 10 usable rows for train"):
        read_hub_tasks("tracking_shuffled_objects", num_train=900, num_test=3, mirror=root)


def test_an_unknown_task_lists_the_catalog(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no task 'mine' in the catalog; choose from .*winowhy"):
        read_hub_tasks("mine", mirror=tmp_path)


def test_a_data_set_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"gsm8k: openai/gsm8k main .* cannot be loaded from .*check the connection"):
        read_hub_tasks("gsm8k", mirror=tmp_path)


@pytest.mark.parametrize("num_train, num_test", [(0, 1), (1, -1)])
def test_an_impossible_number_of_examples_is_a_value_error(num_train: int, num_test: int) -> None:
    with pytest.raises(ValueError, match=f"num_train={num_train}, num_test={num_test}"):
        read_hub_tasks("gsm8k", num_train=num_train, num_test=num_test)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r'pip install "dlp-lora\[hub\]"'):
        read_data("hub", names="gsm8k")


def test_a_folder_is_read_as_a_folder_even_if_its_name_is_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(name="sums", train=(Example(prompt="1 + 1?", answer="2"),), test=())
    write_task(tmp_path / "hub" / "sums", task)
    monkeypatch.chdir(tmp_path)
    assert read_data("hub") == [task]
    assert read_data(Path("hub"), names="sums") == [task]
    assert read_data(tmp_path / "hub", names=["sums"]) == [task]


def test_a_composite_names_the_folders_of_its_tasks(tmp_path: Path) -> None:
    for name in ("sums", *CATALOG):
        write_task(tmp_path / name, Task(name=name, train=(Example(prompt="1 + 1?", answer="2"),), test=()))
    assert [task.name for task in read_data(tmp_path, names="composite-9,sums")][::9] == ["gsm8k", "sums"]


def test_a_task_of_a_composite_that_has_no_folder_is_named(tmp_path: Path) -> None:
    write_task(tmp_path / "gsm8k", Task(name="gsm8k", train=(Example(prompt="1 + 1?", answer="2"),), test=()))
    with pytest.raises(TaskError, match=r"has no task 'cnn_dailymail', .*choose from gsm8k"):
        read_data(tmp_path, names="composite-9")
