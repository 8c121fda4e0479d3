"""Padding: the attention mask of a forward pass in, the tokens that are text out."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor


def kept_tokens(ids: Tensor, mask: Any, *, num_cached: int = 0) -> Bool[Tensor, "batch seq"]:
    """Which of the tokens behind `num_cached` others are no padding.

    A mask of (batch, seq) tells, or one of what tokens attend to, as static caches have it: what is no padding attends
    to itself.
    """
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = next(iter(mask.values()), None)
    num_new = ids.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -num_new:].bool()
    if isinstance(mask, Tensor) and mask.ndim == 4:
        attended = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # (batch, new tokens, places)
        # A cache of a sliding window has places for the last tokens alone.
        first = min(num_cached, attended.shape[2] - num_new)
        return attended.diagonal(offset=first, dim1=-2, dim2=-1).expand(len(ids), -1)
    return torch.ones_like(ids, dtype=torch.bool)
