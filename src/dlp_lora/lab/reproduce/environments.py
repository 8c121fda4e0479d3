"""What a run was made on: it may be begun on one machine, be killed there, and be finished on another one."""

import resource
import sys
from pathlib import Path
from typing import Any

from dlp_lora.files import write_json
from dlp_lora.kept import read_kept_list
from dlp_lora.lab.records.environment import environment

FILE = "environments.json"


class Environments:
    """Each hardware with its versions that worked on the run in a folder, and the most memory of a process there."""

    def __init__(self, out: Path) -> None:
        self._file = out / FILE
        self._now = environment()
        kept = read_kept_list(self._file, "environment", "peak_memory_mb")
        self._before = [own for own in kept if own["environment"] != self._now]
        self._peak_mb = max((own["peak_memory_mb"] for own in kept if own["environment"] == self._now), default=0)

    def keep(self) -> None:
        """Writes this process's memory down where it has risen: a process that is killed says nothing more."""
        peak_mb = _peak_memory_mb()
        if peak_mb > 1.01 * self._peak_mb or not self._file.is_file():
            self._peak_mb = max(peak_mb, self._peak_mb)
            write_json(self._file, self._all())

    def summary(self) -> dict[str, Any]:
        """The environment of this process, all of the run with this one first, and the most memory of any process."""
        self.keep()
        return {
            "environment": self._now,
            "environments": tuple(own["environment"] for own in reversed(self._all())),
            "peak_memory_mb": max(own["peak_memory_mb"] for own in self._all()),
        }

    def _all(self) -> list[dict[str, Any]]:
        return [*self._before, {"environment": self._now, "peak_memory_mb": self._peak_mb}]


def _peak_memory_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)
