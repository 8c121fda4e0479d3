"""What a small run of `reproduce` reads and writes."""

import gzip
import json
from pathlib import Path
from typing import Any

from dlp_lora.tasks import Example, Task


def tasks() -> list[Task]:
    def choice(i: int, options: tuple[str, str], what: str) -> Example:
        return Example(prompt=f"{what} {i}?", answer=options[i % 2], choices=options)

    def story(i: int) -> Example:
        return Example(prompt=f"Tell me of number {i}.", answer=f"It is {i}. It was {i}.")

    return [
        Task(
            name="colours",
            train=tuple(choice(i, ("red", "blue"), "Which colour is") for i in range(4)),
            test=tuple(choice(i, ("red", "blue"), "Which colour is") for i in range(10, 13)),
        ),
        Task(
            name="sides",
            train=tuple(choice(i, ("left", "right"), "Which side is") for i in range(4)),
            test=tuple(choice(i, ("left", "right"), "Which side is") for i in range(10, 12)),
        ),
        Task(name="story", train=tuple(map(story, range(4))), test=tuple(map(story, range(10, 12)))),
    ]


def timeless(data: Any) -> Any:
    """Leaves out what a clock or the process said."""
    clocks = ("seconds", "route_ms", "fuse_ms", "timings", "peak_memory_mb", "environment", "environments", "name")
    if isinstance(data, dict):
        return {k: timeless(v) for k, v in data.items() if k not in clocks}
    return [timeless(item) for item in data] if isinstance(data, list) else data


def read(record: Path) -> Any:
    return timeless(json.loads(record.read_text()))


def outputs(record: Path) -> list[dict[str, Any]]:
    with gzip.open(record.parent / "outputs.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [timeless(json.loads(line)) for line in lines]
