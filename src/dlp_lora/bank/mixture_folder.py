"""Mixtures as PEFT adapters in a folder that another engine reads: named by content, the oldest deleted.

A mixture of adapters is one LoRA whose rank is the sum of theirs. Its folder is written under another name and then
renamed, so that it is never incomplete. Folders of the same name are equal to the last bit. Several processes may share
the folder: each has a shared lock on the mixtures that it uses, and deletes none that is locked.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import uuid4

import torch

from dlp_lora.bank.adapter_files import CONFIG_FILE, WEIGHTS_FILE, check_unchanged, content_hash, files_stamp
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.export import concatenated
from dlp_lora.bank.limits import parts
from dlp_lora.bank.peft_format import Adapter, LoraWeights, read_adapter, write_adapter
from dlp_lora.errors import AdapterError
from dlp_lora.files import replace_folder
from dlp_lora.policy import Mixture

NAME = re.compile(r"dlp-[0-9a-f]{24}")
# Of one answer or one process, also half-written ones: a kill leaves them.
PASSING_NAME = re.compile(r"\.?(keep|probe)-[0-9a-f]{32}(\..*)?")
PASSING_S = 24 * 3600  # no answer takes as long
OWN_PREFIX, OWN_MARKER = "dlp-lora-mixtures-", ".dlp-lora-mixtures"  # of folders that are made here
OWN_NAME = re.compile(rf"{OWN_PREFIX}[a-z0-9_]{{8}}")
FORMAT = "1"  # of the written files; part of each name


@dataclass(frozen=True, kw_only=True)
class Source:
    """An adapter for mixtures: its shapes, a hash of its folder, and the times of its files."""

    adapter: Adapter
    content: str
    stamp: tuple[tuple[int, int], ...]

    @cached_property
    def rank(self) -> int:
        """Its largest rank."""
        return max(lora.rank for lora in self.adapter.modules.values())

    @property
    def targets(self) -> frozenset[str]:
        """The ends of the names of the layers that it changes."""
        return frozenset(module.rsplit(".", 1)[-1] for module in self.adapter.modules)

    def with_weights(self) -> Adapter:
        """Returns the adapter with its weights.

        Raises:
            AdapterError: if it cannot be read any more; AdapterChangedError if its folder has changed.
        """
        try:
            return self.adapter.with_weights()
        finally:  # files that were written again have other weights, or explain the error
            check_unchanged(self.adapter.path, self.adapter.name, self.stamp)


Sources = Mapping[str, Source]
"""Adapters by name."""


def read_source(folder: str | Path, name: str, layout: BaseLayers) -> Source:
    """Reads an adapter's folder without its weights.

    Raises:
        AdapterError: if it cannot be read.
    """
    stamp = files_stamp(folder)
    adapter = read_adapter(folder, name, weights=False, layout=layout, stacklevel=2)
    return Source(adapter=adapter, content=content_hash(folder), stamp=stamp)


@dataclass(eq=False)
class Entry:
    """One mixture in the folder. `contents` are the hashes of its adapters; it is not deleted while it has users."""

    name: str
    path: Path
    nbytes: int
    contents: frozenset[str] = frozenset()
    num_users: int = 0
    lock: int | None = None  # a file descriptor


class MixtureFolder:
    """The written mixtures, up to `budget_mb` megabytes in addition to those in use. One thread uses it, but `write`
    takes time and may run in any thread.

    Args:
        path: the folder; None makes one, in memory (tmpfs) if possible, and deletes it at the end.
        base: identifies the base model.
        layout: of the base model.
        budget_mb: the size of the unused mixtures, at most.
    """

    def __init__(self, path: str | Path | None, *, base: str, layout: BaseLayers, budget_mb: float) -> None:
        if budget_mb < 0:
            raise ValueError(f"adapter_cache_mb must not be negative, got {budget_mb}")
        self._own_lock: int | None = None  # of a folder that was made here
        self._probe: tuple[Path, int] | None = None  # with its lock
        if path is None:
            self.path, self._own_lock = _folder_in_memory()
        else:
            self.path = Path(path).absolute()
        if path is None or not self.path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o755)  # the reader may be another user
        self._base = base
        self._layout = layout
        self._budget = budget_mb * 2**20
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the least recently used first
        for folder in self.path.iterdir():
            if PASSING_NAME.fullmatch(folder.name):
                _delete_if_left(folder)
        # Only names that are given here: others may be somebody's adapters.
        there = [folder for folder in self.path.iterdir() if NAME.fullmatch(folder.name) and folder.is_dir()]
        for folder in sorted(there, key=lambda folder: folder.stat().st_mtime):
            self._entries[folder.name] = Entry(folder.name, folder, _size(folder))

    def name_of(self, mixture: Mixture, sources: Sources) -> str:
        """Names a mixture by its content."""
        lines = [FORMAT, self._base]
        lines += sorted(f"{sources[name].content} {units}" for name, units in parts(mixture).items())
        return "dlp-" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]

    def claim(self, mixture: Mixture, sources: Sources) -> Entry:
        """Returns the entry of a mixture, which is in use until it is released; `write` writes its files."""
        name = self.name_of(mixture, sources)
        entry = self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = Entry(name, self.path / name, 0)
        entry.contents = frozenset(sources[each].content for each in mixture)
        entry.num_users += 1
        self._entries.move_to_end(name)
        return entry

    def release(self, entry: Entry) -> None:
        """Releases an entry for one of its users."""
        entry.num_users -= 1

    def write(self, entry: Entry, mixture: Mixture, sources: Sources) -> None:
        """Writes the files of an entry if they are missing, and locks them against other processes.

        Raises:
            AdapterError: if an adapter's folder cannot be read any more, or the mixture cannot be written.
        """
        while entry.lock is None:
            if not (entry.path / CONFIG_FILE).is_file():
                with _as_adapter_error(entry.path), replace_folder(entry.path) as aside:
                    write_mixture(aside, mixture, sources)
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                entry.lock = _locked(entry.path / CONFIG_FILE, fcntl.LOCK_SH)
        if not entry.nbytes:
            entry.nbytes = _size(entry.path)

    def write_probe(self, module: str, *, d_in: int, d_out: int, rank: int) -> Path:
        """Writes an adapter that changes nothing, for checks of servers; it is deleted at the end."""
        path = self.path / f"probe-{uuid4().hex}"
        write_zeros(path, module, d_in=d_in, d_out=d_out, rank=rank)
        self._probe = path, _locked(path / CONFIG_FILE, fcntl.LOCK_SH)
        return path

    @property
    def used(self) -> list[Entry]:
        """The entries in use."""
        return [entry for entry in self._entries.values() if entry.num_users]

    def surplus(self) -> list[Entry]:
        """The entries to delete if there are too many: the least recently used, none in use."""
        excess = sum(entry.nbytes for entry in self._entries.values()) - self._budget
        going: list[Entry] = []
        for entry in self._entries.values():
            if excess <= 0:
                break
            if not entry.num_users:
                going.append(entry)
                excess -= entry.nbytes
        return going

    def holding(self, content: str) -> list[Entry]:
        """The unused entries that contain an adapter."""
        return [entry for entry in self._entries.values() if content in entry.contents and not entry.num_users]

    def delete(self, entry: Entry) -> None:
        """Forgets an entry, and deletes its files unless another process uses them."""
        self._entries.pop(entry.name, None)
        if entry.lock is not None:
            os.close(entry.lock)
            entry.lock = None
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _locked(entry.path / CONFIG_FILE, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Renamed first, so that no process finds an incomplete folder.
            gone = entry.path.with_name(f".{entry.name}.{os.getpid()}.gone")
            entry.path.rename(gone)
            os.close(lock)
            shutil.rmtree(gone, ignore_errors=True)

    def close(self) -> None:
        """Releases all entries, and deletes the probe, and the folder if it was made here."""
        for entry in self._entries.values():
            if entry.lock is not None:
                os.close(entry.lock)
        self._entries.clear()
        if self._probe is not None:
            path, lock = self._probe
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            self._probe = None
        if self._own_lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._own_lock)
            self._own_lock = None


def write_mixture(folder: Path, mixture: Mixture, sources: Sources) -> None:
    """Writes a mixture as a PEFT adapter; an empty one as an adapter that changes nothing.

    The weights have the widest type of those of its adapters.

    Raises:
        AdapterError: if an adapter's folder has changed.
    """
    if not mixture:
        module, lora = next(iter(next(iter(sources.values())).adapter.modules.items()))
        write_zeros(folder, module, d_in=lora.a.shape[1], d_out=lora.b.shape[0], rank=1)
        return
    loaded = [(sources[name].with_weights(), weight) for name, weight in mixture.items()]
    modules = concatenated(loaded)
    bases = {adapter.base_model for adapter, _ in loaded}
    write_adapter(
        folder,
        modules,
        base_model=next(iter(bases)) if len(bases) == 1 else None,
        rank=max(lora.rank for lora in modules.values()),
    )


def write_zeros(folder: Path, module: str, *, d_in: int, d_out: int, rank: int) -> None:
    """Writes a PEFT adapter that changes nothing."""
    lora = LoraWeights(a=torch.zeros(rank, d_in), b=torch.zeros(d_out, rank), scaling=1.0)
    write_adapter(folder, {module: lora}, rank=rank)
    for file in folder.iterdir():
        file.chmod(0o644)


def rewrite_mixture(path: Path, mixture: Mixture, sources: Sources) -> None:
    """Writes a mixture over an older one, file by file, so that each file is complete at any time."""
    path.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        write_mixture(aside, mixture, sources)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (aside / name).chmod(0o644)
            os.replace(aside / name, path / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _folder_in_memory() -> tuple[Path, int]:
    """Makes a folder, in memory where there is such a disk, and a lock that shows that its process lives.

    Folders of processes that were killed are deleted: nobody else would free that memory.
    """
    parent = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    for folder in parent.glob(f"{OWN_PREFIX}*"):
        if not (OWN_NAME.fullmatch(folder.name) and (folder / OWN_MARKER).is_file()):
            continue  # somebody else's
        with suppress(OSError):  # another user's, or in use
            os.close(_locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB))
            shutil.rmtree(folder, ignore_errors=True)
    # Locked before it has a name that others look for.
    made = Path(tempfile.mkdtemp(prefix=f".{OWN_PREFIX}", dir=parent))
    lock = _locked(made, fcntl.LOCK_EX)
    (made / OWN_MARKER).touch()
    return made.rename(made.with_name(made.name.removeprefix("."))), lock


def _delete_if_left(folder: Path) -> None:
    """Deletes a folder that a killed process left."""
    with suppress(OSError):  # gone, another user's, or in use
        if time.time() - folder.stat().st_mtime < PASSING_S:
            return
        with suppress(FileNotFoundError):  # half-written
            os.close(_locked(folder / CONFIG_FILE, fcntl.LOCK_EX | fcntl.LOCK_NB))
        shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _locked(file: Path, how: int) -> int:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _as_adapter_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(f"the mixture {path} cannot be written: {error}") from error
