"""The base model of a bundle: a name that works on another machine, and a fingerprint."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dlp_lora.bank.fingerprint import Fingerprint
from dlp_lora.bank.stored_layout import stored_folder
from dlp_lora.default_model import NAME, cache_dir, default_model
from dlp_lora.errors import BundleError, ModelError

Origin = Literal["hub", "embedded", "folder", "memory"]
_IN_CACHE = re.compile(r"models--(.+)/snapshots/[^/]+/?$")


PROBE_TEXT = (
    "Sam has 12 apples, buys 30 more and gives 7 to Ana. The train from Paris to Lyon takes 2 hours; how many minutes "
    "is that? Water boils at 100 degrees. def add(a, b): return a + b. Der Himmel ist blau, et la mer aussi."
)
PROBE_TOKENS = 64  # of it, at most


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The tokens of the beginning of PROBE_TEXT, and the base model's log-probability of each but the first, after
    those before it. Another process with the same model gives the same numbers, up to its precision.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Probe":
        """Reads what `to_dict` gave."""
        return cls(tokens=tuple(map(int, data["tokens"])), logprobs=tuple(map(float, data["logprobs"])))

    def to_dict(self) -> dict[str, Any]:
        """Gives it as JSON data."""
        return {"tokens": list(self.tokens), "logprobs": [round(logprob, 5) for logprob in self.logprobs]}


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model of a bundle.

    `name` is its id on the hub, or the name of the embedded model, of its folder, or of a model in memory (maybe "").
    `path` is the path of its folder: relative to the bundle, or absolute and then only a hint. `revision` and
    `subfolder` are its place in a repository of the hub, if it was loaded from another one than the default.
    """

    name: str
    origin: Origin
    path: str | None = None
    fingerprint: Fingerprint | None = None
    probe: Probe | None = None
    revision: str | None = None
    subfolder: str | None = None

    @classmethod
    def of(
        cls,
        source: str,
        *,
        bundle: Path | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        commit: str | None = None,
        folder: Path | None = None,
    ) -> "Base":
        """Describes the model that was loaded from a path or hub id, for a bundle in a folder.

        Without `bundle`, as on the hub, the path is left out. `commit` is that of the revision, and `folder` has the
        model's files, if they are known.
        """
        if not source:
            return cls(name="", origin="memory")
        subfolder, revision = subfolder or None, None if revision == "main" else revision  # the default branch
        folder = folder or stored_folder(source, commit=commit or revision, subfolder=subfolder)
        fingerprint = Fingerprint.of(folder) if folder is not None else None
        if not _is_path(source):
            return cls(name=source, origin="hub", fingerprint=fingerprint, revision=revision, subfolder=subfolder)
        place = Path(os.path.realpath(Path(source, subfolder or "")))
        if place == Path(os.path.realpath(cache_dir() / NAME)):
            return cls(name=NAME, origin="embedded", fingerprint=fingerprint)
        if cached := _IN_CACHE.search(os.path.abspath(source)):
            name = cached[1].replace("--", "/")
            return cls(name=name, origin="hub", fingerprint=fingerprint, subfolder=subfolder)
        path = None if bundle is None else _path_between(Path(os.path.realpath(bundle)), place)
        return cls(
            name=Path(os.path.abspath(Path(source, subfolder or ""))).name,
            origin="folder",
            path=path,
            fingerprint=fingerprint,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Base":
        """Reads what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: if the data are wrong.
        """
        name, origin, path, marks = data["name"], data["origin"], data["path"], data["fingerprint"]
        places = path, data.get("revision"), data.get("subfolder")  # most bundles have only the first
        are_texts = isinstance(name, str) and all(isinstance(place, str | None) for place in places)
        if not are_texts or origin not in get_args(Origin):
            raise TypeError(f"{dict(data)!r} names no base model")
        probe = data.get("probe")  # bundles that were made without the model have none
        return cls(
            name=name,
            origin=origin,
            path=path,
            fingerprint=marks and Fingerprint.from_dict(marks),
            probe=probe and Probe.from_dict(probe),
            revision=data.get("revision"),
            subfolder=data.get("subfolder"),
        )

    @classmethod
    def from_source(cls, source: str) -> "Base":
        """Reads an older bundle's path or hub id, as it was on the machine that wrote it."""
        if not isinstance(source, str):
            raise TypeError(f"expected a str, got {source!r}")
        if not source:
            return cls(name="", origin="memory")
        if _is_path(source):
            folder = Path(os.path.abspath(source))
            origin: Origin = "embedded" if folder == Path(os.path.abspath(cache_dir() / NAME)) else "folder"
            return cls(name=folder.name, origin=origin, path=str(folder))
        return cls(name=source, origin="hub")

    def __str__(self) -> str:
        where = f" (the folder {self.path})" if self.path is not None else ""
        where += "".join(f", {name} {value!r}" for name, value in self.place.items())
        return (repr(self.name) if self.name else "a model without a name") + where

    def to_dict(self) -> dict[str, Any]:
        """Gives it as JSON data."""
        marks = self.fingerprint and self.fingerprint.to_dict()
        data = {"name": self.name, "origin": self.origin, "path": self.path, "fingerprint": marks, **self.place}
        return data if self.probe is None else {**data, "probe": self.probe.to_dict()}

    @property
    def place(self) -> dict[str, str]:
        """The revision and the subfolder, if they are not the default."""
        place = {"revision": self.revision, "subfolder": self.subfolder}
        return {name: value for name, value in place.items() if value is not None}

    def find(self, bundle: Path) -> str:
        """Returns the path or hub id of the model on this machine.

        Raises:
            BundleError: if it is not here and cannot be downloaded.
        """
        if self.path is not None and (bundle / self.path).is_dir():  # an absolute one is the path itself
            return os.path.realpath(bundle / self.path)  # the bundle may be a link to another folder
        if self.origin == "hub":
            return self.name
        if self.origin == "embedded" or (self.origin == "folder" and self.name == NAME):
            try:
                return str(default_model())
            except ModelError as error:
                raise self.missing(bundle, str(error)) from error
        raise self.missing(bundle, "which is not here" if self.origin == "folder" else "")

    def missing(self, bundle: Path, why: str) -> BundleError:
        """The error for a bundle whose base model is missing."""
        reason = f", {why}" if why else ""
        return BundleError(f"the bundle {bundle} was made for {self}{reason}; give --model, or base_model= in Python")

    def differences(
        self,
        source: str,
        *,
        subfolder: str | None = None,
        commit: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> list[str]:
        """Lists the differences between the model at a path or hub id and this one, if its files are here."""
        folder = stored_folder(source, commit=commit, subfolder=subfolder, cache_dir=cache_dir)
        fingerprint = Fingerprint.of(folder) if folder is not None else None
        return (
            self.fingerprint.differences(fingerprint)
            if self.fingerprint is not None and fingerprint is not None
            else []
        )


def _is_path(source: str) -> bool:
    """Whether it is the path of a folder (even of a deleted one) and not an id on the hub."""
    return Path(source).is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1


def _path_between(bundle: Path, place: Path) -> str:
    """The path from a bundle to a folder, relative if they have more than the root in common."""
    common = Path(os.path.commonpath([bundle, place]))
    return os.path.relpath(place, bundle) if common != Path(common.anchor) else str(place)
