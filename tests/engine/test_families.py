"""What an engine promises holds for every model family of transformers, or is limited as results/families.json says."""

import json
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES, IN_CI
from promises import walk

RECORD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "results" / "families.json").read_text())


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.ci if name in IN_CI else pytest.mark.models) for name in FAMILIES],
)
def test_a_family_holds_what_an_engine_promises_or_is_refused_with_a_reason(family: str, tmp_path: Path) -> None:
    if family not in RECORD["families"]:
        _tell_of_new(family, tmp_path)
        return
    wanted, found = RECORD["families"][family], walk(family, tmp_path)
    assert (found.kind, found.status) == (wanted["kind"], wanted["status"]), found.reason
    assert found.limits.keys() <= wanted["limits"].keys(), found.limits


def _tell_of_new(family: str, folder: Path) -> None:
    """A class that a newer transformers has is told of, and fails nothing."""
    try:
        found: Any = walk(family, folder)
    except Exception as error:
        found = f"{type(error).__name__}: {error} ({traceback.format_exc(limit=-1)})"
    warnings.warn(f"transformers has {FAMILIES[family]}, which the record does not know: {found}", stacklevel=2)


def test_most_families_of_the_record_hold_every_promise() -> None:
    families = RECORD["families"].values()
    whole = [family for family in families if family["status"] == "supported" and not family["limits"]]
    assert len(whole) > len(families) / 2
    assert {family["status"] for family in families} <= {"supported", "refused", "not built"}
    for family in families:
        assert family["status"] == "supported" or family["reason"].strip()
        assert all(reason.strip() for reason in family["limits"].values())
