"""Timing: tries each way to multiply on a model's layers, and chooses the paths."""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from dlp_lora.bank.cpu import check_prepacking, prepack
from dlp_lora.bank.group import Group
from dlp_lora.bank.paths import Paths, Way, Ways, choose
from dlp_lora.errors import ModelError

NUM_ROWS = (1, 8, 64)  # of `Ways`: one, few, some
RANK = 24  # of the pairs that are timed: three adapters of rank 8
NUM_TURNS = 16
MIN_TURNS = 3
LIMIT_S = 0.08  # for one kind of layers and number of rows; after that, at most MIN_TURNS turns
SAMPLE_MB = 64  # of weights in each group
CACHES_MB = 64
HOPELESS = 1.5  # a way that takes so many times as long as the fastest at first is not tried again


@dataclass(frozen=True)
class Trial:
    """One group that is timed, with its layers: `layers[i]` are the fused siblings of layer `i`."""

    group: Group
    layers: Sequence[Sequence[nn.Module]]
    is_touched: bool  # an adapter changes it

    @property
    def num_rows(self) -> Sequence[int]:
        """The numbers of rows that are timed; the output layer reads only a few."""
        is_head = getattr(self.layers[0][0], "place", None) == "head"
        return NUM_ROWS[:-1] if is_head else NUM_ROWS

    @property
    def num_sampled(self) -> int:
        """How many of its layers are timed."""
        nbytes = _base_nbytes(self.group) // self.group.num_layers
        return min(self.group.num_layers, max(len(NUM_ROWS) * len(get_args(Way)), SAMPLE_MB * 2**20 // max(1, nbytes)))


@torch.no_grad()
def time_paths(trials: Sequence[Trial]) -> Paths:
    """Times each way in each group, for one row, few and some, and chooses; afterwards the groups have nothing active.

    This takes a second or two; if one layer takes long, each way gets three products.
    """
    trials = list({trial.group.label: trial for trial in trials}.values())
    can_prepack = _can_prepack([trial.group for trial in trials])
    if can_prepack:
        for trial in trials:
            trial.group.prepack(prepack, layers=range(trial.num_sampled))
    runs = [[_Run(trial, num_rows, can_prepack=can_prepack) for num_rows in trial.num_rows] for trial in trials]
    others = torch.empty(CACHES_MB * 2**18)  # float32
    for turn in range(NUM_TURNS):
        others.fill_(turn)  # removes the layers from the caches, as the rest of a model does
        for run in (run for of_trial in runs for run in of_trial):
            run.take_turn(turn)
    for trial in trials:
        trial.group.prepack(prepack, layers=())
        trial.group.clear()
    chosen = [_ways_of([choose(run.seconds) for run in of_trial]) for of_trial in runs]
    return Paths(tuple((trial.group.label, ways) for trial, ways in zip(trials, chosen, strict=True)))


class _Run:
    """The ways of one trial, for so many rows."""

    def __init__(self, trial: Trial, num_rows: int, *, can_prepack: bool) -> None:
        self._trial = trial
        weight: Tensor = trial.layers[0][0].weight  # type: ignore[assignment]
        self._x = weight.new_ones(num_rows, 1, trial.group.d_in).detach()
        ways = list(_ways(trial, num_rows, can_prepack=can_prepack))
        # In one turn no two ways, nor two numbers of rows, take the same layer.
        self._step = max(1, trial.num_sampled // (len(NUM_ROWS) * len(ways)))
        self._first = NUM_ROWS.index(num_rows) * len(ways) * self._step
        for way in ways:
            self._time(way, 0)  # to warm up
        first = {way: min(self._time(way, i + 1), self._time(way, i + 2)) for i, way in enumerate(ways)}
        limit = HOPELESS * min(first.values())
        self.seconds: dict[Way, list[float]] = {
            way: [] for way, seconds in first.items() if way == "plain" or seconds < limit
        }
        self._spent = 0.0

    def take_turn(self, turn: int) -> None:
        """Times each way once, unless enough time was spent; each way takes another layer, which is in no cache."""
        if turn >= MIN_TURNS and self._spent > LIMIT_S:
            return
        for i, way in enumerate(self.seconds):
            self.seconds[way].append(self._time(way, turn + self._first + i * self._step))
            self._spent += self.seconds[way][-1]

    def _time(self, way: Way, layer: int) -> float:
        """The seconds that the siblings of one layer take."""
        trial, x = self._trial, self._x
        siblings = trial.layers[layer % trial.num_sampled]
        if way == "plain" and not trial.is_touched:  # then they are not replaced
            siblings = [module.base_layer for module in siblings]  # type: ignore[misc]
        trial.group.ways = Ways.all(way)
        trial.group.rehearse(RANK if trial.is_touched else 0)
        start = time.perf_counter()
        for module in siblings:
            module(x)
        return time.perf_counter() - start


def _ways_of(chosen: Sequence[Way]) -> Ways:
    """The choices by number of rows; the last one is also for more rows."""
    one_row, few_rows, *more = chosen
    return Ways(one_row, few_rows, more[0] if more else few_rows)


def _ways(trial: Trial, num_rows: int, *, can_prepack: bool) -> Iterator[Way]:
    yield "plain"
    if trial.is_touched or len(trial.group.modules) > 1:
        yield "stacked"
    yield "columns"
    if num_rows == 1:
        yield "halves"
    if can_prepack:
        yield "prepacked"


def _base_nbytes(group: Group) -> int:
    return group.num_layers * group.d_in * sum(group.d_outs) * group.buffers()[0].itemsize


def _can_prepack(groups: Sequence[Group]) -> bool:
    """Whether a second copy of all weights is possible and needs less than a quarter of the free memory."""
    free = free_bytes()
    if free is None or sum(map(_base_nbytes, groups)) >= free / 4:
        return False
    try:
        check_prepacking(groups[0].buffers()[0])
    except ModelError:
        return False
    return True


def free_bytes() -> int | None:
    """The memory that this process may still take; None if the system has no such number."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")  # of a container
    with suppress(OSError, ValueError):  # there is none, or it is "max"
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits, default=None)
