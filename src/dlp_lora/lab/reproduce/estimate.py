"""How long a run still takes: its stages and what it says of them in, seconds out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlp_lora.lab.reproduce.args import Stage
from dlp_lora.progress import Progress


@dataclass
class _Seen:
    """What was seen of a stage: the share that was done, and when, at first and last."""

    first: float
    since: float
    last: float
    until: float


class Estimate:
    """How long the stages that are left take, by how long others of their kind took in this run."""

    def __init__(self, stages: Sequence[Stage], *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.stages, self.clock = tuple(stages), clock
        self._seen: dict[str, _Seen] = {}

    def note(self, now: Progress) -> None:
        """Takes in what the run says."""
        share, at = now.done / now.total if now.total else 1.0, self.clock()
        seen = self._seen.setdefault(now.stage, _Seen(share, at, share, at))
        seen.last, seen.until = share, at

    @property
    def num_done(self) -> int:
        """How many stages are done."""
        return sum(seen.last >= 1 for seen in self._seen.values())

    def seconds_left(self) -> tuple[float, bool]:
        """How long the rest takes, and whether all of it is in that: not before a stage of each kind has been seen."""
        spent: dict[str, list[float]] = {}
        for stage in self.stages:
            seen = self._seen.get(stage.name)
            if seen is not None and seen.last > seen.first:
                known = spent.setdefault(stage.kind, [0.0, 0.0])
                known[0] += seen.until - seen.since
                known[1] += stage.size * (seen.last - seen.first)
        total, whole = 0.0, True
        for stage in self.stages:
            left = stage.size * (1 - self._seen[stage.name].last if stage.name in self._seen else 1.0)
            if left and (known := spent.get(stage.kind, [])):
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
