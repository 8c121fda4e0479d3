"""The lm-eval command."""

from typing import Annotated

import typer


def lm_eval(
    args: Annotated[list[str] | None, typer.Argument(help="The arguments of lm_eval; -h shows its help.")] = None,
) -> None:
    """Run lm-evaluation-harness with the model `dlp_lora`. All arguments are those of `lm_eval`.

    Example: `dlp-lora lm-eval --model dlp_lora --model_args bundle=demo/bundle --tasks arc_easy --limit 100`
    """
    from dlp_lora.integrations.lm_eval import run

    run(args or [])
