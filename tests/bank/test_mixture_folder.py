"""Folders of mixtures in memory: they end with their process, however that ends."""

import os
from pathlib import Path

from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.mixture_folder import MixtureFolder


def make_folder() -> MixtureFolder:
    return MixtureFolder(None, base="base", layout=BaseLayers({}), budget_mb=1)


def left_by_a_process_that_was_killed() -> Path:
    read, write = os.pipe()
    if not os.fork():
        os.write(write, str(make_folder().path).encode())
        os._exit(9)
    os.close(write)
    os.wait()
    with os.fdopen(read) as pipe:
        return Path(pipe.read())


def test_what_a_killed_process_left_in_memory_is_deleted_by_the_next_one_and_the_folders_of_others_stay() -> None:
    other = make_folder()
    left = left_by_a_process_that_was_killed()
    assert left.is_dir()
    mine = make_folder()
    assert not left.exists()
    assert other.path.is_dir()
    assert mine.path.is_dir()
    for folder in (other, mine):
        folder.close()
        assert not folder.path.exists()
