"""The targets: a record in, each target with its measured value and whether it is met out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dlp_lora.lab.evals.router.instructions import BEFORE

Unit = Literal["%", "points", "s", "ms", "", "M"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on a number of the record, and the number's place; fractions have bounds from 0 to 1."""

    name: str
    bound: float
    at: tuple[str, ...]
    unit: Unit = "%"
    at_least: bool = True

    def judge(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the target and the measured value as JSON data; `value` and `met` are None without a measurement."""
        found: Any = record
        for key in self.at:
            found = found.get(key) if isinstance(found, Mapping) else None
        interval = found.get("interval") if isinstance(found, Mapping) else None
        value = found.get("accuracy") if isinstance(found, Mapping) else found
        met = None if value is None else value >= self.bound if self.at_least else value <= self.bound
        return {
            "name": self.name,
            "bound": self.bound,
            "at_least": self.at_least,
            "unit": self.unit,
            "value": value,
            "interval": interval,
            "met": met,
        }


def judged(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All targets with the record's values."""
    scenarios = record["scenarios"]
    sizes = {int(n): own for n, own in scenarios.get("scale", {}).items() if n.isdigit()}
    most = max(sizes, default=0)
    view = {
        "router": record["router"],
        **scenarios,
        "new": _new_task(scenarios.get("extension", {})),
        "ten": _ten_tasks(scenarios.get("extension", {})),
        "most": sizes.get(most),
    }
    named = Target(name=f"Whole prompt of {most or 'all'} tasks", bound=0.985, at=("most",))
    return [target.judge(view) for target in (*TARGETS, named)]


TARGETS = (
    Target(name="Whole prompt", bound=0.995, at=("prompts", "whole")),
    Target(name="First sentence", bound=0.97, at=("prompts", "first sentence")),
    Target(name="Random sentence", bound=0.92, at=("prompts", "random sentence")),
    Target(name="Newest of 5 questions", bound=0.985, at=("conversations", "questions", "5")),
    Target(name="Newest of 5, answers between", bound=0.985, at=("conversations", "questions and answers", "5")),
    Target(name="5 questions in one prompt, per sentence", bound=0.95, at=("serial", "5")),
    Target(name="Extra tasks: AUROC", bound=0.97, at=("outside", "auroc"), unit=""),
    Target(name="Extra tasks: false routes", bound=0.1, at=("outside", "false_routes"), at_least=False),
    Target(
        name="Extra tasks: false routes at the router's own threshold",
        bound=0.1,
        at=("outside", "own_threshold", "false_routes"),
        at_least=False,
    ),
    Target(name="Whole prompts routed there", bound=0.95, at=("outside", "own_threshold", "coverage")),
    *(
        Target(
            name=f"{language} instructions around, routed and right",
            bound=0.9,
            at=("instructions", language, "right_and_routed"),
        )
        for language in BEFORE
    ),
    Target(name="Extra tasks, as decided: AUROC", bound=0.97, at=("instructions", "none", "outside", "auroc"), unit=""),
    Target(name="Tasks left out: AUROC", bound=0.97, at=("left_out", "auroc"), unit=""),
    Target(name="Tasks left out: false routes", bound=0.1, at=("left_out", "false_routes"), at_least=False),
    Target(name="Calibration error", bound=0.01, at=("prompts", "whole", "ece"), at_least=False),
    Target(name="A new task from 32 examples", bound=0.93, at=("new", "new")),
    Target(name="Ten new tasks from 32 examples: their prompts fit", bound=0.95, at=("ten", "new_fit")),
    Target(name="Ten new tasks: false routes of others", bound=0.1, at=("ten", "after"), at_least=False),
    Target(name="Lost on the old tasks", bound=0.003, at=("new", "lost"), unit="points", at_least=False),
    Target(name="Adding it takes", bound=5, at=("new", "add_seconds"), unit="s", at_least=False),
    Target(name="Training takes", bound=90, at=("router", "seconds"), unit="s", at_least=False),
    Target(name="Parameters", bound=6e6, at=("router", "num_parameters"), unit="M", at_least=False),
    Target(name="Routing a sentence takes", bound=0.5, at=("timing", "sentence_ms"), unit="ms", at_least=False),
)


def _new_task(extension: Mapping[str, Any]) -> dict[str, Any]:
    """One of the data's tasks from 32 examples, added to a router trained without it: the worst of such routers."""
    rows = [row for row in extension.get("add", ()) if row["added"] == 1 and row["examples"] == 32]
    rows = [row for row in rows if row["base"] != "extra"] or rows
    if not rows:
        return {}
    return {
        "new": min((row["new"] for row in rows), key=lambda new: float(new["accuracy"])),
        "lost": max(row["lost"] for row in rows),
        "add_seconds": max(row["add_seconds"] for row in rows),
    }


def _ten_tasks(extension: Mapping[str, Any]) -> dict[str, Any]:
    """Ten extra tasks from 32 examples each, added to the measured router."""
    rows = [
        row for row in extension.get("add", ()) if (row["base"], row["added"], row["examples"]) == ("extra", 10, 32)
    ]
    if not rows:
        return {}
    _, after = rows[0]["false_routes"] or (None, None)  # without any other extra task there are none
    return {"new_fit": rows[0]["new_fit"], "after": after}
