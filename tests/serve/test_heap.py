"""A server that runs for days gives back the memory that it frees."""

import os
import platform
import time
from pathlib import Path

import pytest

from dlp_lora.serve.heap import NUM_PRODUCTS, VARIABLE, limit_products, trim_regularly

NUM, SIZE = 4000, 20_000  # bytes of a block; glibc maps blocks from 128 kB on by themselves


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library keeps memory in holes")
def test_holes_in_the_heap_go_back_to_the_system() -> None:
    blocks = [bytearray(SIZE) for _ in range(NUM)]
    kept = blocks[::100]  # so that the heap cannot shrink from its end
    full = resident_mb()
    del blocks
    ended = trim_regularly(0.05)
    try:
        until = time.monotonic() + 20
        while resident_mb() > full - NUM * SIZE / 2**20 / 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert resident_mb() <= full - NUM * SIZE / 2**20 / 2
    finally:
        ended.set()
    assert len(kept) == NUM // 100


def test_the_number_of_kept_products_is_the_users_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    limit_products()
    assert os.environ[VARIABLE] == str(NUM_PRODUCTS)
    monkeypatch.setenv(VARIABLE, "7")
    limit_products()
    assert os.environ[VARIABLE] == "7"
