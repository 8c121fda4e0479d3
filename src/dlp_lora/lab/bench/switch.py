"""The switch benchmark: the parts of a switch's cost, compared with PEFT's way to mix adapters."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import mean
from typing import Annotated, Any

from dlp_lora.engine.engine import Engine
from dlp_lora.errors import DLPLoRAError
from dlp_lora.lab.bench.agreement import Twin, check_paths
from dlp_lora.lab.bench.case import AdapterBenchArgs, Benchmark, Case, Row
from dlp_lora.lab.bench.memory import growth_mb
from dlp_lora.lab.bench.models import base_model, engine_with, peft_many
from dlp_lora.lab.bench.timing import Run, interleave, synchronise
from dlp_lora.policy import Mixture, TopK
from dlp_lora.router import Context

PARTS = ("route_ms", "policy_ms", "fuse_ms", "switch_ms")
SWITCHES_A_ROUND = 8
MAX_GROWTH_MB = 8.0  # over all switches of a bank; each writes tens of megabytes a hundred times
PEFT_MIXTURE = "mixture"


@dataclass(frozen=True, kw_only=True)
class SwitchArgs(AdapterBenchArgs):
    """The settings: mixtures of 1, 2, ... `selected` adapters are measured."""

    sizes: Annotated[tuple[int, ...], "Adapters in the bank."] = (10, 26, 100)
    num_switches: Annotated[int, "Switches during which nothing may grow or move."] = 1000
    context: Annotated[tuple[int, ...], "Instead: a switch after so many tokens, under each KV policy."] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.sizes) <= self.selected:
            raise ValueError(f"a bank of {min(self.sizes)} has no other mixture of {self.selected}; give larger sizes")


def _measure(case: Case, args: SwitchArgs) -> list[Row]:
    selected = range(1, args.selected + 1)
    engines = {size: engine_with(case, num_adapters=size, selected=args.selected) for size in args.sizes}
    peft = peft_many(case, args.selected + 1)
    mixture = _peft_switch(peft, case.names[: args.selected])
    base = base_model(case)
    for engine in engines.values():
        check_paths(engine, base, case.prompts()[0], {"PEFT's mixture": Twin(peft, mixture)})
    counts = {size: _check_steady(engine, case, args) for size, engine in engines.items()}
    ours = {f"dlp-lora, {k} of {size}": (engines[size], k) for size in args.sizes for k in selected}
    theirs = {f"peft weighted, {k}": k for k in selected}
    runs: dict[str, Run] = {name: _ours(engine, case, k) for name, (engine, k) in ours.items()}
    runs |= {name: _theirs(peft, case.names[: args.selected + 1], k) for name, k in theirs.items()}
    times = interleave(runs, rounds=args.rounds, scenario=case.scenario, on_progress=case.on_progress)
    rows = []
    for name, (engine, k) in ours.items():
        size = len(engine.bank)
        over = times.ratio(name, "switch_ms", over=f"peft weighted, {k}")["ratio"]
        parts = {part: times.median(name, part) for part in PARTS}
        row = {"name": name, "num_adapters": size, "selected": k, **parts, **times.spread(name, "switch_ms")}
        rows.append({**row, "over_peft": over, **counts[size]})
    for name, k in theirs.items():
        rows.append({"name": name, "selected": k, **times.spread(name, "switch_ms"), "over_peft": 1.0})
    return rows


bench_switch = Benchmark(
    name="switch",
    args=SwitchArgs,
    measure=_measure,
    num_adapters=lambda args: max(args.sizes),
    does_not_measure="PEFT's router, as it has none, and its deleting of the mixture before",
)
"""Measures switches."""


def context_at(texts: Sequence[str], turn: int) -> Context:
    """A router's context at the beginning of a sentence: a known prompt, and a new answer."""
    answer = "".join(f"That is good question number {turn}, in part {i}. " for i in range(turn % 5 + 1))
    return Context(texts[turn % len(texts)], answer, "The")


def switch(engine: Engine, context: Context, k: int, *, turn: int) -> dict[str, float]:
    """Switches to a mixture of `k` adapters; gives the milliseconds of each part.

    A router of random weights chooses nearly the same adapters every time: those of another `turn` are others.
    """
    router: Any = engine.router
    at = turn % len(router.names)
    names, policy = router.names[at:] + router.names[:at], TopK(k)
    start = time.perf_counter()
    probabilities = router.probabilities([context])[0].tolist()
    routed = time.perf_counter()
    mixture = policy(dict(zip(names, probabilities, strict=True)))
    chosen = time.perf_counter()
    engine.bank.fuse([mixture])
    synchronise(engine.model.device)
    end = time.perf_counter()
    seconds = (routed - start, chosen - routed, end - chosen, end - start)
    return {part: each * 1e3 for part, each in zip(PARTS, seconds, strict=True)}


def _ours(engine: Engine, case: Case, k: int) -> Run:
    turns = count()  # no answer is read twice

    def run(i: int) -> dict[str, float]:
        own = [next(turns) for _ in range(SWITCHES_A_ROUND)]
        each = [switch(engine, context_at(case.texts, turn), k, turn=turn) for turn in own]
        return {part: mean(times[part] for times in each) for part in PARTS}

    return run


def _theirs(peft: Any, names: Sequence[str], k: int) -> Run:
    def run(i: int) -> dict[str, float]:
        seconds = []
        for turn in range(i * SWITCHES_A_ROUND, (i + 1) * SWITCHES_A_ROUND):
            at = turn % len(names)
            peft.set_adapter(names[0])
            peft.delete_adapter(PEFT_MIXTURE)
            start = time.perf_counter()
            _peft_switch(peft, [*names[at:], *names[:at]][:k])
            synchronise(peft.device)
            seconds.append(time.perf_counter() - start)
        return {"switch_ms": mean(seconds) * 1e3}

    return run


def _peft_switch(peft: Any, names: Sequence[str]) -> Mixture:
    """Mixes adapters the way that adds their deltas exactly."""
    weights = [1 / len(names)] * len(names)
    peft.add_weighted_adapter(list(names), weights, PEFT_MIXTURE, combination_type="cat")
    peft.set_adapter(PEFT_MIXTURE)
    return Mixture(dict(zip(names, weights, strict=True)))


def _check_steady(engine: Engine, case: Case, args: SwitchArgs) -> dict[str, Any]:
    """Switches many times between mixtures of all sizes; counts allocations, moves and remaining memory."""
    groups = engine.bank.groups

    def go(num: int) -> None:
        for turn in range(num):
            switch(engine, context_at(case.texts, turn), turn % args.selected + 1, turn=turn)

    go(2 * len(case.texts))
    allocations = sum(group.num_allocations for group in groups)
    places = [buffer.data_ptr() for group in groups for buffer in group.buffers()]
    grown = growth_mb(case.device)
    go(args.num_switches)
    counts = {
        "num_switches": args.num_switches,
        "num_allocations": sum(group.num_allocations for group in groups) - allocations,
        "num_moved": sum(
            place != buffer.data_ptr()
            for place, buffer in zip(places, (b for group in groups for b in group.buffers()), strict=True)
        ),
        "growth_mb": grown(),
    }
    if counts["num_allocations"] or counts["num_moved"] or (counts["growth_mb"] or 0.0) > MAX_GROWTH_MB:
        raise DLPLoRAError(f"switching is not free of allocations: {counts}; no figures are given")
    return counts
