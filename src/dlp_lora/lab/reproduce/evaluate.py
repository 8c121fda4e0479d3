"""Evaluation of one engine: a bundle's engine, tasks and methods in, a record like a run's and every answer out."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dlp_lora.engine.engine import Engine
from dlp_lora.files import write_lines
from dlp_lora.lab.evals.answers import AnswerArgs, batches, data_hash, identity_of
from dlp_lora.lab.evals.evaluation import Evaluation
from dlp_lora.lab.evals.methods import METHODS, Method
from dlp_lora.lab.evals.metrics import bleu_signature, check_scoring
from dlp_lora.lab.records.environment import environment
from dlp_lora.lab.records.run import Data, RunRecord, TaskRecord, write_run
from dlp_lora.progress import OnProgress, unseen
from dlp_lora.tasks import Task, TaskInfo, kind_of


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The record of an evaluation, and every answer."""

    record: RunRecord
    outputs: Iterator[dict[str, Any]]

    def write(self, file: Path) -> Path:
        """Writes the record to a file, and the answers beside it; gives the file of the answers."""
        answers = file.with_name(f"{file.stem}.outputs.jsonl.gz")
        write_lines(answers, self.outputs)
        write_run(file, replace(self.record, outputs=answers.name))
        return answers


def evaluate_bundle(
    engine: Engine,
    tasks: Sequence[Task],
    methods: Sequence[Method],
    args: AnswerArgs,
    *,
    name: str,
    infos: Mapping[str, TaskInfo],
    folder: Path | None = None,
    teacher_forced: bool = False,
    on_progress: OnProgress = unseen,
) -> Evaluated:
    """Answers the tasks' test questions by several methods, and scores them.

    Args:
        name: of the bundle, for the record.
        infos: what a manifest says of the tasks.
        folder: keeps the answers as they come, so that the same call goes on where it stopped.
        teacher_forced: scores along the gold answers, too.

    Raises:
        ValueError: if a method needs an adapter that the engine has not.
        RecordError: if `folder` holds answers under other settings.
    """
    _check_adapters(engine, tasks, methods)
    kinds = {task.name: kind_of(task, infos) for task in tasks}
    check_scoring(kinds.values())
    questions, left_out = batches(engine.model, engine.tokenizer, list(tasks), args)
    evaluation = Evaluation(tasks, kinds, questions, args)
    identity = identity_of(engine, list(tasks), METHODS["dlp"])
    forced = [method.name for method in methods] if teacher_forced else []
    with tempfile.TemporaryDirectory() as scratch:
        evaluation.answer(engine, methods, folder or Path(scratch), forced=forced, on_progress=on_progress)
    record = RunRecord(
        **vars(evaluation.record()),
        bundle=name,
        **{key: identity[key] for key in ("model", "model_hash", "dtype", "adapters")},
        router_hash=identity.get("routing", {}).get("router"),
        environment=environment(),
        metrics={"bleu": bleu_signature()} if "qa" in kinds.values() else {},
        data=Data(
            hash=data_hash(list(tasks)),
            tasks={
                task.name: TaskRecord(kind=kinds[task.name], num_test=len(task.test[: args.limit])) for task in tasks
            },
        ),
        settings={**asdict(args), **engine.settings.to_dict()},
        left_out=left_out,
    )
    return Evaluated(record=record, outputs=evaluation.outputs())


def _check_adapters(engine: Engine, tasks: Sequence[Task], methods: Sequence[Method]) -> None:
    names = engine.bank.names
    if missing := [method.adapter for method in methods if method.adapter and method.adapter not in names]:
        raise ValueError(f"the bundle has no adapter {missing[0]!r}, which that method needs")
    unknown = [task.name for task in tasks if task.name not in names]
    if unknown and any(method.name == "oracle" for method in methods):
        raise ValueError(f"the bundle has no adapter for {', '.join(unknown)}; choose other tasks or leave oracle out")
