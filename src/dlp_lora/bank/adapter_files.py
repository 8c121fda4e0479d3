"""The files of PEFT adapter folders: finding and comparing them."""

import hashlib
import re
from pathlib import Path

from dlp_lora.errors import AdapterChangedError, AdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)


def find_adapters(folder: str | Path) -> dict[str, Path]:
    """Lists the PEFT adapter folders directly inside `folder`, by folder name; also those without settings."""
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder; expected a folder of PEFT adapter folders")
    if (folder / CONFIG_FILE).is_file():
        raise AdapterError(
            f"{folder} is itself an adapter; expected a folder of adapter folders, or {{name: path}} for single ones"
        )
    folders = {p.name: p for p in sorted(folder.iterdir()) if p.name[0] != "." and _is_adapter(p)}
    if not folders:
        raise AdapterError(f"{folder} holds no adapter: no folder in it has an {CONFIG_FILE}")
    return folders


def check_adapter_name(name: str, path: str | Path) -> str:
    """Checks that a mixture can name the adapter; returns the name.

    Raises:
        AdapterError: if it cannot.
    """
    if not name or name != name.strip() or any(letter in name for letter in "=,\n"):
        raise AdapterError(
            f"{path}: the adapter name {name!r} cannot be written in a mixture such as math=0.6,units=0.4; "
            f'rename it to one without "=", "," and spaces at its ends'
        )
    return name


def weights_file(path: Path) -> Path:
    """The file of an adapter's weights.

    Raises:
        AdapterError: if there is none; it names the files that are there instead.
    """
    file = path / WEIGHTS_FILE
    if file.is_file():
        return file
    other = sorted(p.name for p in path.glob("adapter_model*"))
    tensors = [name for name in other if name.endswith(".safetensors")]
    start = f"{path} has no {WEIGHTS_FILE}"
    if any(re.search(r"-\d+-of-\d+\.", name) for name in tensors):
        raise AdapterError(
            f"{start}: its weights are in {len(tensors)} shards ({', '.join(tensors)}), and PEFT reads one file; join "
            f"them with safetensors.torch: load_file of each into one dict, save_file as {WEIGHTS_FILE}"
        )
    if tensors:
        raise AdapterError(
            f"{start} (found {', '.join(tensors)}); PEFT reads that name alone: "
            + ("rename it" if len(tensors) == 1 else "choose one and rename it")
        )
    if other:
        raise AdapterError(
            f"{start} (found {', '.join(other)}, which can run code when loaded); save it again with "
            f"safe_serialization=True"
        )
    if (path / "adapters.safetensors").is_file():
        raise AdapterError(f"{start} but adapters.safetensors, as mlx writes it; convert it to a PEFT adapter")
    raise AdapterError(f"{start} (found no weights); save it again with safe_serialization=True")


def files_stamp(path: str | Path) -> tuple[tuple[int, int], ...]:
    """The sizes and times of an adapter's files; they change if a file is written again."""
    stats = [(Path(path) / file).stat() for file in FILES]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def check_unchanged(path: str | Path, name: str, stamp: tuple[tuple[int, int], ...] | None) -> None:
    """Checks that the files of an adapter are still those that were added as `name`, with this `files_stamp`.

    Raises:
        AdapterChangedError: if they were written again, or are gone.
    """
    try:
        now = files_stamp(path)
    except OSError as error:
        message = f"{path}, the folder of the adapter {name!r}, cannot be read: {error}"
        raise AdapterChangedError(message, name=name) from error
    if now != stamp:
        message = f"{path} was written again since it was added as {name!r}; remove that and add it again"
        raise AdapterChangedError(message, name=name)


def content_hash(path: str | Path) -> str:
    """The SHA-256 of an adapter's settings and weights: adapters with equal hashes are equal."""
    digest = hashlib.sha256()
    for file in FILES:
        digest.update((Path(path) / file).read_bytes())
    return digest.hexdigest()


def _is_adapter(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() or any(path.glob("adapter_model*"))
