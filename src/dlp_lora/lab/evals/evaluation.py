"""An evaluation: tasks' questions in, the answers of several methods and their scores out, each kept as it comes."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlp_lora.engine.engine import Engine
from dlp_lora.lab.evals.answers import (
    AnswerArgs,
    Likelihoods,
    Question,
    answer_all,
    cut_short,
    identity_of,
    known_likelihoods,
    seconds_of,
)
from dlp_lora.lab.evals.forced import Known, answer_forced, known_texts
from dlp_lora.lab.evals.methods import Method
from dlp_lora.lab.evals.record import compared, teacher_forced_scores, without_choices
from dlp_lora.lab.evals.scores import tabulate
from dlp_lora.lab.records.run import Answered
from dlp_lora.progress import OnProgress, staged, unseen
from dlp_lora.tasks import Task

FREE, FORCED = "answers", "teacher-forced"
Rows = dict[str, list[dict[str, Any]]]
"""Answers by method, one dict a question."""


@dataclass
class Evaluation:
    """Test questions of tasks in batches, and what methods have answered: freely, and along the gold answers."""

    tasks: Sequence[Task]
    kinds: Mapping[str, str]
    questions: Sequence[Sequence[Question]]
    args: AnswerArgs
    free: Rows = field(default_factory=dict)
    forced: Rows = field(default_factory=dict)

    def answer(
        self,
        engine: Engine,
        methods: Sequence[Method],
        folder: Path,
        *,
        forced: Collection[str] = (),
        on_progress: OnProgress = unseen,
    ) -> None:
        """Adds the answers of methods, or what is left of those kept in `folder`; along the gold ones for `forced`.

        Raises:
            RecordError: if answers were kept there under other settings.
        """
        likelihoods: Likelihoods = {}
        for method in methods:
            rows = self.free[method.name] = answer_all(
                engine,
                method,
                self.questions,
                self.args,
                folder / "answers" / f"{method.name}.jsonl",
                identity=identity_of(engine, self.tasks, method),
                known=likelihoods,
                on_progress=staged(on_progress, f"{FREE}: {method.name}"),
            )
            likelihoods |= known_likelihoods(rows)
        texts: Known = {}
        for method in (method for method in methods if method.name in forced):
            rows = self.forced[method.name] = answer_forced(
                engine,
                method,
                self.questions,
                self.args,
                folder / "teacher_forced" / f"{method.name}.jsonl",
                identity=identity_of(engine, self.tasks, method),
                known=texts,
                on_progress=staged(on_progress, f"{FORCED}: {method.name}"),
            )
            texts |= known_texts(rows)

    def record(self) -> Answered:
        """The scores of all methods with intervals and differences, what was cut short, and the time it took."""
        by_name = {task.name: task for task in self.tasks}
        tables = {name: tabulate(rows, by_name, self.kinds) for name, rows in self.free.items()}
        return Answered(
            **vars(compared(tables, self.kinds)),
            **vars(teacher_forced_scores(self.forced, by_name, self.kinds)),
            cut_short={name: cut_short(rows) for name, rows in self.free.items()},
            without_choices=without_choices(self.tasks, self.kinds),
            timings={name: seconds_of(rows) for name, rows in self.free.items()},
        )

    def outputs(self) -> Iterator[dict[str, Any]]:
        """Every answer with its method and the part of the record that it is of."""
        for part, by_method in ((FREE, self.free), (FORCED, self.forced)):
            for method, rows in by_method.items():
                for row in rows:
                    yield {"part": part, "method": method, **row}
