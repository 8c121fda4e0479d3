"""Teacher-forced answers, the paper's measure: an engine and a method in, one JSON line a question out.

The likeliest token at each place of the gold answer, with the gold tokens before it given, taken for an answer.
"""

from collections.abc import Sequence
from typing import Any

from dlp_lora.engine.engine import Engine
from dlp_lora.lab.evals.answers import AnswerArgs, Known, Question, Way, encoded, rounded
from dlp_lora.lab.evals.likelihood import teacher_forced
from dlp_lora.lab.evals.methods import Method
from dlp_lora.policy import Mixture


def _answer(
    engine: Engine, method: Method, batch: Sequence[Question], args: AnswerArgs, known: Known
) -> list[dict[str, Any]]:
    """Answers a batch; a method's mixture at the prompt holds for the whole answer."""
    rows = []
    for question in batch:
        mixture = _mixture(engine, method, question)
        text = known.get((*question.key, rounded(mixture)))
        if text is None:
            read, learned = encoded(engine.tokenizer, question.example, args)
            tokens = teacher_forced(engine, read, learned, mixture)
            text = str(engine.tokenizer.decode(tokens, skip_special_tokens=True))
        rows.append({"task": question.task, "index": question.index, "text": text, "mixture": dict(rounded(mixture))})
    return rows


def _mixture(engine: Engine, method: Method, question: Question) -> Mixture:
    if method.mixture is not None:
        return method.mixture(question.key, engine.bank.names)
    with method.on(engine, [question.key]):
        return engine.route(question.example.prompt)[1]


FORCED = Way(name="teacher-forced", answer=_answer, column="text", replaces=True)
"""Along the gold answers."""
