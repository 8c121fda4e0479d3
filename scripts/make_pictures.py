"""Draws the pictures of README and docs, for a light and a dark page, from the records in results/.

The playground's pictures are screenshots, made by tests/serve/test_page.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dlp_lora.lab.evals.methods import MAIN, label

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Theme:
    """The colours of a page."""

    name: str
    text: str
    muted: str
    line: str
    box: str
    accents: tuple[str, ...]  # of adapters, in the order in which they appear; the first is DLP-LoRA's
    other: str  # bars of other methods


LIGHT = Theme(
    name="light",
    text="#1f2328",
    muted="#59636e",
    line="#d1d9e0",
    box="#f6f8fa",
    accents=("#bc4c00", "#0969da", "#1a7f37"),
    other="#afb8c1",
)
DARK = Theme(
    name="dark",
    text="#f0f6fc",
    muted="#9198a1",
    line="#3d444d",
    box="#151b23",
    accents=("#f0883e", "#4493f8", "#3fb950"),
    other="#57606a",
)


def main() -> None:
    """Writes every picture."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (IMAGES / name).write_text(text, encoding="utf-8")


def pictures() -> dict[str, str]:
    """Gives the text of each picture by its file name."""
    return {f"{name}-{theme.name}.svg": draw(theme) for name, draw in PICTURES.items() for theme in (LIGHT, DARK)}


def loop(theme: Theme) -> str:
    """Text, router, policy, bank, model, and back at the next sentence."""
    steps = (
        ("text", "prompt, and the", "answer so far"),
        ("router", "a probability for", "each adapter"),
        ("policy", "which adapters,", "how much of each"),
        ("bank", "fuses them into", "one LoRA"),
        ("model", "writes one", "sentence"),
    )
    width, gap, top, height = 128, 32, 12, 84
    parts = []
    for i, (name, *lines) in enumerate(steps):
        x = 8 + i * (width + gap)
        is_ours = 0 < i < 4
        parts.append(
            f'<rect x="{x}" y="{top}" width="{width}" height="{height}" rx="10" fill="{theme.box}" '
            f'stroke="{theme.accents[0] if is_ours else theme.line}" stroke-width="1.5"/>'
        )
        middle = x + width / 2
        parts.append(_text(middle, top + 28, name, theme.text, size=16, weight=600, anchor="middle"))
        for j, line in enumerate(lines):
            parts.append(_text(middle, top + 50 + 18 * j, line, theme.muted, size=13, anchor="middle"))
        if i:
            parts.append(_arrow(f"M{x - gap + 4} {top + height / 2} H{x - 6}", theme))
    end, start, bottom = 8 + 4 * (width + gap) + width / 2, 8 + width / 2, top + height
    bend = f"M{end} {bottom + 4} V{bottom + 22} Q{end} {bottom + 32} {end - 10} {bottom + 32} H{start + 10} "
    parts.append(_arrow(bend + f"Q{start} {bottom + 32} {start} {bottom + 22} V{bottom + 8}", theme))
    parts.append(_text((start + end) / 2, bottom + 52, "at the next sentence", theme.muted, size=13, anchor="middle"))
    return _svg(8 + 5 * width + 4 * gap + 8, bottom + 64, parts, theme)


def answer(theme: Theme) -> str:
    """The demo's prompt of two questions, and its answer with each sentence in the colour of its adapter."""
    example = _record("demo")["serial"]
    parts = [_text(12, 26, "prompt", theme.muted, size=13), _text(90, 26, example["prompt"], theme.text, size=15)]
    parts.append(_text(12, 66, "answer", theme.muted, size=13))
    x = 90.0
    for sentence, colour in zip(example["trace"], theme.accents, strict=False):
        text = sentence["text"].strip()
        width = 7.6 * len(text) + 20
        ((name, weight),) = sentence["mixture"].items()
        parts.append(f'<rect x="{x}" y="46" width="{width}" height="30" rx="6" fill="{colour}" fill-opacity="0.16"/>')
        parts.append(f'<rect x="{x}" y="46" width="4" height="30" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 14, 66, text, theme.text, size=15))
        parts.append(_text(x + 14, 94, f"{name} {weight:.0%}", colour, size=13, weight=600))
        x += width + 10
    return _svg(max(x, 90 + 7.6 * len(example["prompt"]) + 12, 720), 108, parts, theme)


PEERS: Mapping[str, str] = {
    "base": "base model, no adapter",
    "dlp-lora": "DLP-LoRA",
    "peft one adapter": "PEFT, one adapter",
    "lora-switch (ours)": "LoRA-Switch *",
    "peft several active": "PEFT, two adapters",
    "meteora (ours)": "MeteoRA *",
    "pesc (ours)": "PESC *",
    "moral (ours)": "MoRAL *",
    "mola (ours)": "MoLA *",
    "peft arrow": "PEFT Arrow",
    "peft x-lora": "PEFT X-LoRA",
}


def cost(theme: Theme) -> str:
    """Time per token over the base model, for methods that use several adapters."""
    rows = {row["name"]: row for row in _record("peers")["rows"]}
    bars = [
        _Bar(
            label=label,
            value=rows[name]["ratio"],
            low=rows[name]["ratio_min"],
            high=rows[name]["ratio_max"],
            is_ours=name == "dlp-lora",
        )
        for name, label in PEERS.items()
    ]
    parts = _bars(bars, theme, x=190, y=34, width=470, most=1.6, shown=lambda value: f"{value:.2f}")
    parts.insert(0, _text(12, 20, "time per token over the base model (less is better)", theme.text, size=14))
    bottom = 34 + 26 * len(bars) + 18
    parts.append(_text(12, bottom, "* written for this comparison from the method's paper", theme.muted, size=12))
    return _svg(720, bottom + 12, parts, theme)


def accuracy(theme: Theme) -> str:
    """Scores on the paper's tasks, beside the base model and the right adapter."""
    record = _record("tasks26/record")
    parts = []
    y = 20
    for title, pool, metric in (
        ("accuracy, 17 tasks with choices (of 100)", "composite-17", "accuracy"),
        ("ROUGE-L, 9 tasks with free answers (of 100)", "composite-9", "rougeL"),
    ):
        parts.append(_text(12, y, title, theme.text, size=14))
        bars = []
        for name in (name for name in MAIN if name in record["scores"]):
            low, high = record["composite_intervals"][pool][name][metric]
            value = record["composites"][pool][name][metric]
            bars.append(
                _Bar(label=label(name), value=100 * value, low=100 * low, high=100 * high, is_ours=name == "dlp"),
            )
        parts += _bars(bars, theme, x=190, y=y + 14, width=470, most=60, shown=lambda value: f"{value:.1f}")
        y += 14 + 26 * len(bars) + 26
    return _svg(720, y - 14, parts, theme)


def bank(theme: Theme) -> str:
    """Time per token over the base model as the bank grows."""
    bars = [
        _Bar(
            label=f"{row['name'].removeprefix('dlp-lora, ')} adapters".replace("1 adapters", "1 adapter"),
            value=row["ratio"],
            low=row["ratio_min"],
            high=row["ratio_max"],
            is_ours=True,
        )
        for row in _record("bank")["rows"]
        if row["name"].startswith("dlp-lora")
    ]
    title = "time per token over the base model, by the adapters in the bank"
    return _chart(title, bars, theme, most=1.3, shown=lambda value: f"{value:.2f}")


def switch(theme: Theme) -> str:
    """What a switch adds to a sentence, by the context's length and the KV policy."""
    bars = [
        _Bar(
            label=row["name"].replace("2048", "2,048"),
            value=100 * row["over_sentence"],
            low=100 * row["over_sentence"],
            high=100 * row["over_sentence"],
            is_ours="recompute" in row["name"],
        )
        for row in _record("switch_context")["rows"]
        if "no switch" not in row["name"]
    ]
    title = "a switch's share of the time of a sentence of 25 tokens"
    return _chart(title, bars, theme, most=100, shown=lambda value: f"{value:.0f} %")


def serve(theme: Theme) -> str:
    """Tokens a second of servers, over one stream and over many."""
    rows = [row for row in _record("serve_peers")["rows"] if "tokens_per_s" in row]
    bars = [
        _Bar(
            label=f"{row['name'].partition(', fixed')[0]}, {row['streams']}",
            value=row["tokens_per_s"],
            low=row["tokens_per_s_min"],
            high=row["tokens_per_s_max"],
            is_ours=row["name"].startswith("dlp-lora"),
        )
        for row in rows
    ]
    title = "tokens a second, by server and number of streams (one thread of a CPU)"
    most = 1.15 * max(bar.high for bar in bars)
    return _chart(title, bars, theme, most=most, shown=lambda value: f"{value:.0f}")


PICTURES: Mapping[str, Callable[[Theme], str]] = {
    "loop": loop,
    "answer": answer,
    "cost": cost,
    "accuracy": accuracy,
    "bank": bank,
    "switch": switch,
    "serve": serve,
}


@dataclass(frozen=True, kw_only=True)
class _Bar:
    label: str
    value: float
    low: float
    high: float
    is_ours: bool


def _chart(title: str, bars: Sequence[_Bar], theme: Theme, *, most: float, shown: Callable[[float], str]) -> str:
    """Bars under a title."""
    parts = [_text(12, 20, title, theme.text, size=14)]
    parts += _bars(bars, theme, x=190, y=34, width=470, most=most, shown=shown)
    return _svg(720, 34 + 26 * len(bars) + 8, parts, theme)


def _bars(
    bars: Sequence[_Bar],
    theme: Theme,
    *,
    x: float,
    y: float,
    width: float,
    most: float,
    shown: Callable[[float], str],
) -> list[str]:
    """Horizontal bars with whiskers; one that is longer than `most` ends in an arrow."""
    parts = []
    for i, bar in enumerate(bars):
        top = y + 26 * i
        scale = width / most
        is_cut = bar.value > most
        length = min(bar.value, most) * scale
        colour = theme.accents[0] if bar.is_ours else theme.other
        weight = 600 if bar.is_ours else 400
        parts.append(_text(x - 10, top + 14, bar.label, theme.text, size=13, weight=weight, anchor="end"))
        parts.append(f'<rect x="{x}" y="{top + 1}" width="{length:.1f}" height="18" rx="3" fill="{colour}"/>')
        end = x + length
        if is_cut:
            parts.append(_arrow(f"M{end - 26:.1f} {top + 10} H{end + 2:.1f}", theme))
        else:
            left, right = x + bar.low * scale, min(x + bar.high * scale, x + width)
            end = max(end, right)
            if right - left > 1:
                parts.append(
                    f'<path d="M{left:.1f} {top + 10} H{right:.1f}" stroke="{theme.text}" stroke-width="1.5"/>'
                )
        parts.append(_text(end + 8, top + 14, shown(bar.value), theme.text, size=13, weight=weight))
    return parts


def _record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return record


def _text(x: float, y: float, text: str, colour: str, *, size: int, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _arrow(path: str, theme: Theme) -> str:
    return f'<path d="{path}" fill="none" stroke="{theme.muted}" stroke-width="1.5" marker-end="url(#arrow)"/>'


def _svg(width: float, height: float, parts: Sequence[str], theme: Theme) -> str:
    head = (
        f'<marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{theme.muted}"/></marker>'
    )
    body = "\n".join([f"<defs>{head}</defs>", *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="{FONT}">\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
