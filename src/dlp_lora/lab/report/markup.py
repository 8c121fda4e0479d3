"""Blocks of a page in, Markdown or HTML out: tables of plain data, pictures, paragraphs and lists.

All text is escaped here, and only here: a block holds text as it is meant to be read.
"""

import base64
import html
import re
from dataclasses import dataclass
from itertools import groupby

from dlp_lora.lab.report.record import Measure

MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number, how it is printed, what warns of it, and its relative change."""

    measure: Measure
    mark: str = ""
    change: str = ""
    digits: int = 1
    signed: bool = False


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column's heading, and one above it that neighbours share."""

    name: str
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A titled table; a cell that is None was not measured. The first `num_labels` cells of a row name it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell | str | None, ...], ...]
    notes: tuple[str, ...] = ()
    num_labels: int = 1
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An SVG picture: the name of its file, what it shows in words, and the drawing itself."""

    name: str
    caption: str
    svg: str

    @property
    def file_name(self) -> str:
        """Its file beside the page."""
        return f"{self.name}.svg"


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Markup:
    """A block that comes as finished Markdown and HTML."""

    markdown: str
    html: str


Block = Table | Picture | Bullets | Markup | str


def cell(measure: Measure | None, *, mark: str = "", change: str = "", digits: int = 1) -> Cell | None:
    """A cell for a measure that may be missing."""
    return None if measure is None else Cell(measure=measure, mark=mark, change=change, digits=digits)


def plain(value: float | None, *, digits: int = 1) -> Cell | None:
    """A cell for a number that has no interval and may be missing."""
    return None if value is None else Cell(measure=Measure(value=value), digits=digits)


def to_markdown(block: Block) -> str:
    """Writes a block as GitHub's Markdown."""
    match block:
        case Table():
            return _table_markdown(block)
        case Picture():
            return f"![{escape_markdown(block.caption)}]({block.file_name})"
        case Bullets():
            return "\n".join(f"- {escape_markdown(item)}" for item in block.items)
        case Markup():
            return block.markdown
        case str():
            return escape_markdown(block)


def to_html(block: Block) -> str:
    """Writes a block as HTML that needs no other file."""
    match block:
        case Table():
            return _table_html(block)
        case Picture():
            return _picture_html(block)
        case Bullets():
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in block.items)}</ul>"
        case Markup():
            return block.html
        case str():
            return f"<p>{html.escape(block)}</p>"


def escape_markdown(text: str) -> str:
    """Writes text so that Markdown shows it as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    # An underscore within a word is safe, and task names have many; so are brackets that no target follows.
    return re.sub(r"([\\`*~|]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def number(value: float, *, digits: int = 1, signed: bool = False) -> str:
    """Prints a number with a true minus sign, and never as minus zero."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}".replace("-", "−")


def shown(cell: Cell | str | None) -> str:
    """A cell as plain text."""
    if cell is None:
        return MISSING
    if isinstance(cell, str):
        return cell
    parts = (
        number(cell.measure.value, digits=cell.digits, signed=cell.signed),
        _interval(cell),
        cell.change,
        cell.mark,
    )
    return " ".join(filter(None, parts))


def _interval(cell: Cell) -> str:
    if cell.measure.interval is None:
        return ""
    low, high = (number(x, digits=cell.digits, signed=cell.signed) for x in cell.measure.interval)
    return f"[{low}, {high}]"


def _table_markdown(table: Table) -> str:
    head = [escape_markdown(f"{c.group} {c.name}".strip()) for c in table.columns]
    rule = ["---" if i < table.num_labels else "---:" for i in range(len(head))]
    rows = [[escape_markdown(shown(cell)) for cell in row] for row in table.rows]
    grid = "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
    title = escape_markdown(table.title)
    notes = "\n".join(f"- {escape_markdown(note)}" for note in table.notes)
    if table.folded:
        return "\n\n".join(filter(None, (f"<details><summary>{title}</summary>", grid, notes, "</details>")))
    return "\n\n".join(filter(None, (f"**{title}**", grid, notes)))


def _table_html(table: Table) -> str:
    title, notes = html.escape(table.title), "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    body = "".join(f"<tr>{_row_html(row, table.num_labels)}</tr>" for row in table.rows)
    # Focusable, so that the keyboard can scroll it sideways, too.
    grid = f'<div class="wide" tabindex="0"><table>{_head_html(table)}<tbody>{body}</tbody></table></div>'
    if notes:
        grid += f'<ul class="notes">{notes}</ul>'
    if table.folded:
        return f"<details><summary>{title}</summary>{grid}</details>"
    return f"<section><h3>{title}</h3>{grid}</section>"


def _head_html(table: Table) -> str:
    names = "".join(
        f'<th scope="col"{" class=label" if i < table.num_labels else ""}>{html.escape(column.name)}</th>'
        for i, column in enumerate(table.columns)
    )
    if not any(c.group for c in table.columns):
        return f"<thead><tr>{names}</tr></thead>"
    groups = [(group, len(list(columns))) for group, columns in groupby(table.columns, key=lambda c: c.group)]
    spans = "".join(f'<th colspan="{width}" scope="colgroup">{html.escape(group)}</th>' for group, width in groups)
    lines = "".join(f'<colgroup span="{width}"></colgroup>' for _, width in groups)
    return f'{lines}<thead><tr class="groups">{spans}</tr><tr>{names}</tr></thead>'


def _row_html(row: tuple[Cell | str | None, ...], num_labels: int) -> str:
    return "".join(map(_label_html, row[:num_labels])) + "".join(f"<td>{_cell_html(c)}</td>" for c in row[num_labels:])


def _label_html(label: Cell | str | None) -> str:
    text = shown(label)
    return f'<th scope="row"{" class=short" if len(text) <= 24 else ""}>{html.escape(text)}</th>'


def _cell_html(cell: Cell | str | None) -> str:
    if not isinstance(cell, Cell):
        return html.escape(shown(cell))
    text = number(cell.measure.value, digits=cell.digits, signed=cell.signed)
    text += "".join(f" <small>{part}</small>" for part in (_interval(cell), cell.change) if part)
    if cell.mark:
        text += f' <small class="mark">{html.escape(cell.mark)}</small>'
    return text


def _picture_html(picture: Picture) -> str:
    data = base64.b64encode(picture.svg.encode()).decode()
    caption = html.escape(picture.caption)
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
