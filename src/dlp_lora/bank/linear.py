"""Fused linear layers: a base layer plus the low-rank pair of the current mixture (section 3.3).

`attach` replaces each linear layer that some adapter changes, and its siblings, which read the same input, by a
FusedLinear; `detach` puts the same base layers back.
"""

import copy
import copyreg
from typing import Any, Literal, SupportsIndex, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dlp_lora.bank.cpu import prepacked_product, product
from dlp_lora.bank.group import Fused, FusedProjection, Group
from dlp_lora.bank.paths import FEW_ROWS, Way
from dlp_lora.errors import ModelError

Place = Literal["text", "head", "experts", "images"]
"""The input of a layer: all tokens of each row, the last ones, the tokens of an expert, or images or sounds."""


_READS = {
    "text": "other tokens than those of the batch in their order",
    "head": "other tokens than the last ones of each row",
    "experts": "the tokens that chose an expert, of all rows together",
    "images": "images, of which rows have unlike numbers, or sentences of one row",
}


class Outputs:
    """The outputs of one product for all siblings of a layer.

    The first sibling that is called computes for all. The others are called with the same input and take their outputs;
    the last one clears them.
    """

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.ready: list[Tensor] = []


class FusedLinear(nn.Module):
    """A base layer plus the fused pair of its group: `y = W x + ((x A) * gate) B`.

    While nothing is active in its group it is the base layer, bit for bit. Copied and pickled it is the base layer.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        group: Group,
        sibling: int,
        layer: int,
        outputs: Outputs,
        *,
        place: Place = "text",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.group = group
        self.sibling = sibling
        self.layer = layer
        self.outputs = outputs
        self.place = place
        self._plain = is_plain(base_layer)

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        fused = self.group.active
        if fused is None:
            return self._base(x)
        # A stacked weight has no gradient, so with gradients the base layers are called.
        if fused.projections is None or torch.is_grad_enabled():
            return self._alone(x, fused)
        way: Way = "stacked" if torch.compiler.is_compiling() else self.group.ways.way(x.numel() // x.shape[-1])
        return self._alone(x, fused) if way == "plain" else self._with_siblings(x, fused, way)

    def _base(self, x: Tensor) -> Tensor:
        base = self.base_layer
        y: Tensor = F.linear(x, base.weight, base.bias) if self._plain else base(x)  # type: ignore[arg-type]
        return y

    def _alone(self, x: Tensor, fused: Fused) -> Tensor:
        y, pairs = self._base(x), fused.pairs[self.sibling]
        if pairs is None:
            return y
        a, b, rows = pairs[self.layer]
        low = x.reshape(-1, x.shape[-1]).to(a.dtype) @ a  # (rows, rank)
        if fused.gate is not None:
            self._weigh(low, fused.gate[..., rows], x.shape[:-1])
        add_product(y.view(-1, y.shape[-1]), low, b)
        return y

    def _with_siblings(self, x: Tensor, fused: Fused, way: Way) -> Tensor:
        outputs = self.outputs
        if outputs.x is not x:
            outputs.x, outputs.ready = x, self._compute(x, fused, way)
        y = outputs.ready[self.sibling]
        if self.sibling == len(outputs.ready) - 1:
            outputs.x, outputs.ready = None, []
        return y

    def _compute(self, x: Tensor, fused: Fused, way: Way) -> list[Tensor]:
        """The outputs of all siblings."""
        projection: FusedProjection = fused.projections[self.layer]  # type: ignore[index]
        ys, low = project(x.reshape(-1, x.shape[-1]), projection, way, self.group.dtype)
        if low is not None:
            if fused.gate is not None:
                self._weigh(low, fused.gate, x.shape[:-1])
            for sibling, rows, b in projection.pairs:
                add_product(ys[sibling], low[:, rows], b)
        shape = x.shape[:-1]
        return [y.view(*shape, y.shape[-1]) for y in ys]

    def _weigh(self, low: Float[Tensor, "rows rank"], gate: Float[Tensor, "batch _ rank"], lead: torch.Size) -> None:
        """Multiplies low-rank activations by the gate, in place; `lead` is the shape of the input without features.

        Raises:
            ModelError: if it is not known to which rows of the batch they belong.
        """
        if not low.shape[0]:
            return
        batch, reads = gate.shape[0], self.group.reads
        num_each, rest = divmod(low.shape[0], batch)
        # Some models pass a layer the tokens of all rows as one list, and their last layers only the last tokens of
        # each row. Latent attention has an axis for heads before the tokens, which are those of the whole cache.
        num_tokens = lead[1] if len(lead) > 1 and lead[0] == batch else num_each
        if reads is not None and lead[1:] == (1, reads.num_tokens):
            num_tokens = reads.num_tokens
        fits = rest == 0 and (len(lead) == 1 or lead[0] == batch)
        match self.place:
            case "text" if reads is not None:
                are_last = lead[1:] == (reads.num_kept,)
                # If a row has one mixture, it applies to all its tokens, also to those of the cache.
                is_cache = gate.shape[1] == 1 and lead[1:2] == (1,) and num_each >= reads.num_tokens
                fits = fits and (num_tokens == reads.num_tokens or are_last or is_cache)
            case "text":
                pass
            case "experts":  # the tokens of an expert come as one list; if the input has rows, it has all tokens
                fits = fits and reads is not None and lead[1:] == (reads.num_tokens,)
            case "images":
                fits = rest == 0 and gate.shape[1] == 1 and reads is not None and reads.has_like_images
                num_tokens = num_each
            case _:
                fits = fits and (reads is None or num_tokens <= reads.num_tokens)
        if not fits:
            name = self.group.modules[self.sibling][self.layer]
            raise ModelError(
                f"{name} reads {_READS[self.place]}, so a pass of several mixtures cannot tell which of its "
                f"{low.shape[0]} rows has which of {batch}; answer such prompts one at a time, or with one mixture"
            )
        low.view(batch, num_tokens, -1, low.shape[-1]).mul_(gate[:, -num_tokens:, None])

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: some architectures read its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A parameter that is set here, as `tie_weights` does it, is the base layer's."""
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, param)
        else:
            super().register_parameter(name, param)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.base_layer, memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle saves only the base layer."""
        base: Any = self.base_layer
        rebuild, *rest = base.__reduce_ex__(protocol)
        # Pickle requires that `__newobj__` makes this class.
        return (object.__new__ if rebuild is copyreg.__newobj__ else rebuild, *rest)  # type: ignore[attr-defined]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's state under its names, so that a checkpoint is an ordinary one of the base model."""
        return self.base_layer.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def project(
    x: Float[Tensor, "rows d_in"], projection: FusedProjection, way: Way, dtype: torch.dtype
) -> tuple[list[Float[Tensor, "rows _"]], Float[Tensor, "rows rank"] | None]:
    """Returns the siblings' base projections and, if there are pairs, the low-rank activations. With few rows, these
    are in `dtype`, that of B, because casting B would be slower.
    """
    weight, bias, sizes, pairs, packed = projection
    few = x.shape[0] <= FEW_ROWS
    if way == "prepacked" and packed is not None:
        y = prepacked_product(x, packed.weight, packed.bias)
        ys = [*y.split(sizes[: len(sizes) - bool(pairs)], dim=1)]
        low_dtype = dtype if few else x.dtype
        return ys, F.linear(x.to(low_dtype), packed.a.to(low_dtype)) if pairs else None
    ys = list(product(x, weight, bias, way).split(sizes, dim=1))
    if not pairs:
        return ys, None
    low = ys.pop()
    return ys, low.to(dtype) if few else low


def add_product(y: Float[Tensor, "rows d_out"], h: Float[Tensor, "rows rank"], b: Float[Tensor, "rank d_out"]) -> None:
    """Adds `h B` to base projections in place; with many rows, in the dtype of y."""
    if y.shape[0] > FEW_ROWS:
        h, b = h.to(y.dtype), b.to(y.dtype)
    if y.dtype == b.dtype:
        y.addmm_(h.to(y.dtype), b)
    else:
        y.add_(h.to(b.dtype) @ b)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear map, without hooks (as of offloading) and without quantised weights."""
    return (
        type(layer) is nn.Linear
        and is_ordinary(layer.weight)
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    )


def is_ordinary(weight: object) -> bool:
    """Whether a weight is an ordinary tensor of floats, not one with its operators, such as a quantised one."""
    return type(weight) in (Tensor, nn.Parameter) and cast(Tensor, weight).is_floating_point()
