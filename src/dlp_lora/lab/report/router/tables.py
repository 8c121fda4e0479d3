"""The tables of a router: its targets, and what it got right in each scenario."""

import json
from collections.abc import Iterator, Sequence

from dlp_lora.lab.records.table import Cell, Measure, Table, plain, table_of
from dlp_lora.lab.report.markup import Bullets
from dlp_lora.lab.report.provenance import duration
from dlp_lora.lab.report.record import at
from dlp_lora.lab.report.router.record import Found, measure_of, parts_of, scenario_of

MADE_FROM = {"description": "a description", "1": "1 example", "8": "8 examples", "32": "32 examples"}
"""What a router without training is made from, by its name in the record."""

_SCALES = {"%": 100.0, "points": 100.0, "M": 1e-6}


def in_short(record: Found) -> Bullets:
    """How many targets are met, and which are missed."""
    targets = record["targets"]
    met = [target for target in targets if target["met"]]
    missed = [target["name"] for target in targets if target["met"] is False]
    items = [f"{len(met)} targets of {len(met) + len(missed)} that were measured are met."]
    if missed:
        items.append(f"Missed: {', '.join(missed)}.")
    return Bullets(items=tuple(items))


def targets(record: Found) -> Table:
    """The bounds that were aimed at, and what was found."""
    rows = []
    for target in record["targets"]:
        scale, unit = _SCALES.get(target["unit"], 1.0), target["unit"]
        bound = f"{'at least' if target['at_least'] else 'at most'} {target['bound'] * scale:g} {unit}".strip()
        met = {True: "met", False: "missed", None: None}[target["met"]]
        digits = 2 if unit else 3
        rows.append(
            (target["name"], bound, _cell(target["value"], target["interval"], scale=scale, digits=digits), met)
        )
    return table_of("Targets", ("", "Target", "Found", ""), rows, num_labels=2, notes=(_INTERVALS,))


def prompts(record: Found) -> Table:
    """Accuracy on whole prompts and on parts of them."""
    return accuracies("One part of a prompt, and nothing else", scenario_of(record, "prompts"))


def accuracies(title: str, found: Found, *, what: str = "") -> Table:
    """A row for each part of a scenario that has an accuracy."""
    rows = [
        (
            name,
            _accuracy(own),
            _cell(own.get("mean_over_tasks"), digits=2),
            _cell(own.get("routed")),
            _cell(own.get("right_and_routed")),
            _cell(own.get("ece"), digits=2),
            plain(own["num"], digits=0),
        )
        for name, own in found.items()
        if isinstance(own, dict) and "accuracy" in own and "interval" in own
    ]
    columns = (
        "Accuracy, %",
        "Mean over tasks, %",
        "Routed, %",
        "Right and routed, %",
        "Calibration error, %",
        "Samples",
    )
    return table_of(title, (what, *columns), rows, notes=(_ROUTED,))


def by_task(record: Found) -> Table:
    """Accuracy on whole prompts and single sentences, for each task."""
    kinds = {
        "Whole": ("prompts", "whole"),
        "First sentence": ("prompts", "first sentence"),
        "Random sentence": ("prompts", "random sentence"),
        "Sentence of 5 questions": ("serial", "5"),
    }
    found = {name: at(record, "scenarios", *place, "by_task") or {} for name, place in kinds.items()}
    rows = [
        (task, *(_cell(own.get(task)) for own in found.values()))
        for task in record["data"]["tasks"]
        if any(task in own for own in found.values())
    ]
    return table_of("Accuracy by task, %", ("Task", *found), rows, folded=True)


def conversation_tables(record: Found) -> Iterator[Table]:
    """Accuracy on the newest question, for each length of a conversation."""
    for kind, found in scenario_of(record, "conversations").items():
        if isinstance(found, dict):
            yield accuracies(f"The newest question, {kind} before it", found)


def serial(record: Found) -> Table:
    """Accuracy for each sentence of prompts of several questions, and how late a change is noticed."""
    rows = [
        (
            n,
            _accuracy(own),
            _cell(own["mean_over_tasks"], digits=2),
            _accuracy(own["first_after_change"]),
            plain(own["delay_sentences"], digits=2),
            plain(own["num"], digits=0),
        )
        for n, own in parts_of(record, "serial")
    ]
    columns = ("Questions", "Sentences, %", "Mean over tasks, %", "First after a change, %", "Delay", "Sentences")
    return table_of("Every sentence to its own task", columns, rows, notes=(_DELAY,))


def hysteresis(record: Found) -> Table:
    """What holding on to a task costs and gains in such prompts."""
    rows = [
        (
            n,
            name,
            _accuracy(row),
            _cell(row["first_after_change"]),
            plain(row["switches"], digits=2),
            plain(own["changes"], digits=2),
        )
        for n, own in parts_of(record, "serial")
        for name, row in own["hysteresis"].items()
    ]
    columns = ("Questions", "Hysteresis", "Sentences, %", "First after a change, %", "Switches", "Changes of task")
    return table_of("Hysteresis: when a switch is held back", columns, rows, num_labels=2)


def questions(record: Found) -> Table:
    """Which prompts are cut into several questions."""
    rows = [
        (n, _cell(own["routed_whole"]), _cell(own["cut"]), _cell(own.get("exact")), plain(own["num"], digits=0))
        for n, own in parts_of(record, "questions")
    ]
    columns = ("Questions", "Routed as a whole, %", "Cut, %", "Into exactly its questions, %", "Prompts")
    return table_of("Prompts that are cut into several questions", columns, rows)


def junctions(record: Found) -> Table:
    """What deciding once a sentence loses where the task changes within it."""
    found = scenario_of(record, "junctions")
    if "word" not in found:
        return table_of("", ("",), ())
    rows = [
        ("Words of a mixed sentence, decided once at its first word", _accuracy(found["sentence"])),
        ("The same, decided again at each word", _accuracy(found["word"])),
        *((f"Sentence {i} after it", _accuracy(own)) for i, own in enumerate(found["next"], start=1)),
        *((f"The same, had the change come at a full stop: {i}", _accuracy(own)) for i, own in _each(found)),
    ]
    note = f"Deciding at each word names the second task after {found['delay_words']:.1f} of its words, on average."
    return table_of("A sentence that begins in one task and ends in another", ("", "Right, %"), rows, notes=(note,))


def _each(found: Found) -> Iterator[tuple[int, Found]]:
    return enumerate(found["next_apart"], start=1)


def outside(record: Found, scenario: str) -> Iterator[Table]:
    """How well texts of no task are told from the own ones."""
    found = scenario_of(record, scenario)
    if "auroc" not in found:
        return
    splits = found.get("splits") or {"all": found}
    columns = ("", *_OUTSIDE)
    rows = [(name, *_outside_cells(own)) for name, own in splits.items()]
    if len(rows) > 1:
        rows.append(("mean", plain(found["auroc"], digits=3), _cell(found["false_routes"]), None, None))
    yield table_of("Texts that belong to no task", columns, rows)
    tasks = [(task, *_outside_cells(own)[:2]) for split in splits.values() for task, own in split["by_task"].items()]
    yield table_of("Task by task", columns[:3], tasks, folded=True)


def _outside_cells(own: Found) -> tuple[Cell | None, ...]:
    at_own = own.get("own_threshold") or {}
    return (
        plain(own["auroc"], digits=3),
        _cell(own["false_routes"]),
        _cell(at_own.get("coverage")),
        _cell(at_own.get("false_routes")),
    )


def robustness(record: Found) -> Table:
    """Accuracy on disguised prompts."""
    rows = [
        (
            name,
            _accuracy(own),
            _cell(own["lost"], digits=2),
            _cell(own.get("routed")),
            _cell(own.get("right_and_routed")),
        )
        for name, own in parts_of(record, "robustness")
    ]
    columns = ("", "Accuracy, %", "Lost, points", "Routed, %", "Right and routed, %")
    return table_of("Whole prompts in disguise", columns, rows, notes=(_ROUTED,))


def instructions(record: Found) -> Table:
    """What an engine makes of prompts among instructions, and of foreign ones among the same."""
    rows = [
        (
            name,
            _accuracy(own),
            _cell(own["routed"]),
            _cell(own["right_and_routed"]),
            *(_outside_cells(own["outside"]) if "outside" in own else (None,) * 4),
        )
        for name, own in parts_of(record, "instructions")
    ]
    columns = ("Instructions", "Accuracy, %", "Routed, %", "Right and routed, %", *_OUTSIDE)
    return table_of("Whole prompts among instructions, as decided", columns, rows, notes=(_ROUTED,))


def peers(record: Found) -> Table:
    """Other ways to choose an adapter, on the same prompts."""
    rows = [
        (
            name,
            own.get("skipped") or own["needs"],
            None if "skipped" in own else _accuracy(own),
            plain(own.get("auroc"), digits=3),
            _cell(own.get("false_routes")),
            plain(own.get("prompt_ms"), digits=2),
        )
        for name, own in parts_of(record, "peers")
    ]
    columns = ("", "Needs", "Accuracy, %", *_OUTSIDE[:2], "A prompt, ms")
    return table_of("Whole prompts to their tasks", columns, rows, num_labels=2)


def untrained(record: Found) -> Table:
    """What routers without training keep of their tasks' prompts, and send away of others."""
    shares = {
        "kept": "Routed, %",
        "kept_and_right": "Routed and right, %",
        "left_out_to_base": "Left-out tasks sent to the base, %",
        "everyday_to_base": "Everyday prompts sent to the base, %",
    }
    rows = [
        (MADE_FROM.get(name, name), *(_cell(own["mean"][key]) for key in shares))
        for name, own in (scenario_of(record, "untrained").get("made_from") or {}).items()
    ]
    columns = ("Made from", *shares.values())
    return table_of("Routers without training, with some tasks left out", columns, rows)


def scale(record: Found, scenario: str) -> Table:
    """Accuracy and cost with more and more tasks."""
    rows = [
        (
            n,
            _accuracy(own),
            plain(own["train_seconds"]),
            plain(own["sentence_ms"], digits=3),
            plain(own["num_parameters"] and own["num_parameters"] / 1e6, digits=2),
        )
        for n, own in parts_of(record, scenario)
    ]
    title = "Synthetic tasks, each an action on a kind of text" if scenario == "synthetic" else "More tasks"
    return table_of(title, ("Tasks", "Whole prompt, %", "Training, s", "A sentence, ms", "Parameters, M"), rows)


def added(record: Found) -> Table:
    """Accuracy on tasks that joined, and on those that were there."""
    rows = [
        (
            row["base"],
            str(row["added"]),
            "all" if row["examples"] is None else str(row["examples"]),
            _accuracy(row["new"]),
            _cell(row.get("new_fit")),
            _accuracy(row["old"]),
            _cell(row["lost"], digits=2),
            *(_cell(share) for share in row.get("false_routes") or (None, None)),
            plain(row["add_seconds"], digits=2),
        )
        for row in scenario_of(record, "extension").get("add", ())
    ]
    scores = (
        "New, %",
        "New that fit, %",
        "Old, %",
        "Lost on the old, points",
        "False routes before, %",
        "After, %",
        "Seconds",
    )
    columns = ("Router", "Tasks added", "Examples of each", *scores)
    note = (
        "Router: trained without some of the data's tasks, which are added; or on all of them, and extra ones are. "
        "False routes: extra tasks that it knows neither before nor after, at its own threshold."
    )
    return table_of("Tasks added to a trained router", columns, rows, num_labels=3, notes=(note,))


def removed(record: Found) -> Table:
    """Accuracy on the tasks that are left."""
    rows = [
        (
            str(len(row["removed"])),
            _accuracy(row["others"]),
            _cell(row["lost"], digits=2),
            plain(row["remove_seconds"], digits=3),
        )
        for row in scenario_of(record, "extension").get("remove", ())
    ]
    return table_of("Tasks removed", ("Removed", "Others, %", "Lost on the others, points", "Seconds"), rows)


def skew(record: Found) -> Table:
    """Accuracy on tasks that few of the examples are of."""
    rows = [
        (share, kind, _accuracy(row["starved"]), _accuracy(row["others"]))
        for share, own in parts_of(record, "skew")
        for kind, row in own.items()
    ]
    columns = ("Share of their examples", "Read", "Generative tasks, %", "Multiple-choice tasks, %")
    return table_of("Few examples of the generative tasks, all of the others", columns, rows, num_labels=2)


def ceilings(record: Found) -> Table:
    """How far a much larger classifier is ahead."""
    rows = [
        (
            kind,
            _accuracy(own["router"]),
            _accuracy(own["ceiling"]),
            _cell(own["gap"], digits=2),
            _cell(own["shared_text"], digits=2),
        )
        for kind, own in parts_of(record, "ceilings")
    ]
    columns = ("", "Router, %", "Large classifier, %", "Gap, points", "Text of two tasks, %")
    note = (
        "The large classifier (TF-IDF of words and letters, logistic regression) learned this kind of sample and no "
        "other. Text of two tasks: test samples that stand, letter for letter, under another task in training, too."
    )
    return table_of("Against a much larger classifier", columns, rows, notes=(note,))


def timing(record: Found) -> Table:
    """Milliseconds a sentence and a prompt."""
    found = scenario_of(record, "timing")
    rows = [
        (name, plain(found.get(key), digits=3))
        for name, key in (
            ("A sentence, median", "sentence_ms"),
            ("A sentence, 95th percentile", "sentence_ms_p95"),
            ("A prompt, median", "prompt_ms"),
        )
        if key in found
    ]
    return table_of("One thread, warm; the prompt stays and the answer grows", ("", "Milliseconds"), rows)


def making(record: Found) -> Table:
    """Router, data, settings, hardware and versions of the run."""
    router, data = record["router"], record["data"]
    trained = router["seconds"] and duration(router["seconds"])
    facts = {
        "Router": router["type"] and f"{router['type']}, {'given' if router['given'] else 'trained for this record'}",
        "Parameters": router["num_parameters"] and f"{router['num_parameters']:,}",
        "Training": trained,
        "Tasks": ", ".join(data["tasks"]),
        "Extra tasks": ", ".join(data["extra"]),
        "Settings": json.dumps(record["settings"], ensure_ascii=False),
        "Hardware and versions": _listed(record["environment"]),
        **{f"Those of {name}": _listed(own) for name, own in record.get("elsewhere", {}).items()},
        "Time": ", ".join(f"{name} {duration(own['seconds'])}" for name, own in record["scenarios"].items()),
    }
    return table_of("The run", ("", ""), [(k, str(v) if v else None) for k, v in facts.items()], num_labels=2)


def _listed(environment: Found) -> str:
    return ", ".join(f"{key} {value}" for key, value in environment.items() if value is not None)


def _accuracy(own: Found) -> Cell:
    return Cell(measure=measure_of(own), digits=2)


def _cell(
    value: float | None, interval: Sequence[float] | None = None, *, scale: float = 100, digits: int = 1
) -> Cell | None:
    if value is None:
        return None
    pair = (interval[0] * scale, interval[1] * scale) if interval else None
    return Cell(measure=Measure(value=value * scale, interval=pair), digits=digits)


_OUTSIDE = ("AUROC", "False routes at 95 % coverage, %", "Coverage at own threshold, %", "False routes there, %")
_INTERVALS = "In brackets: 95 % bootstrap intervals; those of serial prompts draw whole prompts."
_ROUTED = "Routed: the router says that some adapter fits; the others go to the base model."
_DELAY = "Delay: sentences of the new task before the first that is routed to it, on average; 0 is at once."
