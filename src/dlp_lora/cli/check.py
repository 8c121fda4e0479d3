"""The check command."""

from pathlib import Path
from typing import Annotated

import typer

from dlp_lora.cli.common import JsonOption, ModelHubOptions, ModelOption, base_model, layers_of
from dlp_lora.cli.json_lines import print_json
from dlp_lora.cli.options import with_options
from dlp_lora.cli.tables import show_table
from dlp_lora.lab.records.table import table_of


@with_options
def check(
    hub_options: ModelHubOptions,
    adapters: Annotated[Path, typer.Argument(help="A PEFT adapter folder, or a folder of them.")],
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check adapter folders against a base model; show refused adapters with the reasons. Exit code 1 if there is one.

    Example: `dlp-lora check adapters/ --model Qwen/Qwen2-1.5B`
    """
    from dlp_lora.bank.check import check_adapters

    checks = check_adapters(layers_of(base_model(model), hub_options), adapters)
    if as_json:
        print_json([check.to_dict() for check in checks])
    else:
        columns = ("adapter", "", "rank", "targets", "reason")
        rows = [
            (c.name, *(("fits", str(c.rank)) if c.fits else ("refused", "")), ", ".join(c.targets), c.reason)
            for c in checks
        ]
        show_table(table_of("", columns, rows, num_labels=5))
    if not all(c.fits for c in checks):
        raise typer.Exit(1)
