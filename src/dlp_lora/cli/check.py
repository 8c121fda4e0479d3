"""The check command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dlp_lora.cli.common import JsonOption, ModelHubOptions, ModelOption, base_model, console, layers_of
from dlp_lora.cli.json_lines import print_json
from dlp_lora.cli.options import with_options


@with_options
def check(
    hub_options: ModelHubOptions,
    adapters: Annotated[Path, typer.Argument(help="A PEFT adapter folder, or a folder of them.")],
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check adapter folders against a base model: say what is refused and why. Exit code 1 if any is.

    Example: `dlp-lora check adapters/ --model Qwen/Qwen2-1.5B`
    """
    from dlp_lora.bank.check import check_adapters

    checks = check_adapters(layers_of(base_model(model), hub_options), adapters)
    if as_json:
        print_json([check.to_dict() for check in checks])
    else:
        table = Table()
        for column in ("adapter", "", "rank", "targets", "reason"):
            table.add_column(column, overflow="fold")
        for c in checks:
            mark = "[green]fits[/]" if c.fits else "[red]refused[/]"
            rank = str(c.rank) if c.fits else ""
            table.add_row(escape(c.name), mark, rank, ", ".join(c.targets), escape(c.reason))
        console.print(table)
    if not all(c.fits for c in checks):
        raise typer.Exit(1)
