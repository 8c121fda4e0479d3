"""Timing side by side: variants take turns in one process, and a ratio is formed within a round.

A slow moment of the machine then hits both sides of a ratio. What is done in steps, as tokens are decoded, takes turns
step by step. Each round begins with another variant, so that none always comes after the same one; the first round
warms up.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from statistics import median

import torch

from dlp_lora.progress import OnProgress, Progress, unseen

BASE = "base"

Run = Callable[[int], Mapping[str, float]]
"""Measures one round, of that number; gives milliseconds by quantity."""
Stepwise = Callable[[int, Callable[[], None]], None]
"""Runs the round of this number, and calls its argument after every step."""


@dataclass(frozen=True)
class Times:
    """Milliseconds by variant, quantity and round."""

    each: Mapping[str, Mapping[str, Sequence[float]]]

    def median(self, name: str, quantity: str) -> float:
        """A variant's median over the rounds."""
        return round(median(self.each[name][quantity]), 4)

    def ratio(self, name: str, quantity: str, over: str = BASE) -> dict[str, float]:
        """The median of a variant's ratios over another in the same round, with the smallest and the largest."""
        ratios = [a / b for a, b in zip(self.each[name][quantity], self.each[over][quantity], strict=True)]
        return _spread("ratio", ratios)

    def spread(self, name: str, quantity: str) -> dict[str, float]:
        """A variant's median over the rounds, with the smallest and the largest."""
        return _spread(quantity, self.each[name][quantity])


def synchronise(device: torch.device) -> None:
    """Waits for all that was asked of a device: a GPU works on while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    variants: Mapping[str, Run], *, rounds: int, scenario: str = "", on_progress: OnProgress = unseen
) -> Times:
    """Runs the variants in turn, `rounds` times after one round to warm up."""
    names = list(variants)
    each: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            for quantity, ms in variants[name](i).items():
                if i > 0:
                    each[name].setdefault(quantity, []).append(ms)
        on_progress(Progress(scenario, i, rounds))
    return Times(each)


def interleave_steps(
    variants: Mapping[str, Stepwise], *, rounds: int, scenario: str = "", on_progress: OnProgress = unseen
) -> Times:
    """Runs the variants side by side, one step of each in turn: `first_ms` is the first step, `step_ms` the mean of the
    others, `all_ms` the sum."""
    names = list(variants)
    each: dict[str, dict[str, list[float]]] = {name: {"first_ms": [], "step_ms": [], "all_ms": []} for name in names}
    for i in range(rounds + 1):
        order = names[i % len(names) :] + names[: i % len(names)]
        steps = _in_turns({name: variants[name] for name in order}, i)
        if i > 0:
            for name, (first, *others) in steps.items():
                each[name]["first_ms"].append(first * 1e3)
                each[name]["step_ms"].append(sum(others) / len(others) * 1e3)
                each[name]["all_ms"].append((first + sum(others)) * 1e3)
        on_progress(Progress(scenario, i, rounds))
    return Times(each)


def _spread(quantity: str, values: Sequence[float]) -> dict[str, float]:
    found = {quantity: median(values), f"{quantity}_min": min(values), f"{quantity}_max": max(values)}
    return {key: round(value, 4) for key, value in found.items()}


def _in_turns(variants: Mapping[str, Stepwise], i: int) -> dict[str, list[float]]:
    turns = {name: _Turn(run, i) for name, run in variants.items()}
    while any(not turn.is_done for turn in turns.values()):
        for turn in turns.values():
            if not turn.is_done:
                turn.take()
    # Work after the last step, such as the sampling of the last token, is not a step.
    return {name: turn.seconds[:-1] for name, turn in turns.items()}


class _Turn:
    """A variant in a separate thread, which runs only in its turn."""

    def __init__(self, run: Stepwise, i: int) -> None:
        self.seconds: list[float] = []
        self.is_done = False
        self._error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        # In this context: a mixture may be merged or fixed around the measurement.
        self._thread = threading.Thread(target=copy_context().run, args=(self._run, run, i), daemon=True)
        self._thread.start()

    def take(self) -> None:
        """Lets it do one step, and notes how long that took."""
        start = time.perf_counter()
        self._go.release()
        self._back.acquire()
        self.seconds.append(time.perf_counter() - start)
        if self._error is not None:
            raise self._error

    def _run(self, run: Stepwise, i: int) -> None:
        self._go.acquire()
        try:
            run(i, self._yield)
        except BaseException as error:
            self._error = error
        self.is_done = True
        self._back.release()

    def _yield(self) -> None:
        self._back.release()
        self._go.acquire()
