"""The report of `bench router`: its record in, targets, tables and pictures out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dlp_lora.errors import RecordError
from dlp_lora.report.charts import confusion, curves
from dlp_lora.report.markup import Block, Bullets, Cell, Column, Picture, Table, plain
from dlp_lora.report.page import Section, section
from dlp_lora.report.paper import SPELLINGS
from dlp_lora.report.provenance import duration
from dlp_lora.report.record import Measure

BENCHMARK, FORMAT = "router", 1
NUM_CURVES = 4
MIN_SHARE = 0.005  # of the samples: a bin with fewer is not drawn
_SCALES = {"%": 100.0, "points": 100.0, "M": 1e-6}

Found = Mapping[str, Any]
"""A record, or a part of one."""


def is_router_record(path: Path) -> bool:
    """True for a JSON file that `bench router` wrote, of whatever format."""
    try:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["benchmark"] == BENCHMARK
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def read_router_record(path: Path) -> Found:
    """Reads the record of a router.

    Raises:
        RecordError: if it is of a later format.
    """
    record: Found = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise RecordError(f"{path} has record format {record.get('format')}; this version reads {FORMAT}; upgrade")
    return record


def router_title(record: Found) -> str:
    """What the page is headed."""
    return f"The router on {len(record['data']['tasks'])} tasks"


def router_pictures(record: Found) -> tuple[Picture, ...]:
    """Draws what the record has numbers for.

    Raises:
        DLPLoRAError: if matplotlib is not installed.
    """
    drawn = (
        *_confusions(record),
        _lengths(record),
        _conversations(record),
        _reliability(record),
        _abstention(record),
        _false_routes(record),
    )
    return tuple(picture for picture in drawn if picture is not None)


def router_sections(record: Found, pictures: Sequence[Picture]) -> tuple[Section, ...]:
    """The report's sections, in order; what was not measured is said, not left out."""
    drawn = {picture.name: picture for picture in pictures}

    def of(title: str, scenario: str, *blocks: Block | None) -> Section:
        skipped = _at(record, "scenarios", scenario, "skipped")
        return section(title, f"Not measured: {skipped}." if skipped else None, *blocks)

    return (
        section("Targets", _in_short(record), _targets(record)),
        of("Prompts", "prompts", _prompts(record), drawn.get("lengths"), _by_task(record)),
        of("Where prompts went", "prompts", drawn.get("confusion-whole"), drawn.get("confusion-sentence")),
        of("Calibration and abstention", "prompts", drawn.get("reliability"), drawn.get("abstention")),
        of("Answers", "answers", _accuracies("Openings of later sentences", _scenario(record, "answers"))),
        of("Conversations", "conversations", drawn.get("conversations"), *_conversation_tables(record)),
        of("Several questions in one prompt", "serial", _serial(record), _hysteresis(record)),
        of("Changes within a sentence", "junctions", _junctions(record)),
        of("Out of domain: extra tasks", "outside", drawn.get("false-routes"), *_outside(record, "outside")),
        of("Out of domain: tasks left out", "left_out", *_outside(record, "left_out")),
        of("Robustness", "robustness", _robustness(record)),
        of("Scale", "scale", _scale(record, "scale"), _scale(record, "synthetic")),
        of("New tasks", "extension", _added(record), _removed(record)),
        of("Mixture skew", "skew", _skew(record)),
        of("How much the data can carry", "ceilings", _ceilings(record)),
        of("Time", "timing", _timing(record)),
        section("How it was made", _making(record)),
    )


def _in_short(record: Found) -> Bullets:
    targets = record["targets"]
    met = [target for target in targets if target["met"]]
    missed = [target["name"] for target in targets if target["met"] is False]
    items = [f"{len(met)} targets of {len(met) + len(missed)} that were measured are met."]
    if missed:
        items.append(f"Missed: {', '.join(missed)}.")
    return Bullets(items=tuple(items))


def _targets(record: Found) -> Table:
    rows = []
    for target in record["targets"]:
        scale, unit = _SCALES.get(target["unit"], 1.0), target["unit"]
        bound = f"{'at least' if target['at_least'] else 'at most'} {target['bound'] * scale:g} {unit}".strip()
        met = {True: "met", False: "missed", None: None}[target["met"]]
        digits = 2 if unit else 3
        rows.append(
            (target["name"], bound, _cell(target["value"], target["interval"], scale=scale, digits=digits), met)
        )
    return _table("Targets", ("", "Target", "Found", ""), rows, num_labels=2, notes=(_INTERVALS,))


def _prompts(record: Found) -> Table:
    return _accuracies("One part of a prompt, and nothing else", _scenario(record, "prompts"))


def _accuracies(title: str, found: Found, *, what: str = "") -> Table:
    """A row for each part of a scenario that has an accuracy."""
    rows = [
        (
            name,
            _accuracy(own),
            _cell(own.get("mean_over_tasks"), digits=2),
            _cell(own.get("ece"), digits=2),
            plain(own["num"], digits=0),
        )
        for name, own in found.items()
        if isinstance(own, dict) and "accuracy" in own and "interval" in own
    ]
    return _table(title, (what, "Accuracy, %", "Mean over tasks, %", "Calibration error, %", "Samples"), rows)


def _by_task(record: Found) -> Table:
    kinds = {
        "Whole": ("prompts", "whole"),
        "First sentence": ("prompts", "first sentence"),
        "Random sentence": ("prompts", "random sentence"),
        "Sentence of 5 questions": ("serial", "5"),
    }
    found = {name: _at(record, "scenarios", *place, "by_task") or {} for name, place in kinds.items()}
    rows = [
        (task, *(_cell(own.get(task)) for own in found.values()))
        for task in record["data"]["tasks"]
        if any(task in own for own in found.values())
    ]
    return _table("Accuracy by task, %", ("Task", *found), rows, folded=True)


def _conversation_tables(record: Found) -> Iterator[Table]:
    for kind, found in _scenario(record, "conversations").items():
        if isinstance(found, dict):
            yield _accuracies(f"The newest question, {kind} before it", found, what="Questions")


def _serial(record: Found) -> Table:
    rows = [
        (
            n,
            _accuracy(own),
            _cell(own["mean_over_tasks"], digits=2),
            _accuracy(own["first_after_change"]),
            plain(own["delay_sentences"], digits=2),
            plain(own["num"], digits=0),
        )
        for n, own in _parts(record, "serial")
    ]
    columns = ("Questions", "Sentences, %", "Mean over tasks, %", "First after a change, %", "Delay", "Sentences")
    return _table("Every sentence to its own task", columns, rows, notes=(_DELAY,))


def _hysteresis(record: Found) -> Table:
    rows = [
        (
            n,
            name,
            _accuracy(row),
            _cell(row["first_after_change"]),
            plain(row["switches"], digits=2),
            plain(own["changes"], digits=2),
        )
        for n, own in _parts(record, "serial")
        for name, row in own["hysteresis"].items()
    ]
    columns = ("Questions", "Hysteresis", "Sentences, %", "First after a change, %", "Switches", "Changes of task")
    return _table("Hysteresis: when a switch is held back", columns, rows, num_labels=2)


def _junctions(record: Found) -> Table:
    found = _scenario(record, "junctions")
    if "word" not in found:
        return _table("", ("",), ())
    rows = [
        ("Words of a mixed sentence, decided once at its first word", _accuracy(found["sentence"])),
        ("The same, decided anew at each word", _accuracy(found["word"])),
        *((f"Sentence {i} after it", _accuracy(own)) for i, own in enumerate(found["next"], start=1)),
        *((f"The same, had the change come at a full stop: {i}", _accuracy(own)) for i, own in _each(found)),
    ]
    note = f"Deciding at each word names the second task after {found['delay_words']:.1f} of its words, on average."
    return _table("A sentence that begins in one task and ends in another", ("", "Right, %"), rows, notes=(note,))


def _each(found: Found) -> Iterator[tuple[int, Found]]:
    return enumerate(found["next_apart"], start=1)


def _outside(record: Found, scenario: str) -> Iterator[Table]:
    found = _scenario(record, scenario)
    if "auroc" not in found:
        return
    splits = found.get("splits") or {"all": found}
    columns = ("", "AUROC", "False routes at 95 % coverage, %", "Coverage at own threshold, %", "False routes there, %")
    rows = [(name, *_outside_cells(own)) for name, own in splits.items()]
    if len(rows) > 1:
        rows.append(("mean", plain(found["auroc"], digits=3), _cell(found["false_routes"]), None, None))
    yield _table("Texts that belong to no task", columns, rows)
    tasks = [(task, *_outside_cells(own)[:2]) for split in splits.values() for task, own in split["by_task"].items()]
    yield _table("Task by task", columns[:3], tasks, folded=True)


def _outside_cells(own: Found) -> tuple[Cell | None, ...]:
    at_own = own.get("own_threshold") or {}
    return (
        plain(own["auroc"], digits=3),
        _cell(own["false_routes"]),
        _cell(at_own.get("coverage")),
        _cell(at_own.get("false_routes")),
    )


def _robustness(record: Found) -> Table:
    rows = [(name, _accuracy(own), _cell(own["lost"], digits=2)) for name, own in _parts(record, "robustness")]
    return _table("Whole prompts in disguise", ("", "Accuracy, %", "Lost, points"), rows)


def _scale(record: Found, scenario: str) -> Table:
    rows = [
        (
            n,
            _accuracy(own),
            plain(own["train_seconds"]),
            plain(own["sentence_ms"], digits=3),
            plain(own["num_parameters"] and own["num_parameters"] / 1e6, digits=2),
        )
        for n, own in _parts(record, scenario)
    ]
    title = "Synthetic tasks, each an action on a kind of text" if scenario == "synthetic" else "More tasks"
    return _table(title, ("Tasks", "Whole prompt, %", "Training, s", "A sentence, ms", "Parameters, M"), rows)


def _added(record: Found) -> Table:
    rows = [
        (
            row["base"],
            str(row["added"]),
            "all" if row["examples"] is None else str(row["examples"]),
            _accuracy(row["new"]),
            _accuracy(row["old"]),
            _cell(row["lost"], digits=2),
            plain(row["add_seconds"], digits=2),
        )
        for row in _scenario(record, "extension").get("add", ())
    ]
    columns = ("Router", "Tasks added", "Examples of each", "New, %", "Old, %", "Lost on the old, points", "Seconds")
    note = "Router: trained without some of the data's tasks, which are added; or on all of them, and extra ones are."
    return _table("Tasks added to a trained router", columns, rows, num_labels=3, notes=(note,))


def _removed(record: Found) -> Table:
    rows = [
        (
            str(len(row["removed"])),
            _accuracy(row["others"]),
            _cell(row["lost"], digits=2),
            plain(row["remove_seconds"], digits=3),
        )
        for row in _scenario(record, "extension").get("remove", ())
    ]
    return _table("Tasks removed", ("Removed", "Others, %", "Lost on the others, points", "Seconds"), rows)


def _skew(record: Found) -> Table:
    rows = [
        (share, kind, _accuracy(row["starved"]), _accuracy(row["others"]))
        for share, own in _parts(record, "skew")
        for kind, row in own.items()
    ]
    columns = ("Share of their examples", "Read", "Generative tasks, %", "Multiple-choice tasks, %")
    return _table("Few examples of the generative tasks, all of the others", columns, rows, num_labels=2)


def _ceilings(record: Found) -> Table:
    rows = [
        (
            kind,
            _accuracy(own["router"]),
            _accuracy(own["ceiling"]),
            _cell(own["gap"], digits=2),
            _cell(own["shared_text"], digits=2),
        )
        for kind, own in _parts(record, "ceilings")
    ]
    columns = ("", "Router, %", "Large classifier, %", "Gap, points", "Text of two tasks, %")
    note = (
        "The large classifier (TF-IDF of words and letters, logistic regression) learned this kind of sample and no "
        "other. Text of two tasks: test samples that stand, letter for letter, under another task in training, too."
    )
    return _table("Against a much larger classifier", columns, rows, notes=(note,))


def _timing(record: Found) -> Table:
    found = _scenario(record, "timing")
    rows = [
        (name, plain(found.get(key), digits=3))
        for name, key in (
            ("A sentence, median", "sentence_ms"),
            ("A sentence, 95th percentile", "sentence_ms_p95"),
            ("A prompt, median", "prompt_ms"),
        )
        if key in found
    ]
    return _table("One thread, warm; the prompt stays and the answer grows", ("", "Milliseconds"), rows)


def _making(record: Found) -> Table:
    router, data = record["router"], record["data"]
    trained = router["seconds"] and duration(router["seconds"])
    facts = {
        "Router": f"{router['type']}, {'given' if router['given'] else 'trained for this record'}",
        "Parameters": router["num_parameters"] and f"{router['num_parameters']:,}",
        "Training": trained,
        "Tasks": ", ".join(data["tasks"]),
        "Extra tasks": ", ".join(data["extra"]),
        "Settings": json.dumps(record["settings"], ensure_ascii=False),
        "Hardware and versions": ", ".join(f"{k} {v}" for k, v in record["environment"].items() if v is not None),
        "Time": ", ".join(f"{name} {duration(own['seconds'])}" for name, own in record["scenarios"].items()),
    }
    return _table("The run", ("", ""), [(k, str(v) if v else None) for k, v in facts.items()], num_labels=2)


def _confusions(record: Found) -> Iterator[Picture]:
    for kind, name in (("whole", "confusion-whole"), ("random sentence", "confusion-sentence")):
        if counts := _labelled(record, _at(record, "scenarios", "prompts", "confusion", kind)):
            what = "whole prompts" if kind == "whole" else "single sentences, drawn at random"
            caption = f"Rows: tasks. Columns: the router's first choice for {what}."
            yield Picture(name=name, caption=caption, svg=confusion(counts, name=name))


def _labelled(record: Found, counts: Mapping[str, Mapping[str, float]] | None) -> dict[str, dict[str, float]]:
    labels = {task: SPELLINGS.get(name, name) for task, name in record["data"]["labels"].items()}
    return {
        labels.get(task, task): {labels.get(name, name): count for name, count in row.items()}
        for task, row in (counts or {}).items()
    }


def _lengths(record: Found) -> Picture | None:
    found = dict(_parts(record, "prompts"))
    cuts = {int(name.split()[0]): own for name, own in found.items() if name.endswith(" tokens")}
    if not cuts:
        return None
    ordered = [*((str(n), cuts[n]) for n in sorted(cuts)), ("whole", found["whole"])]
    points = [(float(i), _measure(own)) for i, (_, own) in enumerate(ordered)]
    svg = curves(
        {"beginning of the prompt": points},
        across="tokens",
        up="accuracy, %",
        ticks={float(i): name for i, (name, _) in enumerate(ordered)},
        name="lengths",
    )
    return Picture(name="lengths", caption="Accuracy against the length of the context, with intervals.", svg=svg)


def _conversations(record: Found) -> Picture | None:
    series = {
        f"{kind} before it": [(float(n), _measure(own)) for n, own in found.items()]
        for kind, found in _parts(record, "conversations")
    }
    if not series:
        return None
    svg = curves(series, across="questions in the conversation", up="accuracy, %", name="conversations")
    return Picture(name="conversations", caption="Accuracy on the newest question, with intervals.", svg=svg)


def _reliability(record: Found) -> Picture | None:
    found = _at(record, "scenarios", "prompts", "reliability")
    if not found:
        return None
    series = {
        f"{kind}, {100 * own['ece']:.1f} %": [
            (100 * b["confidence"], Measure(value=100 * b["accuracy"])) for b in own["bins"] if b["share"] > MIN_SHARE
        ]
        for kind, own in found.items()
    }
    svg = curves(series, across="confidence, %", up="accuracy, %", diagonal=True, name="reliability")
    caption = (
        "Reliability: accuracy against confidence, in bins; on the broken line a router is as sure as it is right. "
        "Beside the names: the calibration error."
    )
    return Picture(name="reliability", caption=caption, svg=svg)


def _abstention(record: Found) -> Picture | None:
    found = _at(record, "scenarios", "prompts", "abstention")
    if not found:
        return None
    series = {
        kind: [(100 * p["coverage"], Measure(value=100 * p["accuracy"])) for p in points]
        for kind, points in found.items()
    }
    svg = curves(series, across="coverage: texts that are routed, %", up="accuracy of these, %", name="abstention")
    caption = "Abstention: accuracy on the texts that are routed, as the least sure are left to the base model."
    return Picture(name="abstention", caption=caption, svg=svg)


def _false_routes(record: Found) -> Picture | None:
    outside, left = _scenario(record, "outside"), _scenario(record, "left_out")
    found = {"extra tasks": outside, **{f"{name}": own for name, own in left.get("splits", {}).items()}}
    series = {
        kind: [(100 * p["coverage"], Measure(value=100 * p["false_routes"])) for p in own["abstention"]]
        for kind, own in islice(found.items(), NUM_CURVES)
        if "abstention" in own
    }
    if not series:
        return None
    svg = curves(
        series, across="coverage: the tasks' own prompts that are routed, %", up="false routes, %", name="false-routes"
    )
    caption = "Texts of no task that are routed all the same, against the share of the tasks' own that are."
    return Picture(name="false-routes", caption=caption, svg=svg)


def _scenario(record: Found, name: str) -> Found:
    found: Found = record["scenarios"].get(name) or {}
    return found


def _parts(record: Found, scenario: str) -> list[tuple[str, Found]]:
    """The parts of a scenario that are measured one like the other."""
    apart = ("confusion", "reliability", "abstention")
    return [(k, v) for k, v in _scenario(record, scenario).items() if isinstance(v, dict) and k not in apart]


def _at(record: Found, *keys: str) -> Any:
    found: Any = record
    for key in keys:
        found = (found or {}).get(key)
    return found


def _measure(own: Found) -> Measure:
    low, high = own["interval"]
    return Measure(value=100 * own["accuracy"], interval=(100 * low, 100 * high))


def _accuracy(own: Found) -> Cell:
    return Cell(measure=_measure(own), digits=2)


def _cell(
    value: float | None, interval: Sequence[float] | None = None, *, scale: float = 100, digits: int = 1
) -> Cell | None:
    if value is None:
        return None
    pair = (interval[0] * scale, interval[1] * scale) if interval else None
    return Cell(measure=Measure(value=value * scale, interval=pair), digits=digits)


def _table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[Cell | str | None, ...]],
    *,
    num_labels: int = 1,
    notes: tuple[str, ...] = (),
    folded: bool = False,
) -> Table:
    return Table(
        title=title,
        columns=tuple(Column(name=name) for name in columns),
        rows=tuple(rows),
        notes=notes,
        num_labels=num_labels,
        folded=folded,
    )


_INTERVALS = "In brackets: 95 % bootstrap intervals; those of serial prompts draw whole prompts."
_DELAY = "Delay: sentences of the new task before the first that is routed to it, on average; 0 is at once."
