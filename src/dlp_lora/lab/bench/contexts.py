"""The context benchmark: the cost of a switch in a long text, under each KV policy, compared with a sentence."""

import time
from typing import Any, get_args

import torch

from dlp_lora.engine.cache import cache_argument, cache_of
from dlp_lora.engine.engine import Engine
from dlp_lora.lab.bench.agreement import check_paths
from dlp_lora.lab.bench.case import Benchmark, Case, Row
from dlp_lora.lab.bench.models import base_model, engine_with
from dlp_lora.lab.bench.switch import SwitchArgs
from dlp_lora.lab.bench.timing import Run, interleave, synchronise
from dlp_lora.policy import KVPolicy, Mixture

SENTENCE = 25  # tokens
PASSES_A_ROUND = 4


def _measure(case: Case, args: SwitchArgs) -> list[Row]:
    engine = engine_with(case, num_adapters=2 * args.selected, selected=args.selected)
    check_paths(engine, base_model(case), case.prompts()[0])
    names = engine.bank.names
    halves = [Mixture(dict.fromkeys(part, 1 / len(part))) for part in (names[::2], names[1::2])]
    ways: dict[str, KVPolicy | None] = {"no switch": None, **{policy: policy for policy in get_args(KVPolicy)}}
    runs: dict[str, Run] = {}
    for length in args.context:
        ids = case.long_prompts(1, length)["input_ids"]
        for way, policy in ways.items():
            runs[f"{length} tokens, {way}"] = _steps(engine, ids, halves, policy)
    times = interleave(runs, rounds=args.rounds, scenario=case.scenario, on_progress=case.on_progress)
    rows: list[Row] = []
    for length in args.context:
        token_ms = times.median(f"{length} tokens, no switch", "pass_ms")
        for way in ways:
            name = f"{length} tokens, {way}"
            switch_ms = max(0.0, times.median(name, "pass_ms") - token_ms) if ways[way] else 0.0
            rows.append(
                {
                    "name": name,
                    "context": length,
                    **times.spread(name, "pass_ms"),
                    "extra_ms": round(switch_ms, 3),
                    "over_sentence": round(switch_ms / (SENTENCE * token_ms), 3),
                }
            )
    return rows


bench_contexts = Benchmark(
    name="switch_context",
    args=SwitchArgs,
    measure=_measure,
    num_adapters=lambda args: 2 * args.selected,
    does_not_measure="the router and the policy, which cost the same under each KV policy",
)
"""Measures a decoding step after each number of tokens: without a switch, and with one under each KV policy."""


def _steps(engine: Engine, ids: torch.Tensor, mixtures: list[Mixture], policy: KVPolicy | None) -> Run:
    """Takes steps over one cache, which grows by a token each; each of them switches, unless there is no policy."""
    state: dict[str, Any] = {"turn": 0}

    def step(mixture: Mixture) -> None:
        with engine.fixed(mixture), engine.using(kv_policy=policy or "keep"):
            engine.model(ids[:, -1:], **cache_argument(state["cache"]), use_cache=True)

    @torch.no_grad()
    def run(i: int) -> dict[str, float]:
        if "cache" not in state:
            with engine.fixed(mixtures[0]):
                state["cache"] = cache_of(engine.model(ids, use_cache=True, logits_to_keep=1))
        seconds = 0.0
        for _ in range(PASSES_A_ROUND):
            state["turn"] += policy is not None
            start = time.perf_counter()
            step(mixtures[state["turn"] % 2])
            synchronise(engine.model.device)
            seconds += time.perf_counter() - start
        return {"pass_ms": seconds * 1e3 / PASSES_A_ROUND}

    return run
