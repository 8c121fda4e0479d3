"""Prepacked weights: linear layers on CPUs with their weights laid out as oneDNN multiplies them.

In bfloat16, `F.linear` lays the weight out anew in each call, which takes longer than a product with few rows
(docs/log.md). Inductor prepacks frozen weights through the same two operators, which PyTorch has no other names for.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dlp_lora.errors import ModelError


def check_prepacking(weight: Tensor) -> None:
    """Checks that weights like this one can be prepacked here.

    Raises:
        ModelError: saying why not.
    """
    if weight.device.type != "cpu":
        raise ModelError(f"prepack is for models on a CPU, and this one is on {weight.device}; leave it out")
    x = weight.new_ones(1, 16)
    try:
        prepacked_linear(x, prepacked(x), None)
    except (AttributeError, RuntimeError) as error:  # the operator is missing, or not for this dtype or CPU
        raise ModelError(
            f"this PyTorch ({torch.__version__}) cannot prepack {str(weight.dtype).removeprefix('torch.')} weights on "
            f"this CPU: {str(error).splitlines()[0]}; leave prepack out"
        ) from error


@torch.no_grad()
def prepacked(weight: Float[Tensor, "d_out d_in"]) -> Tensor:
    """The weight as `prepacked_linear` takes it: a copy that shows its values to nobody else."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def prepacked_linear(
    x: Float[Tensor, "rows d_in"], weight: Tensor, bias: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "rows d_out"]:
    """`F.linear` with a prepacked weight."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


HAS_AMX = torch.cpu._is_amx_tile_supported()


def linear(
    x: Float[Tensor, "rows d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "rows d_out"]:
    """`F.linear`; on a CPU, one row is multiplied in the way that is fastest there (docs/log.md)."""
    if x.shape[0] != 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if HAS_AMX and x.itemsize == 2:
        y = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
        return y[None]
    if len(weight) % 2 == 0 and _is_faster_in_halves(x):
        y = _in_halves(x, weight)
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)


def _has_faster_way(weight: Any) -> bool:
    """Whether `linear` multiplies one row otherwise than `F.linear`."""
    if weight.device.type != "cpu":
        return False
    return (HAS_AMX and weight.itemsize == 2) or (
        weight.dtype == torch.float32 and is_faster_in_halves(torch.get_num_threads())
    )


def _is_faster_in_halves(x: Float[Tensor, "rows d_in"]) -> bool:
    return x.shape[0] == 1 and x.dtype == torch.float32 and is_faster_in_halves(torch.get_num_threads())


def _in_halves(x: Float[Tensor, "1 d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "1 d_out"]:
    return torch.bmm(weight.view(2, -1, weight.shape[1]), x.T.expand(2, -1, 1)).view(1, -1)


@cache
def is_faster_in_halves(num_threads: int) -> bool:
    """Whether a float32 row is multiplied much faster as a batch of two halves, with weights that come from memory.

    Measured once for each number of threads, in a few hundredths of a second.
    """
    x, weights = torch.ones(1, 576), torch.ones(16, 1024, 576)  # more than most caches hold
    ways: dict[Callable[..., Tensor], list[float]] = {F.linear: [], _in_halves: []}
    for _ in range(5):
        for way, seconds in ways.items():
            start = time.perf_counter()
            for weight in weights:
                way(x, weight)
            seconds.append(time.perf_counter() - start)
    return min(ways[F.linear]) > 1.5 * min(ways[_in_halves])
