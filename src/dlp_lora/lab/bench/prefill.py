"""The prefill benchmark: time to read a prompt, over the plain base model, routing and fusing included."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, cast

import torch
from torch import Tensor

from dlp_lora.engine.engine import Engine
from dlp_lora.lab.bench.agreement import Twin, check_paths, check_sentences
from dlp_lora.lab.bench.case import (
    AdapterBenchArgs,
    Batch,
    Benchmark,
    Case,
    Dtypes,
    NumAdapters,
    Prepacked,
    Rounds,
    Row,
)
from dlp_lora.lab.bench.memory import Memory, counted
from dlp_lora.lab.bench.models import (
    AGAIN,
    PEFT_MIXED,
    PEFT_ONE,
    base_model,
    engine_with,
    peft_many,
    peft_one,
    with_gradients,
)
from dlp_lora.lab.bench.timing import BASE, Run, interleave, synchronise
from dlp_lora.router import MiniMLP

CHECKED_LENGTH = 64  # tokens of the prompts on which paths are compared


@dataclass(frozen=True, kw_only=True)
class PrefillArgs(AdapterBenchArgs):
    """The settings."""

    rounds: Rounds = 5
    num_adapters: NumAdapters = 26
    batch: Batch = 4
    length: Annotated[int, "Tokens of each prompt."] = 512
    dtypes: Dtypes = ("bfloat16", "float32")
    prepacked: Prepacked = True


def _measure(case: Case, args: PrefillArgs) -> list[Row]:
    inputs = case.long_prompts(args.batch, args.length)
    names, k = case.names, args.selected
    engine, base, one = engine_with(case, selected=k), base_model(case), with_gradients(peft_one(case))
    num_rows = min(args.batch, len(names))
    mixed: Any = with_gradients(peft_many(case, num_rows))
    row_names = [names[i % num_rows] for i in range(args.batch)]
    mixture = dict.fromkeys(names[:k], 1 / k)
    mixtures = [{names[(i * k + j) % len(names)]: 1 / k for j in range(k)} for i in range(args.batch)]
    twins = {
        PEFT_ONE: Twin(one, {names[0]: 1.0}),
        PEFT_MIXED: Twin(mixed, [{name: 1.0} for name in row_names], {"adapter_names": row_names}),
    }
    checked = case.long_prompts(args.batch, min(args.length, CHECKED_LENGTH))
    check_paths(engine, base, checked, twins)
    check_sentences(engine, base, checked)
    variants: dict[str, tuple[Any, Run]] = {
        BASE: (base, _forward(base, inputs)),
        AGAIN: (base, _forward(base_model(case), inputs)),
        f"dlp-lora, routed, {k} of {args.num_adapters} a row": (
            engine,
            _forward(engine.model, inputs, under=partial(_routed, engine)),
        ),
        "dlp-lora, one mixture": (engine, _forward(engine.model, inputs, under=partial(engine.fixed, mixture))),
        "dlp-lora, another mixture a row": (
            engine,
            _forward(engine.model, inputs, under=partial(engine.fixed, mixtures)),
        ),
        f"dlp-lora, routed, {k} of {args.num_adapters} a sentence": (
            engine,
            _forward(engine.model, inputs, under=partial(_routed, engine, prompt_routing="sentences")),
        ),
        PEFT_ONE: (one, _forward(one, inputs)),
        PEFT_MIXED: (mixed, _forward(mixed, {**inputs, "adapter_names": row_names})),
    }
    if args.prepacked and case.device.type == "cpu":
        ours = engine_with(case, selected=k, prepack=True)
        check_paths(ours, base, checked, twins)
        check_sentences(ours, base, checked)
        for what, settings in (("row", {}), ("sentence", {"prompt_routing": "sentences"})):
            under = partial(_routed, ours, **settings)
            variants[f"dlp-lora, prepacked, {k} of {args.num_adapters} a {what}"] = (
                ours,
                _forward(ours.model, inputs, under=under),
            )
    errors = {} if case.dtype == "float32" else _logit_errors(case, args, variants, checked, mixture, mixtures)
    memory: dict[str, Memory] = {}
    runs = {name: counted(name, v, run, memory, case.device) for name, (v, run) in variants.items()}
    times = interleave(runs, rounds=args.rounds, scenario=case.scenario, on_progress=case.on_progress)
    return [
        {
            "name": name,
            "ms": times.median(name, "ms"),
            **times.ratio(name, "ms"),
            "tokens_per_s": round(args.batch * args.length * 1e3 / times.median(name, "ms"), 1),
            **memory[name].columns(memory[BASE]),
            "logit_error": errors.get(name),
        }
        for name in runs
    ]


bench_prefill = Benchmark(
    name="prefill",
    args=PrefillArgs,
    measure=_measure,
    num_adapters=lambda args: args.num_adapters,
    does_not_measure="decoding; all weights ask for gradients, as frozen ones make the head slow on CPUs",
)
"""Measures prefill."""


def _logit_errors(
    case: Case,
    args: PrefillArgs,
    variants: Mapping[str, tuple[Any, Run]],
    inputs: Mapping[str, Any],
    mixture: Mapping[str, float],
    mixtures: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    """How far the logits of each prompt's last token are from those of the same variant in float32, of their size.

    Only the precision differs, so the base's error is the measure for ours.
    """
    wide, k = replace(case, dtype="float32"), args.selected

    def logits(own: Any, name: str) -> Tensor:
        under: Any = nullcontext()
        if "one mixture" in name:
            under = own.fixed(mixture)
        elif "another mixture a row" in name:
            under = own.fixed(mixtures)
        elif isinstance(own, Engine):
            under = _routed(own, prompt_routing="sentences" if "sentence" in name else "questions")
        with torch.no_grad(), under:
            found: Tensor = (own.model if isinstance(own, Engine) else own)(**inputs, logits_to_keep=1).logits
        return found.double()

    exact = {BASE: base_model(wide), PEFT_ONE: peft_one(wide), "dlp-lora": engine_with(wide, selected=k)}
    names = [name for name in variants if name in exact or name.startswith("dlp-lora")]
    found = {}
    for name in names:
        wanted = logits(exact[name if name in exact else "dlp-lora"], name)
        found[name] = round(float((logits(variants[name][0], name) - wanted).norm() / wanted.norm()), 5)
    return found


@contextmanager
def _routed(engine: Engine, **settings: Any) -> Iterator[None]:
    """Every round reads the same prompts, but the router must not know them."""
    router = cast(MiniMLP, engine.router)
    router._bags.clear()
    router._encode_piece.cache_clear()
    with engine.using(**settings):
        yield


def _forward(model: Any, inputs: Mapping[str, Any], *, under: Any = nullcontext) -> Run:
    @torch.no_grad()
    def run(i: int) -> Mapping[str, float]:
        with under():
            start = time.perf_counter()
            model(**inputs, use_cache=True, logits_to_keep=1)
            synchronise(inputs["input_ids"].device)
            return {"ms": (time.perf_counter() - start) * 1e3}

    return run
