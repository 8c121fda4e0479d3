import runpy
from pathlib import Path

import pytest

import dlp_lora

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return dict(runpy.run_path(str(ROOT / "scripts" / "make_reference.py"))["pages"]())


@pytest.mark.parametrize("name", ["cli.md", "python.md"])
def test_the_reference_is_what_the_code_says(pages: dict[str, str], name: str) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == pages[name], f"docs/reference/{name} is stale: run `make docs`"


def test_the_tables_are_what_the_records_say() -> None:
    for page, text in runpy.run_path(str(ROOT / "scripts" / "make_tables.py"))["pages"]().items():
        assert (ROOT / page).read_text(encoding="utf-8") == text, f"{page} is stale: run `make docs`"


def test_the_reference_has_a_section_for_every_public_name(pages: dict[str, str]) -> None:
    for name in dlp_lora.__all__:
        assert f"\n## {name}\n" in pages["python.md"]


def test_the_reference_is_plain_text(pages: dict[str, str]) -> None:
    for text in pages.values():
        assert "\x1b" not in text
        assert not set(text) & set("│╭╮╰╯─")
        assert " at 0x" not in text
