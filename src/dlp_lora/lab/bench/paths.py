"""The paths benchmark: time per generated token of every way to compute a mixture, over the plain base model.

Stacked, concatenated and prepacked fused layers, and compiled steps, switch at every sentence; merged weights cannot.
Beside the compiled steps stands the base compiled in the same way, beside the prepacked layers the base prepacked.
"""

import os
import shutil
from dataclasses import dataclass
from typing import Annotated, Any

from transformers import StaticCache

from dlp_lora.errors import DLPLoRAError
from dlp_lora.lab.bench.agreement import Twin, check_paths
from dlp_lora.lab.bench.case import Benchmark, Case, NumAdapters, Prepacked, Row
from dlp_lora.lab.bench.decoding import DecodingArgs, decoding_rows, generation
from dlp_lora.lab.bench.models import (
    AGAIN,
    COMPILED,
    PEFT_ONE,
    PREPACKED,
    STACKED,
    base_model,
    compiled_base,
    concatenated,
    engine_with,
    peft_one,
    stacked_base,
)
from dlp_lora.lab.bench.timing import BASE

COMPILERS = ("g++", "clang++")


@dataclass(frozen=True, kw_only=True)
class PathsArgs(DecodingArgs):
    """The settings."""

    num_adapters: NumAdapters = 26
    compiled: Annotated[bool, "Compiled steps, too; on a CPU they need a C++ compiler."] = True
    prepacked: Prepacked = True


def _measure(case: Case, args: PathsArgs) -> list[Row]:
    if args.compiled and args.device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise DLPLoRAError(
            f"compiled steps need a C++ compiler, and there is none ({' or '.join(COMPILERS)}): "
            "install one or pass --no-compiled"
        )
    prompts, base, one = case.prompts(), base_model(case), peft_one(case)
    twins = {PEFT_ONE: Twin(one, {case.names[0]: 1.0})}
    stacked, apart, merged = (engine_with(case, selected=args.selected) for _ in range(3))
    concatenated(apart)
    for engine in (stacked, apart):
        check_paths(engine, base, prompts[0], twins)
    check_paths(merged, base, prompts[0], twins, under=merged.merged)
    variants: dict[str, Any] = {
        BASE: base,
        AGAIN: base_model(case),
        STACKED: stacked_base(case),
        "dlp-lora, stacked": stacked,
        "dlp-lora, concatenated": apart,
        "dlp-lora, merged": merged,
        PEFT_ONE: one,
    }
    if args.prepacked and case.device.type == "cpu":
        packed = engine_with(case, selected=args.selected, prepack=True)
        check_paths(packed, base, prompts[0], twins)
        variants[PREPACKED] = stacked_base(case, prepack=True)
        variants["dlp-lora, prepacked"] = packed
    given: dict[str, dict[str, Any]] = {}
    if args.compiled:
        length = max(prompt["input_ids"].shape[1] for prompt in prompts) + args.new_tokens
        static = {"cache_implementation": "static", "max_cache_len": length, "disable_compile": True}
        compiled = engine_with(case, selected=args.selected)
        compiled.compile(max_rank=args.selected * args.r)
        check_paths(
            compiled, base, prompts[0], twins, make_cache=lambda: StaticCache(base.config, max_cache_len=length)
        )
        for name, variant in ((COMPILED, compiled_base(case)), ("dlp-lora, compiled", compiled)):
            variants[name], given[name] = variant, static
            # Once before memory is counted, because compiling does not belong to a token.
            own = variant.model if variant is compiled else variant
            generation(own, [{**prompts[0], **static}], 3)(0, lambda: None)
    with merged.merged(dict.fromkeys(case.names[: args.selected], 1 / args.selected)):
        rows = decoding_rows(case, variants, prompts, new_tokens=args.new_tokens, rounds=args.rounds, given=given)
    return list(rows.values())


bench_paths = Benchmark(
    name="paths",
    args=PathsArgs,
    measure=_measure,
    num_adapters=lambda args: args.num_adapters,
    does_not_measure="compiling itself; prompts, which run uncompiled",
)
"""Measures decoding by every path."""
