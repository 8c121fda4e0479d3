"""Blocks of a page in, Markdown through one template out, and HTML that is made from it.

All text is escaped in the templates, and only there: a block holds text as it is meant to be read.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup

from dlp_lora.lab.records.table import Table, escape_markdown, table_grid
from dlp_lora.lab.report.routing import Routing

NOT_MEASURED = "Not measured in this run."


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


Block = Table | Picture | Bullets | Routing | str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


def section(title: str, *blocks: Block | None) -> Section:
    """A section of what there is; if there is nothing, it says so."""
    there = tuple(b for b in blocks if b is not None and not (isinstance(b, Table) and not b.rows))
    return Section(title=title, blocks=there or (NOT_MEASURED,))


def markdown_page(title: str, sections: Sequence[Section]) -> str:
    """A report as GitHub's Markdown; the pictures lie beside it."""
    return _templates().get_template("report.md.jinja").render(title=title, sections=sections)


def html_page(title: str, sections: Sequence[Section]) -> str:
    """A report as one HTML file that needs no other."""
    return _templates().get_template("report.html.jinja").render(title=title, sections=sections)


def to_markdown(block: Block) -> str:
    """Writes a block as GitHub's Markdown."""
    macros: Any = _templates().get_template("report.md.jinja").make_module({"title": "", "sections": ()})
    return str(macros.block(block))


def to_html(block: Block) -> str:
    """Writes a block as HTML, by way of its Markdown."""
    return str(_renderer().render(to_markdown(block)))


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("dlp_lora.lab.report"),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    kinds = {"table": Table, "picture": Picture, "bullets": Bullets, "routing": Routing}
    environment.tests |= {name: lambda block, kind=kind: isinstance(block, kind) for name, kind in kinds.items()}
    environment.filters |= {
        "md": escape_markdown,
        "grid": table_grid,
        "html": lambda block: Markup(to_html(block)),
        "base64": lambda text: base64.b64encode(text.encode()).decode(),
        "line_start": lambda text: re.sub(r"^(\d*)([#=+.)-])", r"\1\\\2", text),
    }
    return environment


@cache
def _renderer() -> MarkdownIt:
    renderer = MarkdownIt("commonmark", {"html": True}).enable("table")
    # Focusable, so that the keyboard can scroll it sideways, too.
    renderer.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return renderer
