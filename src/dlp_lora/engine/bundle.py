"""A bundle: one folder with all parts of an engine except the base model, which it names.

bundle.json            base model, routing settings, hashes of the adapters and the router, and a number that grows
README.md              a model card, unless the owner wrote a README
adapters/<name>/       ordinary PEFT adapter folders
router/                the router, if there is one
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dlp_lora.bank.adapter_files import CONFIG_FILE, WEIGHTS_FILE, content_hash
from dlp_lora.engine.base import Base
from dlp_lora.engine.card import CARD_FILE, is_card, model_card
from dlp_lora.errors import BundleError, RouterError
from dlp_lora.files import link_or_copy, name_of, recover_folder, replace_folder
from dlp_lora.policy import RoutingSettings
from dlp_lora.router import Router, folder_hash, listed

BUNDLE_FILE = "bundle.json"
FILES = (BUNDLE_FILE, "adapters/*", "router/*")
# 1 had the routing settings side by side with the rest, and until 2 the base was a path or hub id alone.
FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The content of a bundle folder: the paths of its parts and the settings."""

    path: Path
    base: Base
    adapters: Mapping[str, Path]
    router: Path | None
    settings: RoutingSettings
    format: int = FORMAT

    @property
    def base_model(self) -> str:
        """The path or hub id of the base model on this machine.

        Raises:
            BundleError: if it is not here and cannot be downloaded.
        """
        return self.base.find(self.path)

    def __repr__(self) -> str:
        return (
            f"Bundle({str(self.path)!r} for {self.base}; {listed(list(self.adapters))}; "
            f"{'a router' if self.router is not None else 'no router'}; {self.settings})"
        )


def is_bundle(path: str | Path) -> bool:
    """True if the folder is a bundle."""
    recover_folder(path)
    return (Path(path) / BUNDLE_FILE).is_file()


def generation_of(path: str | Path) -> int:
    """How often a bundle folder has been written, or -1 if it cannot be read; fast enough for polling."""
    try:
        return int(json.loads((Path(path) / BUNDLE_FILE).read_text(encoding="utf-8")).get("generation", 0))
    except (OSError, ValueError, AttributeError, TypeError):
        return -1


def read_bundle(path: str | Path) -> Bundle:
    """Reads a bundle folder and checks that its adapters and router are unchanged.

    Raises:
        BundleError: if it is damaged, changed or of a later format.
    """
    path = Path(path)
    if not is_bundle(path):
        raise BundleError(f"{path} is not a bundle: it has no {BUNDLE_FILE}; make one with `dlp-lora bundle`")
    try:
        data = json.loads((path / BUNDLE_FILE).read_text(encoding="utf-8"))
        if data["format"] not in range(1, FORMAT + 1):
            raise BundleError(
                f"{path} has bundle format {data['format']}; this version reads up to {FORMAT}; upgrade dlp-lora"
            )
        hashes = dict(data["adapters"])
        bundle = Bundle(
            path=path,
            base=_base(data),
            adapters={name: path / "adapters" / name for name in hashes},
            router=path / "router" if data["router"] else None,
            settings=_settings(data),
            format=data["format"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path / BUNDLE_FILE} is damaged ({error!r}); make the bundle again") from error
    for name, folder in bundle.adapters.items():
        _check_name(name)
        try:
            found = content_hash(folder)
        except OSError as error:
            raise BundleError(f"{path}: its adapter {name!r} is missing or unreadable ({error})") from error
        if found != hashes[name]:
            raise BundleError(f"{path}: its adapter {name!r} is not the one that was saved; make the bundle again")
    if isinstance(data["router"], str):  # older bundles have no hash of it
        try:
            found = folder_hash(path / "router")
        except OSError as error:
            raise BundleError(f"{path}: its router is missing or unreadable ({error})") from error
        if found != data["router"]:
            raise BundleError(f"{path}: its router is not the one that was saved; make the bundle again")
    return bundle


def write_bundle(
    path: str | Path,
    *,
    base: Base,
    adapters: Mapping[str, Path],
    router: Router | None,
    settings: RoutingSettings,
    repo_id: str | None = None,
) -> None:
    """Writes a bundle folder; an old bundle is replaced at the very end.

    Args:
        path: of the folder. An owner's README.md in it stays.
        base: its base model.
        adapters: their folders by name.
        router: the router, if there is one.
        settings: the routing settings.
        repo_id: on the hub, for the model card; by default it names the folder.

    Raises:
        BundleError: if an adapter's name cannot name a folder.
        ValueError: if the policy is not of this package, because only these can be saved by name.
    """
    written = settings.to_dict()
    for name in adapters:
        _check_name(name)
    path = Path(path)
    has_card = is_card(path / CARD_FILE) or not (path / CARD_FILE).exists()
    files = (BUNDLE_FILE, "adapters", "router", *([CARD_FILE] if has_card else []))
    with replace_folder(path, own=files) as folder:
        hashes = {}
        for name, source in adapters.items():
            target = folder / "adapters" / name
            target.mkdir(parents=True)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                # Files of the old bundle are not written again, so that an engine that reads them goes on.
                is_old = Path(os.path.realpath(source / file)).is_relative_to(os.path.realpath(path))
                (link_or_copy if is_old else shutil.copyfile)(str(source / file), str(target / file))
            hashes[name] = content_hash(target)
        if router is not None:
            router.save_pretrained(folder / "router")
        data = {
            "format": FORMAT,
            "generation": max(generation_of(path), 0) + 1,
            "dlp_lora": version("dlp-lora"),
            "base_model": base.to_dict(),
            "adapters": hashes,
            "router": router is not None and folder_hash(folder / "router"),
            "settings": written,
        }
        (folder / BUNDLE_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        if has_card:
            written_adapters = {name: folder / "adapters" / name for name in adapters}
            card = model_card(
                name=repo_id or name_of(path), base=base, adapters=written_adapters, router=router, settings=settings
            )
            (folder / CARD_FILE).write_text(card, encoding="utf-8")


def upload_bundle(
    path: Path, repo_id: str, *, private: bool, token: str | bool | None, revision: str | None, commit_message: str
) -> str:
    """Uploads a bundle folder to the hub; returns the commit's address.

    Raises:
        BundleError: if the hub refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        card = None
        if api.file_exists(repo_id, CARD_FILE, revision=revision):
            card = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision, local_dir=path / ".theirs"))
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=path,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=[".theirs/*", *([CARD_FILE] if card is not None and not is_card(card) else [])],
            delete_patterns=["adapters/*", "router/*"],
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"the bundle cannot be uploaded to {repo_id!r}: {reason}") from error
    return str(done)


def check_names(routed: Sequence[str], held: Sequence[str]) -> None:
    """Checks that a router and a bank know the same adapters.

    Raises:
        RouterError: if they do not.
    """
    unknown, unrouted = sorted(set(routed) - set(held)), sorted(set(held) - set(routed))
    problems = []
    if unknown:
        problems.append(f"the router knows {', '.join(unknown)}, which no adapter is named")
    if unrouted:
        problems.append(f"the router does not know the adapters {', '.join(unrouted)}")
    if problems:
        raise RouterError(f"{' and '.join(problems)}; give the adapters it was trained for, or train it again")


def _base(data: Mapping[str, Any]) -> Base:
    if data["format"] < 3:
        return Base.from_source(data["base_model"])
    return Base.from_dict(data["base_model"])


def _settings(data: Mapping[str, Any]) -> RoutingSettings:
    if data["format"] == 1:
        names = ("policy", "switching", "kv_policy")
        # The oldest bundles read every prompt as a whole.
        older = {"prompt_routing": data.get("prompt_routing", "whole")}
        return RoutingSettings.from_dict({**{name: data[name] for name in names}, **older})
    return RoutingSettings.from_dict(data["settings"])


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or Path(name).name != name:
        raise BundleError(f"the adapter name {name!r} cannot name a folder; rename the adapter")
