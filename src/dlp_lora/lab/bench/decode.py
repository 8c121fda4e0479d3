"""The decode benchmark: time per generated token of DLP-LoRA and of PEFT over the plain base model.

Sentence switching is live: the router, the policy and the fusing are inside the time. Beside the plain base stands a
base with the same stacked products as ours, and one with prepacked weights, so that the price of the adapters alone is
seen.
"""

from dataclasses import dataclass
from typing import Any

from dlp_lora.lab.bench.agreement import Twin, check_paths
from dlp_lora.lab.bench.case import Batch, Benchmark, Case, Dtypes, NewTokens, NumAdapters, Prepacked, Row
from dlp_lora.lab.bench.decoding import DecodingArgs, decoding_rows
from dlp_lora.lab.bench.models import (
    AGAIN,
    PEFT_MIXED,
    PEFT_ONE,
    PREPACKED,
    STACKED,
    base_model,
    engine_with,
    peft_many,
    peft_one,
    stacked_base,
)
from dlp_lora.lab.bench.timing import BASE


@dataclass(frozen=True, kw_only=True)
class DecodeArgs(DecodingArgs):
    """The settings."""

    num_adapters: NumAdapters = 26
    batch: Batch = 1
    new_tokens: NewTokens = 64
    dtypes: Dtypes = ("bfloat16", "float32")
    prepacked: Prepacked = True


def _measure(case: Case, args: DecodeArgs) -> list[Row]:
    base, one, stacked = base_model(case), peft_one(case), stacked_base(case)
    engine = engine_with(case, selected=args.selected)
    prompts = case.prompts(args.batch)
    twins = {STACKED: Twin(stacked, {}), PEFT_ONE: Twin(one, {case.names[0]: 1.0})}
    given: dict[str, dict[str, Any]] = {}
    if args.batch > 1:
        num_rows = min(args.batch, len(case.names))
        names = [case.names[i % num_rows] for i in range(args.batch)]
        mixed, given[PEFT_MIXED] = peft_many(case, num_rows), {"adapter_names": names}
        twins[PEFT_MIXED] = Twin(mixed, [{name: 1.0} for name in names], given[PEFT_MIXED])
    check_paths(engine, base, prompts[0], twins)
    variants = {
        BASE: base,
        AGAIN: base_model(case),
        STACKED: stacked,
        f"dlp-lora, {args.selected} of {args.num_adapters}": engine,
        PEFT_ONE: one,
        **({PEFT_MIXED: mixed} if given else {}),
    }
    if args.prepacked and case.device.type == "cpu":
        ours = engine_with(case, selected=args.selected, prepack=True)
        variants[PREPACKED] = stacked_base(case, prepack=True)
        variants[f"dlp-lora, prepacked, {args.selected} of {args.num_adapters}"] = ours
        check_paths(ours, base, prompts[0], {**twins, PREPACKED: Twin(variants[PREPACKED], {})})
    rows = decoding_rows(case, variants, prompts, new_tokens=args.new_tokens, rounds=args.rounds, given=given)
    return list(rows.values())


bench_decode = Benchmark(
    name="decode",
    args=DecodeArgs,
    measure=_measure,
    num_adapters=lambda args: args.num_adapters,
    does_not_measure="prefill beyond the first token's time, trained adapters' answers",
)
"""Measures decoding."""
