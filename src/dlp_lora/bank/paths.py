"""Paths: the ways to multiply the layers of a model, and the choice of the fastest one.

All ways give the same result up to rounding. The fastest one differs between CPUs, precisions, shapes and numbers of
rows, so `timing` tries them on the model's layers. `choose` makes the choice from the times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, cast, get_args

Way = Literal["plain", "stacked", "columns", "halves", "prepacked"]
"""How a product is computed.

- plain: each layer by `F.linear`, and its pair beside it;
- stacked: siblings and A in one `F.linear`;
- columns, halves: the stacked weight in another way (`cpu`);
- prepacked: a second copy of the base weights in oneDNN's layout, and A beside it.
"""
Setting = Literal["auto", "plain", "stacked", "columns", "halves", "prepacked"]

# Up to so many rows count as few, as in decoding a batch. On a CPU their second product is computed in float32, which
# is faster there than bfloat16 (docs/log.md).
FEW_ROWS = 32
# Up to so many rows count as some, as a short prompt beside a batch. For more, `F.linear` is as fast, unless prepacked.
SOME_ROWS = 96

# A way must take less than this part of the time of an earlier one; prepacked weights also take memory.
FASTER = 0.97
MUCH_FASTER = 0.9


@dataclass(frozen=True)
class Ways:
    """The ways of one kind of layers: for one row, for few, and for some."""

    one_row: Way = "stacked"
    few_rows: Way = "stacked"
    some_rows: Way = "stacked"

    @classmethod
    def all(cls, way: Way) -> "Ways":
        """One way for any number of rows."""
        return cls(way, way, way)

    def way(self, num_rows: int) -> Way:
        """The way for a number of rows."""
        if num_rows == 1:
            return self.one_row
        if num_rows <= FEW_ROWS:
            return self.few_rows
        if num_rows <= SOME_ROWS or self.is_plain or self.some_rows == "prepacked":
            return self.some_rows
        return "stacked"

    @property
    def ways(self) -> set[Way]:
        """The different ways."""
        return {self.one_row, self.few_rows, self.some_rows}

    @property
    def is_plain(self) -> bool:
        """Whether the layers compute as the base layers do."""
        return self.ways == {"plain"}

    @property
    def is_prepacked(self) -> bool:
        """Whether there is a second copy of the weights."""
        return "prepacked" in self.ways

    def __str__(self) -> str:
        if len(self.ways) == 1:
            return self.one_row
        return f"1 row {self.one_row}, few rows {self.few_rows}, some rows {self.some_rows}"


PLAIN = Ways.all("plain")


@dataclass(frozen=True)
class Paths:
    """The ways of all kinds of layers of a model, by the layers' names."""

    layers: tuple[tuple[str, Ways], ...] = ()

    def of(self, label: str) -> Ways:
        """The ways of the layers of this name; plain by default."""
        return dict(self.layers).get(label, PLAIN)

    def to_dict(self) -> dict[str, dict[str, str]]:
        """Gives the choice as JSON data."""
        return {label: dict(vars(ways)) for label, ways in self.layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> "Paths":
        """Reads the data of `to_dict`."""
        return cls(tuple((label, Ways(**ways)) for label, ways in data.items()))

    def __str__(self) -> str:
        labels: dict[str, list[str]] = {}
        for label, ways in self.layers:
            labels.setdefault(str(ways), []).append(label)
        if len(labels) < 2:
            return f"paths: {next(iter(labels), 'plain')}"
        return "paths: " + "; ".join(f"{ways} ({', '.join(each)})" for ways, each in labels.items())

    __repr__ = __str__


def check_setting(setting: "Setting | Paths") -> None:
    """Checks a user's setting.

    Raises:
        ValueError: if there is no such setting.
    """
    if not isinstance(setting, Paths) and setting not in get_args(Setting):
        raise ValueError(f"paths must be one of {', '.join(get_args(Setting))}, got {setting!r}")


def fixed(setting: Setting, labels: Sequence[str]) -> Paths:
    """The paths of a setting other than "auto", for layers of these names."""
    return Paths(tuple((label, Ways.all(cast(Way, setting))) for label in labels))


def choose(seconds: Mapping[Way, Sequence[float]]) -> Way:
    """Chooses a way by the seconds that each took in each turn.

    A way replaces an earlier one if it is clearly faster in the median turn. The order begins with plain; prepacked,
    which takes memory, comes last.
    """
    chosen: Way = "plain"
    for way in get_args(Way):
        limit = MUCH_FASTER if way == "prepacked" else FASTER
        if way in seconds and _ratio(seconds[way], seconds[chosen]) < limit:
            chosen = way
    return chosen


def _ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median over the turns, whose times are compared because the speed of a machine changes."""
    return median(a / b for a, b in zip(seconds, others, strict=True))
