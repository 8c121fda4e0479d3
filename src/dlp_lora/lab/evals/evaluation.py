"""An evaluation: tasks' questions in, the answers of several methods and their scores out, each kept as it comes."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlp_lora.engine.engine import Engine
from dlp_lora.lab.evals.answers import FREE, AnswerArgs, Known, Question, answer_all, cut_short, identity_of, seconds_of
from dlp_lora.lab.evals.forced import FORCED
from dlp_lora.lab.evals.methods import Method
from dlp_lora.lab.evals.record import compared, teacher_forced_scores, without_choices
from dlp_lora.lab.evals.scores import tabulate
from dlp_lora.lab.records.run import Answered
from dlp_lora.progress import OnProgress, staged, unseen
from dlp_lora.tasks import Task

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
        """Adds the answers of methods that `folder` lacks; teacher-forced ones for `forced`.

        Raises:
            RecordError: if answers were kept there under other settings.
        """
        aside = [method for method in methods if method.name in forced]
        for way, answers, chosen in ((FREE, self.free, methods), (FORCED, self.forced, aside)):
            known: Known = {}
            for method in chosen:
                rows = answers[method.name] = answer_all(
                    engine,
                    method,
                    self.questions,
                    self.args,
                    folder / way.name.replace("-", "_") / f"{method.name}.jsonl",
                    identity=identity_of(engine, self.tasks, method),
                    way=way,
                    known=known,
                    on_progress=staged(on_progress, f"{way.name}: {method.name}"),
                )
                known |= way.known(rows)

    def record(self) -> Answered:
        """The scores of all methods with intervals and differences, the number of cut answers, and the time."""
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
        for way, by_method in ((FREE, self.free), (FORCED, self.forced)):
            for method, rows in by_method.items():
                for row in rows:
                    yield {"part": way.name, "method": method, **row}
