"""Tables on a terminal: one of words and numbers in, as many as its width asks for out."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from dlp_lora.cli.common import console
from dlp_lora.lab.records.table import Table, shown

LABEL_WIDTH = 20  # longer ones are folded where the terminal is narrow
GAP = 2  # between columns


def show_table(table: Table) -> None:
    """Prints a table on standard output."""
    if table.title:
        console.print(table.title, style="italic", highlight=False, markup=False)
    for part in tables(table, console.width):
        console.print(part, "")


def tables(table: Table, width: int) -> Iterator[RichTable]:
    """Gives the columns in as many tables as the width asks for: labels are folded, numbers never cut."""
    names = [column.name for column in table.columns]
    cells = [[shown(row[i]) for row in table.rows] for i in range(len(names))]
    widths = [max(map(len, (*name.split(), *own)), default=0) for name, own in zip(names, cells, strict=True)]
    labels = range(table.num_labels)
    room = width - sum(min(widths[i], LABEL_WIDTH) + GAP for i in labels)
    parts: list[list[int]] = [[]]
    for i in range(table.num_labels, len(names)):
        if parts[-1] and sum(widths[other] + GAP for other in (*parts[-1], i)) > room:
            parts.append([])
        parts[-1].append(i)
    for part in parts:
        found = RichTable(box=SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), show_edge=False, pad_edge=False)
        for i in labels:
            found.add_column(escape(names[i]), overflow="fold")
        for i in part:
            found.add_column(escape(names[i]), justify="right", width=widths[i], overflow="fold")
        for row in zip(*(cells[i] for i in (*labels, *part)), strict=True):
            found.add_row(*map(Text, row))  # not `escape`, which changes backslashes
        yield found
