"""Router folders: names, settings, weights and tokenizer, written whole or not at all and read back to the last bit."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from dlp_lora.errors import RouterError
from dlp_lora.files import recover_folder, replace_folder
from dlp_lora.router.context import Router

CONFIG_FILE = "router_config.json"
WEIGHTS_FILE = "router.safetensors"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = 4
FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)  # all files of a router
TYPES = ("mini-mlp", "encoder", "prototypes", "arrow")


@dataclass(frozen=True, kw_only=True)
class SavedRouter:
    """The content of a router folder; `settings` has the other data of the router's type, as JSON data."""

    type: str
    names: tuple[str, ...]
    settings: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer


def write_router(path: str | Path, saved: SavedRouter) -> None:
    """Writes a router folder; an old folder is replaced at the very end."""
    with replace_folder(path, own=(*FILES, "report.json")) as folder:  # the report is the old router's
        save_file({name: tensor.contiguous() for name, tensor in saved.weights.items()}, folder / WEIGHTS_FILE)
        saved.tokenizer.save(str(folder / TOKENIZER_FILE))
        tokenizer = _hash(folder / TOKENIZER_FILE)
        config = {"format": FORMAT, "type": saved.type, "names": saved.names, "tokenizer": tokenizer, **saved.settings}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def router_hash(router: Router) -> str:
    """The SHA-256 of a router's files: routers with equal hashes are equal."""
    with tempfile.TemporaryDirectory() as scratch:
        router.save_pretrained(Path(scratch) / "router")
        return folder_hash(Path(scratch) / "router")


def folder_hash(path: str | Path) -> str:
    """The SHA-256 of a router folder's files; files of others in the folder do not count."""
    digest = hashlib.sha256()
    for name in FILES:
        if (file := Path(path) / name).is_file():
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()


def router_type(path: str | Path) -> str:
    """Returns the type of the router in a folder.

    Raises:
        RouterError: if it is no router folder, is damaged or of a later version.
    """
    with as_router_error(Path(path)):
        return str(_read_config(Path(path))["type"])


@contextmanager
def reading_router(path: str | Path, type: str) -> Iterator[SavedRouter]:
    """Reads a router folder; errors of reading inside the `with` become RouterErrors.

    Raises:
        RouterError: if a file is missing or damaged, or the router is of another type or a later version.
    """
    path = Path(path)
    with as_router_error(path):
        config = _read_config(path)
        if (kind := config.pop("type")) != type:
            raise RouterError(f"{path} holds a router of type {kind!r}, not {type!r}; read it with load_router")
        if config.pop("tokenizer") != _hash(path / TOKENIZER_FILE):
            raise RouterError(
                f"{path}/{TOKENIZER_FILE} is not the tokenizer that the router was trained with; copy the router again"
            )
        yield SavedRouter(
            type=type,
            names=tuple(config.pop("names")),
            tokenizer=Tokenizer.from_file(str(path / TOKENIZER_FILE)),
            # Copied: in the file weights begin at any address, and products of such weights may differ in the last bit.
            weights={name: tensor.clone() for name, tensor in load_file(path / WEIGHTS_FILE).items()},
            settings=config,
        )


def _read_config(path: Path) -> dict[str, Any]:
    recover_folder(path)
    if not (path / CONFIG_FILE).is_file():
        raise RouterError(f"{path} is not a router folder: it has no {CONFIG_FILE}; train one with train-router")
    config: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text())
    if (format := config.pop("format")) < FORMAT:
        raise RouterError(f"{path} was written by an earlier version, format {format}, not {FORMAT}; train it again")
    if format > FORMAT or config["type"] not in TYPES:
        raise RouterError(f"{path} was written by a later version; upgrade dlp-lora")
    return config


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def as_router_error(path: Path) -> Iterator[None]:
    """Turns errors of reading a router folder into a RouterError that names the folder."""
    try:
        yield
    except RouterError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise RouterError(f"{path} is damaged ({error}); copy it again or train it again") from error
    except Exception as error:
        # The tokenizers library raises bare Exception for files that it cannot read.
        raise RouterError(f"{path}/{TOKENIZER_FILE} cannot be read ({error}); copy it again") from error
