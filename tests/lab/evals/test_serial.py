import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers

import dlp_lora
from conftest import HashRouter, byte_tokenizer, lively_model
from dlp_lora import Context, Engine, Generation, Mixture, TaskError, TopK
from dlp_lora.errors import RecordError
from dlp_lora.lab.evals.answers import AnswerArgs
from dlp_lora.lab.evals.serial import (
    LineBreaks,
    SerialPrompt,
    _scored,
    answer_serial,
    fitting,
    serial_methods,
    serial_prompts,
)
from dlp_lora.progress import Progress
from dlp_lora.sentences import LineSegmenter, split
from dlp_lora.tasks import Example, Task

TASKS = [
    Task(name=name, train=(), test=tuple(Example(prompt=f"{name} {i}?", answer=f"{i}") for i in range(3)))
    for name in ("math", "poems", "units")
]


@pytest.fixture
def engine(lively_adapters: object) -> Engine:
    return dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters)  # type: ignore[arg-type]


def test_a_line_starts_with_the_line_break_before_it() -> None:
    segmenter = LineSegmenter()
    assert [segmenter.push(piece) for piece in ("Yes.", " No", "\n", "Or\n\n", "So")] == [[], [], [8], [11, 12], []]
    other = segmenter.copy()
    assert other.push("\n") == segmenter.push("\n") == [15]
    assert split("a\nb\nc", LineSegmenter()) == ["a\n", "b\n", "c"]


def test_prompts_ask_questions_of_different_tasks_and_are_the_same_for_the_same_seed() -> None:
    prompts = serial_prompts(TASKS, 2, 20)
    assert all(len(set(prompt.tasks)) == 2 for prompt in prompts)
    assert prompts == serial_prompts(TASKS, 2, 20)
    assert prompts != serial_prompts(TASKS, 2, 20, seed=1)
    assert {task for prompt in prompts for task in prompt.tasks} == {"math", "poems", "units"}
    with pytest.raises(TaskError, match="serial-4 asks questions of 4 tasks, but there are 3"):
        serial_prompts(TASKS, 4, 1)


def test_the_end_of_an_answer_becomes_a_line_break_until_all_are_given(engine: Engine) -> None:
    eos, newline, vocab = 256, engine.tokenizer("\n")["input_ids"][-1], 260
    breaks = LineBreaks(engine.tokenizer, engine.eos_ids, 2)
    prompt = torch.tensor([[5, 6], [5, 6]])
    scores = torch.zeros(2, vocab)
    scores[:, eos] = 9.0
    first = breaks(prompt, scores)
    assert not first.argmax(-1).eq(newline).any()  # an answer is not empty
    assert not first.argmax(-1).eq(eos).any()
    said = torch.tensor([[5, 6, 70], [5, 6, 70]])
    assert breaks(said, scores).argmax(-1).tolist() == [newline, newline]
    one_line = torch.tensor([[5, 6, 70, newline, 71], [5, 6, 70, 71, 72]])
    assert breaks(one_line, scores).argmax(-1).tolist() == [eos, newline]
    scores[:, eos], scores[:, newline] = 0.0, 9.0
    assert breaks(one_line, scores).argmax(-1).tolist() == [eos, newline]


def test_tokens_of_several_line_breaks_end_one_answer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["\n\n", ".\n"])
    blank, full_stop = tokenizer.convert_tokens_to_ids(["\n\n", ".\n"])
    newline, eos = tokenizer("\n")["input_ids"][-1], 256
    breaks = LineBreaks(tokenizer, {eos}, 2)
    prompt = torch.tensor([[5, 6]])
    scores = torch.zeros(1, len(tokenizer))
    scores[:, blank] = 9.0
    assert breaks(prompt, scores).argmax(-1) not in (newline, blank, eos)
    assert breaks(torch.tensor([[5, 6, 70]]), scores).argmax(-1) == newline
    assert breaks(torch.tensor([[5, 6, 70, full_stop, 71]]), scores).argmax(-1) == eos


def test_blank_lines_are_no_answers() -> None:
    prompt = SerialPrompt(tasks=("math", "poems"), examples=(TASKS[0].test[1], TASKS[1].test[2]))
    answer = Generation(text="\n1\n \n\n2\n", tokens=(), trace=())
    assert [row["right"] for row in _scored(prompt, answer, 0.1)] == [True, True]


def test_the_method_that_is_told_the_tasks_gives_each_line_its_own_adapter(engine: Engine, tmp_path: Path) -> None:
    prompts = serial_prompts(TASKS, 3, 4)
    methods = {m.name: m for m in serial_methods(engine.bank.names, prompts)}
    assert methods["base"].mixture == Mixture()
    args = AnswerArgs(max_new_tokens=40, batch_size=3, prompt_format="plain")
    rows = answer_serial(engine, methods["oracle"], prompts, args, tmp_path / "oracle.jsonl", identity={})
    assert len(rows) == 12
    assert [row["task"] for row in rows] == [task for prompt in prompts for task in prompt.tasks]
    answered = [row for row in rows if row["text"]]
    assert answered
    assert all(row["routed"] for row in answered)


def test_prompts_that_leave_no_room_for_the_answers_are_left_out(engine: Engine) -> None:
    prompts = serial_prompts(TASKS, 2, 5)
    lengths = [len(prompt.text.encode()) for prompt in prompts]
    context = engine.model.config.max_position_embeddings
    room = context - sorted(lengths)[2]
    found = fitting(engine, prompts, AnswerArgs(max_new_tokens=room, batch_size=8, prompt_format="plain"))
    assert found == [p for p, length in zip(prompts, lengths, strict=True) if length <= sorted(lengths)[2]]
    assert (
        fitting(engine, prompts, AnswerArgs(max_new_tokens=room - 100, batch_size=8, prompt_format="plain")) == prompts
    )
    assert fitting(engine, prompts, AnswerArgs(max_new_tokens=context, batch_size=8, prompt_format="plain")) == []


def test_a_task_without_test_questions_is_not_asked_about() -> None:
    tasks = [*TASKS, Task(name="untested", train=(), test=())]
    assert serial_prompts(tasks, 2, 20) == serial_prompts(TASKS, 2, 20)
    with pytest.raises(TaskError, match="serial-4 asks questions of 4 tasks, but there are 3"):
        serial_prompts(tasks, 4, 1)


def test_the_method_that_is_told_the_tasks_knows_prompts_that_a_tokenizer_normalises(
    lively_adapters: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    engine = dlp_lora.load(lively_model(), tokenizer=tokenizer, adapters=lively_adapters)
    asked = Example(prompt=unicodedata.normalize("NFD", "Cl\u00e9ment's  sum?"), answer="1")
    assert asked.prompt != unicodedata.normalize("NFC", asked.prompt)
    prompts = [SerialPrompt(tasks=("math", "poems"), examples=(asked, TASKS[1].test[0]))]
    told = {m.name: m for m in serial_methods(engine.bank.names, prompts)}["oracle"]
    args = AnswerArgs(max_new_tokens=30, batch_size=8, prompt_format="plain")
    rows = answer_serial(engine, told, prompts, args, tmp_path / "oracle.jsonl", identity={})
    assert rows[0]["routed"]


class _ByName(HashRouter):
    """Knows a question by the name of its task in it; a text of several names is like none."""

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        rows = [[float(name in context.prompt) for name in self.names] for context in contexts]
        return torch.tensor([[0.98 * value if sum(row) == 1 else 0.1 * value for value in row] for row in rows])


def test_apart_is_scored_as_each_question_alone(lively_adapters: Path, tmp_path: Path) -> None:
    engine = dlp_lora.load(
        lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters, router=_ByName(), policy=TopK(1)
    )
    prompts = serial_prompts(TASKS, 2, 5)
    methods = {m.name: m for m in serial_methods(engine.bank.names, prompts)}
    args = AnswerArgs(max_new_tokens=24, batch_size=2, prompt_format="plain")
    apart, alone = (
        answer_serial(engine, methods[name], prompts, args, tmp_path / f"{name}.jsonl", identity={})
        for name in ("apart", "alone")
    )
    assert all(row["is_cut"] and row["routed"] for row in apart)
    assert [row["text"] for row in apart] == [row["text"] for row in alone]
    assert len({row["text"] for row in apart}) > 2


def test_a_prompt_that_apart_does_not_cut_is_answered_in_turn(lively_adapters: Path, tmp_path: Path) -> None:
    engine = dlp_lora.load(
        lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters, router=HashRouter(), policy=TopK(1)
    )
    prompts = serial_prompts(TASKS, 2, 4)
    methods = {m.name: m for m in serial_methods(engine.bank.names, prompts)}
    args = AnswerArgs(max_new_tokens=24, batch_size=8, prompt_format="plain")
    apart, in_turn = (
        answer_serial(engine, methods[name], prompts, args, tmp_path / f"{name}.jsonl", identity={})
        for name in ("apart", "recompute")
    )
    assert not any(row["is_cut"] for row in apart)
    assert [row["text"] for row in apart] == [row["text"] for row in in_turn]


def test_an_interrupted_method_goes_on_where_it_stopped(engine: Engine, tmp_path: Path) -> None:
    prompts = serial_prompts(TASKS, 2, 5)
    method = {m.name: m for m in serial_methods(engine.bank.names, prompts)}["oracle"]
    args = AnswerArgs(max_new_tokens=24, batch_size=2, prompt_format="plain")
    told, file = list[int](), tmp_path / "oracle.jsonl"

    def stop(now: Progress) -> None:
        if now.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_serial(engine, method, prompts, args, file, identity={"of": 1}, on_progress=stop)
    before = file.read_text()
    rows = answer_serial(
        engine, method, prompts, args, file, identity={"of": 1}, on_progress=lambda now: told.append(now.done)
    )
    assert file.read_text().startswith(before)
    assert told == [4, 5]
    assert [row["task"] for row in rows] == [task for prompt in prompts for task in prompt.tasks]
    with pytest.raises(RecordError, match="of was 1 and is 2"):
        answer_serial(engine, method, prompts, args, file, identity={"of": 2})
