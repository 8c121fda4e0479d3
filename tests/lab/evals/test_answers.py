import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dlp_lora
import reference
from conftest import WordRouter, byte_tokenizer, lively_model, make_adapter
from dlp_lora import Engine, Mixture, TaskError
from dlp_lora.errors import RecordError
from dlp_lora.kept import differences, keep_rows, read_rows
from dlp_lora.lab.evals.answers import FREE, AnswerArgs, answer_all, batches, identity_of
from dlp_lora.lab.evals.likelihood import choice_likelihoods, teacher_forced
from dlp_lora.lab.evals.methods import METHODS
from dlp_lora.tasks import Example, Task
from dlp_lora.training.base import model_hash

MakeEngine = Callable[..., Engine]
MIXTURE = Mixture({"math": 0.75, "poems": 0.25})
CONTEXT = 64
PLAIN = AnswerArgs(batch_size=4, max_new_tokens=32, prompt_format="plain", likelihoods=True)


def test_likelihoods_of_choices_are_those_of_a_forward_pass_a_token(make_engine: MakeEngine) -> None:
    engine = make_engine()
    read, choices = [5, 6, 7, 8], [[9], [10, 11, 12], [9, 13]]
    found = choice_likelihoods(engine, read, choices, MIXTURE)
    with engine.fixed(MIXTURE):
        wanted = [reference.mean_log_likelihood(engine.model, read, choice) for choice in choices]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_teacher_forced_tokens_are_the_likeliest_after_each_gold_beginning(make_engine: MakeEngine) -> None:
    engine = make_engine()
    read, gold = [5, 6, 7, 8], [9, 10, 11]
    found = teacher_forced(engine, read, gold, MIXTURE)
    with engine.fixed(MIXTURE):
        assert found == reference.likeliest_after_each_beginning(engine.model, read, gold)


def short_engine(folder: Path) -> Engine:
    """An engine whose model reads 64 tokens."""
    model = lively_model()
    make_adapter(model, folder / "t", seed=1)
    model.config.max_position_embeddings = CONTEXT
    return dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=folder)


def sized(num_tokens: int, *, answer: str = "ab", choices: tuple[str, ...] | None = None) -> Example:
    """A question of so many bytes."""
    return Example(prompt=f"{num_tokens} ".ljust(num_tokens - 1, "q") + ":", answer=answer, choices=choices)


def test_what_does_not_fit_the_context_is_counted_and_the_rest_answered(tmp_path: Path) -> None:
    engine = short_engine(tmp_path / "adapters")
    learned = (Example(prompt="p:", answer="a"),)  # room for 4 tokens: space, letter, end
    tests = (
        sized(59),  # " ab" and an end: 63
        sized(62),  # no room for an answer
        sized(40, answer="a" * 30),  # the gold answer is too long
        sized(41, choices=("ab", "b" * 40)),  # a choice is too long
        sized(42, choices=("ab", "b")),
        replace(sized(43), answer_prefix="a"),  # a free answer begins at its beginning
    )
    task = Task(name="t", train=learned, test=tests)
    questions, left_out = batches(engine.model, engine.tokenizer, [task], PLAIN)
    assert left_out == {"t": 4}
    rows = answer_all(engine, METHODS["base"], questions, PLAIN, tmp_path / "base.jsonl", identity={})
    assert sorted(row["index"] for row in rows) == [0, 4]


def test_a_batch_leaves_room_for_its_longest_answer_after_its_longest_prompt(tmp_path: Path) -> None:
    engine = short_engine(tmp_path / "adapters")
    brief = Task(name="brief", train=(Example(prompt="p:", answer="a"),), test=(sized(55), sized(56)))
    wordy = Task(name="t", train=(Example(prompt="p:", answer="a" * 28),), test=(sized(20), sized(21)))
    questions, left_out = batches(engine.model, engine.tokenizer, [brief, wordy], PLAIN)
    assert left_out == {}
    assert [[q.task for q in batch] for batch in questions] == [["brief"] * 2, ["t"] * 2]
    rows = answer_all(engine, METHODS["base"], questions, PLAIN, tmp_path / "base.jsonl", identity={})
    assert len(rows) == 4


def test_with_a_long_context_batches_are_full(make_engine: MakeEngine) -> None:
    engine = make_engine()
    tasks = [
        Task(name=n, train=(Example(prompt="p:", answer="a" * k),), test=tuple(sized(20 + i) for i in range(3)))
        for n, k in (("a", 1), ("b", 28))
    ]
    questions, left_out = batches(engine.model, engine.tokenizer, tasks, PLAIN)
    assert ([len(batch) for batch in questions], left_out) == ([4, 2], {})


def test_tasks_without_a_test_question_are_refused_by_what_they_lack(make_engine: MakeEngine) -> None:
    engine = make_engine()
    task = Task(name="t", train=(sized(10),), test=())
    with pytest.raises(TaskError, match=r"no task has a test question; add a test\.jsonl"):
        batches(engine.model, engine.tokenizer, [task], PLAIN)


def test_a_model_is_known_by_its_weights_however_it_was_loaded(lively_adapters: Path) -> None:
    model = lively_model()
    found = model_hash(model)
    assert found == model_hash(lively_model()) == model_hash(lively_model().to(torch.bfloat16))
    engine = dlp_lora.load(model, tokenizer=byte_tokenizer(), adapters=lively_adapters)
    assert identity_of(engine, [], METHODS["base"])["model_hash"] == found
    other = lively_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.add_(0.1)
    assert model_hash(other) != found


def test_answers_of_another_model_of_the_same_name_are_refused_and_older_ones_taken(tmp_path: Path) -> None:
    file = tmp_path / "base.jsonl"
    keep_rows(file, {"model": "m"}, [[1], [2]], lambda batch: [{"index": i} for i in batch])
    now = {"model": "m", "model_hash": "a"}
    assert keep_rows(file, now, [[1], [2]], lambda batch: []) == [{"index": 1}, {"index": 2}] == read_rows(file)
    with pytest.raises(RecordError, match="model_hash was 'a' and is 'b'"):
        keep_rows(file, {"model": "m", "model_hash": "b"}, [[1], [2]], lambda batch: [])
    assert differences({"model_hash": "a"}, {"model_hash": "a"}) == ""


@pytest.mark.usefixtures("unchecked")
def test_a_prompt_format_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_format must be one of auto, chat, plain, got 'bogus'"):
        AnswerArgs(prompt_format="bogus")  # type: ignore[arg-type]


def test_rows_that_a_kill_cut_inside_a_letter_are_computed_anew(tmp_path: Path) -> None:
    file, batches = tmp_path / "rows.jsonl", [["a"], ["b"]]

    def compute(batch: Sequence[str]) -> list[dict[str, str]]:
        return [{"text": f"Grüße {name}"} for name in batch]

    whole = keep_rows(file, {"method": "m"}, batches, compute)
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        assert keep_rows(file, {"method": "m"}, batches, compute) == whole


def test_an_answer_is_as_long_as_its_own_task_allows_whatever_it_is_batched_with(make_engine: MakeEngine) -> None:
    engine = make_engine()
    tasks = [
        Task(name=name, train=(Example(prompt="q", answer="a" * room),), test=(Example(prompt=f"{name}?", answer="a"),))
        for name, room in (("math", 2), ("poems", 20))
    ]
    pooled, _ = batches(engine.model, engine.tokenizer, tasks, PLAIN)
    rooms = {q.task: q.max_new_tokens for q in pooled[0]}
    assert len(pooled) == 1
    assert rooms["math"] < rooms["poems"]
    for row in FREE.answer(engine, METHODS["base"], pooled[0], PLAIN, {}):
        assert row["num_tokens"] <= rooms[row["task"]]


def test_choices_after_a_prompt_encoded_by_sentences_are_not_scored_as_if_it_were_one(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine()
    task = Task(name="math", train=(sized(10),), test=(sized(20, choices=("ab", "b")),))
    questions, _ = batches(engine.model, engine.tokenizer, [task], PLAIN)
    scored = {
        name: ["likelihoods" in row for row in FREE.answer(engine, METHODS[name], questions[0], PLAIN, {})]
        for name in ("base", "dlp", "by-sentence")
    }
    assert scored == {"base": [True], "dlp": [True], "by-sentence": [False]}


def test_what_was_computed_for_one_method_is_taken_for_another_with_the_same_mixture(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(policy=dlp_lora.TopP(0.9))
    task = Task(name="math", train=(sized(10),), test=tuple(sized(20 + i, choices=("ab", "b")) for i in range(3)))
    questions, _ = batches(engine.model, engine.tokenizer, [task], PLAIN)
    rows = FREE.answer(engine, METHODS["dlp"], questions[0], PLAIN, {})
    assert any(len(row["mixture"]) > 1 for row in rows)
    monkeypatch.setattr("dlp_lora.lab.evals.answers.choice_likelihoods", lambda *_: pytest.fail("computed again"))
    again = FREE.answer(engine, METHODS["prompt-only"], questions[0], PLAIN, FREE.known(rows))
    assert [row["likelihoods"] for row in again] == [row["likelihoods"] for row in rows]


def test_a_prompt_that_is_cut_into_questions_has_no_likelihoods_and_ends_if_all_its_answers_end(
    lively_adapters: Path,
) -> None:
    cut = Example(prompt="Add the sum?\n\nHow long is an inch?", answer="a", choices=("a", "b"))
    test = (cut, replace(cut, prompt="Add the sum?"))
    task = Task(name="math", train=(Example(prompt="p:", answer="a" * 20),), test=test)

    def engine(eos_id: int | None = None) -> Engine:
        model = lively_model()
        model.generation_config.eos_token_id = eos_id
        return dlp_lora.load(
            model,
            tokenizer=byte_tokenizer(),
            adapters=lively_adapters,
            router=WordRouter(),
            policy=dlp_lora.TopK(1),
            prompt_routing="apart",
        )

    def rows(eos_id: int) -> list[dict[str, Any]]:
        own = engine(eos_id)
        pooled, _ = batches(own.model, own.tokenizer, [task], PLAIN)
        found = [row for batch in pooled for row in FREE.answer(own, METHODS["dlp"], batch, PLAIN, {})]
        return sorted(found, key=lambda row: row["index"])

    answer = engine().generate(cut.prompt, max_new_tokens=32, do_sample=False)
    first, last = (part.tokens for part in answer.parts)
    of_last = next(token for token in last if token not in first)
    of_both = next(token for token in last if token in first)
    assert ["likelihoods" in row for row in rows(of_last)] == [False, True]
    assert [rows(eos_id)[0]["ended"] for eos_id in (of_last, of_both)] == [False, True]


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "older"])
def test_answers_in_another_precision_are_refused_and_older_ones_taken(
    make_engine: MakeEngine, tmp_path: Path, record: bool
) -> None:
    engine, file = make_engine(router=None), tmp_path / "base.jsonl"
    task = Task(name="math", train=(sized(10),), test=(sized(20),))
    questions, _ = batches(engine.model, engine.tokenizer, [task], PLAIN)

    def answer() -> list[dict[str, Any]]:
        identity = identity_of(engine, [task], METHODS["base"])
        return answer_all(engine, METHODS["base"], questions, PLAIN, file, identity=identity)

    rows = answer()
    if not record:
        lines = file.read_text().splitlines()
        before = json.loads(lines[0])
        assert before["identity"].pop("dtype") == "float32"
        file.write_text("\n".join([json.dumps(before), *lines[1:], ""]))
    assert answer() == rows
    engine.model.to(torch.bfloat16)
    with pytest.raises(RecordError, match="dtype was 'float32' and is 'bfloat16'; remove it, or write somewhere else"):
        answer()
