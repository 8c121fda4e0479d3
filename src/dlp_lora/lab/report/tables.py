"""The paper's tables: a record in, Tables 1, 2, 3 and 5 with its numbers and the paper's out.

Rows and columns are the paper's. Added are the columns of what needs no model (chance, the most frequent answer) and of
the single LoRA of rank 64, the rows of own tasks, and in Table 3 those of the adapters chosen by hand (LoRA).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean

from dlp_lora.lab.evals.methods import MAIN, SINGLE, about, label
from dlp_lora.lab.records.table import Cell, Column, Measure, Row, Table, cell, number, plain, table_of
from dlp_lora.lab.report import paper
from dlp_lora.lab.report.record import METRICS, QA_METRICS, Record, RecordedTask, at, measure_of

POOLED_METRICS = ("accuracy", *QA_METRICS)
NO_LARGER = "no larger model was at hand"
SEVERAL = "; of several seeds, the range of all their intervals"
INTERVALS = (
    f"In brackets: 95 % bootstrap intervals over the test examples{SEVERAL}. "
    "An average's interval is recorded with it or follows from those of its tasks."
)
MARKS = (
    "At chance: the interval includes the accuracy of guessing among the options. Below chance: it lies under it; a "
    "free answer need not be an option at all. At majority: no better than always giving the most frequent answer."
)


def accuracy_table(record: Record, *, metric: str = "accuracy") -> Table:
    """Table 1, accuracy on the multiple-choice tasks; the paper's numbers stand beside free-running accuracy only."""
    beside = metric == "accuracy"
    tasks = _in_order(record.tasks_of("mcq"), paper.TABLE_1, kind="mcq")
    methods = main_methods(record)
    rows = [
        (
            task.label,
            *map(plain, (task.chance, task.majority)),
            *(cell(m, mark=chance_mark(m, task)) for m in (record.measure(x, task.name, metric) for x in methods)),
            *(_paper_cells(paper.row(task.paper_name, metric)) if beside else ()),
        )
        for task in tasks
    ]
    answered = record.scored(record.tasks_of("mcq"))
    scored = [t for t in answered if beside or any(record.measure(m, t.name, metric) for m in methods)]
    average = (
        "Avg.",
        *(plain(_mean_of([getattr(task, line) for task in scored])) for line in ("chance", "majority")),
        *_average_cells(record, methods, scored, metric),
        *(_paper_cells(paper.TABLE_1_AVERAGE) if beside else ()),
    )
    baselines = tuple(Column(name=name, group="No model") for name in ("Chance", "Majority"))
    own = _own_columns(record, methods)
    if not beside:
        return table_of(
            "Accuracy by likelihood: the option with the highest length-normalised likelihood, %",
            ("Task", *baselines, *own),
            (*rows, average) if scored else (),
            notes=("The average is over the tasks that have options. The paper has no such measure.", MARKS),
            folded=True,
        )
    return table_of(
        "Table 1. Accuracy on the multiple-choice tasks, %",
        ("Task", *baselines, *own, *_paper_columns()),
        (*rows, average) if scored else (),
        notes=(not_the_paper(record), INTERVALS, MARKS, _RELATIVE.format(label("oracle"))),
    )


def qa_table(record: Record) -> Table:
    """Table 2: BLEU, ROUGE-1 and ROUGE-L of free-running text on the question-answering tasks."""
    methods = main_methods(record)
    tasks = record.tasks_of("qa")
    rows = [
        (
            task.label,
            METRICS[metric],
            *(cell(record.measure(method, task.name, metric)) for method in methods),
            *_paper_cells(paper.row(task.paper_name, metric)),
        )
        for task in _in_order(tasks, paper.TABLE_2, kind="qa")
        for metric in QA_METRICS
    ]
    averages = [
        (
            "Avg.",
            METRICS[metric],
            *_average_cells(record, methods, record.scored(tasks), metric),
            *_paper_cells(paper.TABLE_2_AVERAGE[metric]),
        )
        for metric in QA_METRICS
    ]
    return table_of(
        "Table 2. BLEU, ROUGE-1 and ROUGE-L on the question-answering tasks, of 100",
        ("Task", "Metric", *_own_columns(record, methods), *_paper_columns()),
        (*rows, *averages) if tasks else (),
        notes=(
            not_the_paper(record),
            *_stand_ins(record),
            INTERVALS,
            _RELATIVE.format(label("oracle")),
            "The paper's averages are as printed; some are not the means of its rows.",
        ),
        num_labels=2,
    )


def composite_table(record: Record) -> Table:
    """Table 3: the tasks pooled, with no label given."""
    composites = tuple(record.run.composites)
    rows: list[Row] = []
    for method in main_methods(record):
        # Trained on all tasks, the single LoRA has one row, as in the paper.
        groups = [composites] if method == SINGLE else [(composite,) for composite in composites]
        rows += [_composite_row(record, method, group) for group in groups]
    theirs = [
        (
            f"Paper: {row.model}",
            label(row.method),
            str(row.num_tasks),
            *(plain(getattr(row, m), digits=2) for m in POOLED_METRICS),
        )
        for row in paper.TABLE_3
    ]
    names = ("Model", "Method", "Composite-n", *(METRICS[metric] for metric in POOLED_METRICS))
    return table_of(
        "Table 3. Composite-n: the tasks pooled, no label given, of 100",
        names,
        (*rows, *theirs) if composites else (),
        notes=(
            not_the_paper(record),
            *_stand_ins(record),
            f"{label('oracle')}: {about('oracle')}; the paper's table has no such row.",
            f"In brackets: 95 % bootstrap intervals over the examples{SEVERAL}.",
            _RELATIVE.format(label("base")),
        ),
        num_labels=3,
    )


def larger_table(record: Record) -> Table:
    """Table 5: the base with DLP-LoRA against a larger plain model, both over the same tasks."""
    larger = record.run.larger
    scored = record.scored(record.tasks)
    tasks = [task for task in scored if larger is None or task.name in larger.scores]
    is_whole = len(tasks) == len(scored)
    names_of_both = {task.name for task in tasks}
    asks_others = (
        larger is not None
        and larger.left_out is not None
        and _counted(larger.left_out, names_of_both) != _counted(record.run.left_out or {}, names_of_both)
    )
    large: dict[str, Measure | None] = {}
    small: dict[str, Measure | None] = {}
    for metric in POOLED_METRICS:
        names = [task.name for task in tasks if (task.kind == "qa") == (metric in QA_METRICS)]
        if larger is not None:
            value = _mean_of([at(larger.scores, name, metric) for name in names])
            large[metric] = measure_of(value, larger.pooled_intervals.get(metric) if is_whole else None, metric)
        small[metric] = record.mean("dlp", names, metric)
    if larger is not None and is_whole and not asks_others:  # a time over other questions says nothing
        large["seconds"] = _exact(larger.seconds)
    if is_whole and not asks_others:
        small["seconds"] = _exact(record.run.timings.get("dlp"))
    theirs, ours = ({name: _exact(getattr(row, name)) for name in _TABLE_5} for row in paper.TABLE_5)
    return table_of(
        "Table 5. A small model with DLP-LoRA against a larger plain one, of 100",
        ("Model", *_TABLE_5.values()),
        (
            _larger_row((larger.model or "a larger model") if larger else NO_LARGER, large),
            _larger_row(f"{record.model} + DLP-LoRA", small, over=large),
            _larger_row(f"Paper: {paper.TABLE_5[0].model}", theirs, digits=2),
            _larger_row(f"Paper: {paper.TABLE_5[1].model}", ours, over=theirs, digits=2),
        ),
        notes=(
            *(() if larger else (f"In this run {NO_LARGER}: its row is empty.",)),
            *((_OTHERS,) if asks_others else ()),
            not_the_paper(record),
            *_stand_ins(record),
            _RELATIVE.format("the larger model"),
        ),
    )


def not_the_paper(record: Record) -> str:
    """Says plainly why the paper's numbers are no target for these."""
    same = paper.backbone(record.model)
    model = (
        f"{record.model} is the paper's {same}: compare with those columns."
        if same
        else f"{record.model} is none of the paper's models: the paper's columns show the pattern, not a target."
    )
    return (
        f"{model} Here answers are generated freely, by greedy decoding, and scored whole; the paper's code measured "
        "teacher-forced: each token was predicted from the right ones before it. The paper averages 10 runs."
    )


def main_methods(record: Record) -> tuple[str, ...]:
    """The paper's three methods, and the single LoRA of rank 64 where it was measured."""
    return tuple(m for m in MAIN if m != SINGLE or m in record.methods)


def chance_mark(measure: Measure | None, task: RecordedTask) -> str:
    """What an accuracy's interval includes that needs no model: "at chance", "at majority", or nothing ("")."""
    if measure is None or measure.interval is None:
        return ""
    low, high = measure.interval
    if task.chance is not None and low <= task.chance:
        return "at chance" if task.chance <= high else "below chance"
    return "at majority" if task.majority is not None and low <= task.majority else ""


def relative(value: float, reference: float) -> str:
    """The change from a reference, in per cent of it; nothing ("") where that is zero."""
    return f"{number(100 * (value - reference) / reference, signed=True)} %" if reference else ""


_OTHERS = "The larger model left out other questions, which were too long for it; so no times are shown."
_RELATIVE = "The per cent beside a number of DLP-LoRA is its relative change over {}."
_TABLE_5 = {"seconds": "Inference time (s)", **{metric: METRICS[metric] for metric in POOLED_METRICS}}


def _in_order(tasks: Sequence[RecordedTask], rows: Iterable[str], *, kind: str) -> list[RecordedTask]:
    """All rows of the paper's table, if it has any of the tasks, then the others."""
    known = {task.paper_name: task for task in tasks if task.paper_name}
    wanted = [known.get(row) or RecordedTask(name=row, kind=kind, paper_name=row) for row in rows] if known else []
    return [*wanted, *(task for task in tasks if task not in wanted)]


def _own_columns(record: Record, methods: Sequence[str]) -> tuple[Column, ...]:
    return tuple(Column(name=label(method), group=record.model) for method in methods)


def _paper_columns() -> tuple[Column, ...]:
    return tuple(Column(name=label(method), group=f"Paper: {model}") for model, method in paper.COLUMNS)


def _paper_cells(values: Sequence[float] | None) -> tuple[Cell | None, ...]:
    return tuple(plain(value, digits=2) for value in values) if values else (None,) * len(paper.COLUMNS)


def _average_cells(
    record: Record, methods: Sequence[str], tasks: Sequence[RecordedTask], metric: str
) -> tuple[Cell | None, ...]:
    means = {method: record.mean(method, [task.name for task in tasks], metric) for method in methods}
    return tuple(_over(mean, means["oracle"] if method == "dlp" else None) for method, mean in means.items())


def _composite_row(record: Record, method: str, composites: Sequence[str]) -> Row:
    cells = []
    for metric in POOLED_METRICS:
        found = ((c, record.composite(c, method, metric)) for c in composites)
        composite, measure = next(((c, m) for c, m in found if m), ("", None))
        cells.append(_over(measure, record.composite(composite, "base", metric) if method == "dlp" else None))
    (first, *others) = composites
    num_tasks = str(len(record.scored(record.tasks))) if others else first.removeprefix("composite-")
    return (record.model, label(method), num_tasks, *cells)


def _larger_row(
    name: str,
    numbers: Mapping[str, Measure | None],
    *,
    over: Mapping[str, Measure | None] | None = None,
    digits: int = 1,
) -> Row:
    return (name, *(_over(numbers.get(column), (over or {}).get(column), digits=digits) for column in _TABLE_5))


def _over(measure: Measure | None, reference: Measure | None, *, digits: int = 1) -> Cell | None:
    """A cell with its relative change over a reference, if there is one."""
    return cell(
        measure, change=relative(measure.value, reference.value) if measure and reference else "", digits=digits
    )


def _exact(value: float | None) -> Measure | None:
    return None if value is None else Measure(value=value)


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _counted(left_out: Mapping[str, float], names: Collection[str]) -> dict[str, float]:
    return {task: count for task, count in left_out.items() if count and task in names}


def _stand_ins(record: Record) -> tuple[str, ...]:
    """Names the tasks whose data are not the paper's."""
    described = record.run.data.tasks
    return tuple(
        f"{task.label} does not hold the paper's data ({described[task.name].stand_in})."
        for task in record.tasks
        if task.name in described and described[task.name].stand_in
    )
