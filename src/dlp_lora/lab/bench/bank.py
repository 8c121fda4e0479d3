"""The bank benchmark (Table 6): the cost of decoding and fusing with growing banks, in memory and on disk."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Annotated

from dlp_lora.engine.engine import Engine
from dlp_lora.errors import DLPLoRAError
from dlp_lora.lab.bench.agreement import Twin, check_paths
from dlp_lora.lab.bench.case import Benchmark, Case, Row
from dlp_lora.lab.bench.decoding import DecodingArgs, decoding_rows
from dlp_lora.lab.bench.memory import MB, growth_mb
from dlp_lora.lab.bench.models import AGAIN, PEFT_ONE, base_model, engine_with, peft_one
from dlp_lora.lab.bench.timing import BASE, synchronise
from dlp_lora.policy import Mixture

NUM_RECENT = 4  # mixtures that are in memory still, fused again to time a hit
NUM_HITS = 48


@dataclass(frozen=True, kw_only=True)
class BankArgs(DecodingArgs):
    """The settings; a bank with fewer than `selected` adapters fuses all of them."""

    sizes: Annotated[tuple[int, ...], "Adapters in memory."] = (1, 5, 10, 20, 50, 100)
    on_disk: Annotated[tuple[int, ...], "Adapters in their files."] = (1000,)
    budget_mb: Annotated[float, "Megabytes of them that are kept in memory."] = 64.0


def _measure(case: Case, args: BankArgs) -> list[Row]:
    banks: dict[str, tuple[int, float | None]] = {
        f"dlp-lora, {size} on disk": (size, args.budget_mb) for size in args.on_disk
    }
    banks |= {f"dlp-lora, {size}": (size, None) for size in args.sizes}
    base, one = base_model(case), peft_one(case)
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    engines: dict[str, Engine] = {}
    about: dict[str, Row] = {BASE: {"num_adapters": 0}, AGAIN: {"num_adapters": 0}}
    for name, (size, budget_mb) in banks.items():
        engines[name], about[name] = _open(case, size, args.selected, budget_mb)
        about[name]["share_of_parameters"] = round(engines[name].bank.num_parameters / num_parameters, 5)
        check_paths(engines[name], base, case.prompts()[0], {PEFT_ONE: Twin(one, {case.names[0]: 1.0})})
    variants = {BASE: base, AGAIN: base_model(case), **engines}
    rows = decoding_rows(case, variants, case.prompts(), new_tokens=args.new_tokens, rounds=args.rounds)
    order = sorted(rows, key=lambda name: about[name]["num_adapters"])
    return [{**rows[name], **about[name]} for name in order]


bench_bank = Benchmark(
    name="bank",
    args=BankArgs,
    measure=_measure,
    num_adapters=lambda args: max(args.sizes + args.on_disk),
    does_not_measure="trained adapters' answers, and disks: the files are in the system's cache",
)
"""Measures banks of several sizes side by side."""


def _open(case: Case, size: int, selected: int, budget_mb: float | None) -> tuple[Engine, Row]:
    """Loads a bank and fuses all its adapters in turn; returns the engine and the times."""
    base = base_model(case)
    grown = growth_mb(case.device)
    start = time.perf_counter()
    engine = engine_with(case, selected=selected, num_adapters=size, budget_mb=budget_mb, base=base)
    load_s = time.perf_counter() - start
    names, k = engine.bank.names, min(selected, size)
    mixtures = [Mixture(dict.fromkeys(names[i : i + k], 1 / k)) for i in range(0, size - k + 1, k)]
    first = [_fuse_ms(engine, mixture) for mixture in mixtures]
    num_misses, recent = engine.bank.store.num_misses, mixtures[-NUM_RECENT:]
    kept_mb = _kept_mb(engine)
    if budget_mb and kept_mb > budget_mb:
        raise DLPLoRAError(f"the bank keeps {kept_mb:.1f} MB under a budget of {budget_mb} MB; no figures are given")
    # The last mixture is still in the buffers, so two mixtures take turns.
    turns = recent if len(recent) > 1 else [*recent, Mixture({names[-1]: 1.0})]
    times = [(turn, _fuse_ms(engine, turn)) for _ in range(NUM_HITS // len(recent)) for turn in turns]
    hits = [ms for turn, ms in times if turn in recent]
    return engine, {
        "num_adapters": size,
        "budget_mb": budget_mb,
        "kept_mb": round(kept_mb, 3),
        "resident_mb": grown(),
        "load_s": round(load_s, 2),
        "num_misses": num_misses,
        "miss_ms": round(median(first), 3) if num_misses else None,
        "hit_ms": round(median(hits), 3) if size > 1 else None,  # the one mixture stays in the buffers
    }


def _kept_mb(engine: Engine) -> float:
    """Megabytes of the bank's adapters, without fused ones."""
    buffers = {tensor.data_ptr() for group in engine.bank.groups for tensor in group.buffers()}
    return sum(t.nbytes for t in engine.bank.tensors() if t.data_ptr() not in buffers) / MB


def _fuse_ms(engine: Engine, mixture: Mixture) -> float:
    engine.bank.forget()  # otherwise a fused mixture is not fused again
    start = time.perf_counter()
    engine.bank.fuse([mixture])
    synchronise(engine.model.device)
    return (time.perf_counter() - start) * 1e3
