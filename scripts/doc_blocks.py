"""The code blocks of README and docs, with the notes that say how they are tested.

An HTML comment before a block says what the tests do with it; without one the block is run:

    <!-- run: models -->            run in the tier `models`, on the real default model
    <!-- not run: needs a GPU -->   only read: commands, options and names must exist
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?:<!-- (?P<note>(?:run|not run): [^\n]*?) -->\n)?(?P<fence>```)(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block: where it stands, its language, its text, and the note before it."""

    page: str
    line: int
    language: str
    text: str
    note: str

    @property
    def is_run(self) -> bool:
        """Whether the text is executed, in whatever tier."""
        return not self.note.startswith("not run")

    @property
    def tier(self) -> str:
        """The tier that executes it."""
        return self.note.removeprefix("run: ") if self.note and self.is_run else "ci"

    @property
    def place(self) -> str:
        """Page and line, as an editor opens it."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README, and every page of docs/ that is not generated or a log."""
    docs = ROOT / "docs"
    return [ROOT / "README.md", *sorted(page for page in docs.glob("*.md") if page.name != "log.md")]


def blocks(page: Path) -> list[Block]:
    """Reads the fenced blocks of a page, in order."""
    return list(_blocks(page, page.read_text(encoding="utf-8")))


def commands(text: str) -> list[str]:
    """The command lines of a console block: comments and prompts are left out, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (re.sub(r"(^|\s)#\s.*$", "", line).strip().removeprefix("$ ") for line in joined.splitlines())
    return [line for line in lines if line]


def _blocks(page: Path, text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        yield Block(
            page=page.relative_to(ROOT).as_posix(),
            line=text.count("\n", 0, match.start("fence")) + 1,
            language=match["language"],
            text=match["text"],
            note=match["note"] or "",
        )
