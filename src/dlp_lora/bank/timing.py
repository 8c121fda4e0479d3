"""Timing: the ways of a model's layers, each tried on the layers themselves, and the paths that follow."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from dlp_lora.bank.cpu import check_prepacking, prepack
from dlp_lora.bank.group import Group
from dlp_lora.bank.paths import Paths, Way, Ways, choose
from dlp_lora.errors import ModelError

NUM_ROWS = (1, 8)
RANK = 24  # of the pairs that are timed: three adapters of rank 8
NUM_ROUNDS = 6  # after the one that warms up
LIMIT_S = 0.8  # no round begins after it
SAMPLE_MB = 16  # of weights in each group, so that they come from memory as in a pass
HOPELESS = 1.5  # times as long as the fastest in the first round: not tried again


@dataclass
class Trial:
    """One group that is timed, with its layers: `layers[i]` are the fused siblings of layer `i`."""

    group: Group
    layers: Sequence[Sequence[nn.Module]]
    is_touched: bool  # an adapter changes it
    seconds: dict[int, dict[Way, list[float]]] = field(default_factory=dict)  # by number of rows and way


@torch.no_grad()
def time_paths(trials: Sequence[Trial]) -> Paths:
    """Times each way in each group, for one row and for eight, and chooses; leaves the groups with nothing active.

    Takes about a second; layers that take longer for a product are tried less often, but at least twice.
    """
    start = time.perf_counter()
    trials = list({trial.group.label: trial for trial in trials}.values())
    can_prepack = _can_prepack([trial.group for trial in trials])
    inputs: dict[tuple[int, int], Tensor] = {}
    for trial in trials:
        if can_prepack:
            trial.group.prepack(prepack, layers=range(_num_sampled(trial.group)))
        weight: Tensor = trial.layers[0][0].weight  # type: ignore[assignment]
        for rows in NUM_ROWS:
            inputs[rows, trial.group.d_in] = weight.new_ones(rows, 1, trial.group.d_in).detach()
            trial.seconds[rows] = {way: [] for way in _ways(trial, rows, can_prepack=can_prepack)}
    for i in range(NUM_ROUNDS + 1):
        _run_round(trials, inputs)
        if i == 0:
            _prune(trials)
        elif i > 1 and time.perf_counter() - start > LIMIT_S:
            break
    for trial in trials:
        trial.group.clear()
    return Paths(tuple((trial.group.label, Ways(*map(choose, trial.seconds.values()))) for trial in trials))


def _ways(trial: Trial, num_rows: int, *, can_prepack: bool) -> Iterator[Way]:
    yield "plain"
    if trial.is_touched or len(trial.group.modules) > 1:
        yield "stacked"
    yield "columns"
    if num_rows == 1:
        yield "halves"
    if can_prepack:
        yield "prepacked"


def _run_round(trials: Sequence[Trial], inputs: Mapping[tuple[int, int], Tensor]) -> None:
    """Takes each way through the layers once; groups take turns, so that no weight stays in a cache."""
    for rows in NUM_ROWS:
        for way in dict.fromkeys(way for trial in trials for way in trial.seconds[rows]):
            for trial in trials:
                if way in trial.seconds[rows]:
                    trial.seconds[rows][way].append(_time(trial, way, inputs[rows, trial.group.d_in]))


def _time(trial: Trial, way: Way, x: Tensor) -> float:
    """The median over layers of the seconds that all siblings take."""
    group = trial.group
    group.ways = Ways(way, way)
    group.rehearse(RANK if trial.is_touched else 0)
    layers = trial.layers[: _num_sampled(group)]
    if way == "plain" and not trial.is_touched:  # then they are not replaced
        layers = [[module.base_layer for module in siblings] for siblings in layers]  # type: ignore[misc]
    seconds = []
    for siblings in layers:
        start = time.perf_counter()
        for module in siblings:
            module(x)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _prune(trials: Sequence[Trial]) -> None:
    """Drops what warmed up, and the ways that are hopeless."""
    for trial in trials:
        for rows, by_way in trial.seconds.items():
            limit = HOPELESS * min(times[0] for times in by_way.values())
            trial.seconds[rows] = {way: [] for way, times in by_way.items() if way == "plain" or times[0] < limit}


def _num_sampled(group: Group) -> int:
    return max(1, min(group.num_layers, SAMPLE_MB * 2**20 // max(1, _base_nbytes(group) // group.num_layers)))


def _base_nbytes(group: Group) -> int:
    return group.num_layers * group.d_in * sum(group.d_outs) * group.buffers()[0].itemsize


def _can_prepack(groups: Sequence[Group]) -> bool:
    """Whether a second copy of all weights needs less than a quarter of the memory that is free, and is possible."""
    free = free_bytes()
    if free is None or sum(map(_base_nbytes, groups)) >= free / 4:
        return False
    try:
        check_prepacking(groups[0].buffers()[0])
    except ModelError:
        return False
    return True


def free_bytes() -> int | None:
    """The memory that this process may still take; None where the system does not say."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")  # of a container
    with suppress(OSError, ValueError):  # there is none, or it is "max"
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)
