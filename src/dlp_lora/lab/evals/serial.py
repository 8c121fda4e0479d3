"""serial-n (MeteoRA's setting): n questions of different tasks in one prompt, answered in order, one line each.

An adapter that learned single questions ends the text after its answer. So the end of an answer is written as a line
break until n lines are there: one rule for all methods, inside one free-running `generate`. A line is a sentence, so
that is where the router is asked again. Questions that are answered apart, or asked alone, end as single ones do.
"""

import math
import random
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from dlp_lora.engine.apart import joined
from dlp_lora.engine.engine import Engine
from dlp_lora.engine.prompts import context_of
from dlp_lora.engine.trace import Generation
from dlp_lora.errors import TaskError
from dlp_lora.kept import keep_rows
from dlp_lora.lab.evals.answers import AnswerArgs, encoded
from dlp_lora.lab.evals.metrics import exact_match
from dlp_lora.policy import Mixture, Switching
from dlp_lora.progress import OnProgress, unseen
from dlp_lora.router import Context
from dlp_lora.sentences import LineSegmenter
from dlp_lora.tasks.formats import as_prompt
from dlp_lora.tasks.task import Example, Task, same_prompt

SEPARATOR = "\n\n"


@dataclass(frozen=True, kw_only=True)
class SerialPrompt:
    """Questions of different tasks asked at once."""

    tasks: tuple[str, ...]
    examples: tuple[Example, ...]

    @property
    def text(self) -> str:
        """The prompt."""
        return SEPARATOR.join(example.prompt for example in self.examples)


@dataclass(frozen=True, kw_only=True)
class SerialMethod:
    """A way to answer a serial prompt: settings of the engine, or one fixed mixture; or each question asked alone."""

    name: str
    settings: dict[str, Any]
    mixture: Mixture | None = None
    is_alone: bool = False


def serial_prompts(tasks: Sequence[Task], n: int, num_prompts: int, *, seed: int = 0) -> list[SerialPrompt]:
    """Draws prompts of `n` test questions, each of another task.

    Raises:
        TaskError: with fewer than `n` tasks that have any.
    """
    tasks = [task for task in tasks if task.test]
    if len(tasks) < n:
        raise TaskError(f"serial-{n} asks questions of {n} tasks, but there are {len(tasks)}")
    rng = random.Random(f"serial {n} {seed}")
    drawn = [rng.sample(list(tasks), n) for _ in range(num_prompts)]
    return [
        SerialPrompt(tasks=tuple(t.name for t in some), examples=tuple(rng.choice(t.test) for t in some))
        for some in drawn
    ]


def fitting(engine: Engine, prompts: Sequence[SerialPrompt], args: AnswerArgs) -> list[SerialPrompt]:
    """The prompts that leave room for the answers in the model's context."""

    def num_tokens(prompt: SerialPrompt) -> int:
        example = Example(prompt=prompt.text, answer=prompt.examples[0].answer)
        return len(encoded(engine.tokenizer, example, args)[0])

    return [prompt for prompt in prompts if num_tokens(prompt) + args.max_new_tokens <= context_of(engine.model)]


def serial_methods(names: Sequence[str], prompts: Sequence[SerialPrompt]) -> list[SerialMethod]:
    """The methods: base, each question's adapter by its label, and routed ones that differ in the router's input.

    `dlp` cuts the prompt into its questions, `apart` answers each in a separate context, `whole` reads it as one text,
    `prompt-only` never switches. `alone` asks each question by itself: the goal of the others.
    """
    switching = Switching(min_tokens=1, margin=0.0)
    lines = {"segmenter": LineSegmenter, "switching": switching, "prompt_routing": "questions"}
    told = _Told(names, prompts)
    return [
        SerialMethod(name="base", settings={}, mixture=Mixture()),
        SerialMethod(name="oracle", settings={**lines, "router": told, "kv_policy": "keep"}),
        SerialMethod(name="dlp", settings={**lines, "kv_policy": "keep"}),
        SerialMethod(name="recompute", settings={**lines, "kv_policy": "recompute"}),
        SerialMethod(name="apart", settings={**lines, "prompt_routing": "apart", "kv_policy": "recompute"}),
        SerialMethod(name="alone", settings={**lines, "kv_policy": "recompute"}, is_alone=True),
        SerialMethod(name="whole", settings={**lines, "prompt_routing": "whole", "kv_policy": "keep"}),
        SerialMethod(name="by-sentence", settings={**lines, "prompt_routing": "sentences"}),
        SerialMethod(name="prompt-only", settings={**lines, "switching": Switching(min_tokens=10**9)}),
    ]


def answer_serial(
    engine: Engine,
    method: SerialMethod,
    prompts: Sequence[SerialPrompt],
    args: AnswerArgs,
    file: Path,
    *,
    identity: Mapping[str, Any],
    on_progress: OnProgress = unseen,
) -> list[dict[str, Any]]:
    """Answers serial prompts into `file`, or goes on with it.

    For each question: the line that was given, whether it is right, which adapter led. `seconds` is each question's
    share of its batch, and `is_cut` says whether its prompt was answered apart.

    Raises:
        RecordError: if the file was begun under another `identity`.
    """

    def answered(batch: Sequence[SerialPrompt]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        answers = generate_serial(engine, method, batch, args)
        seconds = (time.perf_counter() - start) / sum(len(prompt.tasks) for prompt in batch)
        return [{"answers": _scored(*pair, seconds)} for pair in zip(batch, answers, strict=True)]

    size = args.batch_size
    kept = keep_rows(
        file,
        {"method": method.name, **identity, "args": args.identity()},
        [prompts[first : first + size] for first in range(0, len(prompts), size)],
        answered,
        on_progress=on_progress,
    )
    return [row for prompt in kept for row in prompt["answers"]]


def generate_serial(
    engine: Engine, method: SerialMethod, prompts: Sequence[SerialPrompt], args: AnswerArgs
) -> list[Generation]:
    """Answers one batch of serial prompts, of as many questions each."""
    n = len(prompts[0].tasks)
    each: dict[str, Any] = {"max_new_tokens": math.ceil(args.max_new_tokens / n), "do_sample": False}

    def ask(texts: Iterable[str], **settings: Any) -> list[Generation]:
        asked: list[Any] = [
            as_prompt(engine.tokenizer, text, args.prompt_format, chat_template_kwargs=args.chat_template_kwargs)
            for text in texts
        ]
        answers: list[Generation] = engine.generate(asked, **settings)
        return answers

    def ask_in_turn(some: Sequence[SerialPrompt]) -> list[Generation]:
        breaks = LogitsProcessorList([LineBreaks(engine.tokenizer, engine.eos_ids, n)])
        texts = [prompt.text for prompt in some]
        room = args.max_new_tokens
        return ask(texts, max_new_tokens=room, do_sample=False, logits_processor=breaks) if texts else []

    chosen = engine.fixed(method.mixture) if method.mixture is not None else engine.using(**method.settings)
    with chosen:
        if method.is_alone:
            answers = iter(ask((example.prompt for prompt in prompts for example in prompt.examples), **each))
            return [joined(list(islice(answers, n))) for _ in prompts]
        if engine.settings.prompt_routing != "apart":
            return ask_in_turn(prompts)
        apart = ask((prompt.text for prompt in prompts), **each)
        whole = [prompt for prompt, answer in zip(prompts, apart, strict=True) if not answer.parts]
        with engine.using(prompt_routing="questions"):
            answers = iter(ask_in_turn(whole))
        return [answer if answer.parts else next(answers) for answer in apart]


class LineBreaks(LogitsProcessor):
    """Replaces the end of an answer by a line break until there are `n` answers, and ends the text after the last."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int], n: int) -> None:
        self._eos = sorted(eos_ids)
        self._newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        self._blank, self._breaking = _line_breaks(tokenizer)
        self._n = n
        self._width: int | None = None  # of the prompt

    def __call__(
        self, input_ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        self._width = self._width or input_ids.shape[1]
        written = input_ids[:, self._width :]
        ends = [*self._eos, *self._blank]
        stop = scores[:, ends].max(dim=1).values
        is_break = torch.isin(written, torch.tensor(self._breaking, device=written.device))
        is_blank = is_break[:, -1] if written.shape[1] else torch.ones_like(stop, dtype=torch.bool)
        stop[is_blank] = float("-inf")  # an empty line is no answer
        is_last = is_break.sum(dim=1) >= self._n - 1
        target = torch.where(is_last, self._eos[0], self._newline)
        scores = scores.clone()
        scores[:, ends] = float("-inf")
        return scores.scatter(1, target[:, None], stop[:, None])


@cache
def _line_breaks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that are nothing but line breaks and spaces, and all that end a line."""
    texts = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
    breaking = [i for i, text in enumerate(texts) if text.rstrip(" \t").endswith("\n")]
    return [i for i in breaking if not texts[i].strip()], breaking


class _Told:
    """A router that knows the tasks: it counts the written lines."""

    def __init__(self, names: Sequence[str], prompts: Sequence[SerialPrompt]) -> None:
        self.names = tuple(names)
        self._tasks = {_as_read(prompt.text): prompt.tasks for prompt in prompts}

    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]:
        found = torch.zeros(len(contexts), len(self.names))
        for i, context in enumerate(contexts):
            tasks = self._tasks[_as_read(context.prompt)]
            num_answered = sum(line.strip() != "" for line in context.answer.split("\n")[:-1])
            found[i, self.names.index(tasks[min(num_answered, len(tasks) - 1)])] = 1.0
        return found

    def save_pretrained(self, path: str | Path) -> None:
        raise ValueError("a router that knows the answers cannot be saved")


def _as_read(text: str) -> str:
    """The form in which a prompt and its decoded tokens are compared: some tokenizers normalise letters and spaces."""
    return same_prompt(unicodedata.normalize("NFKC", text))


def _scored(prompt: SerialPrompt, answer: Generation, seconds: float) -> list[dict[str, Any]]:
    is_cut = bool(answer.parts)
    if len(answer.parts) == len(prompt.tasks):
        lines = [part.text.strip() for part in answer.parts]
        led_by = [next(iter(part.trace[0].mixture), None) for part in answer.parts]
    else:
        lines = [line.strip() for line in answer.text.split("\n") if line.strip()]
        led_by = [next(iter(sentence.mixture), None) for sentence in answer.trace]
    return [
        {
            "task": task,
            "position": i,
            "text": lines[i] if i < len(lines) else "",
            "right": i < len(lines) and exact_match(lines[i], example.accepted),
            "routed": i < len(led_by) and led_by[i] == task,
            "is_cut": is_cut,
            "seconds": round(seconds, 4),
        }
        for i, (task, example) in enumerate(zip(prompt.tasks, prompt.examples, strict=True))
    ]
