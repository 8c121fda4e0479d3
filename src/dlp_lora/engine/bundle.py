"""A bundle: one folder that holds all that an engine needs beside the base model, or the base model's name.

bundle.json            base model, routing settings, hashes of the adapters and the router
adapters/<name>/       ordinary PEFT adapter folders
router/                the router, if there is one
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dlp_lora.bank.peft_format import CONFIG_FILE, WEIGHTS_FILE, content_hash
from dlp_lora.errors import BundleError, RouterError
from dlp_lora.files import recover_folder, replace_folder
from dlp_lora.policy import RoutingSettings
from dlp_lora.router import Router, folder_hash

BUNDLE_FILE = "bundle.json"
FILES = (BUNDLE_FILE, "adapters/*", "router/*")
FORMAT = 2  # 1 had the routing settings side by side with the rest


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a bundle folder says: where its parts are and how they work together."""

    base_model: str
    adapters: Mapping[str, Path]
    router: Path | None
    settings: RoutingSettings
    format: int = FORMAT


def is_bundle(path: str | Path) -> bool:
    """True if the folder is a bundle."""
    recover_folder(path)
    return (Path(path) / BUNDLE_FILE).is_file()


def read_bundle(path: str | Path) -> Bundle:
    """Reads a bundle folder and checks that its adapters and router are those that were saved.

    Raises:
        BundleError: if it is damaged, changed or of a later format.
    """
    path = Path(path)
    if not is_bundle(path):
        raise BundleError(f"{path} is not a bundle: it has no {BUNDLE_FILE}; make one with `dlp-lora bundle`")
    try:
        data = json.loads((path / BUNDLE_FILE).read_text(encoding="utf-8"))
        if data["format"] not in (1, FORMAT):
            raise BundleError(
                f"{path} has bundle format {data['format']}; this version reads up to {FORMAT}; upgrade dlp-lora"
            )
        hashes = dict(data["adapters"])
        bundle = Bundle(
            base_model=data["base_model"],
            adapters={name: path / "adapters" / name for name in hashes},
            router=path / "router" if data["router"] else None,
            settings=_settings(data),
            format=data["format"],
        )
        if not isinstance(bundle.base_model, str):
            raise TypeError(f"{bundle.base_model!r} where a str is expected")
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
    base_model: str,
    adapters: Mapping[str, Path],
    router: Router | None,
    settings: RoutingSettings,
) -> None:
    """Writes a bundle folder; the one that was there before is replaced at the very end.

    Raises:
        BundleError: if an adapter's name cannot name a folder.
        ValueError: if the policy is not one of this package's, which alone can be saved by name.
    """
    written = settings.to_dict()
    for name in adapters:
        _check_name(name)
    with replace_folder(path, own=(BUNDLE_FILE, "adapters", "router")) as folder:
        hashes = {}
        for name, source in adapters.items():
            target = folder / "adapters" / name
            target.mkdir(parents=True)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(source / file, target / file)
            hashes[name] = content_hash(target)
        if router is not None:
            router.save_pretrained(folder / "router")
        data = {
            "format": FORMAT,
            "dlp_lora": version("dlp-lora"),
            "base_model": base_model,
            "adapters": hashes,
            "router": router is not None and folder_hash(folder / "router"),
            "settings": written,
        }
        (folder / BUNDLE_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


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
        raise RouterError(f"{' and '.join(problems)}; give the adapters it was trained for, or train it anew")


def _settings(data: Mapping[str, Any]) -> RoutingSettings:
    if data["format"] == 1:
        names = ("policy", "switching", "kv_policy")
        # The oldest bundles know no other way than to read a prompt whole.
        older = {"prompt_routing": data.get("prompt_routing", "whole")}
        return RoutingSettings.from_dict({**{name: data[name] for name in names}, **older})
    return RoutingSettings.from_dict(data["settings"])


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or Path(name).name != name:
        raise BundleError(f"the adapter name {name!r} cannot name a folder; rename the adapter")
