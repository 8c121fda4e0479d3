"""Everyday prompts: what people ask an assistant for which no adapter was made, and the threshold that they set.

A router that is made from descriptions or from adapters has seen no foreign text. These stand for it.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from jaxtyping import Float
from torch import Tensor

KEPT = 0.95  # share of an adapter's texts that are to fit
SENT = 0.95  # share of the everyday prompts that are to fit none
SURE = 0.999  # how well the median text fits, or fails to


@cache
def everyday_prompts() -> tuple[str, ...]:
    """Gives the prompts, in fourteen languages."""
    texts = json.loads((files("dlp_lora.router") / "everyday.json").read_text(encoding="utf-8"))
    return tuple(prompt for language in texts.values() for prompt in language)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where a score says that an adapter fits as likely as not, and how fast that turns."""

    at: float
    slope: float

    @classmethod
    def between(cls, inside: Float[Tensor, " texts"], everyday: Float[Tensor, " prompts"]) -> "Threshold":
        """Fits it to the scores of the adapters' texts, which may be none, and of everyday prompts.

        Nineteen of twenty texts are to fit; where that many everyday prompts are not kept out, both count alike.
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
