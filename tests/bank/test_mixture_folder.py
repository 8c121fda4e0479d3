"""Folders of mixtures in memory: they end with their process, however that ends."""

import os
from functools import partial
from pathlib import Path

from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.mixture_folder import MixtureFolder


def make_folder() -> MixtureFolder:
    return MixtureFolder(None, base="base", layout=BaseLayers({}), budget_mb=1)


def test_adapters_of_others_in_the_same_folder_stay(tmp_path: Path) -> None:
    mine, old = tmp_path / "dlp-mine", tmp_path / f"dlp-{'0' * 24}"
    for folder in (mine, old):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    tmp_path.chmod(0o700)
    mixtures = MixtureFolder(tmp_path, base="base", layout=BaseLayers({}), budget_mb=0)
    for entry in mixtures.surplus():
        mixtures.delete(entry)
    mixtures.close()
    assert mine.is_dir()
    assert not old.exists()
    assert tmp_path.stat().st_mode & 0o777 == 0o700


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


def test_folders_of_others_in_memory_stay_whatever_their_names() -> None:
    mine = make_folder()
    names = ("models-{:08}", "mixtures-of-{:08}", "mixtures-{:08}")
    others = [mine.path.parent / f"dlp-lora-{name.format(os.getpid())}" for name in names]
    for other in others:
        other.mkdir()
    try:
        make_folder().close()
        assert all(other.is_dir() for other in others)
    finally:
        mine.close()
        for other in others:
            other.rmdir()


def test_a_probe_and_kept_adapters_are_deleted_after_their_process(tmp_path: Path) -> None:
    cache = partial(MixtureFolder, tmp_path, base="base", layout=BaseLayers({}), budget_mb=0)
    running = cache()
    probe = running.write_probe("q_proj", d_in=4, d_out=4, rank=1)
    left, young = tmp_path / f"keep-{'0' * 32}", tmp_path / f"keep-{'1' * 32}"
    half, mine = tmp_path / f".keep-{'0' * 32}.a1_b2", tmp_path / "keep-it"
    for folder in (left, young, half, mine):
        folder.mkdir()
    (left / "adapter_config.json").write_text("{}")
    for folder in (probe, left, half, mine):
        os.utime(folder, (0, 0))
    cache().close()
    assert {*tmp_path.iterdir()} == {probe, young, mine}
    running.close()
    assert {*tmp_path.iterdir()} == {young, mine}
