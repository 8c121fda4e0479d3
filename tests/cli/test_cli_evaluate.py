import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from conftest import CHAT_TEMPLATE, byte_tokenizer, lively_model
from dlp_lora.cli.app import app
from dlp_lora.lab.evals.methods import MAIN
from dlp_lora.lab.reproduce import ReproduceArgs, grown
from dlp_lora.lab.reproduce.recipe import read_recipe
from dlp_lora.tasks import Task, write_task
from runs import outputs, read, tasks

RECIPE = """
model = "default"
methods = ["base", "oracle", "dlp"]
limit = 2
single_r = 0
serial = []
[training]
prompt_format = "plain"
batch_size = 2
checkpoint_seconds = 0
[router]
epochs = 1
[answers]
batch_size = 2
max_new_tokens = 4
prompt_format = "plain"
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli-reproduce")
    lively_model().save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    for task in tasks():
        write_task(root / "data" / task.name, task)
    write_task(root / "data" / "untested", Task(name="untested", train=tasks()[1].train, test=()))
    (root / "data" / "manifest.json").write_text('{"tasks": {"story": {"kind": "qa"}}}')
    (root / "mine.toml").write_text(RECIPE)
    return root


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def ok(*args: str | Path) -> Result:
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def call(work: Path, out: Path, *options: str) -> list[str]:
    paths = ("--data", work / "data", "--out", out, "--model", work / "model", "--recipe", work / "mine.toml")
    return ["reproduce", *map(str, paths), *options]


@pytest.fixture(scope="module")
def done(work: Path) -> tuple[Path, Result]:
    return work / "a" / "run", ok(*call(work, work / "a" / "run"))


def test_a_run_by_recipe_writes_the_record_and_the_report(done: tuple[Path, Result]) -> None:
    out, result = done
    record = read(out / "record.json")
    assert set(record["scores"]) == {"base", "oracle", "dlp"}
    assert record["data"]["tasks"]["colours"]["num_test"] == 2  # the recipe's limit, which no default overrides
    assert record["args"]["seeds"] == [0]
    assert "Table 1" in (out / "report.md").read_text(encoding="utf-8")
    assert "not scored, for want of test questions: untested" in result.output
    assert "composite-1" in result.output


def test_a_log_file_tells_each_step_that_is_done(done: tuple[Path, Result]) -> None:
    lines = done[1].output.splitlines()
    steps = [
        "colours",
        "sides",
        "story",
        "untested",
        "router",
        *(f"answers: {name}" for name in ("base", "oracle", "dlp")),
    ]
    told = [line.split(": done")[0] for line in lines if ": done, " in line]
    assert [step for step in told if "forced" not in step] == steps
    assert next(line for line in lines if line.startswith("answers: dlp: done, ")).endswith(" steps")


def test_what_is_not_given_adds_nothing_to_a_finished_run(
    work: Path, done: tuple[Path, Result], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(done[0], out)
    plain = replace(read_recipe(work / "mine.toml")[1], methods=MAIN, serial=ReproduceArgs.serial)
    assert grown(out, plain, given=()).methods == ("base", "oracle", "dlp")
    assert grown(out, plain, given=()).serial == ()
    result = ok(*call(work, out, "--methods", "top1", "--serial", "3"))
    assert "methods top1, serial 3" in " ".join(result.output.split())
    assert "serial-3 skipped: it asks questions of as many tasks of choice, and there are 2" in result.output
    record = json.loads((out / "record.json").read_text())
    assert set(record["scores"]) == {"base", "oracle", "dlp", "top1"}
    assert record["serial_skipped"] == {"serial-3": 2}
    assert "added to the run" not in ok(*call(work, out)).output


def test_what_scores_answers_is_asked_for_before_anything_is_trained(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    result = run(*call(work, tmp_path / "run"))
    assert result.exit_code == 1
    assert 'run `pip install "dlp-lora[eval]"`' in " ".join(result.output.split())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_killed_process_goes_on_to_the_same_record(work: Path, done: tuple[Path, Result], tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for mark in ("seed-0/adapters/colours", "seed-0/answers/base.jsonl"):
        command = [sys.executable, "-m", "dlp_lora", *call(work, out)]
        process: Any = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out / mark).exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (out / "record.json").exists()
    ok(*call(work, out))
    assert read(out / "record.json") == read(done[0] / "record.json")
    assert outputs(out / "record.json") == outputs(done[0] / "record.json")


def test_a_bundle_is_evaluated_on_the_tasks_that_have_questions(
    work: Path, done: tuple[Path, Result], tmp_path: Path
) -> None:
    options = ("--methods", "base, dlp", "--prompt-format", "plain", "--batch-size", "2", "--max-new-tokens", "4")
    where = ("--bundle", done[0] / "seed-0" / "bundle", "--data", work / "data", "--model", work / "model")
    result = ok("eval", *where, *options, "--limit", "2", "--teacher-forced", "--json", tmp_path / "scores.json")
    found = json.loads((tmp_path / "scores.json").read_text())
    assert set(found["scores"]) == {"base", "dlp"}
    assert set(found["scores"]["dlp"]) == {"colours", "sides", "story"}
    assert found["settings"]["limit"] == 2
    with gzip.open(tmp_path / found["outputs"], "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    each = [(part, method) for part in ("answers", "teacher-forced") for method in ("base", "dlp")]
    assert Counter((row["part"], row["method"]) for row in rows) == dict.fromkeys(each, 6)
    whole = read(done[0] / "record.json")
    assert found["teacher_forced"] == {name: whole["teacher_forced"][name] for name in ("base", "dlp")}
    assert set(found["teacher_forced_intervals"]["dlp"]) == {"colours", "sides", "story"}
    cut = Counter(row["task"] for row in rows if row["method"] == "dlp" and not row.get("ended", True))
    assert found["cut_short"]["dlp"] == cut
    assert set(found["adapters"]) == {"colours", "sides", "story", "untested"}
    assert {"format", "model_hash", "router_hash", "dtype", "metrics", "timings", "without_choices"} <= found.keys()
    assert found["settings"]["prompt_routing"] == "apart"
    assert {task: own["kind"] for task, own in found["data"]["tasks"].items()}["colours"] == "mcq"
    assert set(found["differences"]) == {"dlp - base"}
    assert set(found["composites"]["composite-2"]) == {"base", "dlp"}
    assert "composite-2" in result.output
    assert "accuracy" in result.output
    assert "not scored, for want of test questions: untested" in result.output


def test_arguments_of_the_chat_template_reach_every_answer(
    work: Path, done: tuple[Path, Result], tmp_path: Path
) -> None:
    shutil.copytree(work / "model", tmp_path / "model")
    byte_tokenizer(chat_template=f"{{{{ mood }}}}{CHAT_TEMPLATE}").save_pretrained(tmp_path / "model")
    where = ("--bundle", done[0] / "seed-0" / "bundle", "--data", work / "data", "--model", tmp_path / "model")
    options = ("--methods", "base", "--tasks", "story", "--limit", "2", "--max-new-tokens", "4")
    answers = {}
    for mood in ("glad", "sad"):
        kwargs = ("--chat-template-kwargs", json.dumps({"mood": mood}), "--json", tmp_path / f"{mood}.json")
        ok("eval", *where, *options, *kwargs)
        found = json.loads((tmp_path / f"{mood}.json").read_text())
        assert found["settings"]["chat_template_kwargs"] == {"mood": mood}
        with gzip.open(tmp_path / found["outputs"], "rt", encoding="utf-8") as lines:
            answers[mood] = [json.loads(line)["text"] for line in lines]
    assert answers["glad"] != answers["sad"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "a"), "--seeds takes whole numbers with commas between them, got 'a'"),
        (("--serial", "2,x"), "--serial takes whole numbers"),
        (("--limit", "0"), "--limit"),
        (("--preset", "none"), "no preset 'none'"),
        (("--methods", "base, bogus"), "no method bogus"),
    ],
)
def test_a_wrong_option_is_named(work: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run(*call(work, tmp_path / "run", *options))
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given, rank", [((), 0), (("--single",), 64), (("--no-single",), 0)], ids=str)
def test_one_lora_for_all_is_asked_for_over_a_recipe_without(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], rank: int
) -> None:
    found: list[ReproduceArgs] = []

    def stopped(model: Any, tasks: Any, out: Any, args: ReproduceArgs, **_: Any) -> None:
        found.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr("dlp_lora.lab.reproduce.reproduce", stopped)
    run(*call(work, tmp_path / "run", *given))
    assert [args.single_r for args in found] == [rank]


def test_the_file_of_the_scores_is_checked_first(work: Path, tmp_path: Path) -> None:
    result = run("eval", "--bundle", tmp_path, "--data", work / "data", "--json", tmp_path)
    assert "is a folder; name a file in it" in " ".join(result.output.split())
    result = run("eval", "--bundle", tmp_path, "--data", work / "data", "--json", tmp_path / "nodir" / "x.json")
    assert result.exit_code == 1
    assert "make it first, or write somewhere else" in " ".join(result.output.split())
