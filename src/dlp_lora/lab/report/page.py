"""The page: a record and its pictures in, the whole report as Markdown and as one HTML file out."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dlp_lora.lab.evals.methods import label
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
from dlp_lora.lab.report.markup import (
    Block,
    Bullets,
    Cell,
    Picture,
    Table,
    cell,
    escape_markdown,
    shown,
    to_html,
    to_markdown,
)
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

NOT_MEASURED = "Not measured in this run."


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


def sections(record: Record, pictures: Sequence[Picture]) -> tuple[Section, ...]:
    """The report's sections, in order; what was not measured is said, not left out."""
    drawn = {picture.name: picture for picture in pictures}
    conversation = record.at("conversation")
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
            "A prompt of several tasks and its answer, sentence by sentence, with the adapters that spoke (Fig. 3)."
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


def section(title: str, *blocks: Block | None) -> Section:
    """A section of what there is; if there is nothing, it says so."""
    there = tuple(b for b in blocks if b is not None and not (isinstance(b, Table) and not b.rows))
    return Section(title=title, blocks=there or (NOT_MEASURED,))


def markdown_page(title: str, parts: Sequence[Section]) -> str:
    """A report as GitHub's Markdown; the pictures lie beside it."""
    blocks = [f"# {escape_markdown(title)}"]
    for part in parts:
        blocks += [f"## {part.title}", *map(to_markdown, part.blocks)]
    return "\n\n".join(blocks) + "\n"


def html_page(title: str, parts: Sequence[Section]) -> str:
    """A report as one HTML file that needs no other, for small and large screens, light and dark."""
    title = html.escape(title)
    body = "".join(f"<h2>{part.title}</h2>{''.join(map(to_html, part.blocks))}" for part in parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main><h1>{title}</h1>{body}</main></body></html>\n"
    )


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
        for composite in record.at("differences", pair) or ():
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


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --paper: #fff; --faint: #667080; --line: #d8dce2; --head: #f4f5f7;
  --mark: #a33c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e5e9; --paper: #15181c; --faint: #98a2b0; --line: #343a42;
  --head: #1e2228; --mark: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); font-size: 1.3rem; }
h3, summary { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .5rem; }
summary { cursor: pointer; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.wide { width: fit-content; max-width: 100%; overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td, .short { white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--head); vertical-align: bottom; white-space: nowrap; }
colgroup + colgroup { border-left: 1px solid var(--line); }
.groups th { text-align: center; }
thead .label, tbody th { text-align: left; font-weight: 500; }
thead th:first-child, tbody th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th:first-child { background: var(--head); }
small { display: block; color: var(--faint); font-size: .75rem; }
.mark { color: var(--mark); }
.notes { color: var(--faint); font-size: .85rem; padding-left: 1.2rem; }
figure { margin: 1.5rem 0; }
img { display: block; width: 100%; max-width: 42rem; height: auto; }
figcaption { color: var(--faint); font-size: .85rem; }
.prompt { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: .8rem; }
.turn { display: grid; max-width: 62rem; grid-template-columns: minmax(0, 1fr) 15rem; gap: 1rem; margin: .4rem 0; }
.turn p { max-width: none; margin: 0; padding: .4rem .7rem; border-left: 4px solid; border-radius: 4px;
  white-space: pre-wrap; }
.weights { font-size: .85rem; overflow-wrap: anywhere; }
.bar { display: flex; height: .5rem; margin: .4rem 0 .2rem; border-radius: 3px; overflow: hidden; }
@media (max-width: 40rem) { .turn { grid-template-columns: minmax(0, 1fr); gap: 0; margin-bottom: 1rem; } }
"""
