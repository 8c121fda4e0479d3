"""New adapters for a trained router, in seconds: it recognises them by their examples, without training."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dlp_lora.bank.adapter_files import check_adapter_name
from dlp_lora.engine.bundle import Bundle, read_bundle, write_bundle
from dlp_lora.engine.loading import load_router
from dlp_lora.errors import BundleError, RouterError, TrainingError
from dlp_lora.router import Context, MiniMLP
from dlp_lora.router.nearness import Nearness
from dlp_lora.router.neighbours import Neighbours
from dlp_lora.router.recall import Recall
from dlp_lora.tasks.task import Task
from dlp_lora.training.contexts import routable

MAX_EXAMPLES = 128  # of a new task, for comparison with prompts
MIN_LEFT_OUT = 4  # with fewer examples the accuracy is too uncertain


def add_tasks(router: MiniMLP, tasks: Sequence[Task], *, seed: int = 0) -> MiniMLP:
    """Returns a router that also knows these tasks; the old router does not change.

    If a task has many examples, some are drawn with `seed`.

    Raises:
        TrainingError: if a task is known already, or has no training examples.
        RouterError: if the router does not know the variation within its tasks; train it again.
    """
    for task in tasks:
        if task.name in router.names:
            raise TrainingError(f"the router knows {task.name!r} already; remove it first, or choose another name")
    if router.neighbours is None:
        raise RouterError(
            "no adapter can join this router: it was trained by an earlier version, or not at all; train it again"
        )
    rng = random.Random(seed)
    prompts = {}
    for task in map(routable, tasks):
        examples = rng.sample(task.train, min(MAX_EXAMPLES, len(task.train)))
        with torch.no_grad():
            prompts[task.name] = router.prompts([example.prompt for example in examples])
    return _with(router, router.trained, router.near, router.neighbours.joined(prompts), router.recall)


def remove_tasks(router: MiniMLP, names: Sequence[str]) -> MiniMLP:
    """Returns a router without some tasks; it distinguishes the others as before.

    Raises:
        RouterError: if it does not know one of them, or no task would remain.
    """
    if unknown := [name for name in names if name not in router.names]:
        raise RouterError(f"the router does not know {unknown[0]!r}; it knows {', '.join(router.names)}")
    trained = [name for name in router.trained if name not in names]
    near, neighbours, recall = router.near, router.neighbours, router.recall
    kept = [router.trained.index(name) for name in trained]
    if near is not None:
        near = near.only(kept)
    if recall is not None:
        recall = recall.only(kept)
    if neighbours is not None:
        neighbours = neighbours.only([name for name in neighbours.names if name not in names])
    return _with(router, trained, near, neighbours, recall)


@dataclass(frozen=True, kw_only=True)
class Extension:
    """The result of adding a task to a bundle. `accuracy` comes from a fifth of the examples, which a first try leaves
    out; None if there are too few. The final router has all examples.
    """

    names: tuple[str, ...]
    num_examples: int
    accuracy: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Gives it as JSON data."""
        return dict(self.__dict__)


def add_to_bundle(path: str | Path, task: Task, adapter: str | Path, *, seed: int = 0) -> Extension:
    """Puts an adapter, named after its task, into a bundle; the router learns it from the task's examples.

    Raises:
        AdapterError: if a mixture cannot name the adapter.
        BundleError: if the bundle has no router.
        TrainingError: if the router knows such a name already, or there is no example.
        RouterError: if the router is no mini-MLP.
    """
    check_adapter_name(task.name, adapter)
    bundle, router = _opened(path)
    task = routable(task)
    start = time.perf_counter()
    accuracy = None
    shuffled = random.Random(seed).sample(task.train, len(task.train))
    left_out, rest = shuffled[: (num := len(shuffled) // 5)], tuple(shuffled[num:])
    if len(left_out) >= MIN_LEFT_OUT:
        tried = add_tasks(router, [replace(task, train=rest)], seed=seed)
        found = tried.probabilities([Context(example.prompt) for example in left_out]).argmax(dim=-1)
        accuracy = (found == len(router.names)).float().mean().item()
    router = add_tasks(router, [task], seed=seed)
    _rewrite(path, bundle, router, {**bundle.adapters, task.name: Path(adapter)})
    return Extension(
        names=router.names,
        num_examples=len(task.train),
        accuracy=accuracy,
        seconds=round(time.perf_counter() - start, 2),
    )


def remove_from_bundle(path: str | Path, name: str) -> tuple[str, ...]:
    """Removes an adapter from a bundle and its router; returns the remaining names.

    Raises:
        BundleError: if the bundle has no router.
        RouterError: if there is no such adapter, no other one, or the router is no mini-MLP.
    """
    bundle, router = _opened(path)
    router = remove_tasks(router, [name])
    _rewrite(path, bundle, router, {n: folder for n, folder in bundle.adapters.items() if n != name})
    return router.names


def _opened(path: str | Path) -> tuple[Bundle, MiniMLP]:
    bundle = read_bundle(path)
    if bundle.router is None:
        raise BundleError(f"{path} has no router to teach; train one with train-router")
    router = load_router(bundle.router)
    if not isinstance(router, MiniMLP):
        raise RouterError(
            f"the router of {path} is a {type(router).__name__}, and only a MiniMLP learns adapters later; "
            "make the router and the bundle again"
        )
    return bundle, router


def _rewrite(path: str | Path, bundle: Bundle, router: MiniMLP, adapters: dict[str, Path]) -> None:
    write_bundle(
        path,
        base=bundle.base,
        adapters=adapters,
        router=router,
        settings=bundle.settings,
    )


def _with(
    router: MiniMLP,
    trained: Sequence[str],
    near: Nearness | None,
    neighbours: Neighbours | None,
    recall: Recall | None,
) -> MiniMLP:
    """The router with some of its trained adapters, and joined ones."""
    other = MiniMLP(
        trained,
        router.tokenizer,
        router.config,
        calibration=router.calibration,
        near=near,
        neighbours=neighbours,
        recall=recall,
    )
    kept = [router.trained.index(name) for name in trained]
    parts = ("near.", "neighbours.", "recall.")
    state = {key: tensor for key, tensor in router.state_dict().items() if not key.startswith(parts)}
    rows = {key: state[key][kept] for key in ("head.weight", "head.bias")}
    other.load_state_dict({**other.state_dict(), **state, **rows})
    return other.eval()
