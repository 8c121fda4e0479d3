"""Everyday prompts, for which no adapter was made, and the threshold that they set.

A router from descriptions or from adapters has seen no foreign text. The everyday prompts take its place.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from jaxtyping import Float
from torch import Tensor

KEPT = 0.95  # target share of an adapter's texts that fit
SENT = 0.95  # target share of the everyday prompts that fit no adapter
SURE = 0.999  # probability that the median text fits (or that the median everyday prompt does not)


@cache
def everyday_prompts() -> tuple[str, ...]:
    """Gives the prompts, in fourteen languages."""
    texts = json.loads((files("dlp_lora.router") / "everyday.json").read_text(encoding="utf-8"))
    return tuple(prompt for language in texts.values() for prompt in language)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The score at which an adapter fits with probability 0.5, and the slope of the log-odds there."""

    at: float
    slope: float

    @classmethod
    def between(cls, inside: Float[Tensor, " texts"], everyday: Float[Tensor, " prompts"]) -> "Threshold":
        """Fits the threshold to the scores of the adapters' texts (maybe none) and of everyday prompts.

        95 % of the texts fit if this rejects 95 % of the everyday prompts. Otherwise the threshold loses as few of both
        as possible.
        """
        outer = float(everyday.quantile(SENT))
        if not len(inside):
            return cls(at=outer, slope=_slope(outer - float(everyday.median())))
        at = float(inside.quantile(1 - KEPT))
        if at < outer:
            places = torch.cat([inside, everyday, inside.new_tensor([at, outer])]).sort().values
            places = places[(places >= at) & (places <= outer)]
            lost = torch.stack([(inside < p).float().mean() + (everyday >= p).float().mean() for p in places])
            at = float(places[lost.argmin()])
        return cls(at=at, slope=_slope(float(inside.median()) - at))


def _slope(room: float) -> float:
    return math.log(SURE / (1 - SURE)) / max(room, 1e-3)
