"""Prepacked weights: linear layers on CPUs with their weights laid out as oneDNN multiplies them.

In bfloat16, `F.linear` lays the weight out anew in each call, which takes longer than a product with few rows
(docs/log.md). Inductor prepacks frozen weights through the same two operators, which PyTorch has no other names for.
"""

import torch
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
