"""Memory that training frees stays at hand for its next step, where the C library is glibc."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

# mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_THRESHOLD = 32 << 20  # bytes; glibc takes no larger one, and comes to it by itself as large tensors are freed
NEVER = -1


@contextmanager
def kept_memory() -> Iterator[Callable[[], object]]:
    """Keeps freed memory in this process for a while, instead of giving it back to the system at each free.

    A step frees gigabytes and asks for as many again, and faulting their pages in took a fifth of its time
    (docs/log.md). The heap grows as it fragments: what is yielded gives back all that is free at that moment.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        yield lambda: None
        return
    give_back = partial(libc.malloc_trim, 0)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)  # setting either one stops glibc from adapting both
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield give_back
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)  # twice the other, as glibc has it
        give_back()
