"""The bench commands."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from dlp_lora.cli.app import ModelOption, app, base_model, console, progress_bar, stderr

bench = typer.Typer(no_args_is_help=True, help="Measure speed side by side with the base model and PEFT.")
app.add_typer(bench, name="bench")


@bench.command()
def decode(
    model: ModelOption = None,
    num_adapters: Annotated[int, typer.Option(min=1, help="Adapters in the bank.")] = 26,
    selected: Annotated[int, typer.Option(min=1, help="Adapters fused at a time.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens a run generates.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up.")] = 9,
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "bfloat16,float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [default: its own choice]")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record to this file, too.")] = None,
) -> None:
    """Time per generated token over the base model, at batch 1, with sentence switching live.

    Example: `dlp-lora bench decode --json results/decode.json`
    """
    from dlp_lora.bench.decode import DecodeArgs, bench_decode
    from dlp_lora.folders import write_text

    args = DecodeArgs(
        num_adapters=num_adapters,
        selected=selected,
        new_tokens=new_tokens,
        rounds=rounds,
        dtypes=tuple(dtypes.split(",")),
        threads=threads,
    )
    with progress_bar() as progress:
        bars = {dtype: progress.add_task(dtype, total=rounds, start=False, note="") for dtype in args.dtypes}

        def on_round(dtype: str, done: int, total: int) -> None:
            progress.start_task(bars[dtype])
            progress.update(bars[dtype], completed=done, total=total)

        record = bench_decode(base_model(model), args, on_round=on_round)
    table = Table(title=f"decode, {record['model']}, batch 1, {record['environment']['cpu']}", title_justify="left")
    for column in ("variant", "dtype", "ms/token", "over base", "spread", "first token", "tokens/s"):
        table.add_column(column, justify="left" if column in ("variant", "dtype") else "right")
    for row in record["rows"]:
        table.add_row(
            row["name"],
            row["dtype"],
            f"{row['ms_per_token']:.2f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
            f"{row['ttft_ms']:.0f} ms",
            f"{row['tokens_per_s']:.1f}",
        )
    console.print(table)
    for dtype, cost in record["switch"].items():
        console.print(f"{dtype}: router {cost['router_ms']:.2f} ms, whole switch {cost['switch_ms']:.2f} ms a sentence")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(json_file, json.dumps(record, indent=2) + "\n")
        stderr.print(f"wrote {json_file}")
