"""The methods that are compared: who chooses the adapters, from which settings; same prompts, same decoding for all."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dlp_lora.errors import TaskError
from dlp_lora.policy import Mixture, Switching, TopK, TopP, Uniform

if TYPE_CHECKING:
    from dlp_lora.engine.engine import Engine

NEVER = 10**9

Key = tuple[str, int]
"""A test question: its task's name and its place in the task's test examples."""


@dataclass(frozen=True)
class Method:
    """One way to choose adapters: a mixture for each question, or settings under which the router chooses.

    `label` is its short name in tables, if there is one; `about` says who chooses.
    """

    name: str
    label: str = ""
    about: str = ""
    mixture: Callable[[Key, Sequence[str]], Mixture] | None = None  # of the question and the bank's names
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ""  # the single adapter that it needs in the place of the bank

    @contextmanager
    def on(self, engine: "Engine", keys: Sequence[Key]) -> Iterator["Engine"]:
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
    Method("base", "base model", "the base model alone", mixture=lambda key, names: Mixture()),
    Method(
        "oracle", "own LoRA", "each task's own LoRA, chosen by hand", mixture=lambda key, names: Mixture({key[0]: 1.0})
    ),
    Method(
        SINGLE,
        "one LoRA, r 64",
        "one LoRA of rank 64, trained on all tasks",
        mixture=lambda key, names: Mixture({SINGLE: 1.0}),
        adapter=SINGLE,
    ),
    Method("dlp", "DLP-LoRA", "the router, asked again at every sentence: by default top-p 0.6, renormalised"),
    Method(
        "never-abstain",
        "DLP-LoRA, never abstaining",
        "as DLP-LoRA, with the likeliest adapters where none fits",
        settings={"switching": Switching(unsure="likeliest")},
    ),
    Method("top1", about="the likeliest adapter alone", settings={"policy": TopK(1)}),
    Method(
        "uniform",
        about="all adapters at one weight",
        mixture=lambda key, names: Uniform()(dict.fromkeys(names, 1 / len(names))),
    ),
    Method("random", about="one adapter drawn for each question", mixture=_random_adapter),
    Method(
        "prompt-only",
        about="as DLP-LoRA, routed at the prompt, never again",
        settings={"prompt_routing": "questions", "switching": Switching(min_tokens=NEVER)},
    ),
    Method(
        "whole-prompt",
        about="as DLP-LoRA, routed at the prompt as one text, never again",
        settings={"prompt_routing": "whole", "switching": Switching(min_tokens=NEVER)},
    ),
    Method(
        "paper-weights",
        about="as DLP-LoRA, with the weights of the paper's Eq. 5",
        settings={"policy": TopP(0.6, weighting="paper")},
    ),
    *(Method(f"p{p}", about=f"as DLP-LoRA, top-p {p}", settings={"policy": TopP(p)}) for p in (0.3, 0.9)),
    Method("p1.0", about="as DLP-LoRA, top-p 1.0: every adapter", settings={"policy": TopP(1.0)}),
    Method(
        "p1.0-paper-weights",
        about="every adapter, with the weights of Eq. 5",
        settings={"policy": TopP(1.0, weighting="paper")},
    ),
    Method(
        "recompute",
        about="as DLP-LoRA, the context encoded again at a switch",
        settings={"kv_policy": "recompute"},
    ),
    Method(
        "by-sentence",
        about="as DLP-LoRA, each sentence of the prompt encoded under its own mixture (Eq. 6)",
        settings={"prompt_routing": "sentences"},
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
MAIN = ("base", "oracle", SINGLE, "dlp")
_SERIAL = {
    "whole": "as DLP-LoRA, the prompt read as one text",
    "apart": "as DLP-LoRA, each question of the prompt answered in a context of its own",
    "alone": "as DLP-LoRA, each question asked by itself",
}
"""Who chooses in methods that are for several questions in one prompt alone."""


def label(method: str) -> str:
    """A method's name in tables: its label, else its name."""
    return (METHODS[method].label if method in METHODS else "") or method


def about(method: str) -> str:
    """Who chooses in a method; nothing ("") of one that is not known."""
    return METHODS[method].about if method in METHODS else _SERIAL.get(method, "")


def main_first(methods: Iterable[str]) -> tuple[str, ...]:
    """Methods, each once: the main ones, then the others as they come."""
    found = dict.fromkeys(methods)
    return tuple(m for m in MAIN if m in found) + tuple(m for m in found if m not in MAIN)


def methods_named(names: Sequence[str]) -> list[Method]:
    """The methods of these names.

    Raises:
        TaskError: if there is none of a name.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise TaskError(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return [METHODS[name] for name in names]
