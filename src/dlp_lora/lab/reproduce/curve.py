"""How many epochs, at which learning rate: answers to held-out training questions along the training.

Nothing here reads a test question. With the schedule warmup_stable_decay one run at a constant rate gives every length:
each branches off it and lets its rate fall. A branch ends in the very weights of a run of its own.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.engine.loading import load
from dlp_lora.errors import TaskError
from dlp_lora.files import as_json, write_json
from dlp_lora.lab.evals.answers import AnswerArgs, batches, data_hash
from dlp_lora.lab.evals.evaluation import Evaluation
from dlp_lora.lab.evals.methods import METHODS, SINGLE
from dlp_lora.lab.evals.metrics import check_scoring
from dlp_lora.lab.records.run import FORMAT
from dlp_lora.lab.reproduce.environments import Environments
from dlp_lora.lab.reproduce.settings import check_settings, keep_settings, kept_dtype
from dlp_lora.progress import OnProgress, Progress, staged, unseen
from dlp_lora.tasks import Task
from dlp_lora.tasks.manifest import TaskInfo, kind_of
from dlp_lora.tasks.task import same_prompt
from dlp_lora.training.adapters import train_adapter
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.base import dtype_of, load_base, model_hash

OWN = "own"


@dataclass(frozen=True, kw_only=True)
class CurveArgs:
    """Which lengths and rates are compared, on how many questions a task."""

    epochs: tuple[int, ...] = (1, 2, 3, 5)
    learning_rates: tuple[float, ...] = (5e-4, 2e-3)
    held_out: int = 100  # training questions a task, not learned here
    single_r: int = 64  # the rank of the one LoRA on all tasks; 0 leaves it out
    single_epochs: tuple[int, ...] = (1, 3)
    training: AdapterTrainingArgs = field(
        default_factory=lambda: AdapterTrainingArgs(schedule="warmup_stable_decay", batch_size=8)
    )
    answers: AnswerArgs = field(default_factory=lambda: AnswerArgs(likelihoods=False))

    def __post_init__(self) -> None:
        if not self.epochs or list(self.epochs) != sorted(set(self.epochs)) or self.epochs[0] < 1:
            raise ValueError(f"CurveArgs.epochs are whole numbers that rise, from 1 on; got {self.epochs}")
        if not all(rate > 0 for rate in self.learning_rates) or not all(num > 0 for num in self.single_epochs):
            raise ValueError(
                f"CurveArgs.learning_rates and single_epochs must be positive, got {self.learning_rates} and "
                f"{self.single_epochs}"
            )
        if self.training.schedule != "warmup_stable_decay":
            raise ValueError(f"CurveArgs.training.schedule is warmup_stable_decay, got {self.training.schedule!r}")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place on a curve: `kind` is "own" (an adapter a task) or "lora-r64" (one for all)."""

    kind: str
    learning_rate: float
    epochs: int

    def folder(self, out: Path) -> Path:
        """Where its adapters and answers lie."""
        return out / self.kind / f"lr-{self.learning_rate:g}" / f"epochs-{self.epochs}"


def held_out(task: Task, num: int) -> Task:
    """The task with `num` of its training examples, drawn at random, in the place of its test questions.

    A question that is also among those that remain is not asked.

    Raises:
        TaskError: if nothing is left to learn.
    """
    if len(task.train) <= num:
        raise TaskError(f"{task.name} has {len(task.train)} training examples; hold out fewer than that, not {num}")
    drawn = set(random.Random(f"held out of {task.name}").sample(range(len(task.train)), num))
    learned = tuple(example for i, example in enumerate(task.train) if i not in drawn)
    prompts = {same_prompt(example.prompt) for example in learned}
    asked = tuple(task.train[i] for i in sorted(drawn) if same_prompt(task.train[i].prompt) not in prompts)
    return replace(task, train=learned, test=asked)


def learning_curve(
    model: str | Path,
    tasks: Sequence[Task],
    out: Path,
    args: CurveArgs | None = None,
    *,
    infos: Mapping[str, TaskInfo] | None = None,
    on_progress: OnProgress = unseen,
) -> Path:
    """Trains and answers every point into the folder `out`, or goes on with it; gives the record's path.

    The record is written again after each point, so that it can be read before the last.

    Raises:
        RecordError: if `out` holds a run with other settings.
        TaskError: if a task has too few training examples.
    """
    args, infos = args or CurveArgs(), infos or {}
    tasks = [held_out(task, args.held_out) for task in tasks]
    kinds = {task.name: kind_of(task, infos) for task in tasks}
    check_scoring(kinds.values())
    kept = {**asdict(args), "training": args.training.identity()}
    settings = {"format": FORMAT, "model": Path(str(model)).name, "data": data_hash(tasks), "args": as_json(kept)}
    check_settings(out, settings, CurveArgs())
    base, tokenizer = load_base(model, dtype=kept_dtype(out))
    settings |= {"model_hash": model_hash(base), "dtype": dtype_of(base)}
    check_settings(out, settings, CurveArgs())
    keep_settings(out, settings)
    environments = Environments(out)
    rows = []
    for point in points(args):
        rows.append(_measure(base, tokenizer, tasks, kinds, out, point, args, on_progress))
        environments.keep()
        record = {**settings, "kinds": kinds, **environments.summary(), "rows": rows}
        write_json(out / "record.json", record)
    return out / "record.json"


def points(args: CurveArgs) -> Iterator[Point]:
    """All points in the order in which they are measured: own adapters first, all rates at a length."""
    for kind, lengths in ((OWN, args.epochs), (SINGLE, args.single_epochs if args.single_r else ())):
        for epochs in lengths:
            for rate in args.learning_rates:
                yield Point(kind=kind, learning_rate=rate, epochs=epochs)


def _measure(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    kinds: Mapping[str, str],
    out: Path,
    point: Point,
    args: CurveArgs,
    on_progress: OnProgress,
) -> dict[str, Any]:
    folder = point.folder(out)
    training = replace(args.training, learning_rate=point.learning_rate, epochs=point.epochs)
    learned: Sequence[Task] = tasks
    if point.kind == SINGLE:
        training = replace(training, r=args.single_r)
        learned = [Task(name=SINGLE, train=tuple(e for task in tasks for e in task.train), test=())]
    trained = {}
    for task in learned:
        stage = f"{task.name}, {point.epochs} epochs at {point.learning_rate:g}"
        trained[task.name] = train_adapter(
            base,
            tokenizer,
            task,
            folder / "adapters" / task.name,
            training,
            trunk=folder.parent / f".{task.name}.trunk",
            on_progress=staged(on_progress, stage),
        )
        on_progress(Progress(stage, 1, 1))
    questions, _ = batches(base, tokenizer, list(tasks), args.answers)
    evaluation = Evaluation(tasks, kinds, questions, args.answers)
    method = METHODS[SINGLE if point.kind == SINGLE else "oracle"]
    engine = load(base, tokenizer=tokenizer, adapters={name: found.path for name, found in trained.items()})
    try:
        evaluation.answer(engine, [method], folder, on_progress=on_progress)
    finally:
        engine.detach()
    record = evaluation.record()
    return {
        **asdict(point),
        "seconds": {name: found.seconds for name, found in trained.items()},
        "losses": {name: found.final_loss for name, found in trained.items()},
        "scores": record.scores[method.name],
        "intervals": record.intervals[method.name],
        "mean": round(float(np.mean([_main(own) for own in record.scores[method.name].values()])), 5),
    }


def _main(scores: Mapping[str, float]) -> float:
    """Accuracy where the task is of choice, and ROUGE-L elsewhere."""
    return scores["accuracy"] if "accuracy" in scores else scores["rougeL"]
