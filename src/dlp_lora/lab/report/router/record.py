"""The record of `bench router`: read, and looked up."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlp_lora.errors import RecordError
from dlp_lora.lab.records.table import Measure

BENCHMARK, FORMAT = "router", 1
PARTS = ("data", "scenarios", "targets", "router", "settings", "environment")

Found = Mapping[str, Any]
"""A record, or a part of one."""


def is_router_record(path: Path) -> bool:
    """True for a JSON file that `bench router` wrote, of whatever format."""
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["benchmark"] == BENCHMARK
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def read_router_record(path: Path) -> Found:
    """Reads the record of a router.

    Raises:
        RecordError: if it is of a later format, or lacks a part.
    """
    record: Found = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise RecordError(f"{path} has record format {record.get('format')}; this version reads {FORMAT}; upgrade")
    if missing := [part for part in PARTS if not isinstance(record.get(part), dict | list)]:
        raise RecordError(f"{path} is damaged: it has no {', '.join(missing)}; measure the router again")
    return record


def scenario_of(record: Found, name: str) -> Found:
    """Gives what was measured in a scenario; nothing, if it was not run."""
    found: Found = record["scenarios"].get(name) or {}
    return found


def parts_of(record: Found, scenario: str) -> list[tuple[str, Found]]:
    """The parts of a scenario that are measured one like the other."""
    apart = ("confusion", "reliability", "abstention")
    return [(k, v) for k, v in scenario_of(record, scenario).items() if isinstance(v, dict) and k not in apart]


def measure_of(own: Found) -> Measure:
    """Gives an accuracy and its interval, in per cent."""
    low, high = own["interval"]
    return Measure(value=100 * own["accuracy"], interval=(100 * low, 100 * high))
