"""The page of a run: a record and its pictures in, the sections of its report out."""

from collections.abc import Iterator, Sequence

from dlp_lora.lab.evals.methods import label
from dlp_lora.lab.records.table import Cell, cell, shown
from dlp_lora.lab.report.findings import (
    PAIRS,
    ablation_table,
    difference_table,
    pair_label,
    router_table,
    score_table,
    seed_table,
    serial_table,
    teacher_forced_table,
    verdict,
)
from dlp_lora.lab.report.markup import Bullets, Picture, Section, section
from dlp_lora.lab.report.provenance import making_table, settings_table, training_table
from dlp_lora.lab.report.record import METRICS, Record
from dlp_lora.lab.report.routing import routing_picture
from dlp_lora.lab.report.tables import (
    accuracy_table,
    chance_mark,
    composite_table,
    larger_table,
    main_methods,
    qa_table,
)


def sections(record: Record, pictures: Sequence[Picture]) -> tuple[Section, ...]:
    """The report's sections, in order; what was not measured is said, not left out."""
    drawn = {picture.name: picture for picture in pictures}
    conversation = record.run.conversation
    labels = {task.name: task.label for task in record.tasks}
    return (
        section("In short", _in_short(record)),
        section(
            "Multiple choice",
            accuracy_table(record),
            drawn.get("bars-accuracy"),
            drawn.get("radar-accuracy"),
            accuracy_table(record, metric="accuracy_loglik"),
        ),
        section("Question answering", qa_table(record), drawn.get("bars-rougeL"), drawn.get("radar-rougeL")),
        section("All tasks pooled", composite_table(record), difference_table(record)),
        section("Ablations", ablation_table(record)),
        section("Several questions in one prompt", serial_table(record)),
        section(
            "Routing",
            "A prompt of several tasks and its answer, sentence by sentence, with the adapters that spoke (Fig. 3)"
            f"{', with the first seed' if len(record.run.by_seed) > 1 else ''}."
            if conversation
            else None,
            routing_picture(conversation, labels=labels) if conversation else None,
            router_table(record),
            drawn.get("confusion"),
        ),
        section("Against a larger model", larger_table(record)),
        section("Teacher-forced", teacher_forced_table(record)),
        *([section("Seeds", seeds)] if (seeds := seed_table(record)).rows else []),
        section(
            "How it was made", making_table(record), training_table(record), settings_table(record), score_table(record)
        ),
    )


def title_of(record: Record) -> str:
    """What the page of a run is headed."""
    return f"{record.name}: DLP-LoRA on {record.model}"


def _in_short(record: Record) -> Bullets | None:
    items = (*_averages(record), *_differences(record), *_no_better_than_guessing(record))
    return Bullets(items=items) if items else None


def _averages(record: Record) -> Iterator[str]:
    for kind, metric in (("mcq", "accuracy"), ("qa", "bleu"), ("qa", "rougeL")):
        tasks = [task.name for task in record.scored(record.tasks_of(kind))]
        means = {method: cell(record.mean(method, tasks, metric)) for method in main_methods(record)}
        if said := [f"{label(method)} {shown(mean)}" for method, mean in means.items() if mean]:
            yield f"{METRICS[metric]}, mean over {len(tasks)} tasks, of 100: {', '.join(said)}."


def _differences(record: Record) -> Iterator[str]:
    """DLP-LoRA against its rivals, in the measure that leads each kind of task."""
    for pair in PAIRS:
        for composite in record.run.differences.get(pair, ()):
            for metric in ("accuracy", "rougeL"):
                if difference := record.difference(pair, composite, metric):
                    points = shown(Cell(measure=difference, digits=2, signed=True))
                    found = verdict(difference) or "no interval"
                    yield f"{METRICS[metric]} on {composite}, {pair_label(pair)}: {points} points; {found}."


def _no_better_than_guessing(record: Record) -> Iterator[str]:
    tasks = record.tasks_of("mcq")
    for method in ("oracle", "dlp"):
        marked = {task.label: chance_mark(record.measure(method, task.name, "accuracy"), task) for task in tasks}
        said = [f"{task} ({mark})" for task, mark in marked.items() if mark]
        if said:
            yield f"{label(method)} cannot be told from answering without a model on {', '.join(said)}."
