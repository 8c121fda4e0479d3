"""Compares methods of several runs of `reproduce` on the questions that all of them answered, without a model.

    python scripts/join_runs.py runs/first runs/second --data DIR --out joined.json

Each folder holds a run's record.json and outputs.jsonl.gz; DIR holds the tasks that they were made from.
"""

import argparse
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlp_lora.errors import DLPLoRAError
from dlp_lora.files import write_json
from dlp_lora.kept import differences
from dlp_lora.lab.evals.answers import data_hash
from dlp_lora.lab.evals.record import compared, teacher_forced_scores
from dlp_lora.lab.evals.scores import tabulate
from dlp_lora.lab.records.run import FORMAT, to_json
from dlp_lora.tasks import Task
from dlp_lora.tasks.hub import read_data

Answers = dict[str, dict[tuple[str, int], dict[str, Any]]]
"""Rows by method, then question."""

ABOUT = ("name", "model", "model_hash", "dtype", "seeds", "args", "environment", "timings")


def main() -> None:
    """Writes the joint record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f"no folder {args.out.parent}; make it first")
    try:
        joint = joined(args.runs, args.data)
    except (DLPLoRAError, ValueError, OSError) as error:
        parser.error(str(error))
    except KeyError as error:
        parser.error(f"a record has no {error}; it is of another version")
    write_json(args.out, joint)


def joined(runs: list[Path], data: str | Path) -> dict[str, Any]:
    """Scores, intervals and paired differences of all methods, over the questions that every one of them answered.

    Teacher-forced scores stand beside them, of the methods that have them.

    Raises:
        ValueError: if the runs have no task in common, several seeds or a method twice, or were made from other data,
            with another model or other settings of answers.
    """
    records = [json.loads((run / "record.json").read_text(encoding="utf-8")) for run in runs]
    known = {name: about for record in records for name, about in record["data"]["tasks"].items()}
    shared = [name for name in known if all(name in record["data"]["tasks"] for record in records)]
    if not shared:
        raise ValueError("the runs have no task in common")
    kinds = {name: known[name]["kind"] for name in shared}
    answers: Answers = {}
    forced: Answers = {}
    tasks: dict[str, Task] = {}
    for run, record in zip(runs, records, strict=True):
        if record["model_hash"] != records[0]["model_hash"] or len(record["seeds"]) > 1:
            raise ValueError(f"{run} has another model than {runs[0]}, or several seeds")
        if changed := differences(records[0]["args"]["answers"], record["args"]["answers"]):
            raise ValueError(f"{run} answers with other settings than {runs[0]}: {changed}")
        tasks |= {task.name: task for task in _tasks_of(record, data, run) if task.name in shared}
        found = _answers_of(run / record["outputs"], shared)
        if twice := found["answers"].keys() & answers.keys():
            raise ValueError(f"{run} answers by {', '.join(sorted(twice))}, as a run before it does")
        answers |= found["answers"]
        forced |= found["teacher-forced"]
    rows, num_left_out = _common(answers)
    tables = {method: tabulate(own, tasks, kinds) for method, own in rows.items()}
    return {
        "format": FORMAT,
        "runs": [{key: record.get(key) for key in ABOUT} for record in records],
        "data": {"tasks": {name: known[name] for name in shared}},
        "num_questions": len(next(iter(rows.values()))),
        "num_left_out": num_left_out,
        **to_json(compared(tables, kinds)),
        **to_json(teacher_forced_scores(_common(forced)[0], tasks, kinds)),
    }


def _answers_of(outputs: Path, tasks: Sequence[str]) -> dict[str, Answers]:
    """Free and teacher-forced answers, by part."""
    parts: dict[str, Answers] = {"answers": {}, "teacher-forced": {}}
    with gzip.open(outputs, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["part"] in parts and row["task"] in tasks:
                parts[row["part"]].setdefault(row["method"], {})[row["task"], row["index"]] = row
    return parts


def _common(answers: Answers) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """Each method's rows of the questions that all methods answered; how many questions only some of them did."""
    if not answers:
        return {}, 0
    common = set.intersection(*(set(own) for own in answers.values()))
    num_left_out = len(set.union(*(set(own) for own in answers.values()))) - len(common)
    return {method: [own[key] for key in sorted(common)] for method, own in answers.items()}, num_left_out


def _tasks_of(record: dict[str, Any], data: str | Path, run: Path) -> list[Task]:
    limit = record["args"]["limit"]
    tasks = [replace(t, train=t.train[:limit], test=t.test[:limit]) for t in read_data(data, record["data"]["tasks"])]
    if data_hash(tasks) != record["data"]["hash"]:
        raise ValueError(f"{run} was made from other data than {data} holds")
    return tasks


if __name__ == "__main__":
    main()
