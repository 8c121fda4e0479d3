"""Folders and files that are written whole or not at all, and files that people write."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replace_folder(path: str | Path, *, own: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty folder beside `path`, and puts it in the place of `path` if all went well.

    `own` names all files that the caller ever writes there. An existing folder is then replaced only if it is empty or
    has the first of these files. Its other files (a README, a repository's files) stay.

    The new folder is written beside the old one and then renamed. So the old folder survives any interruption, even a
    full disk. `recover_folder` finds it even after a kill between the two renames.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays one
    recover_folder(path)
    if own:
        check_replaceable(path, own[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield aside
        _finish_files(aside)
        if own and path.exists():
            _carry_over([entry for entry in path.iterdir() if entry.name not in own], aside)
        _flush(aside)
        previous = _previous(path)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
        aside.rename(path)
        _flush(path.parent)
        if previous.exists():
            # A folder of this name is never recovered, if a kill leaves some of it.
            previous.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        recover_folder(path)
        raise


def check_writable(folder: str | Path) -> None:
    """Checks that files can be written into a folder, which is made if it is missing.

    Raises:
        OSError: if they cannot.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_target(file: Path) -> None:
    """Checks that a file can be written, whose folder is made if it is missing.

    Raises:
        OSError: if it cannot.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; name a file in it")
    check_writable(file.parent)


def check_replaceable(path: str | Path, marker: str) -> None:
    """Checks that a folder may be replaced.

    Raises:
        ValueError: if the folder is not empty and has no file named `marker`.
    """
    path = Path(path)
    if path.exists() and not (path / marker).is_file() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and has no {marker}, so it is something else; write to another place")


def recover_folder(path: str | Path) -> None:
    """Puts back the previous folder if a replacement was killed between its two renames."""
    path = Path(os.path.realpath(path))
    if not path.exists() and _previous(path).is_dir():
        _previous(path).rename(path)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields the path of a file beside `path`, and puts it in the place of `path` if all went well."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        _flush(aside)
        os.replace(aside, path)
        _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with replace_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, *, indent: int | None = 1) -> None:
    """Writes a JSON file whole or not at all; mappings of any kind are objects."""
    write_text(path, json.dumps(data, indent=indent, ensure_ascii=False, default=dict) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes a JSON line for each row, all or nothing; compressed if the file's name ends in .gz."""
    with replace_file(path) as aside, gzip.open(aside, "wb") if path.suffix == ".gz" else aside.open("wb") as lines:
        lines.writelines(json_line(row) for row in rows)


def json_line(row: Any) -> bytes:
    """A row as one line of JSON."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def as_json(data: Any) -> Any:
    """The data as a reader of the written JSON gets them."""
    return json.loads(json.dumps(data, default=dict))


def hash_json(data: Any) -> str:
    """A hash of JSON data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def parse_json(text: str) -> Any:
    """Parses JSON that a person wrote.

    Raises:
        ValueError: if it is not JSON, or an object has a key twice.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is in one object twice; leave one of them out")
    return data


def link_or_copy(source: str, target: str) -> str:
    """Puts a file also into another place, with its time: as a hard link if possible. Returns the target."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def name_of(path: str | Path) -> str:
    """The name of a folder, also of "."; for a link, the link's name."""
    return Path(os.path.abspath(path)).name


def _carry_over(entries: Sequence[Path], folder: Path) -> None:
    """Puts files and folders also into another folder on the same disk, as hard links if possible."""
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, folder / entry.name, symlinks=True, copy_function=link_or_copy)
        else:
            link_or_copy(str(entry), str(folder / entry.name))


def _finish_files(folder: Path) -> None:
    """Gives all files of a folder ordinary permissions, and flushes them to the disk.

    safetensors and `mkdtemp` write files that only their owner may read. Files that are also in another folder keep
    their permissions.
    """
    mode = _mode_of_new(folder)
    for parent, _, files in os.walk(folder, topdown=False):
        for file in files:
            if Path(parent, file).stat().st_nlink == 1:
                Path(parent, file).chmod(mode & 0o666)
            _flush(Path(parent, file))
        Path(parent).chmod(mode)
        _flush(Path(parent))


def _flush(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk: a rename must not survive without its file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot do this to a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _mode_of_new(folder: Path) -> int:
    """The permissions of a new folder in a folder; `os.umask` would change them for all threads to read them."""
    made = folder / ".new"
    made.mkdir()
    try:
        return stat.S_IMODE(made.stat().st_mode) & 0o777
    finally:
        made.rmdir()
