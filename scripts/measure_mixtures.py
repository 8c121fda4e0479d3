"""Measures whether fusing several adapters beats the best single one, where it should: see `lab/evals/mixtures.py`.

    python scripts/measure_mixtures.py --out runs/mixtures --json results/mixtures.json
    python scripts/measure_mixtures.py --out runs/mixtures --json results/mixtures.json \\
        --data tasks26/ --adapters adapters/ --router router/ --extra tasks_extra/

The first command trains what it needs. The second measures the paper's tasks, with adapters that are there, and adds
them to the record. Interrupted, the same command goes on where it stopped.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dlp_lora import Engine, load
from dlp_lora.cli.progress import progress
from dlp_lora.default_model import default_model
from dlp_lora.demo import DemoArgs, with_serial
from dlp_lora.files import write_json
from dlp_lora.lab.evals.answers import AnswerArgs, answer_all, batches, identity_of
from dlp_lora.lab.evals.mixtures import (
    FORMATS,
    Mixed,
    compared,
    crossed,
    format_task,
    made,
    methods,
    near,
    right,
)
from dlp_lora.lab.records.environment import environment
from dlp_lora.progress import OnProgress, staged
from dlp_lora.router import Context, Router, router_hash
from dlp_lora.tasks import procedural_task
from dlp_lora.tasks.hub import read_data
from dlp_lora.tasks.task import PromptFormat
from dlp_lora.training.adapters import train_adapter
from dlp_lora.training.base import load_base
from dlp_lora.training.router import RouterTrainingArgs, load_tokenizer, train_router

FORMAT_EXAMPLES = 480


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--json", type=Path, required=True, help="record to write")
    parser.add_argument("--skills", type=Path, help="the demo's adapters, where they are trained already")
    parser.add_argument("--data", help="folder of the tasks that the adapters are for")
    parser.add_argument("--adapters", type=Path, help="their adapters, all or some")
    parser.add_argument("--router", help="a router that knows these tasks")
    parser.add_argument("--extra", help="folder of other tasks, of which those near several adapters are asked")
    parser.add_argument("--near", type=int, default=8, help="how many of these")
    parser.add_argument("--chosen", type=int, default=32, help="questions of each task by which methods are chosen")
    parser.add_argument("--test", type=int, default=96, help="questions of each task that are measured")
    options = parser.parse_args()
    of_tasks = (options.data, options.adapters, options.router)
    if any(of_tasks) and not all(of_tasks):
        parser.error("--data, --adapters and --router go together")
    record: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    name, measure = ("of the paper's tasks", _of_tasks) if options.data else ("made", _made)
    with progress() as show:
        record[name] = {"environment": environment(), **measure(options, show)}
    write_json(options.json, record)
    print(json.dumps({name: record[name]["mixture_less_single"]}, indent=1))


def _made(options: argparse.Namespace, show: OnProgress) -> dict[str, Any]:
    """Skills and formats, each with an adapter of its own."""
    args = DemoArgs()
    num_train = args.num_train + args.num_serial
    single = [
        procedural_task(name, num_train=num_train, num_test=args.num_test, seed=args.data_seed) for name in args.tasks
    ]
    formats = [format_task(name, num_train=FORMAT_EXAMPLES) for name in FORMATS]
    base, tokenizer = load_base(default_model())
    paths: dict[str, Path] = {}
    for task in [*([] if options.skills else with_serial(single, args)), *formats]:
        paths[task.name] = train_adapter(
            base, tokenizer, task, options.out / "adapters" / task.name, replace(args.training, seed=args.seed),
            on_progress=show,
        ).path  # fmt: skip
    if options.skills:
        paths = {name: options.skills / name for name in args.tasks} | paths
    router, _ = train_router(
        [*single, *formats],
        load_tokenizer(str(default_model())),
        RouterTrainingArgs(epochs=args.router_epochs, seed=args.seed),
        on_progress=show,
    )
    engine = load(base, tokenizer=tokenizer, adapters=paths, router=router)
    asked = made(args.tasks, num_chosen=options.chosen, num_test=options.test)
    return _measured(engine, router, asked, options.out / "made", "plain", show)


def _of_tasks(options: argparse.Namespace, show: OnProgress) -> dict[str, Any]:
    """Questions of tasks in other tasks' formats, and tasks near several adapters."""
    tasks = {task.name: task for task in read_data(options.data)}
    paths = {name: options.adapters / name for name in tasks if (options.adapters / name).is_dir()}
    engine = load(str(default_model()), adapters=paths, router=options.router)
    router = engine.router
    assert router is not None
    sizes = {"num_chosen": options.chosen, "num_test": options.test}
    asked = crossed({name: tasks[name] for name in paths}, **sizes)
    if options.extra:
        rows_of = partial(_rows_of, router, tuple(paths))
        asked += near(read_data(options.extra), rows_of, num_tasks=options.near, **sizes)
    return _measured(engine, router, asked, options.out / "tasks", "auto", show)


def _measured(
    engine: Engine, router: Router, asked: Sequence[Mixed], folder: Path, prompt_format: PromptFormat, show: OnProgress
) -> dict[str, Any]:
    tasks = [each.task for each in asked]
    args = AnswerArgs(max_new_tokens=64, prompt_format=prompt_format)
    pooled, left_out = batches(engine.model, engine.tokenizer, tasks, args)
    rows = {}
    for task in tasks:
        found = _rows_of(router, engine.bank.names, [example.prompt for example in task.test])
        rows |= {(task.name, i): row for i, row in enumerate(found)}
    groups, chooser = methods(asked, rows), router_hash(router)
    answers: dict[str, dict[str, Any]] = {}
    for method in (method for own in groups.values() for method in own):
        given = answer_all(
            engine,
            method,
            pooled,
            args,
            folder / f"{method.name.replace('/', '-')}.jsonl",
            identity={**identity_of(engine, tasks, method), "router": chooser},  # the mixtures come from it
            on_progress=staged(show, method.name),
        )
        answers[method.name] = {
            task.name: right([row for row in given if row["task"] == task.name], task) for task in tasks
        }
    engine.detach()
    return {"left_out": left_out, **compared(asked, groups, answers)}


def _rows_of(router: Router, names: Sequence[str], prompts: Sequence[str]) -> list[Mapping[str, float]]:
    """The probabilities of some adapters among themselves."""
    rows = []
    for prompt in prompts:
        row = dict(zip(router.names, router.probabilities([Context(prompt)])[0].tolist(), strict=True))
        total = sum(row[name] for name in names)
        rows.append({name: row[name] / total if total else 1 / len(names) for name in names})
    return rows


if __name__ == "__main__":
    main()
