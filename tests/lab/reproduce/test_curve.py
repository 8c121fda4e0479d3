import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import byte_tokenizer, lively_model
from dlp_lora.cli.app import app
from dlp_lora.errors import RecordError, TaskError
from dlp_lora.lab.evals.answers import AnswerArgs
from dlp_lora.lab.reproduce.curve import CurveArgs, held_out, learning_curve, points
from dlp_lora.progress import Progress
from dlp_lora.tasks import Example, Task, write_task
from dlp_lora.training.args import AdapterTrainingArgs
from runs import tasks

ARGS = CurveArgs(
    epochs=(1, 2),
    single_epochs=(1,),
    learning_rates=(1e-3, 1e-2),
    held_out=2,
    single_r=4,
    training=AdapterTrainingArgs(
        schedule="warmup_stable_decay", decay=0.5, prompt_format="plain", batch_size=1, checkpoint_seconds=0
    ),
    answers=AnswerArgs(batch_size=2, max_new_tokens=4, prompt_format="plain", likelihoods=False),
)


class KilledError(Exception):
    pass


@pytest.fixture
def model(tmp_path: Path) -> Path:
    lively_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def measured(record: Path) -> Any:
    rows = json.loads(record.read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_held_out_questions_are_not_learned_and_no_test_question_is_asked() -> None:
    train = tuple(Example(prompt=f"Question {i}?", answer=str(i)) for i in range(20))
    task = Task(name="numbers", train=train, test=(Example(prompt="The test?", answer="no"),))
    found = held_out(task, 5)
    assert len(found.train) == 15
    assert len(found.test) == 5
    assert {*found.train, *found.test} == set(train)
    assert held_out(task, 5) == found


def test_a_question_that_is_also_learned_is_not_asked() -> None:
    train = (*(Example(prompt="The same?", answer="yes") for _ in range(8)),)
    assert held_out(Task(name="same", train=train, test=()), 3).test == ()


def test_more_cannot_be_held_out_than_there_is() -> None:
    with pytest.raises(TaskError, match="same has 1 training examples; hold out fewer than that, not 1"):
        held_out(Task(name="same", train=(Example(prompt="?", answer="!"),), test=()), 1)


def test_a_killed_run_goes_on_to_the_same_record_and_other_settings_are_refused(model: Path, tmp_path: Path) -> None:
    whole = learning_curve(model, tasks(), tmp_path / "whole", ARGS)
    seen = 0

    def kill(now: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == 7:
            raise KilledError

    with pytest.raises(KilledError):
        learning_curve(model, tasks(), tmp_path / "killed", ARGS, on_progress=kill)
    killed = learning_curve(model, tasks(), tmp_path / "killed", ARGS)
    assert measured(killed) == measured(whole)
    kinds = [(row["kind"], row["learning_rate"], row["epochs"]) for row in measured(whole)]
    assert kinds == [(p.kind, p.learning_rate, p.epochs) for p in points(ARGS)]
    assert len(kinds) == 6
    assert set(measured(whole)[0]["scores"]) == {task.name for task in tasks()}
    file = tmp_path / "whole" / "settings.json"
    settings = json.loads(file.read_text())
    del settings["args"]["training"]["weight_decay"], settings["args"]["answers"]["chat_template_kwargs"]
    file.write_text(json.dumps(settings))  # as versions without these settings wrote it
    assert measured(learning_curve(model, tasks(), tmp_path / "whole", ARGS)) == measured(whole)
    with pytest.raises(RecordError, match="held_out was 2 and is 1"):
        learning_curve(model, tasks(), tmp_path / "whole", replace(ARGS, held_out=1))


def test_the_command_shows_a_row_for_each_point(model: Path, tmp_path: Path) -> None:
    for task in tasks():
        write_task(tmp_path / "data" / task.name, task)
    command = ["learning-curve", "--data", "data", "--out", "curve", "--tasks", "colours,sides", "--held-out", "1"]
    options = ["--epochs", "1", "--single-epochs", "0", "--learning-rates", "1e-3", "--model", str(model), "--json"]
    arguments = [str(tmp_path / word) if word in ("data", "curve") else word for word in (*command, *options)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["kind"], row["epochs"]) == ("own", 1)
    assert set(row["scores"]) == {"colours", "sides"}


@pytest.mark.parametrize("epochs", [(), (2, 1), (0, 1), (1, 1)])
def test_epochs_that_do_not_rise_are_refused(epochs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="whole numbers that rise"):
        CurveArgs(epochs=epochs)


@pytest.mark.parametrize("wrong", [{"learning_rates": (5e-4, 0.0)}, {"single_epochs": (-1,)}], ids=repr)
def test_rates_and_lengths_that_train_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        CurveArgs(**wrong)
