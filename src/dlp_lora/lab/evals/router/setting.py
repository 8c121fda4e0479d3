"""The setting, shared by the scenarios: data, tokenizer, the measured router, and further trained routers."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tokenizers import Tokenizer

from dlp_lora.engine.loading import load_router
from dlp_lora.errors import TaskError
from dlp_lora.kept import Kept, read_kept
from dlp_lora.lab.evals.answers import data_hash
from dlp_lora.lab.evals.router.measures import Reading
from dlp_lora.lab.evals.router.samples import Question, Sample, questions, whole
from dlp_lora.progress import OnProgress, Progress, staged, unseen
from dlp_lora.router import CONFIG_FILE, Router, router_hash
from dlp_lora.router.questions import read_held, route
from dlp_lora.tasks.manifest import TaskInfo, kind_of
from dlp_lora.tasks.task import Task
from dlp_lora.training.router import REPORT_FILE, RouterTrainingArgs, train_router

BATCH = 128
MAIN = "main"  # the name of the router that is measured


@dataclass(frozen=True, kw_only=True)
class RouterBenchArgs:
    """How much is measured, and how the routers are trained that the scenarios need."""

    per_task: int = 100  # test questions of a task, at most
    cuts: tuple[int, ...] = (8, 16, 32, 64)  # tokens
    conversations: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9, 10)  # questions
    serial: tuple[int, ...] = (3, 5, 10)  # questions
    splits: int = 2  # routers that are trained without a fifth of the tasks
    added: tuple[int, ...] = (1, 5, 10)  # tasks at once
    examples: tuple[int | None, ...] = (8, 32, 128, None)  # of an added task; None is all
    tries: int = 5  # tasks that are added one at a time
    shares: tuple[float, ...] = (0.02, 0.1)  # of the examples of generative tasks that a skewed mixture keeps
    synthetic: int = 1000  # tasks
    left_out: int = 10  # tasks that routers without training are made without
    draws: int = 5  # of these tasks
    encoder: str | None = None  # of routers without training; None is the installed default
    adapters: str | None = None  # folder of the tasks' adapters, for routers that read these
    model: str | None = None  # their base model; None is the default one
    training: RouterTrainingArgs = field(default_factory=RouterTrainingArgs)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_task < 1:
            raise ValueError(f"RouterBenchArgs.per_task must be at least 1, got {self.per_task}")
        for name in ("conversations", "serial"):
            if any(n < 2 for n in getattr(self, name)):
                raise ValueError(f"RouterBenchArgs.{name} must be 2 or more questions each, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A router and its training time; None if it is unknown."""

    router: Router
    seconds: float | None

    @property
    def num_parameters(self) -> int | None:
        """The number of the router's parameters, if it is known."""
        found: int | None = getattr(self.router, "num_parameters", None)
        return found


class Setting:
    """Data, settings and routers; a router is trained when it is first asked for, and kept in `folder` if there is one.

    Raises:
        TaskError: if the router does not know one of the tasks, or no task has test examples.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        tokenizer: Tokenizer,
        args: RouterBenchArgs,
        *,
        router: Trained | None = None,
        extra: Sequence[Task] = (),
        manifest: Mapping[str, TaskInfo] | None = None,
        folder: Path | None = None,
        on_progress: OnProgress = unseen,
    ) -> None:
        self.tasks = tuple(tasks)
        self.extra = tuple(task for task in extra if task.name not in {t.name for t in tasks})
        self.kinds = {task.name: kind_of(task, manifest) for task in tasks}
        infos = manifest or {}
        self.labels = {task.name: infos[task.name].paper_name or task.name for task in tasks if task.name in infos}
        self.tokenizer = tokenizer
        self.args = args
        self.folder = folder
        self.on_progress = on_progress
        self.given = router
        self._trained: dict[str, Trained] = {}
        if not self.asked:
            raise TaskError("no task has test examples to measure the router on; add test.jsonl files")
        unknown = [t.name for t in tasks if router and t.name not in router.router.names]
        if unknown:
            raise TaskError(
                f"the router does not know {', '.join(unknown)}; leave --router out to train one on these tasks, "
                "or give them as --extra to see whether it abstains"
            )

    @cached_property
    def asked(self) -> list[Question]:
        """The test questions."""
        return questions(self.tasks, limit=self.args.per_task)

    @cached_property
    def asked_outside(self) -> list[Question]:
        """The test questions of the extra tasks."""
        return questions(self.extra, limit=self.args.per_task)

    @cached_property
    def main(self) -> Trained:
        """The router that is measured."""
        return self.given or self.train(MAIN, self.tasks)

    @property
    def known(self) -> Trained | None:
        """The router that is measured, if it was given or is trained already."""
        return self.given or self._trained.get(MAIN)

    @cached_property
    def whole(self) -> Reading:
        """The measured router's results for the whole prompts."""
        return self.read(whole(self.asked))

    @property
    def num_tasks(self) -> int:
        """How many tasks have test questions."""
        return len({q.task for q in self.asked})

    def train(self, name: str, tasks: Sequence[Task]) -> Trained:
        """Trains a router on tasks, once for each name; one that was kept from other tasks or settings is replaced."""
        if name not in self._trained:
            key = _hash(self.args.training, data_hash(tasks), self.tokenizer.to_str())
            kept = Kept(self.folder / name / REPORT_FILE, key) if self.folder else None
            if kept and kept.values and (kept.file.parent / CONFIG_FILE).is_file():
                self._trained[name] = read_trained(kept.file.parent)
            else:
                self._trained[name] = self._train(name, tasks, kept)
        return self._trained[name]

    def read(self, samples: Sequence[Sample], router: Router | None = None) -> Reading:
        """Runs a router, by default the measured one, on samples of known or unknown tasks.

        The label of a task that it does not know is -1.
        """
        router = router or self.main.router
        score = getattr(router, "scores", None)
        probabilities, scores = [], []
        for i in range(0, len(samples), BATCH):
            contexts = [sample.context for sample in samples[i : i + BATCH]]
            probabilities.append(router.probabilities(contexts))
            scores.append(probabilities[-1].amax(dim=1) if score is None else score(contexts))
            self.on_progress(Progress("route", min(i + BATCH, len(samples)), len(samples)))
        rows, given = (torch.cat(parts).double().numpy() for parts in (probabilities, scores))
        return _reading(router.names, samples, rows, given)

    def decide(self, samples: Sequence[Sample]) -> Reading:
        """Asks the measured router about samples as an engine does, which looks into prompts that may not fit.

        The score of a text is the probability that any adapter fits.
        """
        router = self.main.router
        rows = []
        for i, sample in enumerate(samples):
            found = route(partial(read_held, router), sample.context)
            rows.append([found[name] for name in router.names])
            self.on_progress(Progress("decide", i + 1, len(samples)))
        return _reading(router.names, samples, np.array(rows))

    def key(self) -> str:
        """The identity of this setting, so that no record mixes two: data, settings and router."""
        given = router_hash(self.given.router) if self.given else None
        return _hash(self.args, data_hash(self.tasks), data_hash(self.extra), self.tokenizer.to_str(), given)

    def _train(self, name: str, tasks: Sequence[Task], kept: Kept | None) -> Trained:
        start = time.perf_counter()
        told = staged(self.on_progress, f"train {name}")
        router, _ = train_router(tasks, self.tokenizer, self.args.training, on_progress=told)
        seconds = round(time.perf_counter() - start, 2)
        if kept:
            router.save_pretrained(kept.file.parent)
            kept.put(seconds=seconds)
        return Trained(router=router, seconds=seconds)


def read_trained(folder: str | Path) -> Trained:
    """Reads a router folder, and from the report in it how long its training took."""
    return Trained(router=load_router(folder), seconds=read_kept(Path(folder) / REPORT_FILE).get("seconds"))


def _reading(
    names: tuple[str, ...],
    samples: Sequence[Sample],
    rows: Float[np.ndarray, "samples adapters"],
    scores: Float[np.ndarray, " samples"] | None = None,
) -> Reading:
    """A router's results for samples; without scores, a sample's score is the probability that any adapter fits."""
    index = {name: i for i, name in enumerate(names)}
    fits = rows.sum(axis=1)
    return Reading(
        names=names,
        labels=np.array([index.get(sample.task, -1) for sample in samples]),
        probabilities=rows / fits.clip(min=1e-12)[:, None],
        fits=fits,
        scores=fits if scores is None else scores,
    )


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
