"""One pass through all steps with one training seed: adapters, router, answers, each kept on disk."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.engine.engine import Engine
from dlp_lora.engine.loading import load, load_router
from dlp_lora.files import as_json
from dlp_lora.kept import read_kept
from dlp_lora.lab.evals.answers import AnswerArgs, Question, data_hash, identity_of
from dlp_lora.lab.evals.chance import described
from dlp_lora.lab.evals.evaluation import Evaluation
from dlp_lora.lab.evals.methods import MAIN, METHODS, SINGLE, Method
from dlp_lora.lab.evals.metrics import bleu_signature
from dlp_lora.lab.evals.record import serial_scores
from dlp_lora.lab.evals.serial import answer_serial, fitting, generate_serial, serial_methods, serial_prompts
from dlp_lora.lab.records.run import (
    Conversation,
    Data,
    RouterRecord,
    RunRecord,
    TaskRecord,
    Trained,
    Training,
    from_json,
)
from dlp_lora.lab.reproduce.args import ReproduceArgs, methods_of, needs_adapters, stage_name
from dlp_lora.policy import TopP
from dlp_lora.progress import OnProgress, Progress
from dlp_lora.tasks import Task
from dlp_lora.tasks.manifest import TaskInfo, kind_of
from dlp_lora.training.adapters import train_adapter
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.router import REPORT_FILE, load_tokenizer, train_router_into

ROUTER_KEYS = ("accuracy", "ece", "num_parameters", "seconds", "temperature")  # of its report
TOKENS_A_QUESTION = 24  # of a serial answer
SERIAL_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the seeds of a run have in common: the model, the tasks, and the batches of their test questions."""

    model: str | Path
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tasks: tuple[Task, ...]
    infos: Mapping[str, TaskInfo]
    args: ReproduceArgs
    questions: Sequence[Sequence[Question]]
    left_out: Mapping[str, int]
    on_progress: OnProgress


class Seed:
    """One pass through all steps with one training seed."""

    def __init__(self, shared: Shared, folder: Path, seed: int) -> None:
        self.shared, self.folder, self.seed = shared, folder, seed
        self.tasks, self.args = shared.tasks, shared.args
        self.kinds = {task.name: kind_of(task, shared.infos) for task in shared.tasks}
        self.methods = methods_of(shared.args)
        self.evaluation = Evaluation(shared.tasks, self.kinds, shared.questions, shared.args.answers)
        self._serial: dict[str, dict[str, list[dict[str, Any]]]] = {}  # answers by step and method
        self._serial_left_out: dict[str, int] = {}
        self._serial_skipped: dict[str, int] = {}  # by step, how many tasks of choice there are

    def run(self) -> RunRecord:
        """Does what is left to do and gives the seed's part of the record."""
        own = self.tasks if needs_adapters(self.args) else ()
        training = {task.name: self._adapter(task, self.args.training, self.folder / "adapters") for task in own}
        single = self._single() if METHODS[SINGLE] in self.methods else None
        router = conversation = None
        if own:
            router = self._router()
            with self._engine() as engine:
                engine.save_pretrained(self.folder / "bundle")
                with engine.using(prompt_routing="questions"):  # one context for all methods but `apart`
                    self._answer(engine, [method for method in self.methods if not method.adapter])
                    for n in self.args.serial:
                        self._answer_serial(engine, n)
                    conversation = self._conversation(engine)
        if single is not None:
            with self._engine(single=True) as engine:
                self._answer(engine, [METHODS[SINGLE]])
        return RunRecord(
            **vars(self.evaluation.record()),
            metrics={"bleu": bleu_signature()} if "qa" in self.kinds.values() else {},
            data=Data(hash=data_hash(self.tasks), tasks={t.name: self._about(t) for t in self.tasks}),
            left_out=dict(self.shared.left_out),
            serial={step: serial_scores(own, int(step.removeprefix("serial-"))) for step, own in self._serial.items()},
            serial_left_out=self._serial_left_out,
            serial_skipped=self._serial_skipped,
            router=router,
            training=Training(adapters=training, single=single),
            conversation=conversation,
        )

    def outputs(self) -> Iterator[dict[str, Any]]:
        """Every answer of the run's methods, with the part of the record that it is of, for audits without a model."""
        for row in self.evaluation.outputs():
            yield {"seed": self.seed, **row}
        for part, by_method in self._serial.items():
            for method, rows in by_method.items():
                for row in rows:
                    yield {"seed": self.seed, "part": part, "method": method, **row}

    def _tell(self, now: Progress) -> None:
        self.shared.on_progress(replace(now, stage=stage_name(self.args, self.seed, now.stage)))

    def _adapter(self, task: Task, args: AdapterTrainingArgs, folder: Path) -> Trained:
        args = replace(args, seed=self.seed)
        trained = train_adapter(
            self.shared.base, self.shared.tokenizer, task, folder / task.name, args, on_progress=self._tell
        )
        self._tell(Progress(task.name, 1, 1, f"loss {trained.final_loss:.3f}"))
        return Trained(**{f.name: getattr(trained, f.name) for f in fields(Trained)})

    def _single(self) -> Trained:
        """The one LoRA on all tasks."""
        pool = Task(name=SINGLE, train=tuple(e for task in self.tasks for e in task.train), test=())
        # The same lora_alpha: a step of Adam then changes the model about as much at any rank (LoRA, section 4.1).
        return self._adapter(pool, replace(self.args.training, r=self.args.single_r), self.folder)

    def _router(self) -> RouterRecord:
        folder = self.folder / "router"
        file = folder / REPORT_FILE
        if not file.is_file():
            args = replace(self.args.router, seed=self.seed)
            train_router_into(folder, self.tasks, load_tokenizer(str(self.shared.model)), args, on_progress=self._tell)
        load_router(folder)
        found = read_kept(file, "names", "confusion", *ROUTER_KEYS)
        self._tell(Progress("router", 1, 1, f"accuracy {found['accuracy']:.4f}"))
        confusion = {
            name: {other: n for other, n in zip(found["names"], row, strict=True) if n}
            for name, row in zip(found["names"], found["confusion"], strict=True)
        }
        return RouterRecord(**{key: found[key] for key in ROUTER_KEYS}, confusion=confusion)

    @contextmanager
    def _engine(self, *, single: bool = False) -> Iterator[Engine]:
        adapters = (
            {SINGLE: self.folder / SINGLE}
            if single
            else {t.name: self.folder / "adapters" / t.name for t in self.tasks}
        )
        router = None if single else self.folder / "router"
        base, tokenizer = self.shared.base, self.shared.tokenizer
        engine = load(base, tokenizer=tokenizer, adapters=adapters, router=router, policy=TopP(0.6))
        try:
            yield engine
        finally:
            engine.detach()

    def _answer(self, engine: Engine, methods: Sequence[Method]) -> None:
        """The methods' answers, and the teacher-forced ones of the main methods."""
        forced = MAIN if self.args.teacher_forced else ()
        self.evaluation.answer(engine, methods, self.folder, forced=forced, on_progress=self._tell)

    def _answer_serial(self, engine: Engine, n: int) -> None:
        """Answers prompts of `n` questions by all methods, those that fit the context."""
        step = f"serial-{n}"
        self._serial[step] = {}
        tasks = [task for task in self.tasks if self.kinds[task.name] == "mcq" and task.test]
        if len(tasks) < n:
            self._serial_skipped[step] = len(tasks)
            self._tell(Progress(step, 1, 1, f"skipped: of {n} tasks of choice there are {len(tasks)}"))
            return
        num_prompts = self.args.serial_prompts
        drawn = serial_prompts(tasks, n, num_prompts, seed=self.seed)
        args = self._serial_args(n)
        prompts = fitting(engine, drawn, args)
        if len(prompts) < len(drawn):
            self._serial_left_out[step] = len(drawn) - len(prompts)
        asked = {"num_prompts": num_prompts, "tasks": [task.name for task in tasks]}
        identity = {**identity_of(engine, self.tasks, METHODS["dlp"]), **asked}
        methods = serial_methods(engine.bank.names, prompts) if prompts else []
        for i, method in enumerate(methods):

            def tell(now: Progress, i: int = i) -> None:
                if now.done < now.total or i == len(methods) - 1:  # one step: it is done with its last method
                    self._tell(Progress(step, i * now.total + now.done, len(methods) * now.total))

            file = self.folder / step / f"{method.name}.jsonl"
            rows = answer_serial(engine, method, prompts, args, file, identity=identity, on_progress=tell)
            self._serial[step][method.name] = rows
        if not methods:
            self._tell(Progress(step, 1, 1))

    def _serial_args(self, n: int) -> AnswerArgs:
        """How prompts of `n` questions are answered."""
        return replace(self.args.answers, max_new_tokens=TOKENS_A_QUESTION * n, batch_size=SERIAL_BATCH_SIZE)

    def _conversation(self, engine: Engine) -> Conversation | None:
        """Fig. 3: questions of several tasks, answered in one go; None where the prompt does not fit the context."""
        rng = random.Random(f"conversation {self.seed}")
        tested = [task for task in self.tasks if task.test]
        tasks = [task for task in tested if self.kinds[task.name] == "mcq"] or tested
        n = min(3, len(tasks))
        args = self._serial_args(n)
        prompts = fitting(engine, serial_prompts(tasks, n, 1, seed=rng.randrange(10**6)), args)
        if not prompts:
            return None
        method = next(m for m in serial_methods(engine.bank.names, prompts) if m.name == "dlp")
        (answer,) = generate_serial(engine, method, prompts, args)
        found: Conversation = from_json(Conversation, {"prompt": prompts[0].text, **as_json(answer.to_dict())})
        return found

    def _about(self, task: Task) -> TaskRecord:
        info = described(task, self.shared.infos.get(task.name, TaskInfo()), self.kinds[task.name])
        return TaskRecord(
            paper_name=info.paper_name,
            kind=self.kinds[task.name],
            num_train=len(task.train),
            num_test=len(task.test),
            chance=info.chance,
            majority=info.majority,
            stand_in=info.stand_in,
        )
