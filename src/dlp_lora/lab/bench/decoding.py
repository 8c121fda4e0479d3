"""Decoding side by side: models and engines in, time a token, tokens a second and memory of each out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlp_lora.engine.engine import Engine
from dlp_lora.lab.bench.case import AdapterBenchArgs, Case, NewTokens, Row
from dlp_lora.lab.bench.memory import MB, memory_of, read_mb
from dlp_lora.lab.bench.models import AGAIN, COMPILED, PREPACKED, STACKED, with_gradients
from dlp_lora.lab.bench.timing import BASE, Stepwise, interleave_steps, synchronise


@dataclass(frozen=True, kw_only=True)
class DecodingArgs(AdapterBenchArgs):
    """How a benchmark that decodes measures."""

    new_tokens: NewTokens = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens must be at least 2, as the first is no step, got {self.new_tokens}")


def decoding_rows(
    case: Case,
    variants: Mapping[str, Any],
    prompts: Sequence[Mapping[str, Tensor]],
    *,
    new_tokens: int,
    rounds: int,
    given: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Row]:
    """Gives a row a variant, a model or an engine; one is named BASE, and what the others take is also told over it.

    Ratios are over the base; of two copies of it (AGAIN), over the faster one, as where in memory a model came to lie
    can change its speed more than an adapter does (docs/log.md). `given` is what a variant's `generate` is given
    besides. `ratio_over_alike` is over the base that computes its
    products as a variant does, so the price of the adapters alone.
    `bandwidth_share` is the speed at which the base's weights are read for each step, over the machine's own.
    """
    models = {name: with_gradients(v.model if isinstance(v, Engine) else v) for name, v in variants.items()}
    inputs = {name: [{**prompt, **(given or {}).get(name, {})} for prompt in prompts] for name in models}
    runs = {name: generation(model, inputs[name], new_tokens) for name, model in models.items()}
    memory = {name: memory_of(variants[name], partial(run, 0, lambda: None), case.device) for name, run in runs.items()}
    times = interleave_steps(runs, rounds=rounds, scenario=case.scenario, on_progress=case.on_progress)
    batch, read_gb = prompts[0]["input_ids"].shape[0], read_mb(models[BASE]) * MB / 1e9
    base = min((name for name in (BASE, AGAIN) if name in models), key=lambda name: times.median(name, "step_ms"))
    rows = {}
    for name in models:
        ms = times.median(name, "step_ms")
        rows[name] = {
            "name": name,
            "ms_per_token": ms,
            **times.ratio(name, "step_ms", over=base),
            "ttft_ms": times.median(name, "first_ms"),
            **{f"answer_{key}": value for key, value in times.ratio(name, "all_ms", over=base).items()},
            "tokens_per_s": round(batch * 1e3 / ms, 2),
            "bandwidth_share": round(read_gb / (ms / 1e3) / case.bandwidth_gb_s, 3),
            **memory[name].columns(memory[BASE]),
        }
        if (alike := _alike(name)) in models:
            alike = base if alike == BASE else alike
            rows[name]["ratio_over_alike"] = times.ratio(name, "step_ms", over=alike)["ratio"]
        rows[name] |= _switches(variants[name])
    return rows


def _alike(name: str) -> str:
    """The base that computes its products as a variant of this name does."""
    ways = {"prepacked": PREPACKED, "compiled": COMPILED, "merged": BASE, "concatenated": BASE}
    stacked = STACKED if name.startswith("dlp-lora") or name == STACKED else BASE
    return next((base for way, base in ways.items() if way in name), stacked)


def _switches(variant: Any) -> dict[str, Any]:
    """How many sentences a row of the last answer had, how often it switched, and the ways that layers were multiplied.

    So the timed mixture changes.
    """
    each = variant.last_traces if isinstance(variant, Engine) else None
    if each is None:
        return {}
    switched = sum(sentence.switched for trace in each for sentence in trace)
    return {
        "sentences": round(sum(map(len, each)) / len(each), 2),
        "switches": round(switched / len(each), 2),
        "paths": variant.paths.to_dict(),
    }


def generation(model: Any, prompts: Sequence[Mapping[str, Any]], new_tokens: int) -> Stepwise:
    """Generates, a token a step; the first step reads the prompt."""

    @torch.no_grad()
    def run(i: int, step: Callable[[], None]) -> None:
        def after(input_ids: Tensor, scores: Tensor) -> Tensor:
            synchronise(scores.device)
            step()
            return scores

        model.generate(
            **prompts[i % len(prompts)],
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            logits_processor=[after],
        )

    return run
