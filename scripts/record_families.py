"""Walks the model families of transformers and writes results/families.json: what holds for each, and what not and why.

    python scripts/record_families.py            # those that the record lacks under these versions
    python scripts/record_families.py llama      # these again

It goes on where it stopped. A family for which something does not hold without a reason is named and not written.
"""

import json
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from dlp_lora.files import write_json  # noqa: E402
from families import FAMILIES  # noqa: E402
from promises import walk  # noqa: E402

RECORD = ROOT / "results" / "families.json"


def main(names: list[str]) -> int:
    """Walks families; gives how many have failed."""
    versions = {package: version(package) for package in ("transformers", "peft", "torch")}
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))["families"] if is_of(versions) else {}
    num_failed = 0
    for name in names or [name for name in sorted(FAMILIES) if name not in found]:
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = asdict(walk(name, Path(folder)))
        except Exception:
            num_failed += 1
            found.pop(name, None)
            print(f"{name}: FAILED\n{traceback.format_exc(limit=-3)}", flush=True)
        else:
            limits = "".join(f"; not: {limit}" for limit in found[name]["limits"])
            print(f"{name}: {found[name]['status']}{limits} ({time.monotonic() - start:.1f} s)", flush=True)
        record = {"versions": versions, "families": dict(sorted(found.items()))}
        write_json(RECORD, record)
    return num_failed


def is_of(versions: dict[str, str]) -> bool:
    """Whether there is a record of these versions."""
    return RECORD.is_file() and json.loads(RECORD.read_text(encoding="utf-8"))["versions"] == versions


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
