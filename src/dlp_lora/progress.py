"""Progress of long work: stage, steps done, and the function that receives it."""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """`done` of `total` in a stage, with a note on how it goes."""

    stage: str
    done: int
    total: int
    note: str = ""


OnProgress = Callable[[Progress], None]
"""A function that receives the progress after each step."""


def unseen(now: Progress) -> None:
    """Ignores the progress."""


def staged(on_progress: OnProgress, stage: str) -> OnProgress:
    """Reports the same progress under another stage's name."""
    return lambda now: on_progress(replace(now, stage=stage))
