"""Watches a bundle folder: servers read a changed bundle again."""

import threading
from pathlib import Path

from dlp_lora.engine.bundle import generation_of
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.logs import LOGGER


def watch(manager: AdapterManager, bundle: Path, every_s: float) -> threading.Event:
    """Reads a bundle again if its number has grown, in a thread that ends with the process, or when the returned event
    is set.
    """
    ended = threading.Event()
    arguments = (manager, bundle, every_s, ended)
    threading.Thread(target=_watch, args=arguments, name="dlp-lora-watch", daemon=True).start()
    return ended


def _watch(manager: AdapterManager, bundle: Path, every_s: float, ended: threading.Event) -> None:
    refused = manager.generation
    while not ended.wait(every_s):
        number = generation_of(bundle)
        if number < 0 or number == manager.generation:
            continue
        try:
            manager.reload()
        except Exception as error:  # the next poll may find it complete, or a lost server back
            if number != refused:
                LOGGER.error("the bundle was written, and cannot be used: %s", error)
            refused = number
