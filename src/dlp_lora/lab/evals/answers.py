"""Free-running answers to test questions: an engine and a method in, one JSON line a question out.

Questions of all tasks are pooled, so a batch needs several adapters at once and nobody says which. What is answered is
on disk batch by batch: an interrupted run goes on where it was, in the very same batches.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.bank.adapter_files import content_hash
from dlp_lora.engine.engine import Engine
from dlp_lora.engine.prompts import context_of
from dlp_lora.engine.trace import Generation
from dlp_lora.errors import TaskError
from dlp_lora.files import hash_json
from dlp_lora.kept import keep_rows
from dlp_lora.lab.evals.likelihood import choice_likelihoods
from dlp_lora.lab.evals.methods import Key, Method
from dlp_lora.policy import Mixture
from dlp_lora.progress import OnProgress, unseen
from dlp_lora.router import router_hash
from dlp_lora.tasks.formats import as_prompt, encode_example
from dlp_lora.tasks.task import Example, PromptFormat, Task
from dlp_lora.training.base import dtype_of, model_hash


@dataclass(frozen=True, kw_only=True)
class AnswerArgs:
    """How questions are answered; the same for every method."""

    batch_size: int = 32
    max_new_tokens: int = 128  # and no more than the longest training answer of the task, rounded up to a power of two
    limit: int | None = None  # test questions a task
    prompt_format: PromptFormat = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # as adapters were trained with
    likelihoods: bool = True  # score the choices of multiple-choice questions as well

    def identity(self) -> dict[str, Any]:
        """The settings on which answers depend, as JSON data."""
        found = asdict(self)
        if not self.chat_template_kwargs:  # as answers of before have it
            del found["chat_template_kwargs"]
        return found

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AnswerArgs.{name} must be positive, got {getattr(self, name)}")
        if self.prompt_format not in get_args(PromptFormat):
            known = ", ".join(get_args(PromptFormat))
            raise ValueError(f"AnswerArgs.prompt_format must be one of {known}, got {self.prompt_format!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"AnswerArgs.limit must be at least 1, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A test example as tokens: `read` is the prompt, `choices` the options' own tokens."""

    task: str
    index: int
    example: Example
    read: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    num_tokens: int
    """The most that the model reads at once: the prompt with room for an answer, a choice or the gold answer."""

    @property
    def key(self) -> Key:
        """A key that identifies it."""
        return self.task, self.index


def batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], args: AnswerArgs
) -> tuple[list[list[Question]], dict[str, int]]:
    """Pools the tasks' test questions into batches of like lengths.

    Also counts questions that are left out: those that are too long, and those with an `answer_prefix`.

    Raises:
        TaskError: if no question is left.
    """
    if not any(task.test for task in tasks):
        raise TaskError("no task has a test question; add a test.jsonl to score one")
    context = context_of(model)
    questions: list[Question] = []
    left_out: dict[str, int] = {}
    for task in tasks:
        longest = max(len(encoded(tokenizer, e, args)[1]) for e in task.train or task.test)
        room = min(args.max_new_tokens, 2 ** (longest - 1).bit_length())
        for i, example in enumerate(task.test[: args.limit]):
            question = _question(tokenizer, task.name, i, example, room, args)
            if question.num_tokens > context or example.answer_prefix:
                left_out[task.name] = left_out.get(task.name, 0) + 1
            else:
                questions.append(question)
    if not questions:
        raise TaskError(
            "no test question fits the model's context; give other tasks (without answer_prefix) "
            "or a model of a longer context"
        )
    questions.sort(key=lambda q: (q.max_new_tokens, len(q.read), q.key))
    return _batched(questions, args.batch_size, context), left_out


def identity_of(engine: Engine, tasks: Sequence[Task], method: Method) -> dict[str, Any]:
    """The other settings on which answers depend; stored rows with others are not used."""
    found: dict[str, Any] = {
        "model": Path(engine.model.config._name_or_path).name,
        "model_hash": model_hash(engine.model),
        "dtype": dtype_of(engine.model),
        "adapters": {name: content_hash(adapter.path) for name, adapter in engine.bank.adapters.items()},
        "data": data_hash(tasks),
    }
    if method.mixture is None and engine.router is not None:
        with method.on(engine, ()):
            found["routing"] = {"router": router_hash(engine.router), **engine.settings.to_dict()}
    return found


def rounded(mixture: Mixture) -> Mixture:
    """The mixture as rows keep it: weights to four digits."""
    return Mixture({name: round(weight, 4) for name, weight in mixture.items()})


Known = dict[tuple[str, int, Mixture], Any]
"""The result for a question, by its task, its index there and the mixture (weights with four digits)."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to answer questions: how a batch is, and which column of its rows depends on the mixture alone.

    It is not computed again for another method. Stored rows with other settings are an error, or are replaced.
    """

    name: str
    answer: Callable[[Engine, Method, Sequence[Question], AnswerArgs, Known], list[dict[str, Any]]]
    column: str
    replaces: bool = False

    def known(self, rows: Sequence[Mapping[str, Any]]) -> Known:
        """The results that another method may use."""
        kept = [row for row in rows if self.column in row]
        return {(row["task"], row["index"], Mixture(row["mixture"])): row[self.column] for row in kept}


def answer_all(
    engine: Engine,
    method: Method,
    pooled: Sequence[Sequence[Question]],
    args: AnswerArgs,
    file: Path,
    *,
    identity: Mapping[str, Any],
    way: Way | None = None,
    known: Known | None = None,
    on_progress: OnProgress = unseen,
) -> list[dict[str, Any]]:
    """Answers the batches into `file`, or goes on with it; gives all answers, in the batches' order.

    Args:
        way: to answer; freely by default.
        known: results of other methods.

    Raises:
        RecordError: if the file was begun with other settings.
    """
    chosen = way or FREE
    return keep_rows(
        file,
        {"method": method.name, "identity": chosen.name, **identity, "args": args.identity()},
        pooled,
        lambda batch: chosen.answer(engine, method, batch, args, known or {}),
        replace=chosen.replaces,
        on_progress=on_progress,
    )


def seconds_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """How long the answers took, all together."""
    return round(sum(float(row["seconds"]) for row in rows), 1)


def cut_short(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many answers were cut off where their room ended, by task."""
    return dict(Counter(row["task"] for row in rows if not row["ended"]))


def data_hash(tasks: Sequence[Task]) -> str:
    """A hash of the tasks' names and examples."""
    content = [(t.name, [e.to_json() for e in t.train], [e.to_json() for e in t.test]) for t in tasks]
    return hash_json(content)


def _question(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    index: int,
    example: Example,
    room: int,
    args: AnswerArgs,
) -> Question:
    def tokens(answer: str) -> tuple[list[int], list[int]]:
        whole = Example(prompt=example.prompt, answer=answer, complete=False, tools=example.tools)
        return encoded(tokenizer, whole, args)

    choices = tuple(tuple(tokens(choice)[1]) for choice in example.choices or ())
    read = tuple(tokens(example.answer)[0])
    gold = sum(map(len, encoded(tokenizer, example, args)))
    return Question(
        task=task,
        index=index,
        example=example,
        read=read,
        choices=choices,
        max_new_tokens=room,
        num_tokens=max(gold, *(len(read) + n for n in (room, *map(len, choices)))),
    )


def encoded(tokenizer: PreTrainedTokenizerBase, example: Example, args: AnswerArgs) -> tuple[list[int], list[int]]:
    """Gives the tokens that are read, and those of the gold answer."""
    return encode_example(tokenizer, example, args.prompt_format, args.chat_template_kwargs)


def _batched(questions: Sequence[Question], size: int, context: int) -> list[list[Question]]:
    """Cuts the questions into batches of `size`, and where the longest prompt leaves no room for the longest answer."""
    found: list[list[Question]] = []
    for question in questions:
        batch = [*found[-1], question] if found else []
        if 0 < len(batch) <= size and max(len(q.read) for q in batch) + max(q.max_new_tokens for q in batch) <= context:
            found[-1].append(question)
        else:
            found.append([question])
    return found


def _answer(
    engine: Engine,
    method: Method,
    batch: Sequence[Question],
    args: AnswerArgs,
    known: Known,
) -> list[dict[str, Any]]:
    start = time.perf_counter()
    answers: list[Generation] = []
    for room, own in groupby(batch, key=lambda q: q.max_new_tokens):  # no answer may depend on others' room
        asked = list(own)
        prompts: list[Any] = [
            as_prompt(
                engine.tokenizer,
                q.example.prompt,
                args.prompt_format,
                tools=q.example.tools,
                chat_template_kwargs=args.chat_template_kwargs,
            )
            for q in asked
        ]
        with method.on(engine, [q.key for q in asked]):
            # Choices are read after a prompt under one mixture: encoded by sentences, or cut into its questions, it
            # would be another method's.
            by_sentence = method.mixture is None and engine.settings.prompt_routing == "sentences"
            is_scored = args.likelihoods and not by_sentence
            answers += engine.generate(prompts, max_new_tokens=room, do_sample=False)
    seconds = (time.perf_counter() - start) / len(batch)
    rows = []
    for question, answer in zip(batch, answers, strict=True):
        mixture = answer.trace[0].mixture
        row: dict[str, Any] = {
            "task": question.task,
            "index": question.index,
            "text": answer.text,
            "num_tokens": len(answer.tokens),
            "ended": all(part.tokens[-1] in engine.eos_ids for part in answer.parts or (answer,)),
            "mixture": dict(rounded(mixture)),
            "num_switches": sum(sentence.switched for sentence in answer.trace[1:]),
            "seconds": round(seconds, 4),
        }
        if is_scored and question.choices and not answer.parts:
            likelihoods = known.get((*question.key, rounded(mixture)))
            if likelihoods is None:
                likelihoods = choice_likelihoods(engine, question.read, question.choices, mixture)
            row["likelihoods"] = likelihoods
        rows.append(row)
    return rows


FREE = Way(name="answers", answer=_answer, column="likelihoods")
"""Generated freely, and scored whole."""
