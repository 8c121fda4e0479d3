import shlex
import sys
from pathlib import Path

import pytest

from dlp_lora.cli.common import to_try


@pytest.mark.parametrize(
    "on_path, started, program",
    [
        ("bin/dlp-lora", "bin/dlp-lora", "dlp-lora"),
        (None, ".venv/bin/dlp-lora", ".venv/bin/dlp-lora"),
        ("other/dlp-lora", ".venv/bin/dlp-lora", ".venv/bin/dlp-lora"),
        (None, "src/dlp_lora/__main__.py", f"{sys.executable} -m dlp_lora"),
    ],
    ids=["on the path", "off the path", "another environment's on the path", "as a module"],
)
def test_a_command_to_try_starts_the_program_that_printed_it(
    monkeypatch: pytest.MonkeyPatch, on_path: str | None, started: str, program: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started, "demo"])
    monkeypatch.setattr("dlp_lora.cli.common.which", lambda _: on_path)
    assert to_try("report", Path("runs/first")) == f"{program} report runs/first"


def test_a_command_to_try_can_be_pasted_whatever_its_arguments_hold() -> None:
    prompt = """It's "5 $HOME"; `ls` [bold]\n!"""
    assert shlex.split(to_try("generate", "--bundle", Path("a b"), prompt))[-4:] == [
        "generate",
        "--bundle",
        "a b",
        prompt,
    ]
