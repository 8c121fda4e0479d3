"""How far a long piece of work is, and who is told."""

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
"""Is told, as often as something is done."""


def unseen(now: Progress) -> None:
    """Tells nobody."""


def staged(on_progress: OnProgress, stage: str) -> OnProgress:
    """Tells the same under another stage's name."""
    return lambda now: on_progress(replace(now, stage=stage))
