"""Repositories of the Hugging Face hub as local folders, from the cache or by download."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dlp_lora.errors import DLPLoRAError


@dataclass(frozen=True, kw_only=True)
class Hub:
    """The access to the hub, the same for all repositories of a call.

    Args:
        token: for private repositories; by default the one that `hf auth login` saved.
        cache_dir: the folder of downloads, instead of the hub's usual cache.
        local_files_only: uses only the cache and no server.
    """

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def folder(
        self,
        source: str | Path,
        *,
        files: Sequence[str],
        error: type[DLPLoRAError],
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> Path:
        """Gives the local folder of a path or hub id.

        Args:
            files: patterns of the files to download, inside the subfolder.
            error: the kind of error to raise.
            revision: a branch, a tag or a commit of a hub id.
            subfolder: the folder inside the path or repository.

        Raises:
            DLPLoRAError: of the given kind, if there is neither such a folder nor such a repository.
        """
        inside = folder_inside(source, subfolder, error)
        if Path(source).is_dir():
            if revision is not None:
                raise error(f"{source} is a folder, which has no revision {revision!r}; leave the revision out")
            return self._inside(Path(source), source, inside, error)
        if not is_repo_id(source):
            raise error(f"{source} is not a folder, and not a hub id of the form owner/name; check the path")
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                str(source),
                revision=revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                allow_patterns=[inside + file for file in files],
            )
        except Exception as cause:  # the hub client raises many kinds of errors
            which = f"{source} at revision {revision!r}" if revision is not None else source
            reason = " ".join(str(cause).split())
            raise error(f"{which} is not a folder, and cannot be loaded from the hub: {reason}") from cause
        return self._inside(Path(folder), source, inside, error)

    def _inside(self, folder: Path, source: str | Path, inside: str, error: type[DLPLoRAError]) -> Path:
        if not (folder / inside).is_dir():
            raise error(f"{source} has no folder {inside.rstrip('/')!r}; check the subfolder")
        return folder / inside


def folder_inside(source: str | Path, subfolder: str | None, error: type[DLPLoRAError]) -> str:
    """Gives a subfolder as the beginning of its files' names: "" for none, else with a slash at its end.

    Raises:
        DLPLoRAError: of the given kind, if it leads out of its repository or path.
    """
    path = PurePosixPath(subfolder or "")
    if path.is_absolute() or ".." in path.parts:
        raise error(f"{source} has no folder {subfolder!r} inside it; give a subfolder without '..' or a leading '/'")
    return f"{path}/" if path.parts else ""


def is_repo_id(source: str | Path) -> bool:
    """Whether a text has the form of a hub id, owner/name."""
    return isinstance(source, str) and not source.startswith((".", "/", "~")) and source.count("/") == 1
