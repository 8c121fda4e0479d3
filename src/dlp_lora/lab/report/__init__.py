"""The report of a run: its record in, report.md, report.html and pictures with the paper's tables and figures out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlp_lora.files import write_text
from dlp_lora.lab.report.charts import pictures
from dlp_lora.lab.report.markup import Picture, Section, html_page, markdown_page
from dlp_lora.lab.report.page import sections, title_of
from dlp_lora.lab.report.record import read_record
from dlp_lora.lab.report.router import (
    is_router_record,
    read_router_record,
    router_pictures,
    router_sections,
    router_title,
)

__all__ = ["Report", "write_report"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The files of a report; the HTML holds the pictures, too."""

    markdown: Path
    html: Path
    pictures: tuple[Path, ...]


def write_report(record: Path, out: Path | None = None) -> Report:
    """Writes the report of a record: a JSON file, or a folder that holds record.json.

    By default it is written beside the record. The report says which parts the record lacks. A record of
    `bench router` has another kind of report.

    Raises:
        RecordError: if the record is missing, damaged or of a later format.
        DLPLoRAError: if matplotlib is not installed.
    """
    if is_router_record(record):
        found = read_router_record(record)
        drawn = router_pictures(found)
        return _write(out or record.parent, router_title(found), router_sections(found, drawn), drawn)
    read = read_record(record)
    drawn = pictures(read)
    return _write(out or read.path.parent, title_of(read), sections(read, drawn), drawn)


def _write(folder: Path, title: str, parts: Sequence[Section], drawn: Sequence[Picture]) -> Report:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "report.md": markdown_page(title, parts),
        "report.html": html_page(title, parts),
        **{picture.file_name: picture.svg for picture in drawn},
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return Report(
        markdown=folder / "report.md",
        html=folder / "report.html",
        pictures=tuple(folder / picture.file_name for picture in drawn),
    )
