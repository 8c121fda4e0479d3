"""Scenarios that train further routers: a Setting in, JSON data out."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlp_lora.lab.evals.router import samples
from dlp_lora.lab.evals.router.ceiling import ceiling, shared
from dlp_lora.lab.evals.router.measures import accuracy, rounded, summary
from dlp_lora.lab.evals.router.samples import Question, Sample, Walk
from dlp_lora.lab.evals.router.scenarios import outside_of, sentence_ms, skipped
from dlp_lora.lab.evals.router.setting import Setting
from dlp_lora.lab.evals.router.synthetic import MAX_TASKS, synthetic_tasks
from dlp_lora.progress import Progress
from dlp_lora.router import MiniMLP, Router
from dlp_lora.sentences import split
from dlp_lora.tasks.task import Task
from dlp_lora.training.extend import add_tasks, remove_tasks

MIDDLE = 50  # tasks: a size between the data's and all
MAX_LEARNED = 30_000  # samples that the ceiling learns from


def left_out(setting: Setting) -> dict[str, Any]:
    """Tasks that are left out of the training: does the router recognise their texts as foreign."""
    splits = _splits(setting)
    if not splits:
        return skipped(f"{len(setting.tasks)} tasks are too few to leave some out")
    found = {}
    for name, (kept, left) in splits.items():
        router = setting.train(name, kept).router
        limit = setting.args.per_task
        inside, outside = samples.questions(kept, limit=limit), samples.questions(left, limit=limit)
        if inside and outside:
            known, unknown = (setting.read(samples.whole(asked), router) for asked in (inside, outside))
            found[name] = {"accuracy": summary(known)["accuracy"], **outside_of(known, unknown, outside)}
    if not found:
        return skipped("the tasks to leave out have no test examples")
    return {
        "auroc": rounded(np.mean([own["auroc"] for own in found.values()])),
        "false_routes": rounded(np.mean([own["false_routes"] for own in found.values()])),
        "splits": found,
    }


def scale(setting: Setting) -> dict[str, Any]:
    """The data's tasks alone, with some of the extra tasks, and with all of them: the cost of more adapters."""
    everything = (*setting.tasks, *setting.extra)
    sizes = {len(setting.tasks), len(everything)}
    if len(setting.tasks) < MIDDLE < len(everything):
        sizes.add(MIDDLE)
    return {str(n): _scaled(setting, f"tasks-{n}", everything[:n]) for n in sorted(sizes)}


def synthetic(setting: Setting) -> dict[str, Any]:
    """A thousand synthetic tasks, each an action on a kind of text (see `synthetic.py`)."""
    texts = sorted({sentence for q in setting.asked for sentence in split(q.example.prompt)})
    tasks = synthetic_tasks(texts, num_tasks=min(setting.args.synthetic, MAX_TASKS), seed=setting.args.seed)
    return {str(len(tasks)): _scaled(setting, f"synthetic-{len(tasks)}", tasks)}


def extension(setting: Setting) -> dict[str, Any]:
    """Tasks are added to a router that was trained without them, from few examples or all; and taken away again."""
    rows = []
    for base in _bases(setting):
        before = setting.read(samples.whole(base.asked), base.router).right
        for num_added in setting.args.added:
            for num_examples in setting.args.examples:
                if num_added <= len(base.added):
                    rows.append(_extended(setting, base, num_added, num_examples, before))
    return {"add": rows, "remove": _removed(setting)} if rows else skipped("there are no further tasks to add")


def skew(setting: Setting) -> dict[str, Any]:
    """Generative tasks with few examples among multiple-choice ones with all of theirs (the paper's appendix A)."""
    starved = {task.name for task in setting.tasks if setting.kinds[task.name] == "qa"}
    if len({q.task in starved for q in setting.asked}) < 2:
        return skipped("all tasks are of one kind, generative or multiple-choice")
    found = {"1": _recalls(setting, setting.main.router, starved)}
    for share in setting.args.shares:
        tasks = [_reduced(task, share) if task.name in starved else task for task in setting.tasks]
        found[f"{share:g}"] = _recalls(setting, setting.train(f"skew-{share:g}", tasks).router, starved)
    return found


def ceilings(setting: Setting) -> dict[str, Any]:
    """How far the router is below a much larger classifier that learned each kind of sample, and no other."""
    if setting.num_tasks < 2:
        return skipped("one task is nothing to classify")
    train = samples.questions(setting.tasks, train=True)
    found = {}
    for i, (kind, draw) in enumerate(_kinds(setting).items()):
        setting.on_progress(Progress("ceiling", i, len(_kinds(setting))))
        learned = [sample for walk in draw(train, True) for sample in walk]
        learned = random.Random(setting.args.seed).sample(learned, min(MAX_LEARNED, len(learned)))
        found[kind] = _below(setting, setting.main.router, learned, draw(setting.asked, False))
    if setting.extra:
        everything = (*setting.tasks, *setting.extra)
        router = setting.train(f"tasks-{len(everything)}", everything).router
        learned = samples.whole(samples.questions(everything, train=True))
        asked = samples.whole(samples.questions(everything, limit=setting.args.per_task))
        found[f"whole, {len(everything)} tasks"] = _below(setting, router, learned, [(sample,) for sample in asked])
    return found


def _below(setting: Setting, router: Router, learned: Sequence[Sample], walks: Sequence[Walk]) -> dict[str, Any]:
    asked, groups = [s for walk in walks for s in walk], np.repeat(np.arange(len(walks)), list(map(len, walks)))
    ours, theirs = setting.read(asked, router).right, ceiling(learned, asked, seed=setting.args.seed)
    return {
        "router": accuracy(ours, groups),
        "ceiling": accuracy(theirs, groups),
        "gap": rounded(theirs.mean() - ours.mean()),
        "shared_text": rounded(shared(learned, asked)),
        "num_learned": len(learned),
    }


@dataclass(frozen=True, kw_only=True)
class _Base:
    """A router, test questions of its tasks, and tasks that it does not know."""

    name: str
    router: MiniMLP
    asked: list[Question]
    added: tuple[Task, ...]


def _kinds(setting: Setting) -> dict[str, Callable[[Sequence[Question], bool], list[Walk]]]:
    """How each kind of sample is drawn, to learn from or to be asked; a sample by itself is a walk of one."""
    n, seed = min(5, setting.num_tasks), setting.args.seed

    def alone(found: Sequence[Sample]) -> list[Walk]:
        return [(sample,) for sample in found]

    def sentences(asked: Sequence[Question], learns: bool) -> list[Walk]:
        seeds = range(seed + 1, seed + 4) if learns else (seed,)
        return alone([sample for s in seeds for sample in samples.random_sentence(asked, seed=s)])

    def serial(asked: Sequence[Question], learns: bool) -> list[Walk]:
        if learns:  # a walk has many sentences, and each holds all that came before it
            asked = random.Random(seed).sample(asked, min(MAX_LEARNED // 5, len(asked)))
        return samples.serial(asked, n, seed=seed)

    return {
        "whole": lambda asked, _: alone(samples.whole(asked)),
        "first sentence": lambda asked, _: alone(samples.first_sentence(asked)),
        "random sentence": sentences,
        f"serial {n}": serial,
    }


def _splits(setting: Setting) -> dict[str, tuple[list[Task], list[Task]]]:
    """By name the tasks that are kept and left out; no task is left out twice."""
    tasks = list(setting.tasks)
    random.Random(f"left out {setting.args.seed}").shuffle(tasks)
    k = max(1, round(len(tasks) / 5))
    if len(tasks) - k < 2:
        return {}
    parts = [tasks[i * k : (i + 1) * k] for i in range(min(setting.args.splits, len(tasks) // k))]
    # In their original order, because the training must not depend on the shuffle.
    return {f"without-{i}": ([t for t in setting.tasks if t not in left], left) for i, left in enumerate(parts)}


def _scaled(setting: Setting, name: str, tasks: Sequence[Task]) -> dict[str, Any]:
    is_main = [task.name for task in tasks] == [task.name for task in setting.tasks]
    trained = setting.main if is_main else setting.train(name, tasks)
    asked = samples.questions(tasks, limit=setting.args.per_task)
    return {
        **summary(setting.read(samples.whole(asked), trained.router)),
        "train_seconds": trained.seconds,
        "num_parameters": trained.num_parameters,
        "sentence_ms": sentence_ms(trained.router, asked)["sentence_ms"],
    }


def _bases(setting: Setting) -> Iterator[_Base]:
    """Routers trained without some tasks, which are added; and the measured one, to which extra tasks are."""
    found = {name: (setting.train(name, kept).router, kept, left) for name, (kept, left) in _splits(setting).items()}
    if setting.extra:
        found["extra"] = (setting.main.router, list(setting.tasks), list(setting.extra))
    for name, (router, kept, left) in found.items():
        if isinstance(router, MiniMLP):
            asked = samples.questions(kept, limit=setting.args.per_task)
            yield _Base(name=name, router=router, asked=asked, added=tuple(task for task in left if task.test))


def _extended(
    setting: Setting, base: _Base, num_added: int, num_examples: int | None, before: np.ndarray
) -> dict[str, Any]:
    """As many tries as there are different tasks for, at most `tries`; no task is in two of them."""
    rng = random.Random(f"extension {num_added} {setting.args.seed}")
    num_tries = min(setting.args.tries, len(base.added) // num_added)
    drawn = rng.sample(base.added, num_tries * num_added)
    tries = [drawn[i : i + num_added] for i in range(0, len(drawn), num_added)]
    new, fits, old, seconds, false = [], [], [], [], []
    for i, tasks in enumerate(tries):
        setting.on_progress(Progress(f"extension {base.name}", i, len(tries)))
        start = time.perf_counter()
        router = add_tasks(base.router, [_few(task, num_examples, rng) for task in tasks], seed=setting.args.seed)
        seconds.append(time.perf_counter() - start)
        asked = samples.questions(tasks, limit=setting.args.per_task)
        reading = setting.read(samples.whole(asked), router)
        new.append(reading.right)
        fits.append(reading.fits > 0.5)
        old.append(setting.read(samples.whole(base.asked), router).right)
        if foreign := samples.whole([q for q in setting.asked_outside if q.task not in router.names]):
            readings = [setting.read(foreign, own) for own in (base.router, router)]
            false.append([float((reading.fits > 0.5).mean()) for reading in readings])
    return {
        "base": base.name,
        "added": num_added,
        "examples": num_examples,
        "tasks": [task.name for tasks in tries for task in tasks],
        "new": accuracy(np.concatenate(new)),
        "new_fit": rounded(np.concatenate(fits).mean()),
        "old": accuracy(np.concatenate(old), np.tile(np.arange(len(base.asked)), len(old))),
        "lost": rounded(before.mean() - np.mean([own.mean() for own in old])),
        "add_seconds": rounded(np.mean(seconds)),
        # Of extra tasks that the router knows neither before nor after.
        "false_routes": [rounded(share) for share in np.mean(false, axis=0)] if false else None,
        "false_routes_by_try": [rounded(after) for _, after in false],
    }


def _removed(setting: Setting) -> list[dict[str, Any]]:
    rng = random.Random(f"removal {setting.args.seed}")
    rows: list[dict[str, Any]] = []
    if not isinstance(setting.main.router, MiniMLP):
        return rows
    for count in [n for n in setting.args.added if n <= len(setting.tasks) - 2]:
        gone = {task.name for task in rng.sample(setting.tasks, count)}
        asked = samples.whole([q for q in setting.asked if q.task not in gone])
        start = time.perf_counter()
        router = remove_tasks(setting.main.router, sorted(gone))
        seconds = time.perf_counter() - start
        before, after = setting.read(asked).right, setting.read(asked, router).right
        rows.append(
            {
                "removed": sorted(gone),
                "others": accuracy(after),
                "lost": rounded(before.mean() - after.mean()),
                "remove_seconds": rounded(seconds),
            }
        )
    return rows


def _few(task: Task, num_examples: int | None, rng: random.Random) -> Task:
    if num_examples is None or num_examples >= len(task.train):
        return task
    return replace(task, train=tuple(rng.sample(task.train, num_examples)))


def _reduced(task: Task, share: float) -> Task:
    return replace(task, train=task.train[: max(2, round(share * len(task.train)))])


def _recalls(setting: Setting, router: Router, starved: set[str]) -> dict[str, Any]:
    found = {}
    for kind, asked in {
        "whole": samples.whole(setting.asked),
        "random sentence": samples.random_sentence(setting.asked, seed=setting.args.seed),
    }.items():
        right = setting.read(asked, router).right
        few = np.array([s.task in starved for s in asked])
        found[kind] = {"starved": accuracy(right[few]), "others": accuracy(right[~few])}
    return found
