"""The heap of a server that runs for days: memory that it frees goes back to the system.

Requests of many lengths leave the heap of the C library full of holes, which it keeps. oneDNN keeps the compiled
products of the latest shapes, and each number of tokens in a pass is a shape (docs/log.md).
"""

import ctypes
import os
import threading
from collections.abc import Callable

EVERY_S = 30
NUM_PRODUCTS = 256  # that oneDNN keeps; its default, 1,024, takes 300 MB with a model of 135M parameters
VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def limit_products() -> None:
    """Limits what oneDNN keeps, unless the environment does; before its first product."""
    os.environ.setdefault(VARIABLE, str(NUM_PRODUCTS))


def trim_regularly(every_s: float = EVERY_S) -> threading.Event:
    """Gives free memory of the heap back, in a thread that ends with the process, or when the returned event is set.

    This takes about 10 ms. It is done only with the GNU C library; others give memory back themselves.
    """
    ended = threading.Event()
    if trim := _trim():
        threading.Thread(target=_run, args=(trim, every_s, ended), name="dlp-lora-heap", daemon=True).start()
    return ended


def _trim() -> Callable[[int], int] | None:
    """The C library's function, if it has it; it keeps so many bytes at the end of the heap."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return None
    return trim


def _run(trim: Callable[[int], int], every_s: float, ended: threading.Event) -> None:
    while not ended.wait(every_s):
        trim(0)
