"""The methods that are compared: who chooses the adapters, from which settings; same prompts, same decoding for all."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dlp_lora.engine.engine import Engine
from dlp_lora.errors import TaskError
from dlp_lora.policy import Mixture, Switching, TopK, TopP, Uniform

NEVER = 10**9

Key = tuple[str, int]
"""A test question: its task's name and its place in the task's test examples."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to choose adapters: a mixture for each question, or settings under which the router chooses."""

    name: str
    about: str
    mixture: Callable[[Key, Sequence[str]], Mixture] | None = None  # of the question and the bank's names
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ""  # the single adapter that it needs in the place of the bank

    @contextmanager
    def on(self, engine: Engine, keys: Sequence[Key]) -> Iterator[Engine]:
        """The engine under this method for a batch of questions."""
        if self.mixture is not None:
            with engine.fixed([self.mixture(key, engine.bank.names) for key in keys]):
                yield engine
        else:
            with engine.using(**self.settings):
                yield engine


def _random_adapter(key: Key, names: Sequence[str]) -> Mixture:
    return Mixture({random.Random(f"{key[0]} {key[1]}").choice(sorted(names)): 1.0})


SINGLE = "lora-r64"

_METHODS = (
    Method(name="base", about="the base model alone", mixture=lambda key, names: Mixture()),
    Method(
        name="oracle",
        about="each task's own LoRA (the paper's LoRA)",
        mixture=lambda key, names: Mixture({key[0]: 1.0}),
    ),
    Method(
        name=SINGLE,
        about="one LoRA of rank 64 trained on all tasks",
        mixture=lambda key, names: Mixture({SINGLE: 1.0}),
        adapter=SINGLE,
    ),
    Method(
        name="dlp", about="the router, as the engine is set: by default top-p 0.6, renormalised, by sentence, KV kept"
    ),
    Method(
        name="never-abstain",
        about="as dlp, with the likeliest adapters where none fits",
        settings={"switching": Switching(unsure="likeliest")},
    ),
    Method(name="top1", about="the router's first choice alone", settings={"policy": TopK(1)}),
    Method(
        name="uniform",
        about="all adapters at one weight",
        mixture=lambda key, names: Uniform()(dict.fromkeys(names, 1 / len(names))),
    ),
    Method(name="random", about="one adapter drawn for each question", mixture=_random_adapter),
    Method(
        name="prompt-only",
        about="routed at the prompt, never again",
        settings={"switching": Switching(min_tokens=NEVER)},
    ),
    Method(
        name="whole-prompt",
        about="routed at the prompt as one text, never again",
        settings={"prompt_routing": "whole", "switching": Switching(min_tokens=NEVER)},
    ),
    Method(name="paper-weights", about="Eq. 5's weights", settings={"policy": TopP(0.6, weighting="paper")}),
    *(Method(name=f"p{p}", about=f"top-p {p}", settings={"policy": TopP(p)}) for p in (0.3, 0.9, 1.0)),
    Method(
        name="p1.0-paper-weights",
        about="every adapter, by Eq. 5's weights",
        settings={"policy": TopP(1.0, weighting="paper")},
    ),
    Method(name="recompute", about="as dlp, the context encoded anew at a switch", settings={"kv_policy": "recompute"}),
    Method(
        name="by-sentence",
        about="as dlp, each sentence of the prompt encoded under its own mixture (Eq. 6)",
        settings={"prompt_routing": "sentences"},
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
MAIN = ("base", "oracle", SINGLE, "dlp")
ABLATIONS = tuple(name for name in METHODS if name not in MAIN)


def methods_named(names: Sequence[str]) -> list[Method]:
    """The methods of these names.

    Raises:
        TaskError: if there is none of a name.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise TaskError(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return [METHODS[name] for name in names]
