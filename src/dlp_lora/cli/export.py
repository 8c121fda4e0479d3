"""The export command."""

from pathlib import Path
from typing import Annotated

import typer

from dlp_lora.cli.common import AdaptersOption, BundleOption, EngineOptions, HubOptions, ModelOption, open_engine, say
from dlp_lora.cli.options import with_options
from dlp_lora.files import check_replaceable
from dlp_lora.policy import mixture_of


@with_options
def export(
    hub_options: HubOptions,
    mixture: Annotated[str, typer.Argument(help='The mixture: "math=0.6,units=0.4".')],
    out: Annotated[Path, typer.Option("--out", "-o", help="PEFT adapter folder to write.")],
    bundle: BundleOption = None,
    model: ModelOption = None,
    adapters: AdaptersOption = None,
) -> None:
    """Write a fixed mixture as one ordinary PEFT adapter folder, for any program that reads them.

    Example: `dlp-lora export "math=0.6,units=0.4" --bundle bundle/ --out mixed/`
    """
    from dlp_lora.bank.adapter_files import CONFIG_FILE
    from dlp_lora.bank.export import export_mixture

    check_replaceable(out, CONFIG_FILE)
    engine = open_engine(EngineOptions(bundle=bundle, model=model, adapters=adapters), hub_options, need_router=False)
    export_mixture(engine.bank, mixture_of(mixture), out)
    say(f"wrote {out}")
