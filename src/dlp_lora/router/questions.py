"""Prompts that ask several questions: a prompt in, its questions out, and the question of each line of the answer.

As a whole, such a prompt fits no adapter, although each of its questions fits one. So a prompt is cut if each part fits
an adapter better than the whole does. Each answer is assumed to be one line, in order (serial-n of MeteoRA, arXiv
2405.13053).

A prompt may also ask one question among instructions ("You are helpful. ... Think step by step."), in any language. The
router then reads it without a few sentences at either end.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from dlp_lora.policy import Mixture, RoutingSettings, choose
from dlp_lora.router.context import CHARS_BEFORE, Context, Router
from dlp_lora.sentences import split

Read = Callable[[Sequence[Context]], Sequence[Mapping[str, float]]]
"""A router: for each context, the probability of each adapter by name; the rest to 1 is that none fits."""

SURE = 0.99  # how well a prompt fits to be one question without a look at its parts
FITS_ALONE = 0.8  # how well each question fits an adapter to be answered without the others
SURELY_SEVERAL = 0.87  # how well each question fits an adapter if none of them can be an instruction
MAX_SENTENCES = 256  # beyond, a prompt is one text
EDGE = 4  # sentences at either end of a prompt that may be instructions, at most
MARGIN = 0.2  # by which another adapter is more probable where another question begins


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The routing of a context: the adapters' probabilities (sum 1), the probability that any fits, and the mixture.

    If a prompt asks several `questions`, it is the routing of the one that the answer has reached.
    """

    probabilities: Mapping[str, float]
    fits: float
    mixture: Mixture
    questions: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Gives it as JSON data; with the questions if there are several."""
        return {
            "probs": dict(self.probabilities),
            "mixture": dict(self.mixture),
            "confidence": max(self.probabilities.values()),
            "fits": self.fits,
            "abstained": not self.mixture,
            **({"questions": list(self.questions)} if len(self.questions) > 1 else {}),
        }


def decide(read: Read, context: Context, settings: RoutingSettings) -> Routed:
    """Reads a context with a router and turns its probabilities into a mixture."""
    row: Mapping[str, float]
    questions: tuple[str, ...] = ()
    if settings.prompt_routing == "whole":
        (row,) = read([context])
    else:
        row, questions = _route(read, context, are_apart=settings.prompt_routing == "apart")
    probabilities, mixture = choose(settings.policy, row, settings.switching.unsure)
    return Routed(probabilities=probabilities, fits=sum(row.values()), mixture=mixture, questions=questions)


def read_held(
    router: Router,
    contexts: Sequence[Context],
    held: Collection[str] | None = None,
    *,
    known: dict[Context, dict[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Reads contexts with a router and returns each adapter's probability by name; `held` limits the adapters.

    The probability of an adapter outside `held` counts as the probability that none fits. Contexts of prompts in
    `known` are not read again, and others are added to it.
    """
    rows = dict(known or {})
    new = [context for context in contexts if context not in rows]
    if new:
        found = router.probabilities(new).tolist()
        rows |= {context: dict(zip(router.names, row, strict=True)) for context, row in zip(new, found, strict=True)}
    if known is not None:
        known.update((context, rows[context]) for context in new if not context.answer + context.sentence)
    return [{name: p for name, p in rows[c].items() if held is None or name in held} for c in contexts]


def route(read: Read, context: Context) -> Mapping[str, float]:
    """Reads the question in turn with a router: the one that the answer has reached."""
    return _route(read, context)[0]


def read_in_turn(
    read: Read, contexts: Sequence[Context], questions: Sequence[Sequence[str]]
) -> list[Mapping[str, float]]:
    """Reads the question in turn of each context with a router; `questions` are those of each context's prompt.

    If a sentence continues a line, it may already answer the next question, because adapters may have learned this
    (`serial` in `dlp_lora.tasks`). Then the whole prompt is read, if it fits.
    """
    whole = [len(each) > 1 and _goes_on(context) for context, each in zip(contexts, questions, strict=True)]
    turns = [in_turn(context, each) for context, each in zip(contexts, questions, strict=True)]
    rows = list(read([c if is_whole else t for c, t, is_whole in zip(contexts, turns, whole, strict=True)]))
    again = [i for i, is_whole in enumerate(whole) if is_whole and sum(rows[i].values()) <= 0.5]
    if again:
        for i, row in zip(again, read([turns[i] for i in again]), strict=True):
            rows[i] = row
    return rows


def questions_of(read: Read, context: Context, row: Mapping[str, float]) -> tuple[str, ...]:
    """Cuts a prompt into its questions; `row` is the router's for the whole prompt.

    Returns several questions, one question if it is among instructions, or none if the prompt is read as it is.
    """
    if _surely_one(row):
        return ()
    whole = sum(row.values())
    several, fit = _several(read, context)
    if fit > max(whole, SURELY_SEVERAL):
        return several
    # Instructions are a little like the texts of an adapter that translates from their language.
    return _among_instructions(read, context) or (several if fit > whole else ())


def questions_apart(read: Read, context: Context) -> tuple[str, ...]:
    """Cuts a prompt into questions that can be answered without each other; none if it is not such a prompt.

    A part that needs another one ("Then add 20 to it.") fits no adapter by itself, so the prompt is not cut. Or it fits
    one that answers such prompts: then the whole prompt is more like this adapter's prompts than the part is. A first
    or last line may be an instruction or a text for all questions: it fits no adapter, and its question fits without
    it. Such a line is added to each question.
    """
    (row,) = read([context])
    if _surely_one(row):
        return ()
    questions, fit = _several(read, context)
    if fit <= max(sum(row.values()), FITS_ALONE):
        return ()
    parts = [replace(context, prompt=question, is_part=True, whole=context.prompt) for question in questions]
    if min(sum(row.values()) for row in read(parts)) <= FITS_ALONE:
        return ()
    head, first = _line_off(read, context, questions[0], first=True)
    tail, last = _line_off(read, context, questions[-1], first=False)
    bare = (first, *questions[1:-1], last)
    return tuple("\n".join(filter(None, (head, question, tail))) for question in bare)


def _route(read: Read, context: Context, *, are_apart: bool = False) -> tuple[Mapping[str, float], tuple[str, ...]]:
    """Reads the question in turn with a router; also returns the questions of the prompt."""
    prompt = Context(context.prompt, history=context.history)
    (row,) = read([prompt])
    questions = questions_apart(read, prompt) if are_apart and context == prompt else ()
    questions = questions or questions_of(read, prompt, row)
    is_read = context == prompt and not questions
    return row if is_read else read_in_turn(read, [context], [questions])[0], questions


def _surely_one(row: Mapping[str, float]) -> bool:
    # Without adapters there is nothing to cut for.
    return not row or sum(row.values()) > SURE


def _several(read: Read, context: Context) -> tuple[tuple[str, ...], float]:
    """The questions of a prompt, if there are several, and how well that one fits an adapter which fits worst."""
    parts = _runs(read, context)
    while len(parts) > 1:
        rows = read([replace(context, prompt=part.strip(), is_part=True) for part in parts])
        joined = _joined(parts, rows)
        if len(joined) == len(parts):
            return tuple(part.strip() for part in parts), min(sum(row.values()) for row in rows)
        parts = joined
    return (), 0.0


def _line_off(read: Read, context: Context, question: str, *, first: bool) -> tuple[str, str]:
    """The first (or last) line of a question if it belongs to all questions, and the question without it."""
    one, _, other = question.partition("\n") if first else question.rpartition("\n")
    line, rest = (one.strip(), other.strip()) if first else (other.strip(), one.strip())
    if not line or not rest:
        return "", question
    whole, alone, without = read([replace(context, prompt=text, is_part=True) for text in (question, line, rest)])
    fit = sum(without.values())
    is_shared = sum(alone.values()) <= 0.5 and sum(whole.values()) < SURE and fit > max(FITS_ALONE, sum(whole.values()))
    return (line, rest) if is_shared and _leader(without) == _leader(whole) else ("", question)


def _among_instructions(read: Read, context: Context) -> tuple[str, ...]:
    """The part of a prompt that surely fits an adapter after a few sentences at either end are left out."""
    sentences = split(context.prompt)
    if not 2 <= len(sentences) <= MAX_SENTENCES:
        return ()
    num = len(sentences)
    stretches = [
        "".join(sentences[begin : num - end]).strip()
        for begin in range(min(EDGE, num - 1) + 1)
        for end in range(min(EDGE, num - 1 - begin) + 1)
        if begin + end
    ]
    fits = [
        sum(row.values()) for row in read([replace(context, prompt=stretch, is_part=True) for stretch in stretches])
    ]
    best = max(range(len(fits)), key=fits.__getitem__)
    # One of so many stretches may fit by chance, so the bound is high.
    return (stretches[best],) if fits[best] > SURE else ()


def in_turn(context: Context, questions: Sequence[str]) -> Context:
    """The context of the question in turn: this question, and its answer so far.

    Each line of the answer belongs to one question; further lines belong to the last question.
    """
    if not questions:
        return context
    lines = context.answer.splitlines(keepends=True)
    is_end = [line.strip() != "" and line.endswith("\n") for line in lines]
    turn = min(sum(is_end), len(questions) - 1)
    answer = "".join(line for line, before in zip(lines, accumulate(is_end, initial=0), strict=False) if before >= turn)
    return replace(context, prompt=questions[turn], answer=answer)


def _goes_on(context: Context) -> bool:
    """Whether the sentence continues a line."""
    return context.answer.strip() != "" and not context.answer.rstrip(" \t").endswith("\n")


def _runs(read: Read, context: Context) -> list[str]:
    """Neighbouring sentences that the router gives to the same adapter."""
    sentences = split(context.prompt)
    if not 2 <= len(sentences) <= MAX_SENTENCES:
        return [context.prompt]
    before = ["", *accumulate(sentences)]
    rows = read(
        [
            replace(context, prompt=sentence.strip(), history=f"{context.history}\n{earlier}"[-CHARS_BEFORE:].strip())
            for sentence, earlier in zip(sentences, before, strict=False)
        ]
    )
    runs: list[str] = []
    leader = ""
    for sentence, row in zip(sentences, rows, strict=True):
        best = _leader(row)
        if runs and row[best] - row[leader] <= MARGIN * sum(row.values()):
            runs[-1] += sentence
        else:
            runs.append(sentence)
            leader = best
    return runs


def _joined(parts: Sequence[str], rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Joins a part that fits no adapter to the one before, and neighbours of the same adapter."""
    joined: list[str] = []
    last: Mapping[str, float] = {}
    for part, row in zip(parts, rows, strict=True):
        fits = sum(row.values()) > 0.5
        if joined and (not fits or sum(last.values()) <= 0.5 or _leader(row) == _leader(last)):
            joined[-1] += part
        else:
            joined.append(part)
        last = row if fits or not last else last
    return joined


def _leader(row: Mapping[str, float]) -> str:
    return max(row, key=lambda name: row[name])
