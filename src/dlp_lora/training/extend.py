"""New adapters for a trained router, in seconds: only the head learns, the rows of the others stay.

The router's own memory of the texts that it was trained on keeps the new rows from claiming them.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dlp_lora.bank.adapter_files import check_adapter_name
from dlp_lora.engine.bundle import Bundle, read_bundle, write_bundle
from dlp_lora.engine.loading import load_router
from dlp_lora.errors import BundleError, RouterError, TrainingError
from dlp_lora.router import Context, MiniMLP
from dlp_lora.router.nearness import Nearness
from dlp_lora.tasks.task import Task
from dlp_lora.training.contexts import MIX, routable
from dlp_lora.training.router import remember

NUM_STEPS = 300
LEARNING_RATE = 0.03
DECAY = 1e-3  # weight of the new rows' squares in the loss
NUM_CONTEXTS = 512  # drawn of each new task
COVERAGE = 0.98  # share of the new prompts that are to fit
MIN_LEFT_OUT = 4  # fewer examples say little about accuracy


def add_tasks(router: MiniMLP, tasks: Sequence[Task], *, seed: int = 0) -> MiniMLP:
    """Gives a router that knows the given tasks, too; the old one is left as it is.

    Raises:
        TrainingError: if a task is known already, or has no training examples.
        RouterError: if the router has no memory of its own tasks.
    """
    for task in tasks:
        if task.name in router.names:
            raise TrainingError(f"the router knows {task.name!r} already; remove it first, or choose another name")
    tasks = [routable(task) for task in tasks]
    if router.memory.shape[1] == 0:
        raise RouterError("the router was trained with memory=0, so nothing guards its adapters; train it again")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    # A conversation of one task says nothing of what comes before this one.
    mix = {kind: share for kind, share in MIX.items() if kind not in ("after_history", "serial")}
    num = max(NUM_CONTEXTS, router.memory.shape[1])
    seen = remember(router, [task.train for task in tasks], num, mix, rng)
    weight, bias = _fit_rows(router, seen)
    memory = torch.cat([router.memory, seen[:, : router.memory.shape[1]]])
    names = [*router.names, *(task.name for task in tasks)]
    rows = torch.cat([router.head.weight, weight]), torch.cat([router.head.bias, bias])
    near = router.near
    if near is not None:
        # Each new adapter reaches as far as its own prompts do; to lower the threshold would let in more for all.
        prompts = remember(router, [task.train for task in tasks], NUM_CONTEXTS, {"whole": 1.0}, rng)
        owners = (len(router.names) + torch.arange(len(tasks))).repeat_interleave(NUM_CONTEXTS)
        flat = prompts.flatten(0, 1)
        least = (router.calibration.fit_threshold or 0.0) - (flat @ rows[0].T + rows[1]).logsumexp(dim=-1)
        near = near.joined(prompts).reaching(flat, owners, least, coverage=COVERAGE)
    return _with_rows(router, names, *rows, memory, near)


def remove_tasks(router: MiniMLP, names: Sequence[str]) -> MiniMLP:
    """Gives a router that no longer knows some tasks; between the others it decides as before.

    Raises:
        RouterError: if it does not know one of them, or none would be left.
    """
    if unknown := [name for name in names if name not in router.names]:
        raise RouterError(f"the router does not know {unknown[0]!r}; it knows {', '.join(router.names)}")
    kept = [i for i, name in enumerate(router.names) if name not in names]
    left = [router.names[i] for i in kept]
    near = None if router.near is None else router.near.only(kept)
    return _with_rows(router, left, router.head.weight[kept], router.head.bias[kept], router.memory[kept], near)


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What a task that joined a bundle came to; `accuracy` is that of a fifth of the examples, left out for a first
    try (None where there are too few), before all of them were learned."""

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
        AdapterError: if no mixture could name the adapter.
        BundleError: if the bundle has no router.
        TrainingError: if the router knows such a name already, or there is no example.
        RouterError: if the router is no mini-MLP.
    """
    check_adapter_name(task.name, adapter)
    bundle, router = _opened(path)
    task = routable(task)
    start = time.perf_counter()
    accuracy = None
    left_out = task.train[::5]
    if len(left_out) >= MIN_LEFT_OUT:
        rest = tuple(example for i, example in enumerate(task.train) if i % 5)
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
    """Takes an adapter out of a bundle and its router; gives the names that are left.

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


def _fit_rows(
    router: MiniMLP, seen: Float[Tensor, "new contexts hidden"]
) -> tuple[Float[Tensor, "new hidden"], Float[Tensor, " new"]]:
    num_new, num_old, device = len(seen), len(router.names), seen.device
    features = torch.cat([router.memory.flatten(0, 1), seen.flatten(0, 1)])
    labels = torch.cat(
        [
            torch.arange(num_old).repeat_interleave(router.memory.shape[1]),
            num_old + torch.arange(num_new).repeat_interleave(seen.shape[1]),
        ]
    ).to(device)
    shares = 1 / labels.bincount()[labels].float()
    with torch.no_grad():
        known = router.head(features)
    weight = torch.zeros(num_new, features.shape[1], requires_grad=True, device=device)
    bias = torch.zeros(num_new, requires_grad=True, device=device)
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    for _ in range(NUM_STEPS):
        logits = torch.cat([known, features @ weight.T + bias], dim=1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        loss = (losses * shares).sum() / shares.sum() + DECAY * weight.square().sum() / num_new
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def _with_rows(
    router: MiniMLP, names: Sequence[str], weight: Tensor, bias: Tensor, memory: Tensor, near: Nearness | None
) -> MiniMLP:
    other = MiniMLP(names, router.tokenizer, router.config, calibration=router.calibration)
    rows = {"head.weight": weight, "head.bias": bias, "memory": memory}
    kept = {name: tensor for name, tensor in router.state_dict().items() if not name.startswith("near.")}
    other.memory = torch.zeros_like(memory)
    other.load_state_dict({**kept, **rows})
    other.near = near
    return other.eval()
