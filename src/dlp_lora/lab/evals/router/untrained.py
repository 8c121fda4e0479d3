"""Routers without training: which prompts do they keep, with some tasks left out at random, and which send away."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dlp_lora.errors import RouterError
from dlp_lora.lab.evals.router.measures import rounded
from dlp_lora.lab.evals.router.samples import Question, questions
from dlp_lora.lab.evals.router.scenarios import skipped
from dlp_lora.lab.evals.router.setting import Setting
from dlp_lora.progress import Progress
from dlp_lora.router.encoder import TextEncoder, default_encoder
from dlp_lora.router.everyday import everyday_prompts
from dlp_lora.router.prototypes import PrototypeRouter, embed

EXAMPLES = (1, 8, 32)  # of each task, that a router is made from
PROMPTS = 20  # test prompts of each task, at most

Embed = Callable[[str], Float[Tensor, " dim"]]


def untrained(setting: Setting) -> dict[str, Any]:
    """Routers of all tasks but some, made from a description or a few examples of each.

    `kept` are the prompts of which the router says that an adapter fits. Half of the everyday prompts, in turn, take
    part in making a router; their share is that of the other half.
    """
    num_left = setting.args.left_out
    if len(setting.tasks) < num_left + 2:
        return skipped(f"{len(setting.tasks)} tasks are too few to leave {num_left} out")
    try:
        encoder = TextEncoder.from_pretrained(setting.args.encoder or default_encoder())
    except RouterError as error:
        return skipped(str(error))

    @cache  # the same text is read for many routers
    def unit(text: str) -> Tensor:
        with torch.no_grad():
            return embed(encoder, [text])[0].cpu()

    known = descriptions()
    made_from = {str(num): _examples(setting, num) for num in EXAMPLES}
    if all(task.name in known for task in setting.tasks):
        made_from = {"description": {task.name: [known[task.name]] for task in setting.tasks}, **made_from}
    return {
        "left_out": num_left,
        "made_from": {name: _drawn(setting, name, texts, encoder, unit) for name, texts in made_from.items()},
    }


def descriptions() -> dict[str, str]:
    """One sentence on each task of the paper, and on 41 others of BIG-bench."""
    text = (files("dlp_lora.lab.evals.router") / "descriptions.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text)
    return found


def _examples(setting: Setting, num: int) -> dict[str, list[str]]:
    prompts: dict[str, list[str]] = {}
    for q in questions(setting.tasks, limit=num, train=True):
        prompts.setdefault(q.task, []).append(q.example.prompt)
    return prompts


def _drawn(
    setting: Setting, name: str, texts: Mapping[str, Sequence[str]], encoder: TextEncoder, unit: Embed
) -> dict[str, Any]:
    rng = random.Random(f"untrained {setting.args.seed}")  # the same tasks, whatever the texts
    asked = questions(setting.tasks, limit=min(PROMPTS, setting.args.per_task))
    draws = []
    for draw in range(num_draws := setting.args.draws):
        setting.on_progress(Progress(f"untrained {name}", draw, num_draws))
        left = {task.name for task in rng.sample(setting.tasks, setting.args.left_out)}
        some = {name: own for name, own in texts.items() if name not in left}
        draws.append(_shares(some, asked, draw % 2, encoder, unit))
    return {"draws": draws, "mean": {key: rounded(np.mean([own[key] for own in draws])) for key in draws[0]}}


def _shares(
    texts: Mapping[str, Sequence[str]], asked: Sequence[Question], half: int, encoder: TextEncoder, unit: Embed
) -> dict[str, float]:
    def units(some: Sequence[str]) -> Tensor:
        return torch.stack([unit(text) for text in some])

    router = PrototypeRouter.from_units(
        {name: units(own) for name, own in texts.items()}, encoder, everyday=units(everyday_prompts()[half::2])
    )
    rows = router.of_units(units([q.example.prompt for q in asked]))
    index = {name: i for i, name in enumerate(router.names)}
    labels = torch.tensor([index.get(q.task, -1) for q in asked])
    kept, inside = rows.sum(dim=1) > 0.5, labels >= 0
    everyday = router.of_units(units(everyday_prompts()[1 - half :: 2])).sum(dim=1)
    return {
        "kept": _share(kept[inside]),
        "kept_and_right": _share((kept & (rows.argmax(dim=1) == labels))[inside]),
        "left_out_to_base": _share(~kept[~inside]),
        "everyday_to_base": _share(everyday <= 0.5),
    }


def _share(which: Tensor) -> float:
    return rounded(which.float().mean().item())
