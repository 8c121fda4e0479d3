"""Products on CPUs: the ways to multiply few rows with a weight, and the pages that weights lie in.

`F.linear` is the fastest way for many rows. For one row or a few, the fastest way depends on the CPU, the precision,
the shape and the number of threads (docs/log.md), so `timing` tries them. The ways other than `F.linear` are:

- columns: W times the rows as columns, which is a matrix times a vector for one row;
- halves: one row times two halves of W, as a batch;
- prepacked: W laid out as oneDNN multiplies it. In bfloat16 `F.linear` lays it out again in each call, which takes
  longer than a product with few rows. Inductor prepacks frozen weights through the same two operators, which have no
  public names in PyTorch.
"""

import ctypes
import mmap

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dlp_lora.bank.paths import Way
from dlp_lora.errors import ModelError, reason_of

LARGE = 2**22  # bytes of a tensor in huge pages, which have 2 MB


def product(
    x: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    way: Way,
) -> Float[Tensor, "rows d_out"]:
    """`F.linear`, in the chosen way if it suits the shapes."""
    if way == "columns":
        if x.shape[0] == 1:
            return (torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0]))[None]
        y = torch.mm(weight, x.T) if bias is None else torch.addmm(bias[:, None], weight, x.T)
        return y.T.contiguous()
    if way == "halves" and x.shape[0] == 1 and len(weight) % 2 == 0:
        y = torch.bmm(weight.view(2, -1, weight.shape[1]), x.T.expand(2, -1, 1)).view(1, -1)
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)


@torch.no_grad()
def prepack(weight: Float[Tensor, "d_out d_in"]) -> Tensor:
    """The weight as `prepacked_product` takes it: a copy that other operators cannot read."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def prepacked_product(
    x: Float[Tensor, "rows d_in"], weight: Tensor, bias: Float[Tensor, " d_out"] | None
) -> Float[Tensor, "rows d_out"]:
    """`F.linear` with a prepacked weight."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def check_prepacking(weight: Tensor) -> None:
    """Checks that weights like this one can be prepacked here.

    Raises:
        ModelError: if they cannot, with the reason.
    """
    if weight.device.type != "cpu":
        raise ModelError(f"prepack is for models on a CPU, and this one is on {weight.device}; leave it out")
    x = weight.new_ones(1, 16)
    try:
        prepacked_product(x, prepack(x), None)
    except (AttributeError, RuntimeError) as error:  # the operator is missing, or not for this dtype or CPU
        raise ModelError(
            f"this PyTorch ({torch.__version__}) cannot prepack {str(weight.dtype).removeprefix('torch.')} weights on "
            f"this CPU: {reason_of(error)}; leave prepack out"
        ) from error


def want_huge_pages(tensor: Tensor) -> None:
    """Asks Linux to put a large new tensor into huge pages; call it before the first write.

    Each token reads all weights, and in pages of 4 KB the CPU must look up the place of each page (docs/log.md). Where
    the system refuses, nothing changes.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
