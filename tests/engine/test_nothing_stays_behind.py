"""Whatever an engine is asked to do, nothing of it stays behind in the process."""

import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import HashRouter
from dlp_lora import Engine
from dlp_lora.bank.peft_format import read_adapter
from dlp_lora.engine.cache import CachedRows
from dlp_lora.engine.routing import RowRouter
from dlp_lora.engine.streaming import PieceStreamer

MakeEngine = Callable[..., Engine]
WARM_UP = 8  # rounds, in which what is kept on purpose is kept
ROUNDS = 12


class Forgetful(HashRouter):
    """Does not note what it was asked."""

    def probabilities(self, contexts: list) -> torch.Tensor:
        try:
            return super().probabilities(contexts)
        finally:
            self.asked.clear()


def mixed_calls(engine: Engine, folder: Path, number: int) -> None:
    engine.generate(f"Why {number}?", max_new_tokens=8)
    engine.generate([f"Tell {number}", "How far is it", "c"], max_new_tokens=6, num_beams=1 + number % 2)
    for i, _ in enumerate(stream := engine.stream(f"Go on {number}", max_new_tokens=8)):
        if i == 2:
            break
    stream.close()
    list(engine.stream("To the end", max_new_tokens=5))
    engine.stream("Never read", max_new_tokens=5)
    engine.add_adapter(folder, "more")
    with engine.fixed({"more": 1.0}), torch.no_grad():
        engine.model(torch.arange(97, 103)[None])
    engine.remove_adapter("more")
    with engine.fixed([{"math": 1.0}, {"units": 1.0}]):
        engine.generate(["a", "b"], max_new_tokens=3)
    with engine.disabled():
        engine.generate("Base", max_new_tokens=3)
    with pytest.raises(ValueError, match="greater than 0"):
        engine.generate("Why?", max_new_tokens=-1)


def counts() -> tuple[int, int, int]:
    """Objects that live: those that the garbage collector knows, blocks of memory, and threads."""
    gc.collect()
    clear = getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache
    clear()  # the interpreter's cache of attributes keeps names
    return len(gc.get_objects()), sys.getallocatedblocks(), threading.active_count()


@pytest.mark.parametrize(("paths", "budget_mb"), [("stacked", None), ("plain", 1e-6)])
def test_mixed_calls_leave_nothing_behind(
    budget_mb: float | None, paths: str, make_engine: MakeEngine, lively_adapters: Path
) -> None:
    engine = make_engine(budget_mb=budget_mb, paths=paths, router=Forgetful())
    for i in range(WARM_UP):
        mixed_calls(engine, lively_adapters / "math", i)
    objects, blocks, threads = counts()
    for i in range(ROUNDS):
        mixed_calls(engine, lively_adapters / "math", i)
    more_objects, more_blocks, more_threads = counts()
    assert more_threads == threads
    assert abs(more_objects - objects) < ROUNDS
    assert abs(more_blocks - blocks) < ROUNDS
    alive = [o for o in gc.get_objects() if type(o) in (RowRouter, CachedRows, PieceStreamer)]
    assert len(alive) <= 2  # of the latest pass, for `engine.last_trace`
    assert engine.bank.names == ("math", "poems", "units")
    assert not engine.bank.store.leased()


def test_an_adapter_that_is_read_and_dropped_is_gone(lively_adapters: Path) -> None:
    def read(times: int) -> int:
        for _ in range(times):
            read_adapter(lively_adapters / "poems")  # 28 tensors
        return counts()[1]

    before = read(20)
    assert abs(read(100) - before) < 100
