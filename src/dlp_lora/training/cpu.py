"""Fast training on CPUs, behind one switch (`AdapterTrainingArgs.cpu_tricks`): precision, passes, memory.

Plain eager attention and RMSNorm use hand-written passes that copy less than autograd's. The backward pass of fused
attention is slow on CPUs: in bfloat16 always, in float32 for short texts.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

NAME = "dlp_lora_eager"
LONG = 256  # keys; from there on fused attention is faster in float32 (docs/log.md)
# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_THRESHOLD = 32 << 20  # bytes; glibc takes no larger one, and comes to it by itself as large tensors are freed
NEVER = -1


@contextmanager
def fast_on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Uses these passes for a model on a CPU in the block; a model on another device does not change."""
    config: Any = model.config
    with ExitStack() as after:
        if model.device.type == "cpu":
            if config._attn_implementation == "sdpa":
                model.set_attn_implementation("eager")
                after.callback(model.set_attn_implementation, "sdpa")
            after.enter_context(lean_passes(model))
        yield


@contextmanager
def kept_memory(*, is_on: bool = True) -> Iterator[Callable[[], object]]:
    """Keeps freed memory in this process in the block, instead of returning it to the system.

    If it is not `is_on`, or the C library is not glibc, it does nothing. A step frees gigabytes and allocates as many
    again; page faults took a fifth of its time (docs/log.md). The heap fragments and grows, so the block gets a
    function that returns all free memory.
    """
    libc = ctypes.CDLL(None) if is_on and sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        yield lambda: None
        return
    give_back = partial(libc.malloc_trim, 0)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)  # setting either one stops glibc from adapting both
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield give_back
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)  # twice the other, as in glibc
        give_back()


@cache
def training_dtype(device: str) -> torch.dtype:
    """Returns the dtype for training with a frozen base: bfloat16 if the hardware multiplies it as fast as float32.

    CPUs with instructions for bfloat16 but without AMX may take twice as long as in float32 (docs/log.md). So a product
    in each dtype is timed once, on one thread.
    """
    if device == "cuda":
        return torch.bfloat16
    if not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    narrow, wide = _seconds_of_products(torch.bfloat16, torch.float32)
    return torch.float32 if narrow > 1.2 * wide else torch.bfloat16


def _seconds_of_products(*dtypes: torch.dtype) -> list[float]:
    """The shortest time of a small batch's tokens times a layer's weight on the CPU, in each dtype."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads wait for each other on a busy machine
    try:
        seconds: list[list[float]] = [[] for _ in dtypes]
        for _ in range(16):  # in turns, so that a busy moment hits all
            for dtype, times in zip(dtypes, seconds, strict=True):
                x, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(num_threads)
    return [min(times) for times in seconds]


@contextmanager
def lean_passes(model: PreTrainedModel) -> Iterator[None]:
    """Uses these functions for a model's eager attention and its frozen norms in the block.

    Only the plain forms, which transformers copies between architectures, are replaced.
    """
    config: Any = model.config
    own = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
    norms = [m for m in model.modules() if _is_same(type(m).forward, LlamaRMSNorm.forward) and "forward" not in vars(m)]
    with ExitStack() as after:
        if config._attn_implementation == "eager" and _is_same(own, eager_attention_forward):
            AttentionInterface.register(NAME, _attend)
            AttentionMaskInterface.register(NAME, eager_mask)
            config._attn_implementation = NAME
            after.callback(setattr, config, "_attn_implementation", "eager")
        for norm in norms:
            norm.forward = partial(_normalise, norm)  # type: ignore[method-assign]
            after.callback(delattr, norm, "forward")
        yield


def _is_same(function: Any, plain: Callable[..., Any]) -> bool:
    """Whether two functions have the same code."""
    ours, theirs = plain.__code__, getattr(function, "__code__", None)  # type: ignore[attr-defined]
    parts = ("co_code", "co_consts", "co_names", "co_varnames")
    return theirs is not None and all(getattr(ours, part) == getattr(theirs, part) for part in parts)


def _attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads seq d_head"],
    key: Float[Tensor, "batch kv_heads kv_seq d_head"],
    value: Float[Tensor, "batch kv_heads kv_seq d_head"],
    attention_mask: Float[Tensor, "#batch 1 seq kv_seq"] | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch seq heads d_head"], Tensor | None]:
    if dropout == 0 and query.dtype == torch.float32 and key.shape[2] >= LONG:
        k, v = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        fused = F.scaled_dot_product_attention(query, k, v, attn_mask=attention_mask, scale=scaling)
        return fused.transpose(1, 2).contiguous(), None
    if dropout == 0:
        return _Attention.apply(query, key, value, attention_mask, scaling), None
    y, weights = eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    return y, weights


class _Attention(torch.autograd.Function):
    """`softmax(Q K^T scaling + mask) V`, with queries that share keys in one product."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Float[Tensor, "batch seq heads d_head"]:
        batch, heads, seq, d_head = query.shape
        kv_heads, kv_seq = key.shape[1:3]
        q = (query * scaling).reshape(-1, heads // kv_heads * seq, d_head)  # (batch * kv_heads, ...)
        k, v = (t.reshape(-1, kv_seq, d_head) for t in (key, value))
        scores = (q @ k.mT).view(batch, heads, seq, kv_seq)
        if mask is not None:
            scores += mask
        p = scores.softmax(-1).view(len(q), -1, kv_seq)
        ctx.save_for_backward(q, k, v, p)
        ctx.scaling, ctx.shape = scaling, query.shape
        return (p @ v).view(query.shape).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "batch seq heads d_head"]) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        batch, d_head = ctx.shape[0], ctx.shape[3]
        g = grad.transpose(1, 2).reshape(q.shape)
        ds = torch.ops.aten._softmax_backward_data(g @ v.mT, p, -1, p.dtype)
        dq = (ds @ k).mul_(ctx.scaling).view(ctx.shape)
        dk, dv = ((t.mT @ u).view(batch, -1, k.shape[1], d_head) for t, u in ((ds, q), (p, g)))
        return dq, dk, dv, None, None


def _normalise(norm: Any, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    y: Tensor = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
    return y


class _RMSNorm(torch.autograd.Function):
    """`weight * x / sqrt(mean(x^2) + eps)`, normalised in float32; the weight has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*batch width"], weight: Float[Tensor, " width"], eps: float
    ) -> Float[Tensor, "*batch width"]:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        normed = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "*batch width"]) -> tuple[Tensor, None, None]:
        normed, scale, weight = ctx.saved_tensors
        g = grad * weight
        along = (g * normed).mean(-1, keepdim=True)
        return torch.addcmul(g, normed, along, value=-1).mul_(scale.to(g.dtype)), None, None
