"""The routers benchmark (Table 4): the mini-MLP beside an encoder of ALBERT's shape, alone and inside decoding."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from dlp_lora.lab.bench.agreement import check_paths
from dlp_lora.lab.bench.case import Benchmark, Case, NewTokens, NumAdapters, Row
from dlp_lora.lab.bench.decoding import DecodingArgs, decoding_rows
from dlp_lora.lab.bench.models import MakeRouter, albert, base_model, engine_with, mini_mlp
from dlp_lora.lab.bench.switch import context_at, switch
from dlp_lora.lab.bench.timing import BASE

ROUTERS: dict[str, MakeRouter] = {
    "dlp-lora, mini-MLP": mini_mlp,
    "dlp-lora, ALBERT (random weights)": albert,
}
NUM_SWITCHES = 16


@dataclass(frozen=True, kw_only=True)
class RoutersArgs(DecodingArgs):
    """The settings."""

    num_adapters: NumAdapters = 26
    new_tokens: NewTokens = 64


def _measure(case: Case, args: RoutersArgs) -> list[Row]:
    base = base_model(case)
    engines = {name: engine_with(case, selected=args.selected, router=make) for name, make in ROUTERS.items()}
    about: dict[str, Row] = {BASE: {}}
    for name, engine in engines.items():
        check_paths(engine, base, case.prompts()[0])
        router: Any = engine.router
        turns = range(2 * NUM_SWITCHES)
        each = [switch(engine, context_at(case.texts, turn), args.selected, turn=turn) for turn in turns]
        each = each[NUM_SWITCHES:]  # the first ones warm up
        about[name] = {
            "router_parameters": router.num_parameters,
            "route_ms": round(median(times["route_ms"] for times in each), 3),
            "switch_ms": round(median(times["switch_ms"] for times in each), 3),
        }
    variants = {BASE: base, **engines}
    rows = decoding_rows(case, variants, case.prompts(), new_tokens=args.new_tokens, rounds=args.rounds)
    return [{**rows[name], **about[name]} for name in rows]


bench_routers = Benchmark(
    name="routers",
    args=RoutersArgs,
    measure=_measure,
    num_adapters=lambda args: args.num_adapters,
    does_not_measure="how well routers choose: their weights are random, which cost what trained ones do",
)
"""Measures decoding with each router."""
