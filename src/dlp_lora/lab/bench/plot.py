"""A record's picture: a horizontal bar a row, with the spread over the rounds as whiskers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dlp_lora.errors import DLPLoRAError

QUANTITIES = {
    "routers": ("answer_ratio", "time of an answer over the base's"),
    "switch": ("switch_ms", "milliseconds a switch"),
    "switch_context": ("pass_ms", "milliseconds a decoding step"),
    "train": ("speedup", "samples a second over the Trainer's"),
    "serve": ("tokens_per_s", "tokens a second of all streams"),
    "soak": ("resident_mb", "megabytes of the server after the warm-up"),
}
RATIO = ("ratio", "time over the base's")  # of the other benchmarks
OURS, OTHERS = "#de6420", "#2f8fc8"
SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Checks that a picture can be drawn, before hours are measured.

    Raises:
        DLPLoRAError: if matplotlib is not installed.
        ValueError: for a file of another kind.
    """
    if find_spec("matplotlib") is None:
        raise DLPLoRAError("--plot needs matplotlib; run `pip install 'dlp-lora[report]'`")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot writes {' or '.join(SUFFIXES)}, not {path.name}")


def plot(record: dict[str, Any], path: Path) -> None:
    """Draws a benchmark's record."""
    check_plot(path)
    from matplotlib.figure import Figure

    quantity, label = QUANTITIES.get(record["benchmark"], RATIO)
    rows = [row for row in record["rows"] if quantity in row]
    several = {key for key in ("dtype", "task") if len({row.get(key) for row in rows}) > 1}
    names = [", ".join([row["name"], *(row[key] for key in sorted(several))]) for row in rows]
    names = [f"{name}, {row['streams']}" if "streams" in row else name for name, row in zip(names, rows, strict=True)]
    values = [row[quantity] for row in rows]
    whiskers = [
        [value - row[f"{quantity}_min"] for value, row in zip(values, rows, strict=True)],
        [row[f"{quantity}_max"] - value for value, row in zip(values, rows, strict=True)],
    ]
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = [OURS if row["name"].startswith("dlp-lora") else OTHERS for row in rows]
    axes.barh(range(len(rows)), values, xerr=whiskers, color=colours, ecolor="#1d2126", capsize=2)
    if quantity.endswith(("ratio", "speedup")):
        axes.axvline(1, color="#8d939c", linewidth=1)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(f"{record['benchmark']}, {record['model']}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
