import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import dlp_lora
from commands import ok, run
from conftest import byte_tokenizer
from dlp_lora.router import MiniMLP, MiniMLPConfig

PROGRAM = (sys.executable, "-m", "dlp_lora")


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "router"
    MiniMLP(("days", "sums"), byte_tokenizer().backend_tokenizer, MiniMLPConfig(dim=8, hidden=8)).save_pretrained(
        folder
    )
    return folder


def test_the_version_is_that_of_the_installed_package() -> None:
    assert dlp_lora.__version__ == version("dlp-lora")
    assert ok("--version") == f"dlp-lora {version('dlp-lora')}\n"


@pytest.mark.parametrize("args", [("tasks", "--json"), ("tasks",), ("--help",), ("--version",)], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["at the end", "at once"])
def test_a_command_whose_output_nobody_reads_ends_silently(
    args: tuple[str, ...], unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    process = subprocess.Popen([*PROGRAM, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()  # before it writes
    _, errors = process.communicate()
    assert errors == ""
    assert process.returncode in (0, 141)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "prompt": "b"}', "line 2: the key 'prompt' is in one object twice"),
        ('{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "line 2: the key 'role' is in one"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
    ids=["prompt", "message", "deep"],
)
def test_a_line_that_cannot_be_read_is_named(router: Path, line: str, message: str) -> None:
    result = run("route", "--router", router, stdin=f'{{"prompt": "Hi"}}\n{line}\n')
    assert result.exit_code == 1
    assert f"standard input, {message}" in result.stderr


def test_a_byte_order_mark_on_standard_input_is_skipped(router: Path) -> None:
    line = json.dumps({"prompt": "Why?"})
    assert ok("route", "--router", router, stdin=f"\ufeff{line}\n") == ok("route", "Why?", "--router", router)
    # Only at the beginning: elsewhere it is a character like others.
    assert run("route", "--router", router, stdin=f"{line}\n\ufeff{line}\n").exit_code == 1
