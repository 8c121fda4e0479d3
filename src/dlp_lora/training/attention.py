"""Eager attention in training: passes without copies of keys and values, or of scores in float32.

It is for CPUs, where the backward pass of fused attention is slow in bfloat16.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

NAME = "dlp_lora_eager"


@contextmanager
def lean_attention(model: PreTrainedModel) -> Iterator[None]:
    """Computes a model's eager attention by `_Attention` for a while; another attention is left as it is."""
    config: Any = model.config
    own = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    if config._attn_implementation != "eager" or not _is_llamas(own):
        yield
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "eager"


def _is_llamas(function: Any) -> bool:
    """Whether an architecture's eager attention is the plain one, which transformers copies from file to file."""
    ours, theirs = eager_attention_forward.__code__, getattr(function, "__code__", None)
    return theirs is not None and all(
        getattr(ours, part) == getattr(theirs, part) for part in ("co_code", "co_consts", "co_names", "co_varnames")
    )


def _attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads seq d_head"],
    key: Float[Tensor, "batch kv_heads seq d_head"],
    value: Float[Tensor, "batch kv_heads seq d_head"],
    attention_mask: Float[Tensor, "#batch 1 seq seq"] | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch seq heads d_head"], Tensor | None]:
    if dropout == 0:
        return _Attention.apply(query, key, value, attention_mask, scaling), None
    y, weights = eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    return y, weights


class _Attention(torch.autograd.Function):
    """`softmax(Q K^T scaling + mask) V`, the queries that share keys in one product."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Float[Tensor, "batch seq heads d_head"]:
        batch, heads, seq, d_head = query.shape
        q = (query * scaling).reshape(-1, heads // key.shape[1] * seq, d_head)  # (batch * kv_heads, ...)
        k, v = (t.reshape(-1, seq, d_head) for t in (key, value))
        scores = (q @ k.mT).view(batch, heads, seq, seq)
        if mask is not None:
            scores += mask
        p = scores.softmax(-1).view(len(q), -1, seq)
        ctx.save_for_backward(q, k, v, p)
        ctx.scaling, ctx.shape = scaling, query.shape
        return (p @ v).view(query.shape).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "batch seq heads d_head"]) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        batch, _, seq, d_head = ctx.shape
        g = grad.transpose(1, 2).reshape(q.shape)
        ds = torch.ops.aten._softmax_backward_data(g @ v.mT, p, -1, p.dtype)
        dq = (ds @ k).mul_(ctx.scaling).view(ctx.shape)
        dk, dv = ((t.mT @ u).view(batch, -1, seq, d_head) for t, u in ((ds, q), (p, g)))
        return dq, dk, dv, None, None
