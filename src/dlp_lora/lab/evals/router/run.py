"""The run: the scenarios one by one, each kept in the record as soon as it is done."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlp_lora.errors import RecordError
from dlp_lora.files import write_json
from dlp_lora.lab.evals.router import scenarios, trainings
from dlp_lora.lab.evals.router.peers import peers
from dlp_lora.lab.evals.router.scenarios import Scenario
from dlp_lora.lab.evals.router.setting import Setting, Trained
from dlp_lora.lab.evals.router.targets import judged
from dlp_lora.lab.evals.router.untrained import untrained
from dlp_lora.lab.records.environment import environment
from dlp_lora.progress import Progress
from dlp_lora.router import router_hash

FORMAT = 1
SCENARIOS: Mapping[str, Scenario] = {
    "prompts": scenarios.prompts,
    "answers": scenarios.answers,
    "conversations": scenarios.conversations,
    "serial": scenarios.serial,
    "questions": scenarios.questions,
    "junctions": scenarios.junctions,
    "outside": scenarios.outside,
    "robustness": scenarios.robustness,
    "instructions": scenarios.instructions,
    "timing": scenarios.timing,
    "untrained": untrained,
    "peers": peers,
    "left_out": trainings.left_out,
    "scale": trainings.scale,
    "synthetic": trainings.synthetic,
    "extension": trainings.extension,
    "skew": trainings.skew,
    "ceilings": trainings.ceilings,
}


def bench_router(
    setting: Setting, *, only: Sequence[str] = (), file: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Measures a router in the scenarios, by default in all; returns the record as JSON data.

    Args:
        file: the record, which is written after each scenario; those that it has already are not measured again.
        overwrite: begin the record again.

    Raises:
        ValueError: for an unknown scenario.
        RecordError: if the file is no such record, or one of other data, settings or router.
    """
    unknown = [name for name in only if name not in SCENARIOS]
    if unknown:
        raise ValueError(f"no scenario {unknown[0]!r}; choose from {', '.join(SCENARIOS)}")
    key = setting.key()
    record = _kept(file, key) if file and not overwrite else None
    record = record or {"format": FORMAT, "benchmark": "router", "key": key, "scenarios": {}}
    for name in only or SCENARIOS:
        if name in record["scenarios"]:
            continue
        setting.on_progress(Progress(name, 0, 1))
        start = time.perf_counter()
        found = SCENARIOS[name](setting)
        _check_router(record, setting)
        record["scenarios"][name] = {**found, "seconds": round(time.perf_counter() - start, 2)}
        _describe(record, name, setting)
        record["targets"] = judged(record)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, record)
        setting.on_progress(Progress(name, 1, 1))
    return record


def _check_router(record: Mapping[str, Any], setting: Setting) -> None:
    """Checks that a scenario was measured with the router of those before.

    Raises:
        RecordError: if it was not, or if the record does not say which one that was.
    """
    before = record.get("router") or {}
    if before.get("given") or before.get("type") is None or setting.known is None:  # a given router is in the key
        return
    if before.get("hash") != router_hash(setting.known.router):
        raise RecordError(
            "the router that this run trained first is not kept, and trained again it came out differently; give the "
            "folder with it (--work), or begin again (--overwrite)"
        )


def _describe(record: dict[str, Any], scenario: str, setting: Setting) -> None:
    """Adds to a record what it is of; `elsewhere` are the environments of scenarios that ran in another one."""
    now = environment()
    if record.setdefault("environment", now) != now:
        record.setdefault("elsewhere", {})[scenario] = now
    record["settings"] = asdict(setting.args)
    record["data"] = {
        "tasks": [task.name for task in setting.tasks],
        "extra": [task.name for task in setting.extra],
        "labels": setting.labels,
    }
    if setting.known is not None or "router" not in record:
        record["router"] = _router(setting.known) | {"given": setting.given is not None}


def _router(known: Trained | None) -> dict[str, Any]:
    """What a record says of its router; one that no scenario asked for has no type."""
    if known is None:
        return dict.fromkeys(("type", "num_parameters", "seconds", "hash"))
    return {
        "type": type(known.router).__name__,
        "num_parameters": known.num_parameters,
        "seconds": known.seconds,
        "hash": router_hash(known.router),
    }


def _kept(file: Path, key: str) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{file} cannot be read as a record ({error}); name another file") from error
    if not isinstance(record, dict) or record.get("benchmark") != "router":
        raise RecordError(f"{file} is no record of `bench router`; name another file")
    if record["key"] != key:
        raise RecordError(
            f"{file} holds a run of other data, settings or another router; name another file, or --overwrite it"
        )
    return record
