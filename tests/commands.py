"""Commands run as a person types them, in this process."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from dlp_lora.cli.app import app


def run(*args: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def ok(*args: str | Path, stdin: str = "") -> str:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return str(result.stdout)


def visible(text: str) -> str:
    """A console shows tabs as spaces, and no control characters."""
    return "".join(c for c in text if c.isprintable() and not c.isspace())


def json_lines(text: str) -> list[dict[str, Any]]:
    # Not splitlines: an answer may hold other line separators.
    return [json.loads(line) for line in text.split("\n") if line]
