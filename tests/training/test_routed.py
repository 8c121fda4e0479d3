"""What a person has corrected in a routing log is learned."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from dlp_lora import Context, TrainingError
from dlp_lora.tasks import Example, Task
from dlp_lora.training.contexts import Sample
from dlp_lora.training.routed import read_routed
from dlp_lora.training.router import train_router

TOKENIZER = byte_tokenizer().backend_tokenizer
NAMES = ("sums", "tales")


def line(adapter: str | None = "sums", **text: Any) -> str:
    return json.dumps({"time": "2026-01-01T00:00:00.000+00:00", "adapter": adapter, "text": text or {"prompt": "Hi"}})


def log(folder: Path, *lines: str) -> Path:
    path = folder / "routing.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_lines_are_samples_each_text_once(tmp_path: Path) -> None:
    path = log(tmp_path, line(prompt="Hi", history="Yes"), line("tales", prompt="Ho", answer="a", sentence="b"), line())
    twice = log(tmp_path, *path.read_text().split("\n"), line("tales", prompt="Ho", answer="a", sentence="b"))
    assert read_routed(twice, NAMES) == [
        Sample(Context("Hi", history="Yes"), 0),
        Sample(Context("Ho", "a", "b"), 1),
        Sample(Context("Hi"), 0),
    ]


def test_lines_for_the_base_model_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(read_routed(log(tmp_path, line(), line(None, prompt="Ho")), NAMES)) == 1
    assert "left out 1 lines without an adapter" in caplog.text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"routing.jsonl:1: not JSON"),
        ([line(), '{"text": {"prompt": "x"}}'], r'routing.jsonl:2: no "adapter"'),
        ([json.dumps({"adapter": "sums"})], r"1: the line has no text to learn from; log with --log-text"),
        ([line("songs")], "1: there is no task 'songs'; there are sums, tales"),
        ([line(), line("tales")], "2: the same text has the adapter 'tales' here and 'sums' on line 1"),
        ([line(3)], '"adapter" is 3; expected a name'),  # type: ignore[arg-type]
        ([line(prompt=3)], '"text" is .*; expected prompt, answer, sentence, history as strings'),
        ([line(None)], "no line with a text and an adapter"),
    ],
)
def test_a_line_that_teaches_nothing_is_named(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        read_routed(log(tmp_path, *lines), NAMES)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="expected the file of --log-routing"):
        read_routed(tmp_path / "nothing.jsonl", NAMES)


def test_a_router_learns_what_a_line_says() -> None:
    makers = {"sums": "What is {} plus one?", "tales": "Tell a tale about king number {}."}
    tasks = [
        Task(name=name, train=tuple(Example(prompt=p.format(i), answer="Yes.") for i in range(40)), test=())
        for name, p in makers.items()
    ]
    strange = Context("Add up the kings.")
    plain, _ = train_router(tasks, TOKENIZER)
    taught, _ = train_router(tasks, TOKENIZER, routed=[Sample(strange, NAMES.index("sums"))])
    assert plain.probabilities([strange]).argmax() == NAMES.index("tales")
    assert taught.probabilities([strange]).argmax() == NAMES.index("sums")
