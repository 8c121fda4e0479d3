"""How long a run still takes: its steps and what they say they are doing in, seconds out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlp_lora.lab.evals.methods import SINGLE
from dlp_lora.lab.reproduce.args import Event

Step = tuple[int, str]
"""A seed and the name of a step."""


@dataclass
class _Seen:
    """What was seen of a step: the share that was done, and when, at first and last."""

    first: float
    since: float
    last: float
    until: float


class Estimate:
    """How long what is left takes, by how long the same kind of step took in this run.

    Adapters are one kind, and the one LoRA on all tasks is as many of them as there are tasks; the answers of a method
    are another, so are teacher-forced ones, and prompts of several questions.
    """

    def __init__(
        self, steps: Sequence[Step], *, tasks: Sequence[str], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.steps, self.tasks, self.clock = tuple(steps), frozenset(tasks), clock
        self._seen: dict[Step, _Seen] = {}

    def note(self, now: Event) -> None:
        """Takes in what the run says."""
        share, at = now.done / now.total if now.total else 1.0, self.clock()
        seen = self._seen.setdefault((now.seed, now.step), _Seen(share, at, share, at))
        seen.last, seen.until = share, at

    @property
    def num_done(self) -> int:
        """How many steps are done."""
        return sum(seen.last >= 1 for seen in self._seen.values())

    def seconds_left(self) -> tuple[float, bool]:
        """How long the rest takes, and whether all of it is in that: not before a step of each kind has been seen."""
        spent: dict[str, list[float]] = {}
        for step, seen in self._seen.items():
            done = self._size(step) * (seen.last - seen.first)
            if done > 0:
                known = spent.setdefault(self._kind(step), [0.0, 0.0])
                known[0] += seen.until - seen.since
                known[1] += done
        total, whole = 0.0, True
        for step in self.steps:
            left = self._size(step) * (1 - self._seen[step].last if step in self._seen else 1.0)
            if left and (known := spent.get(self._kind(step), [])):
                total += left * known[0] / known[1]
            elif left:
                whole = False
        return total, whole

    def __str__(self) -> str:
        seconds, whole = self.seconds_left()
        if seconds < 60:
            return "less than a minute left" if whole and seconds else ""
        minutes = round(seconds / 60)
        text = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
        return f"{'about' if whole else 'at least'} {text} left"

    def _kind(self, step: Step) -> str:
        name = step[1]
        if name in self.tasks or name == SINGLE:
            return "adapter"
        return name.partition(":")[0].partition("-")[0]

    def _size(self, step: Step) -> float:
        return len(self.tasks) if step[1] == SINGLE else 1.0
