from pathlib import Path

import pytest

from dlp_lora.errors import RecordError
from dlp_lora.kept import Kept, keep_rows, read_kept, read_kept_list, read_rows


@pytest.mark.parametrize("text", ['{"identity": {}, "met', "[1]", '"text"', "\0\0\0", '{"identity": {}}'])
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "serial.json"
    assert (read_kept(file, "methods"), read_kept_list(file, "methods")) == ({}, [])
    file.write_text(text)
    for read in (read_kept, read_kept_list):
        with pytest.raises(RecordError, match=r"serial\.json is damaged \(.*\); remove it, and it is made again"):
            read(file, "methods")


@pytest.mark.parametrize("line", ['{"index": 1, "answ', "7", "\0\0"])
def test_a_damaged_row_is_named_and_a_torn_last_one_is_computed_again(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    batches = [[0], [1], [2]]

    def compute(batch: object) -> list[dict[str, int]]:
        assert isinstance(batch, list)
        return [{"index": i} for i in batch]

    keep_rows(file, {"model": "m"}, batches, compute)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], line]))
    assert len(read_rows(file)) == 2
    assert keep_rows(file, {"model": "m"}, batches, compute) == [{"index": 0}, {"index": 1}, {"index": 2}]
    file.write_text("\n".join([*lines[:2], line, lines[3], ""]))
    for read in (lambda: keep_rows(file, {"model": "m"}, batches, compute), lambda: read_rows(file)):
        with pytest.raises(RecordError, match=r"rows\.jsonl:3 is damaged \(.*\); remove"):
            read()


def test_values_are_there_again_for_the_same_identity_alone(tmp_path: Path) -> None:
    file, identity = tmp_path / "shares.json", {"args": {"tasks": ("days", "sums")}}
    kept = Kept(file, identity)
    assert kept.values == {}
    kept.put(shares={"keep": 0.5})
    kept.put(seconds=3)
    assert Kept(file, identity).values == {"shares": {"keep": 0.5}, "seconds": 3}
    assert Kept(file, {"args": {"tasks": ["days"]}}).values == {}
    file.write_text('{"shares": {}}')
    assert Kept(file, identity).values == {}
