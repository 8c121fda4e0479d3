"""The compared models: a plain base model, our engine, and PEFT's ways.

Each variant has a model of its own.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from dlp_lora.bank.attach import attach, detach, linear_layers, siblings
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import read_adapter
from dlp_lora.engine.engine import Engine
from dlp_lora.engine.loading import load
from dlp_lora.lab.bench.case import PROMPTS, Case
from dlp_lora.policy import Switching, TopK
from dlp_lora.router import Context, EncoderRouter, MiniMLP, Router, TextEncoder
from dlp_lora.router.encoder import albert_config
from dlp_lora.router.nearness import Nearness

AGAIN = "base again"
STACKED = "base, stacked"
PREPACKED = "base, prepacked"
COMPILED = "base, compiled"
PEFT_ONE = "peft one adapter"
PEFT_MIXED = "peft another adapter a row"

MakeRouter = Callable[[Sequence[str], Tokenizer], Router]
"""Makes a router of random weights for adapters of these names."""


def base_model(case: Case) -> Any:
    """A base model of its own, in memory of its own.

    As they are loaded, weights lie in the memory of their file, which all variants that leave them there would share:
    touched by each of them, they stay in the CPU's caches, where those of an engine, which moves them, are not.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(case.model), dtype=getattr(torch, case.dtype), trust_remote_code=False
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.to(case.device).eval()


def with_gradients(model: Any) -> Any:
    """The same model with weights that ask for gradients, as a base model's do: PEFT freezes them, and frozen ones send
    the head of a prompt down a slow path on CPUs that is not the price of LoRA."""
    return model.requires_grad_(True)


def mini_mlp(names: Sequence[str], tokenizer: Tokenizer) -> Router:
    """The paper's plugin, with random weights that choose other adapters for another text."""
    torch.manual_seed(0)
    router = MiniMLP(names, tokenizer).eval()
    with torch.no_grad():
        # With random weights, the biases outweigh the text. Without the mean over texts, the router depends on the
        # text.
        router.head.bias.sub_(router(router.encode_all([Context(text) for text in PROMPTS])).mean(dim=0))
        router.near = Nearness.of(torch.randn(len(names), 4, router.config.hidden))  # which a trained one asks, too
    return router


def albert(names: Sequence[str], tokenizer: Tokenizer) -> Router:
    """The paper's encoder in ALBERT-base's shape, with random weights and the base model's vocabulary."""
    torch.manual_seed(0)
    return EncoderRouter(names, TextEncoder.from_config(albert_config(tokenizer), tokenizer)).eval()


def engine_with(
    case: Case,
    *,
    selected: int,
    num_adapters: int | None = None,
    router: MakeRouter = mini_mlp,
    budget_mb: float | None = None,
    base: Any = None,
    prepack: bool = False,
) -> Engine:
    """Our engine with `num_adapters` of the adapters, which fuses the `selected` likeliest at every sentence."""
    paths = dict(list(case.adapters.items())[:num_adapters])
    return load(
        base_model(case) if base is None else base,
        tokenizer=case.tokenizer,
        adapters=paths,
        router=router(list(paths), case.tokenizer.backend_tokenizer),  # type: ignore[attr-defined]
        policy=TopK(selected),
        # A router of random weights is never sure: without a margin it switches at every sentence.
        switching=Switching(min_tokens=4, margin=0.0),
        kv_policy="keep",  # the cost of a token; `bench switch` measures switches
        budget_mb=budget_mb,
        prepack=prepack,
    )


def stacked_base(case: Case, *, prepack: bool = False) -> Any:
    """A base that enjoys the same stacked products as the engine's, with no adapter under them."""
    found = base_model(case)
    first = next(iter(case.adapters.values()))
    bank = AdapterBank(
        linear_layers(found), [read_adapter(first)], siblings=siblings(found), dtype=found.dtype, device=found.device
    )
    attach(found, bank, paths="prepacked" if prepack else None)
    for group in bank.groups:
        group.idle()
    return found


def compiled_base(case: Case) -> Any:
    """A base whose decoding steps are compiled, as the engine's are; prompts run uncompiled."""
    found = base_model(case)
    plain, compiled = found.forward, torch.compile(found.forward, dynamic=False)

    @wraps(plain)
    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        return (compiled if input_ids.shape[1] == 1 else plain)(input_ids=input_ids, **kwargs)

    found.forward = forward
    return found


def concatenated(engine: Engine) -> None:
    """Has an engine compute layer by layer, as where weights cannot be stacked."""
    detach(engine.model)
    attach(engine.model, engine.bank, paths="plain")


def peft_many(case: Case, num_adapters: int) -> Any:
    """PEFT holding several adapters, the first of them active."""
    (first, path), *others = list(case.adapters.items())[:num_adapters]
    found: Any = PeftModel.from_pretrained(base_model(case), str(path), adapter_name=first)
    for name, other in others:
        found.load_adapter(str(other), adapter_name=name)
    return found.eval()


def peft_one(case: Case) -> Any:
    """PEFT with one adapter, not merged."""
    return peft_many(case, 1)


def peft_active(case: Case, selected: int) -> Any:
    """PEFT with several adapters active at once, each at its full weight."""
    found = peft_many(case, selected)
    found.base_model.set_adapter(list(found.peft_config))
    return found


def peft_merged(case: Case) -> Any:
    """PEFT with one adapter merged into the weights."""
    return peft_one(case).merge_and_unload()
