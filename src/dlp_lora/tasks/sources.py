"""Task folders: `<name>/{train,test}.jsonl[.gz]` in, Tasks out, and back."""

import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from dlp_lora.errors import TaskError
from dlp_lora.files import name_of, parse_json, write_lines
from dlp_lora.tasks.task import Example, Task, same_prompt

SUFFIXES = (".jsonl", ".jsonl.gz")

logger = logging.getLogger(__name__)


def read_tasks(data_dir: str | Path, *, names: Iterable[str] | None = None) -> list[Task]:
    """The tasks of a data directory: those in `names`, in that order, or all of them, by name.

    Every folder in it is a task, except those whose names start with a dot; files beside them are ignored.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise TaskError(f"no folder {data_dir}; expected a folder of task folders; check the path")
    existing = sorted(f.name for f in data_dir.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not existing:
        raise TaskError(
            f"{data_dir} holds no task folder; expected <name>/train.jsonl in it; "
            "if it is itself a task folder, give the folder above it"
        )
    chosen = existing if names is None else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in existing]
    if unknown:
        raise TaskError(f"{data_dir} has no task {', '.join(map(repr, unknown))}; choose from {', '.join(existing)}")
    return [read_task(data_dir / name) for name in chosen]


def read_task(folder: str | Path) -> Task:
    """The task in a folder, named after it; without a test file its `test` is empty."""
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskError(f"no task folder {folder}; expected a folder with train.jsonl in it; check the path")
    train_file = _split_file(folder, "train")
    if train_file is None:
        raise TaskError(
            f"{folder} has no train file; expected train.jsonl or train.jsonl.gz; add one or remove the folder"
        )
    test_file = _split_file(folder, "test")
    train = _read_split(train_file)
    test = _read_split(test_file) if test_file else {}
    _check_disjoint(train, test, train_file=train_file, test_file=test_file)
    return Task(name=name_of(folder), train=tuple(train.values()), test=tuple(test.values()))


def read_examples(file: str | Path) -> tuple[Example, ...]:
    """The examples of one JSON-lines file, plain or gzipped."""
    file = Path(file)
    if not file.is_file():
        raise TaskError(f'no file {file}; expected JSON lines {{"prompt": ..., "answer": ...}}; check the path')
    return tuple(_read_split(file).values())


def write_task(folder: str | Path, task: Task) -> None:
    """Write a task as plain train.jsonl and test.jsonl, each of them whole or not at all.

    A reader gets the task's name from the folder. Older files of the task are replaced.
    """
    if not task.train:
        raise ValueError(f"the task {task.name!r} has no train examples; expected at least one")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in (("train", task.train), ("test", task.test)):
        if examples:
            write_lines(folder / f"{split}.jsonl", (example.to_json() for example in examples))
        for stale in SUFFIXES[1:] if examples else SUFFIXES:
            (folder / f"{split}{stale}").unlink(missing_ok=True)


def _split_file(folder: Path, split: str) -> Path | None:
    files = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(files) > 1:
        raise TaskError(f"{folder} has both {files[0].name} and {files[1].name}; expected one; delete the other")
    return files[0] if files else None


def _read_split(path: Path) -> dict[int, Example]:
    """The examples of a file by line number, the first of each prompt only."""
    rows: dict[int, Example] = {}
    seen: set[tuple[str, str, str]] = set()
    num_repeated = 0
    for number, row in _rows(path):
        try:
            example = Example.from_json(row)
        except TaskError as error:
            raise TaskError(f"{path}:{number}: {error}") from error
        # Questions of a serial prompt share the prompt and differ in the answer so far.
        key = (example.prompt, example.answer_prefix, json.dumps(example.tools, sort_keys=True))
        if key in seen:
            num_repeated += 1
            continue
        seen.add(key)
        rows[number] = example
    if not rows:
        raise TaskError(f"{path} holds no example; expected one JSON object a line; fill it or delete it")
    if num_repeated:
        logger.warning(
            "%s: left out %d of %d examples whose prompt had come before; kept the first of each",
            path,
            num_repeated,
            num_repeated + len(rows),
        )
    return rows


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in _lines(path):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise TaskError(
                f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8; "
                "expected UTF-8 text; save the file as UTF-8"
            ) from error
        if not text.strip():
            continue
        try:
            yield number, parse_json(text.rstrip())
        except (json.JSONDecodeError, RecursionError) as error:
            raise TaskError(
                f"{path}:{number}: not JSON ({_reason(error)}); expected one whole object on the line; "
                "correct the line, or write the file again"
            ) from error
        except ValueError as error:
            raise TaskError(f"{path}:{number}: {error}") from error


def _reason(error: json.JSONDecodeError | RecursionError) -> str:
    # json counts lines within this one line, so its message would name line 1.
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes, so that lines end only at "\n": text may have the other line separators of Unicode.
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except EOFError as error:
        raise TaskError(
            f"{path}:{number + 1}: the gzip file ends early; expected a whole one; download or compress it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TaskError(
            f"{path}:{number + 1}: not readable as gzip ({error}); expected gzip, as its name says; "
            "compress it again, or name it .jsonl if it is plain text"
        ) from error
    except OSError as error:
        raise TaskError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _check_disjoint(
    train: dict[int, Example], test: dict[int, Example], *, train_file: Path, test_file: Path | None
) -> None:
    train_lines = {same_prompt(example.prompt): number for number, example in reversed(train.items())}
    prompts = {number: same_prompt(example.prompt) for number, example in test.items()}
    shared = [(number, train_lines[prompt]) for number, prompt in prompts.items() if prompt in train_lines]
    if shared:
        test_line, train_line = shared[0]
        raise TaskError(
            f"{test_file}:{test_line}: the prompt is also in {train_file}:{train_line} "
            f"({len(shared)} such test prompts); expected train and test to be disjoint; "
            "remove it from one of them"
        )
