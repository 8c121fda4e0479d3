"""Folders by path or by Hugging Face hub id."""

from collections.abc import Sequence
from pathlib import Path

from dlp_lora.errors import DLPLoRAError


def local_folder(source: str | Path, *, files: Sequence[str], error: type[DLPLoRAError]) -> Path:
    """Gives the local folder of a path or hub id; `files` are the patterns that are downloaded of a hub id.

    Raises:
        DLPLoRAError: of the given kind, if there is neither such a folder nor such a repository.
    """
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise error(f"{source} is not a folder, and not a hub id of the form owner/name; check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as cause:  # the hub client raises its own errors, httpx's and OSError
        raise error(f"{source} is not a folder, and cannot be had from the hub: {cause}") from cause
