"""Task folders: what reads, what is refused and in which words, and what comes back as it was written."""

import gzip
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlp_lora.errors import TaskError
from dlp_lora.tasks import Example, Task, compose, read_task, read_tasks, serial, write_task
from dlp_lora.tasks.task import same_prompt

SUM = {"prompt": "What is 1 + 2?", "answer": "The result is 3."}
DAY = {"prompt": "Which day follows Monday?", "answer": "The day is Tuesday."}

filled = st.text(min_size=1).filter(str.strip)
free_rows = st.fixed_dictionaries(
    {"prompt": filled, "answer": filled},
    optional={
        "references": st.lists(st.text(), max_size=3).map(tuple),
        "answer_prefix": st.text(),
        "complete": st.booleans(),
    },
)
choice_rows = filled.flatmap(
    lambda answer: st.fixed_dictionaries(
        {
            "prompt": filled,
            "answer": st.just(answer),
            "choices": st.lists(filled, max_size=3).map(lambda others: (answer, *others)),
        }
    )
)


def make_folder(folder: Path, *, train=(SUM,), test=()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        if rows:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def test_a_task_folder_reads_as_a_task_named_after_it(tmp_path):
    task = read_task(make_folder(tmp_path / "sums", train=[SUM], test=[DAY]))
    assert task == Task(name="sums", train=(Example(**SUM),), test=(Example(**DAY),))


def test_a_folder_given_as_a_dot_is_named_after_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path / "sums"))
    assert read_task(".").name == "sums"


def test_every_key_reads_into_its_field(tmp_path):
    row = {
        "prompt": "Yes or no?",
        "answer": "yes",
        "choices": ["yes", "no"],
        "references": ["yes", "Yes."],
        "answer_prefix": "The result is 3.",
        "complete": False,
    }
    (example,) = read_task(make_folder(tmp_path / "t", train=[row])).train
    assert example.to_json() == row
    assert example.choices == ("yes", "no")
    assert example.references == ("yes", "Yes.")


@pytest.mark.parametrize("extra", [{"id": 7}, {"meta": {"source": "x"}}, {"choices": None, "references": None}])
def test_ids_notes_and_nulls_change_nothing(tmp_path, extra):
    assert read_task(make_folder(tmp_path / "t", train=[SUM | extra])).train == (Example(**SUM),)


def test_a_missing_test_file_is_an_empty_test_set(tmp_path):
    assert read_task(make_folder(tmp_path / "t")).test == ()


def test_gzip_and_plain_files_read_the_same(tmp_path):
    plain = make_folder(tmp_path / "plain" / "t", train=[SUM, DAY])
    packed = tmp_path / "packed" / "t"
    packed.mkdir(parents=True)
    (packed / "train.jsonl.gz").write_bytes(gzip.compress((plain / "train.jsonl").read_bytes()))
    assert read_task(plain) == read_task(packed)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + json.dumps(SUM).encode(),
        json.dumps(SUM).encode() + b"\r\n",
        b"\n" + json.dumps(SUM).encode() + b"\n\n",
    ],
    ids=["byte order mark", "windows line end", "blank lines"],
)
def test_what_editors_add_to_a_file_is_overlooked(tmp_path, content):
    folder = make_folder(tmp_path / "t")
    (folder / "train.jsonl").write_bytes(content)
    assert read_task(folder).train == (Example(**SUM),)


def test_a_unicode_line_separator_does_not_end_a_line(tmp_path):
    row = {"prompt": "one\u2028two\x85three", "answer": "x"}
    folder = make_folder(tmp_path / "t")
    (folder / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    assert read_task(folder).train == (Example(**row),)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(rows=st.lists(free_rows | choice_rows, min_size=1, max_size=5, unique_by=lambda row: same_prompt(row["prompt"])))
def test_a_written_task_reads_back_as_it_was(tmp_path, rows):
    train = [Example(**row) for row in rows]
    half = (len(train) + 1) // 2
    task = Task(name="t", train=tuple(train[:half]), test=tuple(train[half:]))
    write_task(tmp_path / "t", task)
    assert read_task(tmp_path / "t") == task


def test_writing_replaces_the_files_that_were_there(tmp_path):
    folder = make_folder(tmp_path / "t", test=[DAY])
    (folder / "train.jsonl").rename(folder / "train.jsonl.gz")
    task = Task(name="t", train=(Example(**DAY),), test=())
    write_task(folder, task)
    assert read_task(folder) == task
    assert [path.name for path in folder.iterdir()] == ["train.jsonl"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    folder = make_folder(tmp_path / "t")
    broken = Example(prompt="half a character: \ud83d", answer="x")
    with pytest.raises(UnicodeEncodeError):
        write_task(folder, Task(name="t", train=(broken,), test=()))
    assert read_task(folder).train == (Example(**SUM),)
    assert [path.name for path in folder.iterdir()] == ["train.jsonl"]


def test_a_task_without_train_examples_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"the task 't' has no train examples"):
        write_task(tmp_path / "t", Task(name="t", train=(), test=(Example(**SUM),)))


LINE_ERRORS = {
    "broken JSON": ('{"prompt": "x", "answer"', r"not JSON \(.*at column 25\).*expected one whole object"),
    "a key twice": ('{"prompt": "x", "prompt": "y", "answer": "z"}', r"the key 'prompt' is in one object twice"),
    "too deep JSON": ("[" * 100_000, r"not JSON .*expected one whole object"),
    "a list": ("[1]", r"found a list, expected a JSON object with 'prompt' and 'answer'"),
    "a string": ('"hello"', r"found the string 'hello', expected a JSON object"),
    "no prompt": ('{"answer": "x"}', r"no key 'prompt'; every line needs 'prompt' and 'answer'; add it"),
    "no answer": ('{"prompt": "x"}', r"no key 'answer'; every line needs 'prompt' and 'answer'; add it"),
    "misspelt key": (
        '{"prompt": "x", "anwser": "y"}',
        r"unknown key 'anwser'; known keys are prompt, answer, ",
    ),
    "number": ('{"prompt": "x", "answer": 3}', r"'answer' is the number 3, expected a string"),
    "null": ('{"prompt": null, "answer": "y"}', r"'prompt' is null, expected a string"),
    "text for a list": (
        '{"prompt": "x", "answer": "y", "references": "y"}',
        r"'references' is the string 'y', expected a list of strings or null",
    ),
    "number in a list": (
        '{"prompt": "x", "answer": "y", "choices": ["y", 2]}',
        r"'choices' holds the number 2, expected strings only",
    ),
    "text for a flag": (
        '{"prompt": "x", "answer": "y", "complete": "false"}',
        r"'complete' is the string 'false', expected true or false",
    ),
    "number for a flag": (
        '{"prompt": "x", "answer": "y", "complete": 0}',
        r"'complete' is the number 0, expected true or false",
    ),
    "empty prompt": ('{"prompt": " ", "answer": "y"}', r"'prompt' is empty; expected text"),
    "empty choice": (
        '{"prompt": "x", "answer": "y", "choices": ["y", ""]}',
        r"one of the choices \['y', ''\] is empty; fill it in or remove it",
    ),
    "empty answer": ('{"prompt": "x", "answer": ""}', r"'answer' is empty; expected text"),
    "answer off the choices": (
        '{"prompt": "x", "answer": "Yes", "choices": ["yes", "no"]}',
        r"'answer' is 'Yes', which is none of the choices \['yes', 'no'\]; make it one of them",
    ),
    "half a character": (
        '{"prompt": "\\ud83d", "answer": "y"}',
        r"'prompt' holds '\\ud83d', half of a character",
    ),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("line, message", LINE_ERRORS.values(), ids=LINE_ERRORS)
def test_a_wrong_line_is_refused_with_its_file_and_number(tmp_path, split, line, message):
    folder = make_folder(tmp_path / "t")
    (folder / f"{split}.jsonl").write_text(f"{json.dumps(DAY)}\n{line}\n", "utf-8")
    with pytest.raises(TaskError, match=rf"{split}\.jsonl:2: {message}"):
        read_task(folder)


def test_bytes_that_are_not_utf8_are_refused_with_their_place(tmp_path):
    folder = make_folder(tmp_path / "t")
    (folder / "train.jsonl").write_bytes(json.dumps(SUM).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(TaskError, match=r"train\.jsonl:2: byte 16 of the line is not UTF-8; .*save the file as"):
        read_task(folder)


def test_a_gzip_file_that_ends_early_is_refused(tmp_path):
    rows = [{"prompt": os.urandom(40).hex(), "answer": "y"} for _ in range(100)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TaskError, match=r"train\.jsonl\.gz:\d+: the gzip file ends early; .*download or compress"):
        read_task(tmp_path)


@pytest.mark.parametrize("damage", ["plain text", "a changed byte"])
def test_a_gzip_file_that_is_not_one_is_refused(tmp_path, damage):
    plain = json.dumps(SUM).encode()
    packed = bytearray(gzip.compress(plain))
    packed[15] ^= 0xFF
    (tmp_path / "train.jsonl.gz").write_bytes(plain if damage == "plain text" else packed)
    with pytest.raises(TaskError, match=r"train\.jsonl\.gz:1: not readable as gzip .*compress it again"):
        read_task(tmp_path)


def test_a_folder_without_a_train_file_is_refused(tmp_path):
    folder = make_folder(tmp_path / "t", train=[], test=[SUM])
    with pytest.raises(TaskError, match=r"t has no train file; expected train\.jsonl or train\.jsonl\.gz; add one"):
        read_task(folder)


def test_a_split_that_is_there_twice_is_refused(tmp_path):
    folder = make_folder(tmp_path / "t")
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(TaskError, match=r"both train\.jsonl and train\.jsonl\.gz; expected one; delete the other"):
        read_task(folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_without_examples_is_refused(tmp_path, split):
    folder = make_folder(tmp_path / "t")
    (folder / f"{split}.jsonl").write_text("\n")
    with pytest.raises(TaskError, match=rf"{split}\.jsonl holds no example; .*fill it or delete it"):
        read_task(folder)


def test_a_missing_task_folder_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"no task folder .*gone; .*check the path"):
        read_task(tmp_path / "gone")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    folder = make_folder(tmp_path / "t")
    (folder / "train.jsonl").chmod(0)
    with pytest.raises(TaskError, match=r"cannot be read \(Permission denied\)"):
        read_task(folder)


@pytest.mark.parametrize("write", [str, lambda prompt: prompt.replace(" ", "  ") + "\n"], ids=("same", "spaced"))
def test_a_prompt_in_train_and_test_is_refused_with_both_places(tmp_path, write):
    asked_again = DAY | {"prompt": write(DAY["prompt"]), "answer": "The day is unknown."}
    folder = make_folder(tmp_path / "t", train=[SUM, DAY], test=[asked_again])
    with pytest.raises(TaskError, match=r"test\.jsonl:1: the prompt is also in .*train\.jsonl:2 \(1 such"):
        read_task(folder)


def test_repeated_prompts_are_counted_in_a_warning_and_the_first_is_kept(tmp_path, caplog):
    folder = make_folder(tmp_path / "t", train=[SUM, DAY, SUM | {"answer": "The result is 4."}, SUM])
    with caplog.at_level(logging.WARNING, logger="dlp_lora"):
        task = read_task(folder)
    assert task.train == (Example(**SUM), Example(**DAY))
    assert "left out 2 of 4 examples whose prompt had come before" in caplog.text


def test_one_prompt_with_different_answers_so_far_is_not_repeated(tmp_path, caplog):
    parts = serial(Example(**SUM), Example(**DAY))
    task = Task(name="t", train=parts, test=())
    write_task(tmp_path / "t", task)
    assert read_task(tmp_path / "t") == task
    assert not caplog.records


def test_one_prompt_with_other_tools_is_not_repeated(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    folder = make_folder(tmp_path / "t", train=[SUM, SUM | {"tools": [tool], "answer": "I add them."}])
    assert len(read_task(folder).train) == 2


def test_a_data_directory_reads_as_its_tasks_by_name(tmp_path):
    for name in ("sums", "days", ".cache"):
        make_folder(tmp_path / name)
    (tmp_path / "manifest.json").write_text("{}")
    assert [task.name for task in read_tasks(tmp_path)] == ["days", "sums"]


def test_named_tasks_are_read_once_in_the_order_given(tmp_path):
    for name in ("a", "b", "c"):
        make_folder(tmp_path / name)
    (tmp_path / "b" / "train.jsonl").write_text("broken, but not asked for")
    assert [task.name for task in read_tasks(tmp_path, names=["c", "a", "c"])] == ["c", "a"]


def test_an_unknown_task_name_lists_the_ones_that_exist(tmp_path):
    for name in ("sums", "days"):
        make_folder(tmp_path / name)
    with pytest.raises(TaskError, match=r"has no task 'sum', 'x'; choose from days, sums"):
        read_tasks(tmp_path, names=["sum", "days", "x"])


def test_a_data_directory_without_task_folders_is_refused(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(TaskError, match=r"holds no task folder; .*if it is itself a task folder, give the folder"):
        read_tasks(tmp_path)


def test_a_missing_data_directory_is_refused(tmp_path):
    with pytest.raises(TaskError, match=r"no folder .*gone; expected a folder of task folders; check the path"):
        read_tasks(tmp_path / "gone")


def test_the_answer_is_always_accepted_and_each_accepted_answer_once():
    assert Example(prompt="x", answer="y").accepted == ("y",)
    assert Example(prompt="x", answer="y", references=("z", "y", "z")).accepted == ("y", "z")


def test_two_questions_in_a_row_are_learned_in_two_parts():
    first, second = serial(Example(**SUM), Example(**DAY))
    prompt = "What is 1 + 2? Which day follows Monday?"
    assert first == Example(prompt=prompt, answer="The result is 3. The", complete=False)
    assert second == Example(prompt=prompt, answer_prefix="The result is 3.", answer=" The day is Tuesday.")


@given(st.lists(filled, min_size=1, max_size=5))
def test_the_parts_of_questions_in_a_row_join_into_the_composed_answer(texts):
    rows = [Example(prompt=text, answer=f"The {text}.") for text in texts]
    whole = compose(rows)
    parts = serial(*rows)
    assert {part.prompt for part in parts} == {whole.prompt}
    assert [part.complete for part in parts] == [False] * (len(rows) - 1) + [True]
    for part in parts[:-1]:
        assert whole.answer.startswith(part.answer_prefix + part.answer)
        assert part.answer.endswith(". The")
    assert parts[-1].answer_prefix + parts[-1].answer == whole.answer


def test_an_opener_that_the_next_answer_does_not_begin_with_is_refused():
    yes = Example(prompt="Is it?", answer="Yes.")
    with pytest.raises(ValueError, match=r"the answer 'Yes\.' does not begin with the opener ' The'; pass as opener="):
        serial(Example(**SUM), yes)
    assert serial(Example(**SUM), yes, opener=" Yes")[0].answer == "The result is 3. Yes"


@pytest.mark.parametrize("join", [compose, lambda examples: serial(*examples)])
def test_only_whole_examples_can_be_joined(join):
    with pytest.raises(ValueError, match=r"found no examples; expected at least one"):
        join([])
    with pytest.raises(ValueError, match=r"is already part of a longer answer; expected whole examples"):
        join(serial(Example(**SUM), Example(**DAY)))


@pytest.mark.skipif("DLP_LORA_DATA" not in os.environ, reason="DLP_LORA_DATA names no data directory")
def test_a_real_data_directory_reads_without_loss():
    data_dir = Path(os.environ["DLP_LORA_DATA"])
    tasks = read_tasks(data_dir)
    assert len(tasks) == len([path for path in data_dir.iterdir() if path.is_dir()])
    for task in tasks:
        assert task.train
        assert all(example.answer in example.accepted for example in task.train + task.test)
