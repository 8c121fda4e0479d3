"""The findings beyond the paper's tables: a record in, differences, ablations, several questions, router, seeds out."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from dlp_lora.lab.evals.methods import MAIN, SINGLE, about, label, main_first
from dlp_lora.lab.records.run import RouterRecord, Serial
from dlp_lora.lab.records.table import Cell, Column, Measure, Table, cell, number, plain, table_of
from dlp_lora.lab.report import paper
from dlp_lora.lab.report.record import METRICS, Record, measure_of, metrics_of, points
from dlp_lora.lab.report.tables import INTERVALS, SEVERAL, relative

PAIRS = tuple(f"dlp - {other}" for other in ("oracle", "base", SINGLE))
_SERIAL = {"accuracy": "Right", "accuracy_later": "Later", "routed": "Routed"}


def difference_table(record: Record) -> Table:
    """Paired differences between methods on the composites: those to DLP-LoRA's rivals first."""
    recorded = record.run.differences
    rows = [
        (
            pair_label(pair),
            composite,
            METRICS.get(metric, metric),
            Cell(measure=measure, digits=2, signed=True),
            _relative_change(record, pair, composite, metric, measure),
            _paper_relative(pair, metric),
            verdict(measure) or None,
        )
        for pair in sorted(recorded, key=lambda p: PAIRS.index(p) if p in PAIRS else len(PAIRS))
        for composite in recorded[pair]
        for metric in recorded[pair][composite]
        if (measure := record.difference(pair, composite, metric))
    ]
    names = ("Difference", "Tasks", "Metric", "Points", "Relative", "Paper: relative", "Finding")
    return table_of(
        "Differences between methods, in points of 100",
        names,
        rows,
        notes=(
            "Paired: both methods answer the same examples. "
            f"In brackets: 95 % bootstrap intervals of the difference{SEVERAL}.",
            "The paper's are its averages over four other models (section 4.2).",
        ),
        num_labels=3,
    )


def verdict(difference: Measure) -> str:
    """The conclusion from a difference's interval: its side of zero, or "" without an interval."""
    if difference.interval is None:
        return ""
    low, high = difference.interval
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def pair_label(pair: str) -> str:
    """A recorded pair such as "dlp - oracle", in the words of the tables."""
    return " − ".join(label(method) for method in pair.split(" - "))


def ablation_table(record: Record) -> Table:
    """All other methods beside the main ones, each a mean over the tasks that all of them answered."""
    others = [method for method in record.methods if method not in MAIN]
    methods = [m for m in ("dlp", "oracle", SINGLE, "base") if m in record.methods] + others
    common = {metric: _common_tasks(record, methods, metric) for metric in METRICS}
    metrics = [metric for metric, tasks in common.items() if tasks]
    rows = [
        (
            label(method),
            about(method),
            *(cell(record.mean(method, common[metric], metric)) for metric in metrics),
        )
        for method in methods
    ]
    counted = ", ".join(f"{METRICS[metric]} over {len(common[metric])}" for metric in metrics)
    return table_of(
        "Ablations: means over the tasks that every method answered, of 100",
        ("Method", "What chooses", *(METRICS[m] for m in metrics)),
        rows if others else (),
        notes=(f"Tasks: {counted}.", INTERVALS),
        num_labels=2,
    )


def serial_table(record: Record) -> Table:
    """Several questions of different tasks in one prompt, answered in order."""
    serials = [serial for serial, by_method in record.run.serial.items() if by_method]
    methods = main_first(method for serial in serials for method in record.run.serial[serial])
    columns = [
        Column(name=name, group=f"{serial}, {_num_questions(record, serial)} questions")
        for serial in serials
        for name in _SERIAL.values()
    ]
    rows = [(label(m), *(_serial_cell(record, s, m, key) for s in serials for key in _SERIAL)) for m in methods]
    return table_of(
        "Serial-n: n questions of different tasks in one prompt, answered in order, %",
        ("Method", *columns),
        rows,
        notes=(
            "Right: questions answered right. Later: the same without the first of each prompt. Routed: answers under "
            f"their own task's adapter. In brackets: 95 % bootstrap intervals{SEVERAL}.",
            *(note for serial in serials for note in _what_switching_adds(record, serial)),
        ),
    )


THEIRS = {"bleu": "", "bleu_letters": "bleu"}
"""Which of the paper's numbers stands beside a teacher-forced metric of another name here."""


def teacher_forced_table(record: Record) -> Table:
    """The paper's protocol: each token is predicted from the right ones before it, beside the paper's numbers."""
    methods = main_first(record.run.teacher_forced)
    rows = []
    for task in record.tasks:
        for metric in metrics_of(record.run.teacher_forced, task.name):
            measures = [record.teacher_forced(method, task.name, metric) for method in methods]
            theirs = paper.row(task.paper_name, THEIRS.get(metric, metric))
            rows.append(
                (
                    task.label,
                    METRICS.get(metric, metric),
                    *map(cell, measures),
                    *((plain(value, digits=2) for value in theirs) if theirs else [None] * len(paper.COLUMNS)),
                )
            )
    groups = [
        *((record.model, method) for method in methods),
        *((f"Paper: {m}", method) for m, method in paper.COLUMNS),
    ]
    columns = [Column(name=f"{label(method)}, teacher-forced", group=group) for group, method in groups]
    return table_of(
        "Teacher-forced: what the paper's code measured, of 100",
        ("Task", "Metric", *columns),
        rows,
        notes=(
            "Each token is predicted from the right ones before it. "
            "That is easier than to answer, and says little about how often an answer is right.",
            "BLEU of letters is what the paper's code calls BLEU: of each answer alone, over its letters, the mean. "
            "BLEU is sacrebleu's over the words of all answers.",
            INTERVALS,
        ),
        num_labels=2,
        folded=True,
    )


def router_table(record: Record) -> Table:
    """How well the router tells the tasks apart, and what it costs."""
    router = record.run.router or RouterRecord()
    rows = [
        ("Accuracy, %", plain(_times(router.accuracy, 100), digits=2), plain(paper.ROUTER_ACCURACY, digits=2)),
        ("Expected calibration error, %", plain(_times(router.ece, 100), digits=2), None),
        ("Parameters, millions", plain(_times(router.num_parameters, 1e-6), digits=2), "5"),
        ("Training, s", plain(router.seconds), "under 600"),
    ]
    return table_of(
        "The router",
        ("Router", "Here", "Paper"),
        rows if record.run.router else (),
        notes=("The paper's: section 4.1, on its own data for the 26 tasks.", *record.seed_notes),
    )


def seed_table(record: Record) -> Table:
    """Means over tasks, seed by seed; without rows unless there are several seeds."""
    seeds = tuple(record.run.by_seed)
    rows = []
    for method in record.methods if len(seeds) > 1 else ():
        for metric, name in METRICS.items():
            tasks = [task.name for task in record.tasks if record.measure(method, task.name, metric)]
            means = [_times(mean, points(metric)) for mean in record.seed_means(method, tasks, metric)]
            known = [mean for mean in means if mean is not None]
            if known:
                spread = Measure(value=fmean(known), interval=(min(known), max(known)))
                rows.append((label(method), name, Cell(measure=spread), *map(plain, means)))
    return table_of(
        "Means over tasks, seed by seed, of 100",
        ("Method", "Metric", "Mean", *(f"Seed {seed}" for seed in seeds)),
        rows,
        notes=("In brackets: the lowest and the highest of the seeds.",),
        num_labels=2,
    )


def score_table(record: Record) -> Table:
    """Every score of the record."""
    rows = [
        (task.name, METRICS.get(metric, metric), *(cell(record.measure(m, task.name, metric)) for m in record.methods))
        for task in record.tasks
        for metric in metrics_of(record.run.scores, task.name)
    ]
    return table_of(
        "Every score, of 100",
        ("Task", "Metric", *record.methods),
        rows,
        notes=(INTERVALS,),
        num_labels=2,
        folded=True,
    )


def _paper_relative(pair: str, metric: str) -> str | None:
    value = paper.RELATIVE.get(pair, {}).get(metric)
    return None if value is None else f"{number(value, digits=2, signed=True)} %"


def _relative_change(record: Record, pair: str, composite: str, metric: str, difference: Measure) -> str | None:
    second = record.composite(composite, pair.split(" - ")[-1], metric)
    return (relative(second.value + difference.value, second.value) or None) if second else None


def _common_tasks(record: Record, methods: Sequence[str], metric: str) -> list[str]:
    """The tasks with a score of every method that has any."""
    scored = {m: {t.name for t in record.tasks if record.measure(m, t.name, metric)} for m in methods}
    having = [names for names in scored.values() if names]
    return [t.name for t in record.tasks if having and all(t.name in names for names in having)]


def _num_questions(record: Record, serial: str) -> int:
    return max(int(row.num_questions or 0) for row in record.run.serial[serial].values())


def _serial_cell(record: Record, serial: str, method: str, key: str) -> Cell | None:
    row = record.run.serial[serial].get(method, Serial())
    interval = {"accuracy": row.interval, "accuracy_later": row.interval_later}.get(key)
    return cell(measure_of(getattr(row, key), interval, key))


def _what_switching_adds(record: Record, serial: str) -> Iterable[str]:
    against = {
        "dlp": ("prompt-only", "DLP-LoRA against the same router asked once a prompt (prompt-only)"),
        "recompute": ("dlp", "encoding the context again at each switch (recompute) against keeping it"),
    }
    for method, (other, what) in against.items():
        ours, theirs = (record.run.serial[serial].get(name, Serial()).accuracy for name in (method, other))
        if ours is not None and theirs is not None:
            yield f"{serial}: {what}: {number(100 * (ours - theirs), signed=True)} points."


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
