import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import ByT5Tokenizer

from conftest import byte_tokenizer
from dlp_lora import Context, MiniMLP, RouterError, TrainingError
from dlp_lora.progress import Progress
from dlp_lora.router.context import fit_temperature
from dlp_lora.tasks import Example, Task, compose
from dlp_lora.training.calibration import calibration_error
from dlp_lora.training.contexts import MIX
from dlp_lora.training.router import (
    RouterReport,
    RouterTrainingArgs,
    _report,
    _split,
    load_tokenizer,
    train_router,
)

TOKENIZER = byte_tokenizer().backend_tokenizer
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ARGS = RouterTrainingArgs(epochs=24, batch_size=32, mix={**MIX, "serial": 6})


def test_every_task_holds_examples_out_that_has_two() -> None:
    tasks = [Task(name=str(n), train=tuple(map(sums, range(n))), test=()) for n in (1, 2, 5, 200)]
    train, held_out = _split(tasks, 0.05, random.Random(0))
    assert [len(own) for own in train] == [1, 1, 4, 190]
    assert [len(own) for own in held_out] == [1, 1, 1, 10]
    for task, own, others in list(zip(tasks, train, held_out, strict=True))[1:]:
        assert {e.prompt for e in own} | {e.prompt for e in others} == {e.prompt for e in task.train}
        assert not {e.prompt for e in own} & {e.prompt for e in others}
    assert _split(tasks, 0.0, random.Random(0))[0] == _split(tasks, 0.0, random.Random(0))[1]


def sums(i: int) -> Example:
    return Example(prompt=f"What is {i} plus {3 * i}?", answer=f"It is {4 * i}. That was {i} and {3 * i}.")


def days(i: int) -> Example:
    return Example(
        prompt=f"Which day comes {i} days after {DAYS[i % 7]}?", answer=f"{DAYS[2 * i % 7]} comes then. Bye."
    )


def tales(i: int) -> Example:
    return Example(prompt=f"Tell a tale about king number {i}.", answer=f"Once upon a time king {i} slept. He woke up.")


TASKS = tuple(
    Task(name=make.__name__, train=tuple(map(make, range(80))), test=tuple(map(make, range(80, 100))))
    for make in (sums, days, tales)
)


@pytest.fixture(scope="module")
def trained() -> tuple[MiniMLP, RouterReport]:
    return train_router(TASKS, TOKENIZER, ARGS)


def best(router: MiniMLP, *contexts: Context) -> list[str]:
    return [router.names[i] for i in router.probabilities(contexts).argmax(dim=-1)]


def test_a_router_learns_to_tell_tasks_apart(trained: tuple[MiniMLP, RouterReport]) -> None:
    router, report = trained
    assert report.accuracy > 0.95
    for task in TASKS:
        found = best(router, *(Context(example.prompt) for example in task.test))
        assert found.count(task.name) / len(found) == pytest.approx(report.accuracy_by_task[task.name])


def test_the_names_are_the_tasks_in_the_order_given() -> None:
    router, report = train_router(TASKS[::-1], TOKENIZER, ARGS)
    assert router.names == report.names == ("tales", "days", "sums")
    assert best(router, *(Context(task.test[0].prompt) for task in TASKS)) == ["sums", "days", "tales"]


def test_of_two_questions_the_first_is_chosen_at_the_prompt_and_the_second_after_its_answer(
    trained: tuple[MiniMLP, RouterReport],
) -> None:
    router, _ = trained
    right, num = 0, 0
    for one in TASKS:
        for other in TASKS:
            if one is other:
                continue
            for first, second in zip(one.test[:5], other.test[:5], strict=True):
                prompt = compose([first, second]).prompt
                later = Context(prompt, f"{first.answer} ", second.answer.split()[0])
                right += best(router, Context(prompt), later) == [one.name, other.name]
                num += 1
    assert right / num > 0.9


def test_training_is_the_same_for_the_same_seed(trained: tuple[MiniMLP, RouterReport]) -> None:
    torch.manual_seed(7)
    router, report = train_router(TASKS, TOKENIZER, ARGS)
    assert all(torch.equal(tensor, trained[0].state_dict()[name]) for name, tensor in router.state_dict().items())
    assert replace(report, seconds=0.0) == replace(trained[1], seconds=0.0)


def test_another_seed_trains_another_router(trained: tuple[MiniMLP, RouterReport]) -> None:
    args = replace(ARGS, epochs=1, seed=1)
    one, other = (train_router(TASKS, TOKENIZER, a)[0] for a in (args, replace(args, seed=2)))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_every_step_is_told(trained: tuple[MiniMLP, RouterReport]) -> None:
    seen: list[Progress] = []
    _, report = train_router(TASKS, TOKENIZER, replace(ARGS, epochs=1), on_progress=seen.append)
    num_steps = len(report.losses)
    assert seen == [Progress("router", i + 1, num_steps, f"loss {loss:.3f}") for i, loss in enumerate(report.losses)]


@pytest.mark.parametrize("num", [0, 1])
def test_fewer_than_two_tasks_are_refused(num: int) -> None:
    with pytest.raises(TrainingError, match=f"got {num}; give at least two task folders"):
        train_router(TASKS[:num], TOKENIZER)


def test_tasks_without_tests_are_measured_on_the_training_prompts_that_were_held_out(
    trained: tuple[MiniMLP, RouterReport],
) -> None:
    tasks = [replace(task, test=()) for task in TASKS]
    router, report = train_router(tasks, TOKENIZER, ARGS)
    num_held_out = sum(round(ARGS.held_out * len(task.train)) for task in TASKS)
    assert (report.measured_on, report.num_test) == ("held-out", num_held_out)
    assert report.accuracy > 0.9
    assert trained[1].measured_on == "test"
    assert (
        str(router.measured) == f"right on {report.accuracy:.1%} of {num_held_out} training prompts that were held out"
    )
    asked = [Context(example.prompt) for task in TASKS for example in task.test]
    assert torch.equal(router.probabilities(asked), trained[0].probabilities(asked))


def test_tasks_of_one_example_can_be_learned() -> None:
    tasks = [replace(task, train=task.train[:1]) for task in TASKS]
    router, _ = train_router(tasks, TOKENIZER, replace(ARGS, epochs=1))
    assert router.names == ("sums", "days", "tales")


@pytest.mark.parametrize(
    "confidence, right, error",
    [
        ([1.0, 1.0], [1, 1], 0.0),
        ([1.0, 1.0], [0, 0], 1.0),
        ([0.9, 0.9, 0.3, 0.3], [1, 0, 1, 0], 0.5 * 0.4 + 0.5 * 0.2),
        # One bin holds 0.5 and 0.52: their mean confidence is compared with their accuracy.
        ([0.5, 0.52, 0.99], [1, 0, 1], 2 / 3 * 0.01 + 1 / 3 * 0.01),
    ],
)
def test_the_calibration_error_is_worked_out_by_bin(confidence: list[float], right: list[int], error: float) -> None:
    found = calibration_error(np.array(confidence), np.array(right, dtype=bool))
    assert found == pytest.approx(error, abs=1e-5)


def test_the_temperature_makes_an_overconfident_router_as_sure_as_it_is_right() -> None:
    # Right seven times of ten, each time by a margin of 4: sigmoid(4 / t) = 0.7.
    logits = torch.tensor([[4.0, 0.0]] * 10)
    labels = torch.tensor([0] * 7 + [1] * 3)
    temperature = fit_temperature(logits, labels, torch.logspace(-1, 1, 201))
    assert temperature == pytest.approx(4 / math.log(0.7 / 0.3), rel=0.05)
    assert F.cross_entropy(logits / temperature, labels) < F.cross_entropy(logits, labels)


def test_the_router_keeps_the_temperature_that_the_report_names(trained: tuple[MiniMLP, RouterReport]) -> None:
    router, report = trained
    assert router.calibration.temperature == report.temperature


def test_the_confusion_counts_every_test_prompt_once(trained: tuple[MiniMLP, RouterReport]) -> None:
    router, report = trained
    assert [sum(row) for row in report.confusion] == [20, 20, 20]
    assert report.num_test == 60
    assert sum(report.confusion[i][i] for i in range(3)) / 60 == pytest.approx(report.accuracy)
    assert report.num_parameters == sum(parameter.numel() for parameter in router.parameters())


def test_mistakes_are_listed_worst_task_first_and_most_frequent_first() -> None:
    report = RouterReport(
        names=("a", "b", "c"),
        num_parameters=1,
        seconds=0.0,
        num_test=30,
        accuracy=0.7,
        accuracy_by_task={"a": 0.9, "b": 1.0, "c": 0.2},
        confusion=[[9, 1, 0], [0, 10, 0], [3, 5, 2]],
        temperature=1.0,
        ece_before=0.0,
        ece=0.0,
    )
    assert report.mistakes() == [("c", 0.2, {"b": 5, "a": 3}), ("a", 0.9, {"b": 1})]
    assert list(report.mistakes()[0][2]) == ["b", "a"]


def test_a_report_is_json_data(trained: tuple[MiniMLP, RouterReport]) -> None:
    data = json.loads(json.dumps(trained[1].to_dict(), allow_nan=False))
    assert data["names"] == ["sums", "days", "tales"]
    assert data["losses"] == trained[1].losses


def test_a_saved_router_measures_the_same(trained: tuple[MiniMLP, RouterReport], tmp_path: Path) -> None:
    router, report = trained
    router.save_pretrained(tmp_path / "router")
    again = _report(MiniMLP.from_pretrained(tmp_path / "router"), TASKS, [], seconds=0.0, losses=[])
    assert again == replace(report, seconds=0.0, losses=[])


def test_a_task_without_tests_is_left_out_of_the_report(trained: tuple[MiniMLP, RouterReport]) -> None:
    report = _report(trained[0], [TASKS[0], replace(TASKS[1], test=())], [], seconds=0.0, losses=[])
    assert list(report.accuracy_by_task) == ["sums"]
    assert report.num_test == 20
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_tokenizer_is_loaded_from_a_folder(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("abc").ids == TOKENIZER.encode("abc").ids


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match=r"no tokenizer can be loaded from .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_tokenizer_that_is_not_fast_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RouterError, match=r"has no tokenizer\.json; choose another with --tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"dropout": 1.0},
        {"label_smoothing": 1.0},
        {"embedding_learning_rate": 0.0},
        {"held_out": -0.1},
        {"coverage": 0.0},
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"RouterTrainingArgs.{next(iter(wrong))} must be"):
        RouterTrainingArgs(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("mix", [{"songs": 1.0}, {"alone": 1.0}, {"whole": 0.0}, {}])
def test_a_mix_names_known_kinds_and_one_of_those_met_while_writing(mix: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"RouterTrainingArgs.mix draws from whole, .*got"):
        RouterTrainingArgs(mix=mix)


def test_nearly_all_texts_of_its_tasks_fit_and_texts_of_no_task_fit_less(trained: tuple[MiniMLP, RouterReport]) -> None:
    router, _ = trained
    tests = [Context(example.prompt) for task in TASKS for example in task.test]
    others = [Context(f"{{'x': [{i}, {i}]}} => QWZ#{i}@@") for i in range(60)]
    fits, strange = (router.probabilities(contexts).sum(dim=-1) for contexts in (tests, others))
    assert (fits > 0.5).float().mean() > 0.9
    assert strange.mean() < fits.mean()


@pytest.mark.parametrize(
    "history", ["Hi!\nHello! What may I do for you?", "You are a chatbot.", "What is green?\nGrass."]
)
def test_what_was_said_before_makes_no_stranger_of_a_prompt(
    trained: tuple[MiniMLP, RouterReport], history: str
) -> None:
    prompts = [example.prompt for make in (sums, days, tales) for example in map(make, range(1000, 1020))]
    alone = trained[0].probabilities([Context(prompt) for prompt in prompts])
    after = trained[0].probabilities([Context(prompt, history=history) for prompt in prompts])
    assert ((after.sum(dim=1) > 0.5) >= (alone.sum(dim=1) > 0.5)).all()
    assert (after.argmax(dim=1) == alone.argmax(dim=1)).float().mean() > 0.9


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_all_but_the_share_of_held_out_texts_fits_once_manifold_tasks_reach_further(coverage: float) -> None:
    held_out = replace(
        ARGS, held_out=0.5, coverage=coverage, mix={**MIX, "whole": 1.0, "after_history": 0, "answer": 0}
    )
    found, _ = train_router(TASKS, TOKENIZER, held_out)
    _, asked = _split([*TASKS], 0.5, random.Random(held_out.seed))
    fits = found.probabilities([Context(example.prompt) for own in asked for example in own]).sum(dim=1) > 0.5
    assert fits.float().mean() >= coverage - 0.02


def test_two_tasks_that_learn_their_halves_of_one_prompt_are_told_apart_by_whole_ones() -> None:
    halves = [
        replace(mine, prompt=f"{mine.prompt} {other.prompt}", complete=False)
        for mine, other in zip(TASKS[0].train, TASKS[1].train, strict=False)
    ]
    with_halves = [replace(task, train=(*task.train, *halves), test=(*task.test, *halves)) for task in TASKS]
    found, report = train_router(with_halves, TOKENIZER, ARGS)
    expected, plain = train_router(TASKS, TOKENIZER, ARGS)
    assert report.num_test == plain.num_test
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
