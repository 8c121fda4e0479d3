"""The scores of answers without a model, for tasks whose manifest does not have them."""

from collections import Counter
from dataclasses import replace

import numpy as np

from dlp_lora.lab.evals.metrics import exact_match, normalise
from dlp_lora.tasks.catalog import CATALOG
from dlp_lora.tasks.manifest import TaskInfo
from dlp_lora.tasks.task import Task


def described(task: Task, info: TaskInfo, kind: str) -> TaskInfo:
    """Completes a manifest: the paper's name from the catalog, chance and majority from the examples."""
    listed = CATALOG.get(task.name)
    chance, majority = (_chance(task), _majority(task)) if kind == "mcq" else (None, None)
    return replace(
        info,
        paper_name=info.paper_name or (listed.paper_name if listed else None),
        chance=chance if info.chance is None else info.chance,
        majority=majority if info.majority is None else info.majority,
    )


def _chance(task: Task) -> float | None:
    """The accuracy of a random choice; None if a test question has no choices."""
    if not task.test or not all(example.choices for example in task.test):
        return None
    shares = [np.mean([exact_match(c, example.accepted) for c in example.choices or ()]) for example in task.test]
    return round(float(np.mean(shares)), 4)


def _majority(task: Task) -> float | None:
    """The accuracy of always giving the most common training answer."""
    answers = Counter(normalise(example.answer) for example in task.train)
    if not answers or not task.test:
        return None
    (most_common, _), *_ = answers.most_common(1)
    return round(float(np.mean([exact_match(most_common, example.accepted) for example in task.test])), 4)
