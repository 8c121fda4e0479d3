"""One pass through all steps with one training seed: adapters, router, answers, each kept on disk."""

import json
import random
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.engine import Engine
from dlp_lora.environment import environment
from dlp_lora.evals.answers import Question, answer_all, batches, data_hash, identity_of, read_answers, seconds_of
from dlp_lora.evals.likelihood import teacher_forced
from dlp_lora.evals.methods import METHODS, SINGLE, Method
from dlp_lora.evals.record import compared, serial_scores
from dlp_lora.evals.scores import Table, scores, tabulate
from dlp_lora.evals.serial import answer_serial, serial_methods, serial_prompts
from dlp_lora.folders import write_text
from dlp_lora.loading import load
from dlp_lora.policy import Mixture, TopP
from dlp_lora.reproduce.args import Event, ReproduceArgs, methods_of
from dlp_lora.router import MiniMLP
from dlp_lora.tasks import Task
from dlp_lora.tasks.formats import as_prompt, encode_example
from dlp_lora.tasks.manifest import TaskInfo, kind_of
from dlp_lora.training.adapters import AdapterTrainingArgs, Progress, train_adapter
from dlp_lora.training.router import load_tokenizer, train_router


class Seed:
    """One pass through all steps with one training seed."""

    def __init__(
        self,
        model: str | Path,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        infos: dict[str, TaskInfo],
        folder: Path,
        seed: int,
        args: ReproduceArgs,
        on_event: Callable[[Event], None],
    ) -> None:
        self.model, self.base, self.tokenizer = model, base, tokenizer
        self.tasks, self.infos, self.folder, self.seed, self.args = list(tasks), infos, folder, seed, args
        self.by_name = {task.name: task for task in tasks}
        self.kinds = {task.name: kind_of(task, infos) for task in tasks}
        self._on_event = on_event

    def run(self) -> dict[str, Any]:
        """Does what is left to do and gives the seed's part of the record."""
        training = {task.name: self._adapter(task, self.args.training, self.folder / "adapters") for task in self.tasks}
        single = None
        if self.args.single_r:
            pool = Task(name=SINGLE, train=tuple(e for task in self.tasks for e in task.train), test=())
            # The same lora_alpha: a step of Adam then changes the model about as much at any rank (LoRA, section 4.1).
            single = self._adapter(pool, replace(self.args.training, r=self.args.single_r), self.folder)
        router = self._router()
        tables: dict[str, Table] = {}
        timings: dict[str, float] = {}
        left_out: dict[str, int] = {}
        forced: dict[str, Any] = {}
        with self._engine() as engine:
            engine.save_pretrained(self.folder / "bundle")
            questions, left_out = batches(engine, self.tasks, self.args.answers)
            for method in methods_of(self.args):
                if not method.adapter:
                    tables[method.name], timings[method.name] = self._answers(engine, method, questions)
            if self.args.teacher_forced:
                forced = self._teacher_forced(engine, questions)
            serial = {f"serial-{n}": self._serial(engine, n) for n in self.args.serial}
            conversation = self._conversation(engine)
        if single is not None and SINGLE in self.args.methods:
            with self._engine(single=True) as engine:
                tables[SINGLE], timings[SINGLE] = self._answers(engine, METHODS[SINGLE], questions)
        return {
            "environment": environment(),
            "data": {"hash": data_hash(self.tasks), "tasks": {t.name: self._about(t) for t in self.tasks}},
            "left_out": left_out,
            **compared(tables, self.kinds),
            "teacher_forced": forced,
            "serial": serial,
            "router": router,
            "training": {"adapters": training, SINGLE: single},
            "timings": timings,
            "peak_memory_mb": _peak_memory_mb(),
            "conversation": conversation,
            "outputs": "outputs.jsonl.gz",
        }

    def outputs(self) -> Iterator[dict[str, Any]]:
        """Every answer, for audits without a model."""
        for file in sorted((self.folder / "answers").glob("*.jsonl")):
            for row in read_answers(file):
                yield {"seed": self.seed, "method": file.stem, **row}

    def _event(self, step: str, done: int, total: int, note: str = "") -> None:
        self._on_event(Event(seed=self.seed, step=step, done=done, total=total, note=note))

    def _adapter(self, task: Task, args: AdapterTrainingArgs, folder: Path) -> dict[str, Any]:
        def on_step(now: Progress) -> None:
            self._event(task.name, now.step, now.num_steps, f"loss {now.loss:.3f}")

        args = replace(args, seed=self.seed)
        trained = train_adapter(self.base, self.tokenizer, task, folder / task.name, args, on_step=on_step)
        self._event(task.name, 1, 1, f"loss {trained.final_loss:.3f}")
        return {
            "seconds": trained.seconds,
            "final_loss": trained.final_loss,
            "num_examples": trained.num_examples,
            "num_left_out": trained.num_left_out,
        }

    def _router(self) -> dict[str, Any]:
        folder = self.folder / "router"
        file = folder / "report.json"
        if not file.is_file():
            args = replace(self.args.router, seed=self.seed)
            router, report = train_router(
                self.tasks,
                load_tokenizer(str(self.model)),
                args,
                on_step=lambda step, total, loss: self._event("router", step, total, f"loss {loss:.3f}"),
            )
            router.save_pretrained(folder)
            write_text(file, json.dumps(report.to_dict(), indent=1) + "\n")
        MiniMLP.from_pretrained(folder)
        found: dict[str, Any] = json.loads(file.read_text())
        self._event("router", 1, 1, f"accuracy {found['accuracy']:.4f}")
        confusion = {
            name: {other: n for other, n in zip(found["names"], row, strict=True) if n}
            for name, row in zip(found["names"], found["confusion"], strict=True)
        }
        keys = ("accuracy", "ece", "num_parameters", "seconds", "temperature")
        return {**{key: found[key] for key in keys}, "confusion": confusion}

    @contextmanager
    def _engine(self, *, single: bool = False) -> Iterator[Engine]:
        adapters = (
            {SINGLE: self.folder / SINGLE}
            if single
            else {t.name: self.folder / "adapters" / t.name for t in self.tasks}
        )
        router = None if single else self.folder / "router"
        engine = load(self.base, tokenizer=self.tokenizer, adapters=adapters, router=router, policy=TopP(0.6))
        try:
            yield engine
        finally:
            engine.detach()

    def _answers(self, engine: Engine, method: Method, questions: Sequence[Sequence[Question]]) -> tuple[Table, float]:
        step = f"answers: {method.name}"
        rows = answer_all(
            engine,
            method,
            questions,
            self.args.answers,
            self.folder / "answers" / f"{method.name}.jsonl",
            identity=identity_of(engine, self.tasks, method),
            known=self._known(engine),
            on_batch=lambda done, total: self._event(step, done, total),
        )
        return tabulate(rows, self.by_name, self.kinds), seconds_of(rows)

    def _known(self, engine: Engine) -> dict[tuple[str, int, Mixture], list[float]]:
        if SINGLE in engine.bank.names:
            return {}
        return {
            (row["task"], row["index"], Mixture(row["mixture"])): row["likelihoods"]
            for file in (self.folder / "answers").glob("*.jsonl")
            if file.stem != SINGLE
            for row in read_answers(file)
            if "likelihoods" in row
        }

    def _teacher_forced(self, engine: Engine, questions: Sequence[Sequence[Question]]) -> dict[str, Any]:
        """The paper's measure: the likeliest tokens along the gold answer, scored as if they were an answer."""
        file = self.folder / "teacher_forced.json"
        identity = identity_of(engine, self.tasks, METHODS["dlp"])
        if file.is_file() and (kept := json.loads(file.read_text()))["identity"] == identity:
            self._event("teacher-forced", 1, 1)
            return dict(kept["scores"])
        names = [name for name in ("base", "oracle", "dlp") if name in self.args.methods]
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        flat = [question for batch in questions for question in batch]
        for i, question in enumerate(flat):
            self._event("teacher-forced", i, len(flat))
            read, learned = encode_example(self.tokenizer, question.example, self.args.answers.prompt_format)
            texts: dict[Mixture, str] = {}
            for name in names:
                mixture = self._prompt_mixture(engine, name, question)
                if mixture not in texts:
                    tokens = teacher_forced(engine, read, learned, mixture)
                    texts[mixture] = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
                rows[name].append({"task": question.task, "index": question.index, "text": texts[mixture]})
        found = {name: scores(tabulate(own, self.by_name, self.kinds)) for name, own in rows.items()}
        write_text(file, json.dumps({"identity": identity, "scores": found}, indent=1) + "\n")
        self._event("teacher-forced", 1, 1)
        return found

    def _prompt_mixture(self, engine: Engine, name: str, question: Question) -> Mixture:
        method = METHODS[name]
        if method.mixture is not None:
            return method.mixture(question.key, engine.bank.names)
        return engine.route(question.example.prompt)[1]

    def _serial(self, engine: Engine, n: int) -> dict[str, Any]:
        step, file = f"serial-{n}", self.folder / f"serial-{n}.json"
        tasks = [task for task in self.tasks if self.kinds[task.name] == "mcq"]
        if len(tasks) < n:
            return {}
        identity = {**identity_of(engine, self.tasks, METHODS["dlp"]), "num_prompts": self.args.serial_prompts}
        kept = json.loads(file.read_text()) if file.is_file() else {}
        found: dict[str, Any] = kept["methods"] if kept.get("identity") == identity else {}
        prompts = serial_prompts(tasks, n, self.args.serial_prompts, seed=self.seed)
        methods = serial_methods(engine.bank.names, prompts)
        for i, method in enumerate(methods):
            if method.name in found:
                continue

            def on_batch(done: int, total: int, i: int = i) -> None:
                self._event(step, i * total + done, len(methods) * total)

            rows = answer_serial(
                engine,
                method,
                prompts,
                max_new_tokens=24 * n,
                prompt_format=self.args.answers.prompt_format,
                on_batch=on_batch,
            )
            found[method.name] = {"rows": rows}
            write_text(file, json.dumps({"identity": identity, "methods": found}, ensure_ascii=False) + "\n")
        self._event(step, 1, 1)
        return {name: serial_scores(own["rows"], n) for name, own in found.items()}

    def _conversation(self, engine: Engine) -> dict[str, Any]:
        """Fig. 3: questions of several tasks, answered in one go."""
        rng = random.Random(f"conversation {self.seed}")
        tasks = [task for task in self.tasks if self.kinds[task.name] == "mcq"] or self.tasks
        prompt = serial_prompts(tasks, min(3, len(tasks)), 1, seed=rng.randrange(10**6))[0]
        asked: Any = as_prompt(self.tokenizer, prompt.text, self.args.answers.prompt_format)
        method = next(m for m in serial_methods(engine.bank.names, [prompt]) if m.name == "dlp")
        with engine.using(**method.settings):
            answer = engine.generate(asked, max_new_tokens=96, do_sample=False)
        return {"prompt": prompt.text, **json.loads(json.dumps(answer.to_dict(), default=dict))}

    def _about(self, task: Task) -> dict[str, Any]:
        info = self.infos.get(task.name, TaskInfo())
        return {
            "paper_name": info.paper_name,
            "kind": self.kinds[task.name],
            "num_train": len(task.train),
            "num_test": len(task.test),
            "chance": info.chance,
            "majority": info.majority,
            "stand_in": info.stand_in,
        }


def _peak_memory_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)
