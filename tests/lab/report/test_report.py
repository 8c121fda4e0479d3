import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from dlp_lora.cli.app import app
from dlp_lora.errors import DLPLoRAError, RecordError
from dlp_lora.lab.evals.methods import label
from dlp_lora.lab.records.run import RunRecord, from_json
from dlp_lora.lab.records.table import MISSING, Cell, Measure, Table, escape_markdown, number
from dlp_lora.lab.report import Report, charts, findings, paper, provenance, tables, write_report
from dlp_lora.lab.report.markup import to_html, to_markdown
from dlp_lora.lab.report.record import Record, RecordedTask, mean, read_record
from dlp_lora.lab.report.routing import routing_picture

ROOT = Path(__file__).parents[3]
PAPER_TEXT = ROOT.parent / "shared" / "paper" / "full_text.txt"
NASTY = "<script>alert('x')</script> | `code` [a](javascript:alert) *b* _c_ & $d$"

TASKS = {
    "abstract_narrative_understanding": {"paper_name": "AbsNarr", "kind": "mcq", "chance": 0.15, "majority": 0.0},
    "play_dialog_same_or_different": {"paper_name": "PlayDiag", "kind": "mcq", "chance": 0.5, "majority": 0.72},
    "sums": {"paper_name": None, "kind": "mcq", "chance": None, "majority": 0.1},
    "news_commentary_de": {"paper_name": "NewsDE", "kind": "qa", "stand_in": "WMT tests"},
    "chat": {"paper_name": None, "kind": "qa", "chance": None, "majority": None},
}
MCQ, QA = ("abstract_narrative_understanding", "play_dialog_same_or_different", "sums"), ("news_commentary_de", "chat")
ACCURACY = {"base": (0.2, 0.4, 0.0), "oracle": (0.7, 0.75, 0.95), "lora-r64": (0.5, 0.7, 0.6), "dlp": (0.7, 0.8, 0.9)}
BLEU = {"base": (2.5, 1.0), "oracle": (20.0, 12.0), "lora-r64": (14.0, 6.0), "dlp": (21.0, 11.5)}


def full() -> dict[str, Any]:
    """A record with everything in it."""
    scores: dict[str, Any] = {}
    for method in (*ACCURACY, "top1", "prompt-only"):
        of = method if method in ACCURACY else "dlp"
        scores[method] = {
            **{task: {"accuracy": value} for task, value in zip(MCQ, ACCURACY[of], strict=True)},
            **{
                task: {"bleu": value, "rouge1": value / 50, "rougeL": value / 60}
                for task, value in zip(QA, BLEU[of], strict=True)
            },
        }
        scores[method][MCQ[0]]["accuracy_loglik"] = 0.5
    intervals = {
        method: {
            task: {metric: [value * 0.9, value * 1.1] for metric, value in by_metric.items()}
            for task, by_metric in by_task.items()
        }
        for method, by_task in scores.items()
    }
    composites = {
        "composite-3": {m: {"accuracy": float(np.mean(ACCURACY[m]))} for m in ACCURACY},
        "composite-2": {m: {"bleu": float(np.mean(BLEU[m]))} for m in BLEU},
    }
    return {
        "format": 1,
        "name": "small",
        "model": "tiny",
        "settings": {"epochs": 3, "adapter": {"r": 8}},
        "environment": {
            "cpu": "Abacus 7",
            "cores": 2,
            "threads": 1,
            "gpu": None,
            "python": "3.11.7",
            "torch": "2.13.0",
        },
        "data": {
            "hash": "sha256:0123",
            "tasks": {t: {**row, "num_train": 9, "num_test": 10} for t, row in TASKS.items()},
        },
        "left_out": {"chat": 3},
        "scores": scores,
        "intervals": intervals,
        "composites": composites,
        "composite_intervals": {"composite-3": {"dlp": {"accuracy": [0.77, 0.83]}}},
        "differences": {
            "dlp - base": {"composite-3": {"accuracy": {"value": 0.6, "interval": [0.5, 0.7]}}},
            "dlp - oracle": {
                "composite-3": {"accuracy": {"value": 0.0, "interval": [-0.02, 0.02]}},
                "composite-2": {"bleu": {"value": -0.25, "interval": [-0.3, -0.2]}},
            },
        },
        "teacher_forced": {
            "base": {"sums": {"accuracy": 0.31}},
            "dlp": {"sums": {"accuracy": 0.97}, "chat": {"bleu": 61.0, "bleu_letters": 0.7}},
        },
        "teacher_forced_intervals": {"dlp": {"sums": {"accuracy": [0.93, 0.99]}}},
        "serial": {
            "serial-3": {
                "base": {"accuracy": 0.1, "interval": [0.05, 0.15], "routed": 0.0, "num_questions": 30},
                "prompt-only": {"accuracy": 0.3, "accuracy_later": 0.05, "routed": 0.33, "num_questions": 30},
                "dlp": {"accuracy": 0.55, "accuracy_later": 0.5, "routed": 0.9, "num_questions": 30},
            }
        },
        "router": {
            "accuracy": 0.9988,
            "ece": 0.0021,
            "num_parameters": 4979994,
            "seconds": 96.5,
            "confusion": {"sums": {"sums": 9, "chat": 1}, "chat": {"chat": 10}},
        },
        "training": {
            "adapters": {"sums": {"seconds": 61.5, "final_loss": 0.125, "num_examples": 9, "num_left_out": 1}},
            "lora-r64": {"seconds": 400.0, "final_loss": 0.5, "num_examples": 45},
        },
        "timings": {"base": 30.0, "dlp": 7500.0},
        "peak_memory_mb": 2345.6,
        "conversation": {
            "prompt": f"1. {NASTY}\n# What is 1 + 1?",
            "text": "No. 2.",
            "trace": [
                {
                    "text": f"{NASTY} ",
                    "start": 0,
                    "end": 5,
                    "probabilities": {"news_commentary_de": 0.6, "chat": 0.4},
                    "mixture": {"news_commentary_de": 0.75, "chat": 0.25},
                    "switched": False,
                    "abstained": False,
                },
                {"text": "2.", "probabilities": {"sums": 0.1}, "mixture": {}, "switched": True, "abstained": True},
            ],
        },
        "larger": None,
        "seeds": [0],
        "outputs": "outputs.jsonl.gz",
    }


def bare() -> dict[str, Any]:
    """A record with next to nothing in it."""
    return {
        "format": 1,
        "scores": {"dlp": {"sums": {"accuracy": 0.5}, "chat": None}},
        "composites": None,
        "larger": None,
    }


def written(folder: Path, data: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def record(data: Mapping[str, Any]) -> Record:
    run = from_json(RunRecord, json.loads(json.dumps(data)))
    return Record(path=Path("runs/small/record.json"), run=run)


def cells(table: Table, *labels: str) -> dict[tuple[str, str], Cell | str | None]:
    """The cells of the row with these labels, by the group and the name of their columns."""
    (row,) = (row for row in table.rows if row[: len(labels)] == labels)
    return {(c.group, c.name): cell for c, cell in zip(table.columns, row, strict=True)}


def value(cell: Cell | str | None) -> float:
    assert isinstance(cell, Cell)
    return cell.measure.value


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps the attributes and the text."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report(written(tmp_path_factory.mktemp("report") / "run", full()))


@pytest.mark.parametrize("method", list(ACCURACY))
def test_the_accuracies_in_table_1_are_the_records_in_per_cent(method: str) -> None:
    data = full()
    table = tables.accuracy_table(record(data))
    column = ("tiny", label(method))
    for task, name in zip(MCQ, ("AbsNarr", "PlayDiag", "sums"), strict=True):
        cell = cells(table, name)[column]
        assert value(cell) == pytest.approx(100 * data["scores"][method][task]["accuracy"])
        assert isinstance(cell, Cell)
        assert cell.measure.interval == pytest.approx([100 * x for x in data["intervals"][method][task]["accuracy"]])
    assert value(cells(table, "Avg.")[column]) == pytest.approx(100 * np.mean(ACCURACY[method]))


def test_table_1_has_the_papers_rows_in_its_order_and_then_own_tasks() -> None:
    table = tables.accuracy_table(record(full()))
    assert [row[0] for row in table.rows] == [*paper.TABLE_1, "sums", "Avg."]
    assert cells(table, "WinoWhy")["tiny", "DLP-LoRA"] is None
    assert value(cells(table, "WinoWhy")["Paper: LLaMA-3 8B", "DLP-LoRA"]) == 96.88
    assert cells(table, "sums")["Paper: LLaMA-3 8B", "DLP-LoRA"] is None
    assert [value(cells(table, "PlayDiag")["No model", name]) for name in ("Chance", "Majority")] == [50.0, 72.0]


def test_table_2_keeps_bleu_and_scales_rouge() -> None:
    table = tables.qa_table(record(full()))
    assert [row[0] for row in table.rows[::3]] == [*paper.TABLE_2, "chat", "Avg."]
    assert value(cells(table, "NewsDE", "BLEU")["tiny", "DLP-LoRA"]) == 21.0
    assert value(cells(table, "NewsDE", "ROUGE-1")["tiny", "DLP-LoRA"]) == pytest.approx(42.0)
    assert value(cells(table, "NewsDE", "ROUGE-L")["Paper: Qwen-2 7B", "DLP-LoRA"]) == 67.64
    average = cells(table, "Avg.", "BLEU")["tiny", "DLP-LoRA"]
    assert value(average) == pytest.approx(16.25)
    assert isinstance(average, Cell)
    assert average.change == "+1.6 %"  # over LoRA's 16.0


def test_tasks_of_ones_own_only_stand_without_the_papers_rows() -> None:
    data = full()
    for task in data["data"]["tasks"].values():
        task["paper_name"] = None
    table = tables.accuracy_table(record(data))
    assert [row[0] for row in table.rows] == [*MCQ, "Avg."]


def test_table_3_has_a_row_for_each_method_and_composite_and_one_for_the_single_lora() -> None:
    table = tables.composite_table(record(full()))
    own = [row for row in table.rows if row[0] == "tiny"]
    assert [row[1:3] for row in own] == [
        *(("base model", "3"), ("base model", "2"), ("own LoRA", "3"), ("own LoRA", "2"), ("one LoRA, r 64", "5")),
        *(("DLP-LoRA", "3"), ("DLP-LoRA", "2")),
    ]
    single = cells(table, "tiny", "one LoRA, r 64", "5")
    assert (value(single["", "Accuracy"]), value(single["", "BLEU"])) == pytest.approx((60.0, 10.0))
    dlp = cells(table, "tiny", "DLP-LoRA", "3")["", "Accuracy"]
    assert isinstance(dlp, Cell)
    assert (dlp.measure.value, dlp.measure.interval) == (pytest.approx(80.0), (77.0, 83.0))
    assert dlp.change == "+300.0 %"  # over the base model's 20
    assert len(table.rows) - len(own) == len(paper.TABLE_3)


def test_table_5_says_that_no_larger_model_was_at_hand() -> None:
    table = tables.larger_table(record(full()))
    assert table.rows[0] == (tables.NO_LARGER, None, None, None, None, None)
    assert any(tables.NO_LARGER in note for note in table.notes)
    assert value(cells(table, "tiny + DLP-LoRA")["", "Inference time (s)"]) == 7500.0


def test_table_5_compares_both_models_over_the_tasks_of_the_larger_one() -> None:
    data = full()
    data["larger"] = {"model": "huge", "scores": {MCQ[0]: {"accuracy": 0.35}, "chat": {"bleu": 23.0}}}
    table = tables.larger_table(record(data))
    plain, small = cells(table, "huge"), cells(table, "tiny + DLP-LoRA")
    assert (value(plain["", "Accuracy"]), value(small["", "Accuracy"])) == pytest.approx((35.0, 70.0))
    assert (value(plain["", "BLEU"]), value(small["", "BLEU"])) == pytest.approx((23.0, 11.5))
    changes = [cell.change for cell in (small["", "Accuracy"], small["", "BLEU"]) if isinstance(cell, Cell)]
    assert changes == ["+100.0 %", "−50.0 %"]
    assert small["", "Inference time (s)"] is None  # it is over all tasks
    larger = {"model": "huge", "seconds": 75000.0, "scores": {task: {} for task in TASKS}, "left_out": {"chat": 3}}
    data["larger"] = larger
    time = cells(tables.larger_table(record(data)), "tiny + DLP-LoRA")["", "Inference time (s)"]
    assert isinstance(time, Cell)
    assert time.change == "−90.0 %"
    data["larger"] = {**larger, "left_out": {"chat": 4, "sums": 0}}
    table = tables.larger_table(record(data))
    assert {cells(table, name)["", "Inference time (s)"] for name in ("huge", "tiny + DLP-LoRA")} == {None}
    assert any("left out other questions" in note for note in table.notes)
    some = {MCQ[0]: {"accuracy": 0.35}}
    for left_out, scores in ((None, {task: {} for task in TASKS}), ({}, some)):  # unknown, and of another task
        data["larger"] = {**larger, "left_out": left_out, "scores": scores}
        assert not any("left out other" in note for note in tables.larger_table(record(data)).notes)


def test_a_task_without_test_questions_empties_neither_table_5_nor_a_composites_size() -> None:
    data = full()
    data["data"]["tasks"]["unasked"] = {"kind": "mcq", "num_train": 9, "num_test": 0}
    small = cells(tables.larger_table(record(data)), "tiny + DLP-LoRA")
    assert value(small["", "Accuracy"]) == pytest.approx(80.0)
    rows = tables.composite_table(record(data)).rows
    assert [row[2] for row in rows if row[:2] == ("tiny", "one LoRA, r 64")] == ["5"]
    data["larger"] = {"model": "huge", "seconds": 9.0, "scores": {task: {} for task in TASKS}, "left_out": {"chat": 3}}
    assert value(cells(tables.larger_table(record(data)), "huge")["", "Inference time (s)"]) == 9.0


def test_a_record_of_an_evaluation_is_named_by_its_bundle_and_counts_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"sums": {"kind": "mcq", "num_test": 7}, "chat": {"kind": "qa", "num_test": 3}}
    data = {**full(), "name": None, "bundle": "mine", "data": {"tasks": tasks}}
    assert record(data).name == "mine"
    assert "; examples: 10 to be scored on" in to_markdown(provenance.making_table(record(data)))
    (tmp_path / "scores.json").write_text(json.dumps({**data, "bundle": None}))
    monkeypatch.chdir(tmp_path)
    assert read_record("scores.json").name == tmp_path.name


@pytest.mark.parametrize(
    ("interval", "mark"),
    [
        ((0.30, 0.45), "below chance"),
        ((0.45, 0.55), "at chance"),
        ((0.50, 0.60), "at chance"),
        ((0.55, 0.72), "at majority"),
        ((0.73, 0.90), ""),
        (None, ""),
    ],
)
def test_an_accuracy_is_marked_with_what_needs_no_model(interval: tuple[float, float] | None, mark: str) -> None:
    data = full()
    data["intervals"]["dlp"][MCQ[1]]["accuracy"] = interval
    cell = cells(tables.accuracy_table(record(data)), "PlayDiag")["tiny", "DLP-LoRA"]
    assert isinstance(cell, Cell)
    assert cell.mark == mark
    assert (mark or "80.0") in to_markdown(tables.accuracy_table(record(data)))


def test_captions_say_plainly_what_is_not_the_papers() -> None:
    data = full()
    for table in (tables.accuracy_table, tables.qa_table, tables.composite_table, tables.larger_table):
        notes = " ".join(table(record(data)).notes)
        assert "none of the paper's models" in notes
        assert "teacher-forced" in notes
        assert ("NewsDE" in notes) == (table is not tables.accuracy_table)
    data["model"] = "Qwen2-1.5B-Instruct"
    data["data"]["tasks"]["news_commentary_de"]["stand_in"] = None
    notes = " ".join(tables.qa_table(record(data)).notes)
    assert "the paper's Qwen-2 1.5B" in notes
    assert "NewsDE" not in notes


def test_likelihoods_are_averaged_over_the_tasks_that_have_options() -> None:
    table = tables.accuracy_table(record(full()), metric="accuracy_loglik")
    assert value(cells(table, "Avg.")["tiny", "DLP-LoRA"]) == 50.0
    assert cells(table, "sums")["tiny", "DLP-LoRA"] is None
    assert all("Paper" not in column.group for column in table.columns)


def test_differences_keep_the_recorded_interval_and_its_finding() -> None:
    table = findings.difference_table(record(full()))
    assert [row[:3] for row in table.rows] == [
        ("DLP-LoRA − own LoRA", "composite-3", "Accuracy"),
        ("DLP-LoRA − own LoRA", "composite-2", "BLEU"),
        ("DLP-LoRA − base model", "composite-3", "Accuracy"),
    ]
    same, worse, better = table.rows
    assert [row[-1] for row in table.rows] == ["no difference shown", "worse", "better"]
    assert isinstance(same[3], Cell)
    assert same[3].measure == Measure(value=0.0, interval=(-2.0, 2.0))
    assert value(worse[3]) == -0.25  # BLEU is in points already
    assert better[4:6] == ("+300.0 %", "+92.95 %")
    assert "0.00 [−2.00, +2.00]" in to_markdown(table)


def test_ablations_are_compared_over_the_tasks_that_all_have() -> None:
    data = full()
    del data["scores"]["top1"]["sums"]
    table = findings.ablation_table(record(data))
    assert value(cells(table, "DLP-LoRA")["", "Accuracy"]) == pytest.approx(75.0)
    assert value(cells(table, "top1")["", "Accuracy"]) == pytest.approx(75.0)
    assert "Accuracy over 2" in table.notes[0]


def test_an_ablation_without_any_score_of_a_metric_leaves_its_cell_open() -> None:
    data = full()
    for task in QA:
        del data["scores"]["top1"][task]
    table = findings.ablation_table(record(data))
    assert cells(table, "top1")["", "BLEU"] is None
    assert value(cells(table, "prompt-only")["", "BLEU"]) == pytest.approx(16.25)


def test_serial_questions_are_shown_with_what_switching_adds() -> None:
    table = findings.serial_table(record(full()))
    dlp = cells(table, "DLP-LoRA")
    group = "serial-3, 30 questions"
    assert [value(dlp[group, name]) for name in ("Right", "Later", "Routed")] == pytest.approx([55.0, 50.0, 90.0])
    assert cells(table, "base model")[group, "Later"] is None
    assert any("+25.0 points" in note for note in table.notes)


def test_teacher_forced_numbers_stand_only_in_columns_named_so() -> None:
    table = findings.teacher_forced_table(record(full()))
    assert all("teacher-forced" in column.name for column in table.columns[2:])
    assert value(cells(table, "sums", "Accuracy")["tiny", "DLP-LoRA, teacher-forced"]) == 97.0
    assert cells(table, "sums", "Accuracy")["tiny", "DLP-LoRA, teacher-forced"].measure.interval == (93.0, 99.0)
    assert value(cells(table, "chat", "BLEU")["tiny", "DLP-LoRA, teacher-forced"]) == 61.0
    assert value(cells(table, "chat", "BLEU of letters")["tiny", "DLP-LoRA, teacher-forced"]) == 70.0
    free = (tables.accuracy_table(record(full())), tables.qa_table(record(full())))
    assert all(value(cell) not in (31.0, 97.0, 61.0) for t in free for row in t.rows for cell in row if _own(cell))


def _own(cell: Cell | str | None) -> bool:
    return isinstance(cell, Cell) and cell.digits == 1


def test_of_several_seeds_the_report_names_what_is_a_mean() -> None:
    data, one = full(), record(full())
    data |= {"seeds": [0, 1], "by_seed": {"0": {}, "1": {}}, "cut_short": {"dlp": {"sums": 2.5}, "base": {"sums": 1e3}}}
    two = record(data)
    (cut,) = (row for row in provenance.making_table(two).rows if row[0] == "Answers cut off")
    assert cut[1] == "DLP-LoRA 2.5, base model 1,000"
    for made in (provenance.training_table, findings.router_table):
        assert "Means over the seeds 0, 1." in made(two).notes
        assert not any("seeds" in note for note in made(one).notes)
    assert provenance.making_table(two).notes == ("Of several seeds, times and cut answers are means.",)
    for made in (findings.difference_table, findings.serial_table, tables.composite_table, tables.accuracy_table):
        (note,) = (note for note in made(two).notes if "95 % bootstrap" in note)
        assert "of several seeds, the range of all their intervals" in note


def test_intervals_are_widened_to_the_extremes_of_the_seeds() -> None:
    data = full()
    by_seed = {seed: {"dlp": {"sums": {"accuracy": x}}} for seed, x in (("0", 0.7), ("1", 0.95))}
    data |= {"seeds": [0, 1], "by_seed": by_seed}
    found = record(data).measure("dlp", "sums", "accuracy")
    assert found is not None
    assert found.interval == pytest.approx((70.0, 99.0))  # 0.81 to 0.99 by bootstrap
    del data["intervals"]["dlp"]
    alone = record(data).measure("dlp", "sums", "accuracy")
    assert alone is not None
    assert alone.interval == pytest.approx((70.0, 95.0))
    seeds = findings.seed_table(record(data))
    assert not seeds.rows  # no seed has all tasks
    data["scores"] = {"dlp": {"sums": {"accuracy": 0.825}}}
    (row,) = findings.seed_table(record(data)).rows
    assert [value(cell) for cell in row[2:]] == pytest.approx([82.5, 70.0, 95.0])
    only = record(data).mean("dlp", ["sums"], "accuracy")
    assert only is not None
    assert only.interval == pytest.approx((70.0, 95.0))


def test_the_interval_of_a_mean_is_that_of_a_bootstrap_over_all_examples() -> None:
    rng = np.random.default_rng(0)
    answers = [rng.random(100) < p for p in (0.2, 0.5, 0.75, 0.6)]
    resampled = np.array([rng.choice(a, (4000, len(a))).mean(axis=1) for a in answers]) * 100

    def measure(draws: np.ndarray, center: float) -> Measure:
        low, high = np.quantile(draws, [0.025, 0.975])
        return Measure(value=center, interval=(float(low), float(high)))

    measures = [measure(draws, 100 * float(a.mean())) for draws, a in zip(resampled, answers, strict=True)]
    found, expected = mean(measures), measure(resampled.mean(axis=0), 100 * float(np.mean([a.mean() for a in answers])))
    assert found.value == pytest.approx(expected.value)
    assert found.interval == pytest.approx(expected.interval, abs=0.3)


def test_pools_of_one_size_are_told_apart_by_their_kind() -> None:
    data = full()
    for by_task in data["scores"].values():
        del by_task["sums"]
    pools = {"composite-2-mcq": ("accuracy", 0.75), "composite-2-qa": ("bleu", 16.25)}
    data["composites"] = {name: {"dlp": {metric: value}} for name, (metric, value) in pools.items()}
    data["composite_intervals"] = {
        name: {"dlp": {metric: [0.9 * value, 1.1 * value]}} for name, (metric, value) in pools.items()
    }
    found = record(data)
    assert found.mean("dlp", MCQ[:2], "accuracy") == found.composite("composite-2-mcq", "dlp", "accuracy")
    assert found.mean("dlp", QA, "bleu") == found.composite("composite-2-qa", "dlp", "bleu")
    assert [row[2] for row in tables.composite_table(found).rows if row[1] == "DLP-LoRA"][:2] == ["2-mcq", "2-qa"]


def test_a_task_without_scores_empties_no_average() -> None:
    data = full()
    for by_task in data["scores"].values():
        del by_task["sums"]
    table = tables.accuracy_table(record(data))
    assert record(data).mean("dlp", MCQ[:2], "accuracy") in [c.measure for c in table.rows[-1] if isinstance(c, Cell)]


def test_a_mean_that_is_a_composite_has_its_recorded_interval() -> None:
    found = record(full()).mean("dlp", MCQ, "accuracy")
    assert found is not None
    assert found.interval == (77.0, 83.0)


def test_a_mean_is_left_open_where_a_task_is_missing() -> None:
    data = full()
    del data["scores"]["dlp"]["sums"]
    assert record(data).mean("dlp", MCQ, "accuracy") is None
    assert cells(tables.accuracy_table(record(data)), "Avg.")["tiny", "DLP-LoRA"] is None


def test_how_it_was_made_is_told() -> None:
    text = to_markdown(provenance.making_table(record(full())))
    for fact in ("tiny", "sha256:0123", "Abacus 7", "2 cores", "torch 2.13.0", "2,346 MB", "DLP-LoRA 2 h 05 min"):
        assert fact in text
    assert "5; examples: 45 to learn from, 50 to be scored on" in text
    assert "1 examples to learn from, 3 to be scored on (chat 3)" in text
    assert '| adapter | {"r": 8} |' in to_markdown(provenance.settings_table(record(full())))
    assert "| sums | 9 | 1 | 61.5 | 0.125 |" in to_markdown(provenance.training_table(record(full())))


def test_all_files_are_written_beside_the_record(report: Report) -> None:
    folder = report.markdown.parent
    assert sorted(p.name for p in folder.iterdir()) == [
        *("bars-accuracy.svg", "bars-rougeL.svg", "confusion.svg", "radar-accuracy.svg", "radar-rougeL.svg"),
        *("record.json", "report.html", "report.md"),
    ]
    assert [p.name for p in report.pictures if p.is_file()] == [
        *("bars-accuracy.svg", "radar-accuracy.svg", "bars-rougeL.svg", "radar-rougeL.svg", "confusion.svg"),
    ]
    markdown = report.markdown.read_text()
    for picture in report.pictures:
        assert ElementTree.fromstring(picture.read_text()).tag == "{http://www.w3.org/2000/svg}svg"
        assert f"]({picture.name})" in markdown


def test_the_same_record_gives_the_same_bytes(report: Report, tmp_path: Path) -> None:
    again = write_report(report.markdown.parent / "record.json", tmp_path / "elsewhere")
    for one, other in zip((report.html, report.markdown, *report.pictures), _files(again), strict=True):
        assert one.read_bytes() == other.read_bytes()


def _files(report: Report) -> tuple[Path, ...]:
    return (report.html, report.markdown, *report.pictures)


def test_the_html_parses_and_needs_no_other_file(report: Report) -> None:
    text = report.html.read_text()
    page = Page(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(report.pictures)
    assert all((i["src"] or "").startswith("data:image/svg+xml;base64,") and i["alt"] for i in images)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert "http" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text


def test_a_record_with_next_to_nothing_makes_a_report_that_says_so(tmp_path: Path) -> None:
    report = write_report(written(tmp_path / "bare", bare()))
    markdown = report.markdown.read_text()
    assert markdown.startswith("# bare: DLP-LoRA on an unnamed model\n")
    assert markdown.count("Not measured in this run.") == 6
    assert f"| sums | {MISSING} | {MISSING} | {MISSING} | {MISSING} | 50.0 |" in markdown
    assert tables.NO_LARGER in markdown
    assert [p.name for p in report.pictures] == ["bars-accuracy.svg", "radar-accuracy.svg"]
    Page(report.html.read_text())


def test_a_record_without_scores_still_makes_a_report(tmp_path: Path) -> None:
    report = write_report(written(tmp_path / "empty", {"format": 1}))
    assert report.pictures == ()
    Page(report.html.read_text())


def test_text_of_tasks_is_escaped_everywhere(tmp_path: Path) -> None:
    data = full()
    for part in (data["data"]["tasks"], *data["scores"].values(), *data["intervals"].values()):
        part[NASTY] = part.pop("sums")
    data["router"]["confusion"] = {NASTY: {NASTY: 3}}
    report = write_report(written(tmp_path / "nasty", data | {"name": NASTY, "model": NASTY}))
    page = Page(report.html.read_text())
    assert NASTY in page.text
    for text in (report.html.read_text(), report.markdown.read_text(), *(p.read_text() for p in report.pictures)):
        assert "<script" not in text
    markdown = report.markdown.read_text()
    assert not re.search(r"(?<!\\)\]\(javascript", markdown)
    for one, other in pairwise(markdown.split("\n")):
        if one.startswith("|") and other.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", one)) == len(re.findall(r"(?<!\\)\|", other))


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("news_commentary_de", "news_commentary_de"),
        ("_a_ *b*", r"\_a\_ \*b\*"),
        ("1.0 [0.5, 1.5]", "1.0 [0.5, 1.5]"),
        ("[a](b)", r"[a\](b)"),
        ("a|b\nc", r"a\|b c"),
        ("<b>&", "&lt;b&gt;&amp;"),
    ],
)
def test_markdown_shows_text_as_it_is(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped


@pytest.mark.parametrize(
    ("found", "printed"), [(0.0, "0.0"), (-0.04, "0.0"), (-1.25, "−1.2"), (12.345, "12.3"), (100.0, "100.0")]
)
def test_numbers_have_a_true_minus_and_no_minus_zero(found: float, printed: str) -> None:
    assert number(found) == printed
    assert number(abs(found), signed=True) == ("+" + number(abs(found)) if abs(found) >= 0.05 else "0.0")


def test_the_routing_picture_has_every_sentence_with_its_adapters() -> None:
    data = full()
    conversation = record(data).run.conversation
    assert conversation is not None
    one, two = routing_picture(conversation, labels={"news_commentary_de": "NewsDE"}).turns
    assert (one.weights, one.probability, one.switched) == ({"NewsDE": 0.75, "chat": 0.25}, 0.6, False)
    assert (two.text, two.weights, two.probability, two.switched) == ("2.", {"base model": 1.0}, None, True)


def test_the_routing_picture_is_in_both_pages(report: Report) -> None:
    page = Page(report.html.read_text())
    assert "NewsDE 75.0 %, chat 25.0 %" in page.text
    assert "base model (switched)" in page.text
    shares = [a["style"] or "" for tag, a in page.tags if tag == "i"]
    assert [style.split(";")[0] for style in shares] == ["width:75.0%", "width:25.0%", "width:100.0%"]
    assert "| 2. | base model (switched) | – |" in report.markdown.read_text()
    assert "\n> 1\\. &lt;script" in report.markdown.read_text()
    assert "\n> \\# What is 1 + 1?" in report.markdown.read_text()


LABELS = list(paper.TABLE_1)


@pytest.mark.parametrize("num_tasks", [1, 2, 17])
def test_a_radar_chart_names_every_task_and_no_names_overlap(num_tasks: int) -> None:
    rng = random.Random(0)
    series = {m: [100 * rng.random() for _ in range(num_tasks)] for m in ("base", "oracle", "dlp")}
    svg = charts.radar(LABELS[:num_tasks], series)
    boxes = {text: box for text, box in _boxes(svg) if text in LABELS}
    assert list(boxes) == LABELS[:num_tasks]
    assert all(left >= 0 and right <= 374.4 for left, _, right, _ in boxes.values())
    for i, a in enumerate(boxes.values()):
        for b in list(boxes.values())[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def _boxes(svg: str) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Each text with about the room it takes: left, top, right, bottom."""
    found = []
    for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        style = dict(part.split(": ") for part in text.attrib["style"].split("; "))
        x, y, size = float(text.attrib["x"]), float(text.attrib["y"]), float(style["font-size"].removesuffix("px"))
        width = 0.62 * size * len(text.text or "")
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[style.get("text-anchor", "start")] * width
        found.append((text.text or "", (left, y - 0.8 * size, left + width, y + 0.2 * size)))
    return found


def test_a_radar_line_is_broken_where_a_score_is_missing() -> None:
    whole = charts.radar(["a", "b", "c"], {"dlp": [10.0, 20.0, 30.0]})
    broken = charts.radar(["a", "b", "c"], {"dlp": [10.0, None, 30.0]})
    assert ElementTree.fromstring(broken) is not None
    assert whole != broken
    assert "nan" not in broken.lower()


def test_bars_have_a_dash_where_nothing_is_known() -> None:
    known = Measure(value=50.0, interval=(40.0, 60.0))
    svg = charts.bars(["a", "b"], {"dlp": [known, None], "base": [known, known]}, chance=[None, 25.0])
    texts = [text for text, _ in _boxes(svg)]
    assert texts.count("–") == 1
    assert {"a", "b", "Chance", "DLP-LoRA", "base model"} <= set(texts)


def test_the_confusion_matrix_has_the_recorded_counts() -> None:
    svg = charts.confusion({"sums": {"sums": 9, "chat": 4}, "chat": {"chat": 13}})
    texts = [text.text for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert [texts.count(count) for count in ("9", "4", "13", "0")] == [1, 1, 1, 0]
    assert texts.count("sums") == texts.count("chat") == 2


def test_pictures_follow_a_light_and_a_dark_page() -> None:
    svg = charts.radar(["a"], {"dlp": [10.0]})
    assert "prefers-color-scheme:dark" in svg
    assert "currentColor" in svg
    assert not {"#000000", "#123456", "#ffffff"} & set(re.findall(r"#[0-9a-f]{6}", svg.split("</style>", 1)[1]))


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DLPLoRAError, match=r"need matplotlib; run `pip install 'dlp-lora\[report\]'`"):
        charts.radar(["a"], {"dlp": [10.0]})


def changed(**changes: Any) -> dict[str, Any]:
    return full() | changes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is no record"),
        ({"name": "x"}, "is no record"),
        (changed(format=2), "has record format 2; this version reads 1"),
        (changed(scores=[]), r"scores is \[\]; expected an object"),
        (
            changed(scores={"dlp": {"sums": {"accuracy": "0.5"}}}),
            r'scores.dlp.sums.accuracy is "0.5"; expected a finite',
        ),
        (changed(scores={"dlp": {"sums": {"accuracy": True}}}), "accuracy is true"),
        (changed(scores={"dlp": {"sums": {"accuracy": float("nan")}}}), "accuracy is NaN"),
        (changed(intervals={"dlp": {"sums": {"accuracy": [0.6, 0.4]}}}), r"expected a list \[low, high\]"),
        (changed(intervals={"dlp": {"sums": {"accuracy": [0.6]}}}), r"expected a list \[low, high\]"),
        (changed(conversation={"trace": {}}), r"conversation.trace is \{\}; expected a list"),
        (changed(conversation={"trace": [{"mixture": {"a": "b"}}]}), r"conversation.trace\[0\].mixture.a"),
        (changed(model=3), "model is 3; expected a string"),
    ],
)
def test_a_damaged_record_is_named_with_the_place(data: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=message):
        read_record(written(tmp_path / "run", data))


def test_a_missing_record_or_one_that_is_not_json_is_a_record_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no record .*record.json"):
        read_record(tmp_path)
    with pytest.raises(RecordError, match=r"no record .*gone.json"):
        read_record(tmp_path / "gone.json")
    for content in (b'{"format": 1', b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "record.json").write_bytes(content)
        with pytest.raises(RecordError, match="is not JSON in UTF-8"):
            read_record(tmp_path)


@pytest.mark.parametrize("column", range(12))
def test_the_papers_averages_in_table_1_are_the_means_of_its_rows(column: int) -> None:
    assert len(paper.TABLE_1) == 17
    assert np.mean([row[column] for row in paper.TABLE_1.values()]) == pytest.approx(
        paper.TABLE_1_AVERAGE[column], abs=0.006
    )


def test_the_papers_averages_in_table_2_are_about_the_means_of_its_rows() -> None:
    assert len(paper.TABLE_2) == 9
    off = [
        abs(float(np.mean([by_metric[metric][i] for by_metric in paper.TABLE_2.values()])) - printed[i])
        for metric, printed in paper.TABLE_2_AVERAGE.items()
        for i in range(12)
    ]
    assert sum(x > 0.0101 for x in off) == 12
    assert max(off) < 1.2


def test_the_papers_averages_in_table_3_are_the_means_over_its_backbones() -> None:
    averages = [row for row in paper.TABLE_3 if row.model == "Avg."]
    assert len(averages) == 5
    for average in averages:
        rows = [r for r in paper.TABLE_3 if r[1:3] == average[1:3] and r.model in paper.BACKBONES]
        assert len(rows) == 4
        for theirs, expected in zip(zip(*(r[3:] for r in rows), strict=True), average[3:], strict=True):
            assert (None in theirs) == (expected is None)
            if expected is not None:
                assert np.mean(theirs) == pytest.approx(expected, abs=0.006)


def test_the_papers_relative_changes_follow_from_its_tables() -> None:
    by_backbone = list(zip(*[iter(paper.TABLE_1_AVERAGE)] * 3, strict=True))
    changes = [100 * (dlp - oracle) / oracle for _, oracle, dlp in by_backbone]
    assert paper.RELATIVE["dlp - oracle"]["accuracy"] == -0.35
    assert np.mean(changes) == pytest.approx(-0.42, abs=0.005)  # the paper prints -0.12 for LLaMA-3's -0.39
    averages = {(row.method, row.num_tasks): row for row in paper.TABLE_3 if row.model == "Avg."}
    base, dlp = averages["base", 17].accuracy, averages["dlp", 17].accuracy
    assert base is not None
    assert dlp is not None
    assert 100 * (dlp - base) / base == pytest.approx(paper.RELATIVE["dlp - base"]["accuracy"], abs=0.02)


def test_the_papers_numbers_are_those_of_its_text() -> None:
    if not PAPER_TEXT.is_file():
        pytest.skip("the paper's text is not at hand")
    lines = [re.sub(r"<u>|</u>|_\{[^}]*\}", "", line).split("\t") for line in PAPER_TEXT.read_text().splitlines()]
    printed = [[cell.strip() for cell in line if cell.strip()] for line in lines if len(line) > 3]
    for task, numbers in {**paper.TABLE_1, "Avg.": paper.TABLE_1_AVERAGE}.items():
        assert [task, *_texts(numbers)] in printed
    for by_metric in (*paper.TABLE_2.values(), paper.TABLE_2_AVERAGE):
        for metric, numbers in by_metric.items():
            name = {"bleu": "BLEU", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}[metric]
            assert any(row[-13:] == [name, *_texts(numbers)] for row in printed)
    for row in (*paper.TABLE_3, *paper.TABLE_5):
        numbers = [x for x in row if isinstance(x, float)]
        assert any(
            r[-len(numbers) :] == _texts(numbers) or _texts(numbers) == [x for x in r if "." in x] for r in printed
        )


def _texts(numbers: Sequence[float]) -> list[str]:
    return [f"{x:.2f}" for x in numbers]


@pytest.mark.parametrize(
    ("model", "backbone"),
    [
        ("Qwen/Qwen2-1.5B-Instruct", "Qwen-2 1.5B"),
        ("models/Qwen2-7B", "Qwen-2 7B"),
        ("meta-llama/Llama-2-7b-hf", "LLaMA-2 7B"),
        ("meta-llama/Meta-Llama-3-8B", "LLaMA-3 8B"),
        ("meta-llama/Llama-3.1-8B", None),
        ("Qwen/Qwen2.5-7B", None),
        ("SmolLM2-135M-Instruct", None),
    ],
)
def test_the_papers_backbones_are_known_by_name(model: str, backbone: str | None) -> None:
    assert paper.backbone(model) == backbone


def test_a_task_is_known_by_the_name_in_the_papers_table_8() -> None:
    data = {"format": 1, "data": {"tasks": {"question_selection": {"paper_name": "QuestSel", "kind": "mcq"}}}}
    assert record(data).tasks == (RecordedTask(name="question_selection", kind="mcq", paper_name="QuesSel"),)


def test_a_report_is_written_without_torch() -> None:
    code = "import sys, dlp_lora.lab.report; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_prints_what_it_wrote(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", full())
    found = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "out"), "--json"])
    assert found.exit_code == 0, found.output
    printed = json.loads(found.stdout)
    assert printed["html"] == str(tmp_path / "out" / "report.html")
    assert all(Path(path).is_file() for path in (printed["markdown"], printed["html"], *printed["pictures"]))
    found = CliRunner().invoke(app, ["report", str(folder / "record.json")])
    assert str(folder / "report.md") in found.stdout.split("\n")
    found = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert (found.exit_code, "error: no record" in found.stderr) == (1, True)


def test_a_table_with_groups_has_a_heading_for_each() -> None:
    page = Page(to_html(tables.accuracy_table(record(full()))))
    table = tables.accuracy_table(record(full()))
    headings = [f"{column.group} {column.name}".strip() for column in table.columns]
    texts = [line for line in page.text.split("\n") if line]
    assert texts[1 : 1 + len(headings)] == headings
    assert len([tag for tag, _ in page.tags if tag == "th"]) == 1 + 2 + 4 + 4 * 3
