"""Free-running answers to test questions: an engine and a method in, one JSON line a question out.

Questions of all tasks are pooled, so a batch needs several adapters at once and nobody says which. What is answered is
on disk batch by batch: an interrupted run goes on where it was, in the very same batches.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlp_lora.engine import Engine
from dlp_lora.errors import RecordError, TaskError
from dlp_lora.evals.likelihood import choice_likelihoods
from dlp_lora.evals.methods import Key, Method
from dlp_lora.peft_format import content_hash
from dlp_lora.policy import Mixture
from dlp_lora.router import router_hash
from dlp_lora.tasks.formats import PromptFormat, as_prompt, encode_example
from dlp_lora.tasks.task import Example, Task


@dataclass(frozen=True, kw_only=True)
class AnswerArgs:
    """How questions are answered; the same for every method."""

    batch_size: int = 32
    max_new_tokens: int = 128  # and no more than the longest training answer of the task, rounded up to a power of two
    limit: int | None = None  # test questions a task
    prompt_format: PromptFormat = "auto"
    likelihoods: bool = True  # score the choices of multiple-choice questions as well

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AnswerArgs.{name} must be positive, got {getattr(self, name)}")
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

    @property
    def key(self) -> Key:
        """What tells it from all others."""
        return self.task, self.index


def batches(engine: Engine, tasks: Sequence[Task], args: AnswerArgs) -> tuple[list[list[Question]], dict[str, int]]:
    """Pools the tasks' test questions into batches of like lengths; also counts what does not fit the context.

    Raises:
        TaskError: if no question is left.
    """
    context = getattr(engine.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    questions: list[Question] = []
    left_out: dict[str, int] = {}
    for task in tasks:
        longest = max(len(encode_example(engine.tokenizer, e, args.prompt_format)[1]) for e in task.train or task.test)
        room = min(args.max_new_tokens, 2 ** (longest - 1).bit_length())
        for i, example in enumerate(task.test[: args.limit]):
            question = _question(engine, task.name, i, example, room, args.prompt_format)
            if len(question.read) + room > context:
                left_out[task.name] = left_out.get(task.name, 0) + 1
            else:
                questions.append(question)
    if not questions:
        raise TaskError("no test question fits the model's context; give other tasks or a model of a longer context")
    questions.sort(key=lambda q: (q.max_new_tokens, len(q.read), q.key))
    size = args.batch_size
    return [questions[i : i + size] for i in range(0, len(questions), size)], left_out


def identity_of(engine: Engine, tasks: Sequence[Task], method: Method) -> dict[str, Any]:
    """What answers depend on beside their arguments; what was kept under another is not used."""
    found: dict[str, Any] = {
        "model": Path(engine.model.config._name_or_path).name,
        "adapters": {name: content_hash(adapter.path) for name, adapter in engine.bank.adapters.items()},
        "data": data_hash(tasks),
    }
    if method.mixture is None and engine.router is not None:
        with method.on(engine, ()):
            found["routing"] = {"router": router_hash(engine.router), **engine.routing_settings()}
    return found


def answer_all(
    engine: Engine,
    method: Method,
    pooled: Sequence[Sequence[Question]],
    args: AnswerArgs,
    file: Path,
    *,
    identity: Mapping[str, Any],
    known: Mapping[tuple[str, int, Mixture], list[float]] | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Answers the batches into `file`, or goes on with it; gives all answers, in the batches' order.

    `known` holds likelihoods of choices that were computed for another method: the same mixture gives the same ones.

    Raises:
        RecordError: if the file was begun with other settings.
    """
    data = json.loads(json.dumps({"method": method.name, "identity": "answers", **identity, "args": asdict(args)}))
    rows = _resume(file, data, pooled)
    num_done = len(rows)
    done = 0
    for batch in pooled:
        done += len(batch)
        if done <= num_done:
            continue
        on_batch(done - len(batch), sum(map(len, pooled)))
        found = _answer(engine, method, batch, args, known or {})
        with file.open("a", encoding="utf-8") as lines:
            lines.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
        rows += found
    on_batch(done, done)
    return rows


def read_answers(file: Path) -> list[dict[str, Any]]:
    """Reads the answers that a file holds, a torn last line left out."""
    return [row for row in _lines(file) if "identity" not in row] if file.is_file() else []


def differences(before: Any, now: Any, key: str = "") -> str:
    """Says in which settings two records of them differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = (differences(before.get(k), now.get(k), f"{key}.{k}".lstrip(".")) for k in {**before, **now})
        return "; ".join(filter(None, found))
    return "" if before == now else f"{key} was {before!r} and is {now!r}"


def seconds_of(rows: Sequence[Mapping[str, Any]]) -> float:
    """How long the answers took, all together."""
    return round(sum(float(row["seconds"]) for row in rows), 1)


def data_hash(tasks: Sequence[Task]) -> str:
    """A hash of the tasks' names and examples."""
    content = [(t.name, [e.to_json() for e in t.train], [e.to_json() for e in t.test]) for t in tasks]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _question(
    engine: Engine, task: str, index: int, example: Example, room: int, prompt_format: PromptFormat
) -> Question:
    def tokens(answer: str) -> tuple[list[int], list[int]]:
        whole = Example(prompt=example.prompt, answer=answer, complete=False)
        return encode_example(engine.tokenizer, whole, prompt_format)

    choices = tuple(tuple(tokens(choice)[1]) for choice in example.choices or ())
    read = tuple(tokens(example.answer)[0])
    return Question(task=task, index=index, example=example, read=read, choices=choices, max_new_tokens=room)


def _answer(
    engine: Engine,
    method: Method,
    batch: Sequence[Question],
    args: AnswerArgs,
    known: Mapping[tuple[str, int, Mixture], list[float]],
) -> list[dict[str, Any]]:
    prompts: list[Any] = [as_prompt(engine.tokenizer, q.example.prompt, args.prompt_format) for q in batch]
    start = time.perf_counter()
    with method.on(engine, [q.key for q in batch]):
        room = max(q.max_new_tokens for q in batch)
        answers = engine.generate(prompts, max_new_tokens=room, do_sample=False)
    seconds = (time.perf_counter() - start) / len(batch)
    rows = []
    for question, answer in zip(batch, answers, strict=True):
        mixture = answer.trace[0].mixture
        row: dict[str, Any] = {
            "task": question.task,
            "index": question.index,
            "text": answer.text,
            "num_tokens": len(answer.tokens),
            "mixture": {name: round(weight, 4) for name, weight in mixture.items()},
            "num_switches": sum(sentence.switched for sentence in answer.trace[1:]),
            "seconds": round(seconds, 4),
        }
        if args.likelihoods and question.choices:
            likelihoods = known.get((*question.key, mixture))
            if likelihoods is None:
                likelihoods = choice_likelihoods(engine, question.read, question.choices, mixture)
            row["likelihoods"] = likelihoods
        rows.append(row)
    return rows


def _resume(file: Path, identity: dict[str, Any], pooled: Sequence[Sequence[Question]]) -> list[dict[str, Any]]:
    """Reads whole batches of an earlier run and cuts off what follows them."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
    lines = list(_lines(file)) if file.is_file() else []
    rows: list[dict[str, Any]] = []
    if lines:
        if lines[0].get("identity") != identity:
            raise RecordError(
                f"{file} holds answers under other settings: {differences(lines[0].get('identity') or {}, identity)}; "
                f"remove it, or write somewhere else"
            )
        rows = lines[1:]
    whole = 0
    for batch in pooled:
        if whole + len(batch) > len(rows):
            break
        whole += len(batch)
    rows = rows[:whole]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [{"identity": identity}, *rows])
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
    return rows


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:  # splitlines() would cut at U+2028, too
        try:
            yield json.loads(line)
        except ValueError:
            return  # a line that a kill cut short
