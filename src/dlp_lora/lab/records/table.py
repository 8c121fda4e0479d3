"""A table: rows of numbers and words, the same for a report, the docs and a terminal; and its grid in Markdown."""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number, and the interval that it lies in."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number, its format, its warning, and its relative change."""

    measure: Measure
    mark: str = ""
    change: str = ""
    digits: int = 1
    signed: bool = False


Row = tuple[Cell | str | None, ...]
"""A cell that is None was not measured."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column's heading, and one above it that neighbours share."""

    name: str
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table. The first `num_labels` cells of a row name it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    num_labels: int = 1
    folded: bool = False


def table_of(
    title: str,
    columns: Iterable[Column | str],
    rows: Iterable[Row],
    *,
    notes: Iterable[str] = (),
    num_labels: int = 1,
    folded: bool = False,
) -> Table:
    """Makes a table; a column that has no group is given by its name."""
    return Table(
        title=title,
        columns=tuple(Column(name=column) if isinstance(column, str) else column for column in columns),
        rows=tuple(rows),
        notes=tuple(notes),
        num_labels=num_labels,
        folded=folded,
    )


def cell(measure: Measure | None, *, mark: str = "", change: str = "", digits: int = 1) -> Cell | None:
    """A cell for a measure that may be missing."""
    return None if measure is None else Cell(measure=measure, mark=mark, change=change, digits=digits)


def plain(value: float | None, *, digits: int = 1) -> Cell | None:
    """A cell for a number that has no interval and may be missing."""
    return None if value is None else Cell(measure=Measure(value=value), digits=digits)


def number(value: float, *, digits: int = 1, signed: bool = False) -> str:
    """Prints a number with a true minus sign, and never as minus zero."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}".replace("-", "−")


def shown(cell: Cell | str | None) -> str:
    """A cell as plain text."""
    if not isinstance(cell, Cell):
        return MISSING if cell is None else cell

    def printed(value: float) -> str:
        return number(value, digits=cell.digits, signed=cell.signed)

    interval = cell.measure.interval and f"[{', '.join(map(printed, cell.measure.interval))}]"
    return " ".join(filter(None, (printed(cell.measure.value), interval, cell.change, cell.mark)))


def escape_markdown(text: str) -> str:
    """Writes text so that Markdown shows it as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    # An underscore within a word is safe, and task names have many; so are brackets that no target follows.
    return re.sub(r"([\\`*~|]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def markdown_grid(head: Sequence[str], rows: Iterable[Sequence[str]], *, num_labels: int = 1) -> str:
    """A grid of Markdown texts as GitHub has it; the columns behind the labels are aligned on the right."""
    rule = ["---" if i < num_labels else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def table_grid(table: Table) -> str:
    """The grid of a table, without its title and notes."""
    head = [escape_markdown(f"{column.group} {column.name}".strip()) for column in table.columns]
    rows = ([escape_markdown(shown(cell)) for cell in row] for row in table.rows)
    return markdown_grid(head, rows, num_labels=table.num_labels)
