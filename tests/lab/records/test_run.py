import json
from pathlib import Path
from typing import Any

import pytest

from dlp_lora.files import as_json
from dlp_lora.lab.records.run import read_run, to_json, write_run

RESULTS = Path(__file__).parents[3] / "results"
RECORDS = sorted(RESULTS.glob("*/record.json"))


def holds(written: Any, read: Any) -> bool:
    """Whether all of what was read is in what was written; there may be fields of later versions, too."""
    if isinstance(read, dict):
        return all(key in written and holds(written[key], value) for key, value in read.items())
    if isinstance(read, list):
        return len(written) == len(read) and all(map(holds, written, read))
    return bool(written == read)


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.parent.name)
def test_a_record_that_is_read_and_written_loses_nothing(file: Path, tmp_path: Path) -> None:
    record = read_run(file)
    assert holds(as_json(to_json(record)), json.loads(file.read_text()))
    write_run(tmp_path / "record.json", record)
    assert read_run(tmp_path) == record


def test_there_are_records_of_earlier_versions_to_read() -> None:
    assert RECORDS
