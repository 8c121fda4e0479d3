"""Metrics: free-running answers and their references in, numbers out.

Accuracy and ROUGE are fractions, 0 to 1; BLEU is sacrebleu's, 0 to 100. An empty answer is wrong, and scores zero.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from dlp_lora.errors import DLPLoRAError

MAX_NGRAM = 4
_GROUPED = re.compile(r"(?<![\w,.])\d{1,3}(?:,\d{3})+(?!\w|,\d)")  # 12,000
INSTALL = 'BLEU and ROUGE need the packages sacrebleu and rouge-score; run `pip install "dlp-lora[eval]"`'


@dataclass(frozen=True, kw_only=True)
class Rouge:
    """F-measures of ROUGE-1 and ROUGE-L."""

    rouge1: float
    rougeL: float  # noqa: N815  # as rouge-score and the records call it


def normalise(text: str) -> str:
    """The form in which answers are compared: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".")


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """True if the answer is one of the references, but for case, spaces and a final full stop."""
    return bool(answer.strip()) and normalise(answer) in {normalise(reference) for reference in references}


def contains(answer: str, references: Sequence[str]) -> bool:
    """True if a reference stands in the answer as whole words.

    Lenient towards a model that answers at length: it is right if the value appears anywhere.
    """
    return any(text_after(answer, reference) is not None for reference in references)


def text_after(answer: str, reference: str) -> str | None:
    """The text of the answer after the first occurrence of a reference as whole words; None if there is none.

    Numbers are whole, too: "3" does not stand in "3.5", "5.3", "-3", "1/3" or "3,500", and "12000" stands in "12,000".
    """
    wanted = _GROUPED.sub(_without_commas, normalise(reference))
    if not wanted:
        return None
    before, after = r"(?<!\w)(?<!\d\.)", r"(?!\w|\.\d)"
    if wanted[0].isdecimal():  # in "10-3" there is no sign
        before += r"(?<!\d/)(?<!(?<![\w)])[-\u2212])"
    if wanted[-1].isdecimal():
        after += r"(?!/\d)"
    found = re.search(before + re.escape(wanted) + after, _GROUPED.sub(_without_commas, normalise(answer)))
    return None if found is None else found.string[found.end() :]


def _without_commas(number: re.Match[str]) -> str:
    return number[0].replace(",", "")


def bleu_signature() -> str:
    """sacrebleu's signature of `bleu_of`, for a record: each answer has references of its own number."""
    metric = _sacrebleu(effective_order=False)
    metric.corpus_score(["a", "b"], [["a", "b"], [None, "c"]])
    return str(metric.get_signature())


def check_scoring(kinds: Iterable[str]) -> None:
    """Checks that the packages for scores are installed, before any answer.

    Raises:
        DLPLoRAError: naming the packages to install.
    """
    if "qa" in kinds:
        rouge_each([""], [[""]])
        bleu_signature()


def bleu_statistics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Int[np.ndarray, "answers 10"]:
    """Each answer's contribution to corpus BLEU: its length, the closest reference's, matching n-grams, n-grams.

    `bleu_of` turns sums of rows into scores, so that resampling tokenises nothing.
    """
    _check_pairs(answers, references)
    metric = _sacrebleu(effective_order=True)  # of no consequence for the counts
    found = [metric.sentence_score(answer, list(own)) for answer, own in zip(answers, references, strict=True)]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in found])


def bleu_of(sums: Num[np.ndarray, "draws 10"]) -> Float[np.ndarray, " draws"]:
    """Corpus BLEU for each row of summed `bleu_statistics`."""
    compute = _sacrebleu(effective_order=False).compute_bleu
    return np.array([
        compute(
            correct=row[2 : 2 + MAX_NGRAM],
            total=row[2 + MAX_NGRAM :],
            sys_len=row[0],
            ref_len=row[1],
            smooth_method="exp",
        ).score
        for row in sums.astype(int).tolist()
    ], dtype=float)  # fmt: skip


def bleu_letters_each(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU of each answer alone over its letters, with spaces, 0 to 1, as the paper's code averages it.

    Without smoothing, so that an answer that shares no four letters in a row scores zero.
    """
    _check_pairs(answers, references)
    metric = _sacrebleu(effective_order=False, smooth_method="none", tokenize="none")
    pairs = zip(map(_spelled, answers), (list(map(_spelled, own)) for own in references), strict=True)
    return [float(metric.corpus_score([answer], [[r] for r in own]).score) / 100 for answer, own in pairs]


def _spelled(text: str) -> str:
    """Each letter as a word, white space by its number."""
    return " ".join(f"U+{ord(letter):04X}" if letter.isspace() else letter for letter in text)


def rouge_each(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[Rouge]:
    """Each answer's ROUGE against the reference that it is closest to, without stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise DLPLoRAError(INSTALL) from error
    _check_pairs(answers, references)
    scorer = RougeScorer(["rouge1", "rougeL"])
    scores = [scorer.score_multi(list(own), answer) for answer, own in zip(answers, references, strict=True)]
    return [Rouge(rouge1=float(s["rouge1"].fmeasure), rougeL=float(s["rougeL"].fmeasure)) for s in scores]


def _sacrebleu(*, effective_order: bool, **settings: Any) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise DLPLoRAError(INSTALL) from error
    # Forced, it does not warn of answers that end in " .": the highlights of CNN/DailyMail do.
    return BLEU(force=True, max_ngram_order=MAX_NGRAM, effective_order=effective_order, **settings)


def _check_pairs(answers: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not answers or len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers and references for {len(references)}; expected as many, and one")
    for i, own in enumerate(references):
        if not own:
            raise ValueError(f"answer {i} has no reference; expected at least one")
