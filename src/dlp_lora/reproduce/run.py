"""The paper's experiments as one run: a base model and task data in, adapters, router, answers and a record out.

Every step is kept on disk and none is done twice: a run that was interrupted, at any moment, goes on to the same
results. A run with other settings is refused, and the difference is named.
"""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dlp_lora.errors import RecordError, TaskError
from dlp_lora.evals.answers import data_hash, differences
from dlp_lora.evals.record import merged
from dlp_lora.folders import write_text
from dlp_lora.reproduce.args import LARGER, Event, ReproduceArgs
from dlp_lora.reproduce.larger import answer_plainly
from dlp_lora.reproduce.seed import Seed
from dlp_lora.tasks import Task
from dlp_lora.tasks.manifest import TaskInfo, kind_of
from dlp_lora.training.adapters import load_base

RECORD_FILE = "record.json"
FORMAT = 1


def reproduce(
    model: str | Path,
    tasks: Sequence[Task],
    out: str | Path,
    args: ReproduceArgs | None = None,
    *,
    infos: dict[str, TaskInfo] | None = None,
    larger: str | Path | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Path:
    """Runs everything into the folder `out`, or goes on with it; gives the record's path.

    Args:
        larger: another model, which answers without adapters (Table 5); it may be given to a finished run, too.

    Raises:
        RecordError: if `out` holds a run with other settings.
        TaskError: if a test example is also a training example.
    """
    args, out, infos = args or ReproduceArgs(), Path(out), infos or {}
    check_apart(tasks)
    tasks = [replace(t, train=t.train[: args.limit], test=t.test[: args.limit]) for t in tasks]
    settings = {
        "format": FORMAT,
        "model": Path(str(model)).name,
        "data": data_hash(tasks),
        "args": json.loads(json.dumps(asdict(args))),
    }
    _keep_settings(out, settings)
    kinds = {task.name: kind_of(task, infos) for task in tasks}
    plain = None if larger is None else answer_plainly(larger, tasks, kinds, out / LARGER, args, on_event)
    base, tokenizer = load_base(model)
    runs = [
        Seed(model, base, tokenizer, tasks, infos, out / f"seed-{seed}", seed, args, on_event) for seed in args.seeds
    ]
    records = [run.run() for run in runs]
    record = {**settings, "name": out.name, "seeds": list(args.seeds), **merged(records, args.seeds), "larger": plain}
    with gzip.open(out / "outputs.jsonl.gz", "wt", encoding="utf-8") as lines:
        for run in runs:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in run.outputs())
    write_text(out / RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return out / RECORD_FILE


def check_apart(tasks: Sequence[Task]) -> None:
    """Checks that no test prompt was learned.

    Raises:
        TaskError: naming the first test example that is among the training examples of any task.
    """
    learned = {example.prompt.strip(): task.name for task in tasks for example in task.train}
    for task in tasks:
        for i, example in enumerate(task.test):
            if example.prompt.strip() in learned:
                raise TaskError(
                    f"test example {i} of {task.name} is also a training example of {learned[example.prompt.strip()]}; "
                    f"remove one of the two: a score on learned prompts says nothing"
                )


def _keep_settings(out: Path, settings: dict[str, Any]) -> None:
    file = out / "settings.json"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(settings, indent=1) + "\n")
        return
    before = json.loads(file.read_text())
    if changed := differences(before, settings):
        raise RecordError(f"{out} holds a run with other settings: {changed}; choose another --out")
