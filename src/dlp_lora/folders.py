"""Folders that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_folder(path: str | Path, *, marker: str | None = None) -> Iterator[Path]:
    """Yields an empty folder beside `path`, and puts it in the place of `path` if all went well.

    With a `marker`, a folder that is there is replaced only if it is empty or holds a file of that name.

    Written aside and renamed: whatever interrupts the writing, a full disk included, the folder that was there
    before survives. `recover_folder` finds it even after a kill between the two renames.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays one
    recover_folder(path)
    if marker is not None:
        check_replaceable(path, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~_umask())
        previous = _previous(path)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        aside.rename(path)
        if previous.exists():
            # Under this name, what a kill leaves of it is never recovered.
            previous.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        recover_folder(path)
        raise


def check_replaceable(path: str | Path, marker: str) -> None:
    """Checks that replacing a folder loses nothing that was not written here.

    Raises:
        ValueError: if something else than an empty folder is there and it holds no file named `marker`.
    """
    path = Path(path)
    if path.exists() and not (path / marker).is_file() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} is there and has no {marker}: it would be lost; write somewhere else")


def recover_folder(path: str | Path) -> None:
    """Puts back the previous folder if a replacement was killed between its two renames."""
    path = Path(os.path.realpath(path))
    if not path.exists() and _previous(path).is_dir():
        _previous(path).rename(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
