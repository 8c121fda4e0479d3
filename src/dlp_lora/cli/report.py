"""The report command."""

from pathlib import Path
from typing import Annotated

import typer

from dlp_lora.cli.common import JsonOption, console
from dlp_lora.cli.json_lines import print_json


def report(
    path: Annotated[Path, typer.Argument(help="A run's folder, or its record as a JSON file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write. [default: beside the record]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's results as Markdown and HTML, with the paper's tables and figures.

    Example: `dlp-lora report runs/tasks26`
    """
    from dlp_lora.lab.report import write_report

    written = write_report(path, out)
    if as_json:
        pictures = [str(picture) for picture in written.pictures]
        print_json({"markdown": str(written.markdown), "html": str(written.html), "pictures": pictures})
        return
    for file in (written.html, written.markdown, *written.pictures):
        console.print(str(file), markup=False, highlight=False, soft_wrap=True)
