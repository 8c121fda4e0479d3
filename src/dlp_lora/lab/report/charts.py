"""Pictures: scores in, SVG out: radar charts (Figs. 2, 4 to 7), bars with intervals, the router's confusion matrix.

Text stays text, and ink and paper follow the reader's light or dark setting. The colours are near those of Okabe and
Ito, which colour-blind people tell apart; markers, lines and order say the same again.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from dlp_lora.errors import DLPLoRAError
from dlp_lora.lab.evals.methods import SINGLE, label
from dlp_lora.lab.records.table import Measure
from dlp_lora.lab.report.markup import Picture
from dlp_lora.lab.report.record import METRICS, Record
from dlp_lora.lab.report.tables import main_methods

WIDTH = 5.2  # inches, 374 points: about a phone's width, so that text is as large there as it is drawn
LONGEST = 16  # characters of a task's name
_INK = "#123456"  # stands for the page's text colour until the SVG is written
_STYLE = (
    "<style>svg{color:#1d2126;background:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#e2e5e9;background:#15181c}}</style>"
)
_SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # a task's name may hold a dollar sign
    **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}": _INK for part in ("edgecolor", "labelcolor")},
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str
    line: str
    width: float = 1.4


LOOKS = {
    "base": Look(colour="#8d939c", marker="s", line=":"),
    "oracle": Look(colour="#2f8fc8", marker="o", line="-", width=3.2),  # wide, to be seen under a line that is the same
    SINGLE: Look(colour="#12a37a", marker="^", line="-."),
    "dlp": Look(colour="#de6420", marker="D", line="-"),
}
_LINES = (
    Look(colour="#2f8fc8", marker="o", line="-"),
    Look(colour="#de6420", marker="D", line="--"),
    Look(colour="#12a37a", marker="^", line="-."),
    Look(colour="#8d939c", marker="s", line=":"),
)


def pictures(record: Record) -> tuple[Picture, ...]:
    """Draws the charts for which the record has numbers.

    Raises:
        DLPLoRAError: if matplotlib is not installed.
    """
    return (
        *_score_pictures(record, "mcq", "accuracy", "multiple-choice"),
        *_score_pictures(record, "qa", "rougeL", "question-answering"),
        *_confusion_picture(record),
    )


def radar(labels: Sequence[str], series: Mapping[str, Sequence[float | None]], *, name: str = "radar") -> str:
    """One spoke per task, one line per method, with a gap if a score is missing."""
    angles = [2 * math.pi * i / len(labels) for i in range(len(labels))]
    highest = max((value for values in series.values() for value in values if value is not None), default=0)
    ring = 20 if highest > 50 else 10
    top = ring * max(1, math.ceil(highest / ring))

    def paint(figure: Any) -> None:
        axes = _axes(figure, left=1.15, right=1.15, top=0.3, bottom=0.65, projection="polar")
        axes.set_theta_zero_location("N")
        axes.set_theta_direction(-1)
        for method, values in series.items():
            look = LOOKS[method]
            radii = [math.nan if value is None else value for value in (*values, values[0])]
            axes.plot(
                [*angles, angles[0]],
                radii,
                label=label(method),
                color=look.colour,
                linestyle=look.line,
                linewidth=look.width,
                marker=look.marker,
                markersize=2 + look.width,
            )
        axes.set_ylim(0, top)
        axes.set_xticks(angles, [])
        rings = range(ring, top + 1, ring)
        axes.set_yticks(rings, [])
        for radius in rings:
            axes.text(math.pi / len(labels), radius, f"{radius}", fontsize=6.5, alpha=0.75, ha="center", va="center")
        axes.grid(color=_INK, alpha=0.2, linewidth=0.6)
        axes.spines["polar"].set_alpha(0.3)
        for angle, text in zip(angles, labels, strict=True):
            across, up = math.sin(angle), math.cos(angle)
            ha = "center" if abs(across) < 0.1 else "left" if across > 0 else "right"
            va = "center" if abs(up) < 0.9 else "bottom" if up > 0 else "top"
            axes.text(angle, 1.06 * top, _short(text), ha=ha, va=va)
        _legend(figure, axes)

    return _draw(paint, name=name, height=WIDTH - 2.3 + 0.95)


def bars(
    labels: Sequence[str],
    series: Mapping[str, Sequence[Measure | None]],
    *,
    chance: Sequence[float | None] = (),
    name: str = "bars",
) -> str:
    """A group a task, a bar a method with its interval, a broken line at chance; a dash where nothing is known."""
    step = 0.84 / len(series)

    def paint(figure: Any) -> None:
        axes = _axes(figure, left=1.2, right=0.2, top=0.1, bottom=0.6)
        for row, (method, measures) in enumerate(series.items()):
            colour = LOOKS[method].colour
            axes.barh([0], [0], color=colour, label=label(method))
            for i, measure in enumerate(measures):
                y = i - 0.42 + (row + 0.5) * step
                if measure is None:
                    axes.text(0.5, y, "–", fontsize=6.5, va="center")
                    continue
                axes.barh([y], [measure.value], height=0.86 * step, color=colour)
                if measure.interval:
                    axes.plot(measure.interval, (y, y), color=_INK, linewidth=0.9, solid_capstyle="butt")
        dashes: dict[str, Any] = {"color": _INK, "linewidth": 1.2, "linestyle": (0, (2, 1))}
        known = {i: value for i, value in enumerate(chance) if value is not None}
        for i, value in known.items():
            axes.plot((value, value), (i - 0.45, i + 0.45), **dashes, label=None if i > min(known) else "Chance")
        axes.set_yticks(range(len(labels)), [_short(text) for text in labels])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.grid(axis="x", color=_INK, alpha=0.2, linewidth=0.6)
        axes.set_axisbelow(True)
        _legend(figure, axes)

    return _draw(paint, name=name, height=0.7 + len(labels) * (0.12 * len(series) + 0.12))


def confusion(counts: Mapping[str, Mapping[str, float]], *, name: str = "confusion") -> str:
    """A row a task, a column a first choice of the router: numbers of prompts, shaded by their share of the row."""
    rows = list(counts)
    columns = list(dict.fromkeys([*rows, *(column for row in counts.values() for column in row)]))
    side = min(0.4, (WIDTH - 1.3) / len(columns))  # of a cell, in inches
    size = min(8.5, 46 * side)  # of the text, in points
    below = 0.2 + 0.6 * max(len(_short(text)) for text in columns) * size / 72

    def paint(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        axes = _axes(figure, left=1.2, right=WIDTH - 1.2 - side * len(columns), top=0.1, bottom=below)
        for y, task in enumerate(rows):
            total = sum(counts[task].values())
            for column, count in counts[task].items():
                if not count:
                    continue
                x, right = columns.index(column), column == task
                colour, share = LOOKS["oracle" if right else "dlp"].colour, count / total
                axes.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour, alpha=0.25 + 0.75 * share, linewidth=0)
                )
                axes.text(x, y, f"{count:.0f}", fontsize=0.72 * size, ha="center", va="center")
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), [_short(text) for text in columns], rotation=90, fontsize=size)
        axes.set_yticks(range(len(rows)), [_short(text) for text in rows], fontsize=size)
        axes.set_xticks([i + 0.5 for i in range(len(columns))], minor=True)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], minor=True)
        axes.tick_params(which="both", length=0)
        axes.grid(which="minor", color=_INK, alpha=0.12, linewidth=0.5)
        axes.set_axisbelow(True)

    return _draw(paint, name=name, height=0.1 + side * len(rows) + below)


def curves(
    series: Mapping[str, Sequence[tuple[float, Measure]]],
    *,
    across: str,
    up: str,
    ticks: Mapping[float, str] | None = None,
    diagonal: bool = False,
    name: str = "curves",
) -> str:
    """A line of shares of 100 for each series, in the band of its intervals; `ticks` names places on the lower axis."""

    def paint(figure: Any) -> None:
        axes = _axes(figure, left=0.6, right=0.15, top=0.15, bottom=0.85)
        if diagonal:
            axes.plot((0, 100), (0, 100), color=_INK, alpha=0.4, linewidth=0.8, linestyle=(0, (2, 2)))
        for (title, points), look in zip(series.items(), _LINES, strict=False):
            xs, ys = [x for x, _ in points], [m.value for _, m in points]
            size = 3.5 if len(points) < 20 else 0
            axes.plot(
                xs,
                ys,
                label=title,
                color=look.colour,
                linestyle=look.line,
                linewidth=look.width,
                marker=look.marker,
                markersize=size,
            )
            if all(m.interval for _, m in points):
                lows, highs = zip(*(m.interval or () for _, m in points), strict=True)
                axes.fill_between(xs, lows, highs, color=look.colour, alpha=0.18, linewidth=0)
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -3), min(high, 101))  # all are shares of 100
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(color=_INK, alpha=0.2, linewidth=0.6)
        axes.set_axisbelow(True)
        _legend(figure, axes)

    return _draw(paint, name=name, height=3.3)


def _score_pictures(record: Record, kind: str, metric: str, what: str) -> tuple[Picture, ...]:
    tasks = record.tasks_of(kind)
    measures = {m: [record.measure(m, task.name, metric) for task in tasks] for m in main_methods(record)}
    series = {method: found for method, found in measures.items() if any(found)}
    if not series:
        return ()
    labels = [task.label for task in tasks]
    values = {m: [x.value if x else None for x in found] for m, found in series.items() if m != SINGLE}
    chance = [task.chance for task in tasks] if metric == "accuracy" else []
    about = f"{METRICS[metric]} on the {what} tasks, of 100"
    radar_name, bars_name = f"radar-{metric}", f"bars-{metric}"
    return (
        Picture(
            name=bars_name,
            caption=f"{about}, with intervals.",
            svg=bars(labels, series, chance=chance, name=bars_name),
        ),
        Picture(
            name=radar_name,
            caption=f"{about}, as the paper draws it.",
            svg=radar(labels, values, name=radar_name),
        ),
    )


def _confusion_picture(record: Record) -> tuple[Picture, ...]:
    labels = {task.name: task.label for task in record.tasks}
    counts = {
        labels.get(task, task): {labels.get(name, name): count for name, count in row.items()}
        for task, row in (record.run.router.confusion if record.run.router else {}).items()
        if row
    }
    if not counts:
        return ()
    of = " of all seeds" if len(record.run.by_seed) > 1 else ""
    caption = f"Rows: tasks. Columns: the router's first choice for their test prompts, in numbers of prompts{of}."
    return (Picture(name="confusion", caption=caption, svg=confusion(counts)),)


def _draw(paint: Callable[[Any], None], *, name: str, height: float) -> str:
    """Paints a figure and writes it as SVG, the same bytes for the same picture."""
    if find_spec("matplotlib") is None:
        raise DLPLoRAError("the pictures need matplotlib; run `pip install 'dlp-lora[report]'`")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written = io.StringIO()
    settings: Any = {**_SETTINGS, "svg.hashsalt": name}
    with rc_context(settings):
        figure = Figure(figsize=(WIDTH, height))
        paint(figure)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # Text is measured as DejaVu Sans, which is wide: another font takes less room.
    svg = written.getvalue().replace("'DejaVu Sans'", "system-ui").replace(_INK, "currentColor")
    return re.sub(r"(<svg [^>]*>)", rf"\1{_STYLE}", svg, count=1)


def _axes(figure: Any, *, left: float, right: float, top: float, bottom: float, **options: Any) -> Any:
    """Axes with margins in inches."""
    width, height = figure.get_size_inches()
    rect = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    return figure.add_axes(rect, **options)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=len(labels), columnspacing=1.0, handletextpad=0.5, handlelength=1.5
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
