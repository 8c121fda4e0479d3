"""Teacher-forced answers, the paper's measure: an engine and a method in, one JSON line a question out.

The likeliest token at each place of the gold answer, with the gold tokens before it given, taken for an answer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlp_lora.engine.engine import Engine
from dlp_lora.kept import keep_rows
from dlp_lora.lab.evals.answers import AnswerArgs, Question, encoded, rounded
from dlp_lora.lab.evals.likelihood import teacher_forced
from dlp_lora.lab.evals.methods import Method
from dlp_lora.policy import Mixture
from dlp_lora.progress import OnProgress, unseen

Known = dict[tuple[str, int, Mixture], str]
"""Texts by task, place in it, and mixture, its weights to four digits."""


def answer_forced(
    engine: Engine,
    method: Method,
    pooled: Sequence[Sequence[Question]],
    args: AnswerArgs,
    file: Path,
    *,
    identity: Mapping[str, Any],
    known: Known | None = None,
    on_progress: OnProgress = unseen,
) -> list[dict[str, Any]]:
    """Answers the batches into `file`, or goes on with it; what was kept under other settings is replaced.

    The method's mixture at the prompt holds for the whole answer. `known` has texts that were found for other methods:
    the same mixture gives the same ones.
    """

    def answer(batch: Sequence[Question]) -> list[dict[str, Any]]:
        rows = []
        for question in batch:
            mixture = _mixture(engine, method, question)
            text = (known or {}).get((*question.key, rounded(mixture)))
            if text is None:
                read, learned = encoded(engine.tokenizer, question.example, args)
                tokens = teacher_forced(engine, read, learned, mixture)
                text = str(engine.tokenizer.decode(tokens, skip_special_tokens=True))
            rows.append(
                {"task": question.task, "index": question.index, "text": text, "mixture": dict(rounded(mixture))}
            )
        return rows

    data = {"method": method.name, "identity": "teacher-forced", **identity, "args": args.identity()}
    return keep_rows(file, data, pooled, answer, replace=True, on_progress=on_progress)


def known_texts(rows: Sequence[Mapping[str, Any]]) -> Known:
    """The texts of a method, for another one."""
    return {(row["task"], row["index"], Mixture(row["mixture"])): row["text"] for row in rows}


def _mixture(engine: Engine, method: Method, question: Question) -> Mixture:
    if method.mixture is not None:
        return method.mixture(question.key, engine.bank.names)
    with method.on(engine, [question.key]):
        return engine.route(question.example.prompt)[1]
