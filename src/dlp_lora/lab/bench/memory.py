"""Memory: the tensors of a variant, the additional memory of a run, and the machine's reading speed.

The variants of a benchmark live in one process, so its resident memory says nothing about one of them. Counted are
the bytes of tensors: those that a model holds, and the most that PyTorch's allocator gave out at a time in one run.
"""

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dlp_lora.bank.linear import FusedLinear
from dlp_lora.engine.engine import Engine
from dlp_lora.lab.bench.timing import Run, synchronise

MB = 2**20


@dataclass(frozen=True)
class Memory:
    """Megabytes that a variant holds, and holds at most during a run."""

    held_mb: float
    peak_mb: float

    def columns(self, base: "Memory") -> dict[str, float]:
        """Its columns in a table, over the base."""
        return {
            "held_mb": round(self.held_mb, 2),
            "peak_mb": round(self.peak_mb, 2),
            "memory_ratio": round(self.peak_mb / base.peak_mb, 4),
        }


def memory_of(variant: Any, run: Callable[[], object], device: torch.device) -> Memory:
    """Counts the memory of a model or an engine, its router and bank included, and of a run with it."""
    if isinstance(variant, Engine):
        router: list[nn.Module] = [variant.router] if isinstance(variant.router, nn.Module) else []
        held = held_mb(variant.model, *router, tensors=variant.bank.tensors())
    else:
        held = held_mb(variant)
    return Memory(held, held + peak_mb(run, device))


def counted(name: str, variant: Any, run: Run, memory: dict[str, Memory], device: torch.device) -> Run:
    """Gives a run that counts the variant's memory in the round that warms up, and notes it under the name."""

    def measure(i: int) -> Mapping[str, float]:
        if i > 0:
            return run(i)
        memory[name] = memory_of(variant, partial(run, i), device)
        return {}

    return measure


def held_mb(*models: nn.Module, tensors: Iterable[Tensor] = ()) -> float:
    """Megabytes of models' weights and buffers, prepacked ones included, and of other tensors, each place once."""
    modules = [module for model in models for module in model.modules()]
    found = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())]
    held = [t for t in (*found, *tensors) if isinstance(t, Tensor)]
    groups = {module.group for module in modules if isinstance(module, FusedLinear)}
    return (held_nbytes(held) + sum(group.prepacked_nbytes for group in groups)) / MB


def held_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; a shared storage, as of fused layers and their base, counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    total = 0
    for device in {storage.device for storage in storages}:
        end = 0
        places = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.device == device)
        for start, stop in places:
            total += max(0, stop - max(start, end))
            end = max(end, stop)
    return total


def read_mb(model: nn.Module) -> float:
    """Megabytes of weights that a model reads for each token: all but embeddings, of which it reads a row."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in model.modules() if not isinstance(m, nn.Embedding) and hasattr(m, "weight")}
    return sum(p.nbytes for p in model.parameters() if id(p) not in embeddings - linear) / MB


def peak_mb(run: Callable[[], object], device: torch.device) -> float:
    """The largest number of megabytes that a run has allocated in addition."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MB
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says on standard error that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((int(size) for _, size in changes), initial=0)) / MB


def growth_mb(device: torch.device) -> Callable[[], float | None]:
    """Gives a function that tells how many megabytes the process has grown by since: its resident memory, or what is
    allocated on a GPU. None where the system does not tell."""
    before = _resident_mb(device)

    def grown() -> float | None:
        now = _resident_mb(device)
        return None if before is None or now is None else round(now - before, 1)

    return grown


def bandwidth_gb_s(device: torch.device, *, num_mb: int = 256, tries: int = 5) -> float:
    """Gigabytes a second that a product of a matrix and a vector reads: the best of several, larger than any cache."""
    matrix = torch.ones(8192, num_mb * MB // 4 // 8192, device=device)
    vector = torch.ones(matrix.shape[1], device=device)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / min(seconds) / 1e9


def _resident_mb(device: torch.device) -> float | None:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MB
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB if statm.is_file() else None
