"""Adapters that are loaded and unloaded while a server runs, only from folders that its owner named."""

import os
import stat
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlp_lora.bank.adapter_files import CONFIG_FILE, WEIGHTS_FILE, check_adapter_name, content_hash, files_stamp
from dlp_lora.engine.base import Base
from dlp_lora.engine.bundle import Bundle, generation_of, read_bundle
from dlp_lora.engine.loading import load_router
from dlp_lora.errors import AdapterError, BundleError, DLPLoRAError
from dlp_lora.router import MiniMLP, Router
from dlp_lora.serve.errors import APIError, invalid
from dlp_lora.serve.logs import LOGGER
from dlp_lora.serve.schema import AdapterResponse, LoadAdapterRequest, ReloadResponse
from dlp_lora.serve.service import Service
from dlp_lora.tasks import Example, Task
from dlp_lora.training.extend import add_tasks, remove_tasks

# The files of an adapter; others in its folder, from PEFT or people, are not read.
MAX_NAME = 255  # bytes of a name in a path
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of an adapter: the hash of their content, and their sizes and times."""

    content: str
    stamp: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class BundleMark:
    """What a bundle folder held at a moment. Taken before the bundle is loaded, it shows what was written since."""

    bundle: Bundle
    generation: int
    files: Mapping[str, Files]

    @classmethod
    def of(cls, path: Path) -> "BundleMark":
        """The mark of a folder now.

        Raises:
            BundleError: if it is damaged, changed or of a later format.
        """
        generation, bundle = generation_of(path), read_bundle(path)
        return cls(bundle=bundle, generation=generation, files=_files(bundle))


class AdapterManager:
    """Loads, unloads and reloads adapters of a service, one after the other; each call may take seconds.

    Adapters may be loaded from `folders`; `reload` reads the `bundle` again. Give the mark of a bundle that may have
    been written since it was loaded.
    """

    def __init__(
        self, service: Service, *, folders: Sequence[str | Path] = (), bundle: Path | BundleMark | None = None
    ) -> None:
        self._service = service
        self._folders = [Path(os.path.abspath(folder)) for folder in folders]
        for folder in self._folders:
            if not folder.is_dir():
                raise AdapterError(f"--adapter-dir {folder} is not a folder")
        mark = BundleMark.of(bundle) if isinstance(bundle, Path) else bundle
        self._bundle = None if mark is None else mark.bundle.path
        self.generation = -1 if mark is None else mark.generation  # of the bundle that was read last
        self._base: Base | None = None
        self._files: dict[str, Files] = {}  # of the bundle's adapters
        self._choices: dict[str, Any] = {}  # settings that the server was started with, instead of the bundle's
        if mark is not None:
            self._base, self._files = mark.bundle.base, dict(mark.files)
            chosen, stored = service.call.settings, mark.bundle.settings
            self._choices = {n: v for n in chosen.names() if (v := getattr(chosen, n)) != getattr(stored, n)}
        self._loaded: set[str] = set()  # by a request
        self._tasks: dict[str, Task] = {}  # for the router, by adapter
        self._lock = threading.Lock()

    def load(self, body: LoadAdapterRequest) -> AdapterResponse:
        """Loads an adapter, and teaches the router its examples.

        Raises:
            APIError: if its name is taken, it is in another folder, or it does not fit.
        """
        name = body.lora_name
        with self._lock:
            folder = self._folder(body.lora_path)
            self._check_name(name, folder)
            if name in self._service.backend.adapters and not body.load_inplace:
                raise invalid(
                    f"The lora adapter {name!r} has already been loaded; unload it first, or set load_inplace to true",
                    "lora_name",
                    "adapter_exists",
                )
            try:
                self._service.backend.check_adapter(folder, name)
            except AdapterError as error:
                raise invalid(f"lora_path: {error}", "lora_path", "adapter_refused") from error
            call, tasks = self._service.call, self._tasks
            if body.examples:
                examples = tuple(Example(prompt=one.prompt, answer=one.answer) for one in body.examples)
                task = Task(name=name, train=examples, test=())
                call, tasks = replace(call, router=_taught(call.router, task)), {**tasks, name: task}
            self._service.backend.put_adapters({name: folder})
            # Nothing fails from here on, so an adapter and the router that was taught its examples come together.
            self._service.call, self._tasks = call, tasks
            self._loaded.add(name)
            is_routed = call.router is not None and name in call.router.names
            LOGGER.info("adapter loaded", extra={"adapter": name, "is_routed": is_routed})
            unknown = "the router does not know it and never chooses it: give examples, or ask for it by name"
            how = "the router may choose it" if is_routed else unknown
            return {
                "message": f"Success: LoRA adapter {name!r} added; {how}.",
                "lora_name": name,
                "is_routed": is_routed,
            }

    def unload(self, name: str) -> AdapterResponse:
        """Removes an adapter; running answers keep it.

        Raises:
            APIError: if there is none of this name.
        """
        with self._lock:
            if name not in self._service.backend.adapters:
                raise APIError(
                    404,
                    f"The lora adapter {name!r} cannot be found.",
                    type="not_found_error",
                    param="lora_name",
                    code="adapter_not_found",
                )
            self._remove(name)
            self._loaded.discard(name)
            router = self._service.call.router
            if self._tasks.pop(name, None) is not None and isinstance(router, MiniMLP) and len(router.names) > 1:
                self._service.call = replace(self._service.call, router=remove_tasks(router, [name]))
            LOGGER.info("adapter unloaded", extra={"adapter": name})
        return {
            "message": f"Success: LoRA adapter {name!r} removed.",
            "lora_name": name,
            "is_routed": False,
        }

    def reload(self) -> ReloadResponse:
        """Reads the bundle again: its adapters, router and routing settings. Running answers do not change.

        Adapters that were loaded by a request stay, and the new router learns their examples. Settings of the server's
        start stay, too.

        Raises:
            APIError: if there is no bundle, it is damaged, or has another base model. Then nothing changes.
        """
        with self._lock:
            if self._bundle is None:
                raise invalid("the server was not started from a bundle folder, so there is nothing to read again")
            try:
                generation, bundle = generation_of(self._bundle), read_bundle(self._bundle)
                self._check_base(bundle)
                router = None if bundle.router is None else load_router(bundle.router)
                before, files = self._files, _files(bundle)
            except (DLPLoRAError, OSError) as error:
                raise invalid(str(error), code="bundle_refused") from error
            there = set(self._service.backend.adapters)
            removed = sorted((before.keys() - files.keys()) & there)
            is_new = {name for name in files if name not in before or files[name].content != before[name].content}
            replaced, added = sorted(is_new & there), sorted(files.keys() - there)
            # The same numbers in other files: the backend may read them later.
            rewritten = {name for name in files.keys() & before.keys() if files[name] != before[name]} - self._loaded
            # What was taught stays as long as the adapter that it was taught for.
            gone = {*added, *replaced, *removed}
            tasks = {name: task for name, task in self._tasks.items() if name not in gone}
            for name in (*added, *replaced):
                try:
                    self._check_name(name, bundle.adapters[name])
                    self._service.backend.check_adapter(bundle.adapters[name], name)
                except (AdapterError, APIError) as error:
                    raise invalid(str(error), code="adapter_refused") from error
            for task in tasks.values():
                try:
                    router = _taught(router, task)
                except APIError as error:
                    raise invalid(
                        f"{task.name!r} was loaded with examples, and the bundle's router cannot learn them; unload it "
                        f"first ({error})",
                        code="bundle_refused",
                    ) from error
            settings = replace(bundle.settings, **self._choices)
            changed = {*added, *replaced, *(rewritten & there)}
            try:
                self._service.backend.put_adapters({name: bundle.adapters[name] for name in sorted(changed)})
            except (DLPLoRAError, OSError) as error:
                raise invalid(f"the bundle's adapters cannot be loaded: {error}", code="bundle_refused") from error
            self._service.call = replace(self._service.call, router=router, settings=settings)
            for name in removed:
                self._remove(name)
            self._files, self._tasks, self.generation = files, tasks, generation
            self._loaded -= gone
            LOGGER.info("bundle reloaded", extra={"added": added, "removed": removed, "replaced": replaced})
        return {
            "message": f"Success: read {self._bundle} again.",
            "added": added,
            "removed": removed,
            "replaced": replaced,
        }

    def _remove(self, name: str) -> None:
        self._service.backend.remove_adapter(name)
        self._service.metrics.forget(name)

    def _check_name(self, name: str, folder: Path) -> None:
        self._service.names.check_free(name)
        try:
            check_adapter_name(name, folder)
        except AdapterError as error:
            raise invalid(f"lora_name: {error}", "lora_name") from error

    def _folder(self, given: str) -> Path:
        """Finds the folder of an adapter inside one of the allowed folders.

        Raises:
            APIError: if it is elsewhere, or its path or its content has a link.
        """
        if not self._folders:
            raise APIError(
                403, "no adapter may be loaded: start the server with --adapter-dir", type="permission_error"
            )
        path = Path(given)
        if "\0" in given or ".." in path.parts:
            raise invalid('lora_path: must hold no ".."', "lora_path", "path_refused")
        if any(len(part.encode(errors="replace")) > MAX_NAME for part in path.parts):
            raise invalid(f"lora_path: a name in it has more than {MAX_NAME} bytes", "lora_path", "path_refused")
        for root in self._folders:
            folder = root / path  # an absolute path stays absolute
            if folder == root or not folder.is_relative_to(root):
                continue
            parts = [root.joinpath(*folder.relative_to(root).parts[:n]) for n in range(1, len(folder.parts) + 1)]
            if any(part.is_symlink() for part in parts):
                raise invalid("lora_path: must not lead over a link", "lora_path", "path_refused")
            if folder.is_dir():
                _check_files(folder)
                return folder
        raise invalid(
            f"lora_path: there is no folder {given[:200]!r} in those that adapters may be loaded from; hub ids and "
            "folders elsewhere are refused",
            "lora_path",
            "path_refused",
        )

    def _check_base(self, bundle: Bundle) -> None:
        """Checks that a bundle still has the base model of the server's start.

        Raises:
            BundleError: if it has another one.
        """
        then, now = self._base, bundle.base
        assert then is not None
        if then.fingerprint is None or now.fingerprint is None:
            differences = [] if then.name == now.name else ["its name"]
        else:
            differences = then.fingerprint.differences(now.fingerprint)
        if differences:
            raise BundleError(
                f"{self._bundle} is now for another base model, {now}, than the one that runs "
                f"({', '.join(differences)}); start another server"
            )


def _taught(router: Router | None, task: Task) -> MiniMLP:
    """Makes a router that also knows the task of an adapter.

    Raises:
        APIError: if the router cannot learn it.
    """
    if not isinstance(router, MiniMLP):
        kind = "no router" if router is None else f"a {type(router).__name__}"
        raise invalid(f"examples: only a MiniMLP learns adapters later, and the server has {kind}", "examples")
    if task.name in router.names:
        if len(router.names) == 1:
            raise invalid("examples: the router knows this adapter alone; load it without examples", "examples")
        router = remove_tasks(router, [task.name])
    try:
        return add_tasks(router, [task])
    except DLPLoRAError as error:
        raise invalid(f"examples: {error}", "examples") from error


def _check_files(folder: Path) -> None:
    for entry in sorted(folder.iterdir()):
        mode = entry.lstat().st_mode
        if stat.S_ISLNK(mode) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise invalid(f"lora_path: {entry.name} is a link or no file", "lora_path", "path_refused")
        if entry.suffix in PICKLES and not (folder / WEIGHTS_FILE).is_file():
            raise invalid(
                f"lora_path: {entry.name} may be a pickle, which can run code; save it as {WEIGHTS_FILE}",
                "lora_path",
                "path_refused",
            )
    if not (folder / CONFIG_FILE).is_file():
        raise invalid(f"lora_path: there is no {CONFIG_FILE} in it", "lora_path", "adapter_refused")


def _files(bundle: Bundle) -> dict[str, Files]:
    return {
        name: Files(content=content_hash(folder), stamp=files_stamp(folder)) for name, folder in bundle.adapters.items()
    }
