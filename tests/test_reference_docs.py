import re
import runpy
from pathlib import Path

import pytest

import dlp_lora
from dlp_lora.training.args import AdapterTrainingArgs

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


def test_the_pictures_are_what_the_records_say() -> None:
    for name, text in runpy.run_path(str(ROOT / "scripts" / "make_pictures.py"))["pictures"]().items():
        written = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
        assert written == text, f"{name} is stale: run `make docs`"


def test_the_reference_has_a_section_for_every_public_name(pages: dict[str, str]) -> None:
    for name in dlp_lora.__all__:
        assert f"\n### {name}\n" in pages["python.md"]


def test_the_help_names_the_defaults_of_training(pages: dict[str, str]) -> None:
    section = pages["cli.md"].split("\n### dlp-lora train-adapters\n")[1].split("\n### ")[0]
    for name in ("r", "lora_alpha", "learning_rate", "epochs", "batch_size", "target_modules", "prompt_format", "seed"):
        (option,) = re.findall(rf"\n--{name.replace('_', '-')} .*?(?=\n--|$)", section, re.DOTALL)
        value = getattr(AdapterTrainingArgs(), name)
        shown = f"{value:g}" if isinstance(value, int | float) else value if isinstance(value, str) else ",".join(value)
        assert re.search(rf"\[default: {re.escape(shown)}[],]", option)


def test_options_that_take_words_name_them(pages: dict[str, str]) -> None:
    assert "--prompt-routing whole|questions|apart|sentences" in pages["cli.md"]
    assert re.search(r"--single, --no-single .*\n?.*\[default: --single\]", pages["cli.md"])


def test_the_reference_is_plain_text(pages: dict[str, str]) -> None:
    for text in pages.values():
        assert "\x1b" not in text
        assert not set(text) & set("│╭╮╰╯─")
        assert " at 0x" not in text
