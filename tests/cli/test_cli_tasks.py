import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dlp_lora.cli.app import app
from dlp_lora.tasks import CATALOG, COMPOSITES, Example, Task, write_task


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["tasks", *map(str, args)])


def ok(*args: str | Path) -> str:
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return str(result.stdout)


def squeezed(text: str) -> str:
    """The console folds long names into their columns."""
    return "".join(c for c in text if c.isalnum() or c in "_-%/.")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A catalog's task, two of the user's own, and a manifest that knows the first two."""
    long = "An answer of some length, as one writes it, that nobody would compare letter for letter."
    for name, answers in (("winowhy", ("correct", "incorrect", "correct")), ("essays", (long,)), ("sums", ("2", "3"))):
        examples = [Example(prompt=f"Question {i}?", answer=answer) for i, answer in enumerate(answers)]
        write_task(tmp_path / name, Task(name=name, train=tuple(examples[:2]), test=tuple(examples[2:])))
    manifest = {
        "winowhy": {"kind": "mcq", "random_guess_accuracy_test": 0.5, "majority_answer_accuracy_test": 0.59},
        "essays": {"paper_name": "[Essays]"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": manifest}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("args", [(), ("--data", "hub")])
def test_the_catalog_is_listed_with_its_composites(args: tuple[str, ...]) -> None:
    shown = squeezed(ok(*args))
    for name in COMPOSITES:
        assert name in shown
    for paper_name in (task.paper_name for task in CATALOG.values()):
        assert paper_name in shown


def test_the_catalog_as_json_has_everything(tmp_path: Path) -> None:
    found = json.loads(ok("--json"))
    assert [task["name"] for task in found["tasks"]] == list(CATALOG)
    assert found["composites"] == {name: list(tasks) for name, tasks in COMPOSITES.items()}
    gsm8k: dict[str, Any] = next(task for task in found["tasks"] if task["name"] == "gsm8k")
    assert (gsm8k["paper_name"], gsm8k["kind"], gsm8k["metrics"]) == ("GSM8K", "qa", ["bleu", "rouge1", "rougeL"])
    assert gsm8k["source"]["dataset"] == "openai/gsm8k"
    assert gsm8k["source"]["licence"] == "MIT"


def test_the_folders_of_a_data_directory_are_listed_with_their_counts(data: Path) -> None:
    essays, sums, winowhy = json.loads(ok("--data", data, "--json"))["tasks"]
    assert winowhy == {
        "name": "winowhy",
        "paper_name": "WinoWhy",
        "kind": "mcq",
        "metrics": ["accuracy"],
        "num_train": 2,
        "num_test": 1,
        "chance": 0.5,
        "majority": 0.59,
    }
    assert (essays["paper_name"], essays["kind"], essays["num_train"], essays["num_test"]) == ("[Essays]", "qa", 1, 0)
    assert (sums["paper_name"], sums["kind"], sums["chance"]) == (None, "mcq", None)


def test_the_table_of_a_data_directory_shows_counts_and_baselines(data: Path) -> None:
    shown = ok("--data", data)
    assert "[Essays]" in shown
    assert "50.0%" in squeezed(shown)
    assert "59.0%" in squeezed(shown)


def test_a_broken_folder_or_manifest_is_one_line_that_names_it(data: Path) -> None:
    (data / "sums" / "train.jsonl").write_text("{}\n")
    result = run("--data", data)
    assert result.exit_code == 1
    assert "train.jsonl:1" in result.stderr
    (data / "manifest.json").write_text("{}")
    assert 'manifest.json has no "tasks"' in run("--data", data).stderr
    assert "no folder nowhere" in run("--data", "nowhere").stderr
