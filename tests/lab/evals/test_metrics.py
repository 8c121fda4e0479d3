import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from dlp_lora.errors import DLPLoRAError
from dlp_lora.lab.evals.bootstrap import bootstrap
from dlp_lora.lab.evals.metrics import (
    Rouge,
    bleu_letters_each,
    bleu_of,
    bleu_signature,
    bleu_statistics,
    contains,
    exact_match,
    normalise,
    rouge_each,
)
from reference import bleu_of_letters

LETTERS = st.text(alphabet="ab \n", max_size=9)


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU."""
    return float(bleu_of(bleu_statistics(answers, references).sum(axis=0, keepdims=True))[0])


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The same of sacrebleu, which takes the first reference of every answer, then the second, or None."""
    streams = [[own[i] if i < len(own) else None for own in references] for i in range(max(map(len, references)))]
    return float(sacrebleu.corpus_bleu(answers, streams).score)


@pytest.mark.parametrize(
    "text, same",
    [("The result is 42.", "the result is 42"), ("  a\n b ", "a b"), ("A..", "a."), ("", ""), ("3.5", "3.5")],
)
def test_case_spaces_and_a_final_full_stop_do_not_count(text: str, same: str) -> None:
    assert normalise(text) == same


@pytest.mark.parametrize(
    "answer, references, right",
    [
        ("Paris.", ["paris"], True),
        ("paris", ["London", " PARIS. "], True),
        ("It is Paris", ["Paris"], False),
        ("", ["Paris"], False),
        ("Paris", [], False),
        (" ", ["."], False),
    ],
)
def test_an_exact_match_is_one_of_the_references(answer: str, references: list[str], right: bool) -> None:
    assert exact_match(answer, references) is right


@pytest.mark.parametrize(
    "answer, references, right",
    [
        ("The capital is Paris, of course.", ["Paris"], True),
        ("The capital is Parish.", ["Paris"], False),
        ("The result is 42.", ["42"], True),
        ("The result is 142.", ["42"], False),
        ("The result is 420.", ["42"], False),
        ("The result is 42.5.", ["42"], False),
        ("The result is 3.42", ["42"], False),
        ("The result is 3.42", ["3.42"], True),
        ("1, 2,42 and so on", ["42"], True),
        ("42", ["17", "42"], True),
        ("It is 5  KM away", ["5 km"], True),
        ("The word is a+b.", ["a+b"], True),
        ("aab", ["a+b"], False),
        ("The result is -3.", ["3"], False),
        ("The result is \u22123.", ["3"], False),
        ("The result is -3.", ["-3"], True),
        ("10-3", ["3"], True),
        ("(10)-3 is 7", ["3"], True),
        ("- 3", ["3"], True),
        ("One third is 1/3.", ["3"], False),
        ("One third is 1/3.", ["1"], False),
        ("One third is 1/3.", ["1/3"], True),
        ("3 m/s", ["3"], True),
        ("and/or", ["or"], True),
        ("a well-known dog", ["known"], True),
        ("The result is 3,500.", ["3"], False),
        ("The result is 3,500.", ["500"], False),
        ("The result is 3,500.", ["3500"], True),
        ("The result is 3,500.5", ["3500"], False),
        ("The result is 1,203,500, isn't it", ["1203500"], True),
        ("The result is 3500.", ["3,500"], True),
        ("3,5000", ["3"], True),
        ("100, 107, 114", ["107"], True),
        ("12 March", ["12 March."], True),
        ("anything", ["."], False),
        ("anything", [""], False),
        ("anything", [], False),
        ("", ["x"], False),
    ],
)
def test_a_reference_must_stand_in_the_answer_as_whole_words(answer: str, references: list[str], right: bool) -> None:
    assert contains(answer, references) is right


texts = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "."]), max_size=8).map(" ".join)
pairs = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6)


@pytest.mark.parametrize(
    "answers, references, score",
    [
        # Of 6, 5, 4 and 3 n-grams 5, 3, 1 and none are right; none counts as a half (exponential smoothing).
        (["the cat is on the mat"], [["the cat sat on the mat"]], 100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25),
        # All right, but four words for five.
        (["a b c d"], [["a b c d e"]], 100 * math.exp(1 - 5 / 4)),
        # As long as the closer reference; each n-gram may stand in another one.
        (["a b c d"], [["a b c", "b c d e f g"]], 100 * (1 * 1 * 1 * 0.5) ** 0.25),
        # Two answers are one corpus: 3 + 1 of 8 words, 2 + 0 of 6, 1 of 4, none of 2.
        (["a b c x", "a y z w"], [["a b c d"], ["a"]], 100 * (4 / 8 * 2 / 6 * 1 / 4 * 0.5 / 2) ** 0.25),
        (["a b c d", ""], [["a b c d"], ["a b c d"]], 100 * math.exp(1 - 8 / 4)),
        ([""], [["a"]], 0),
        (["a b c d e"], [["a b c d e"]], 100),
    ],
)
def test_bleu_is_what_is_worked_out_by_hand(answers: list[str], references: list[list[str]], score: float) -> None:
    assert bleu(answers, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("die Katze", ["die Katze"], 1.0),
        # Of 9, 8, 7 and 6 n-grams 8, 7, 6 and 5: the last letter is wrong.
        ("die Katzx", ["die Katze"], (8 / 9 * 7 / 8 * 6 / 7 * 5 / 6) ** 0.25),
        # A space is a letter, and there is one too few.
        ("a b cd", ["a b c d"], (6 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25 * math.exp(1 - 7 / 6)),
        ("abcx", ["abcd"], 0.0),
        ("No", ["No"], 0.0),
        ("", ["No"], 0.0),
    ],
)
def test_bleu_of_letters_is_what_is_worked_out_by_hand(answer: str, references: list[str], score: float) -> None:
    assert bleu_letters_each([answer], [references]) == [pytest.approx(score)]


@given(st.lists(st.tuples(LETTERS, st.lists(LETTERS.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=3))
def test_bleu_of_letters_is_that_of_the_definition(found: list[tuple[str, list[str]]]) -> None:
    answers, references = [answer for answer, _ in found], [own for _, own in found]
    expected = [bleu_of_letters(answer, own) for answer, own in found]
    assert bleu_letters_each(answers, references) == pytest.approx(expected)


def test_bleu_says_what_it_depends_on() -> None:
    assert bleu_signature() == f"nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"


@given(pairs)
@settings(max_examples=100, deadline=None)
def test_bleu_from_statistics_is_sacrebleus(found: list[tuple[str, list[str]]]) -> None:
    answers, references = [answer for answer, _ in found], [own for _, own in found]
    assert bleu(answers, references) == pytest.approx(corpus_bleu(answers, references))


def test_a_bootstrap_of_bleu_is_bleu_of_the_texts_drawn() -> None:
    answers = ["the cat sat on a mat", "the cat", "a mat sat on the cat .", ""]
    references = [["the cat sat on the mat"], ["the cat", "a cat sat"], ["a mat sat on a cat ."], ["the mat"]]
    draws = np.random.default_rng(0).integers(0, 4, size=(20, 4))
    statistics = bleu_statistics(answers, references)
    found = bleu_of(statistics[draws].sum(axis=1))
    expected = [corpus_bleu([answers[i] for i in drawn], [references[i] for i in drawn]) for drawn in draws]
    assert found == pytest.approx(expected)
    low, high = bootstrap(statistics, lambda drawn: bleu_of(drawn.sum(axis=0, keepdims=True))[0], num_resamples=20)
    assert (low, high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))


@pytest.mark.parametrize(
    "answer, references, rouge1, rouge_l",
    [
        ("the cat", ["the cat sat"], 2 * 1 * (2 / 3) / (1 + 2 / 3), 0.8),
        ("cat the", ["the cat"], 1.0, 0.5),
        ("The cat.", ["a dog", "the cat"], 1.0, 1.0),
        ("", ["the cat"], 0.0, 0.0),
        ("...", ["the cat"], 0.0, 0.0),
        ("cats", ["cat"], 0.0, 0.0),
    ],
)
def test_rouge_is_what_is_worked_out_by_hand(answer: str, references: list[str], rouge1: float, rouge_l: float) -> None:
    (found,) = rouge_each([answer], [references])
    assert (found.rouge1, found.rougeL) == pytest.approx((rouge1, rouge_l))


def test_rouge_takes_the_best_reference_of_each_answer() -> None:
    each = rouge_each(["the cat", ""], [["a dog", "the cat"], ["the cat"]])
    assert each == [Rouge(rouge1=1.0, rougeL=1.0), Rouge(rouge1=0.0, rougeL=0.0)]


@given(pairs)
@settings(max_examples=50, deadline=None)
def test_rouge_is_the_best_of_rouge_scores(found: list[tuple[str, list[str]]]) -> None:
    scorer = RougeScorer(["rouge1", "rougeL"])
    for metric in ("rouge1", "rougeL"):
        best = [max(scorer.score(own, answer)[metric].fmeasure for own in references) for answer, references in found]
        each = rouge_each([answer for answer, _ in found], [references for _, references in found])
        assert [getattr(own, metric) for own in each] == pytest.approx(best)


@pytest.mark.parametrize("metric", [bleu_statistics, rouge_each])
@pytest.mark.parametrize(
    "answers, references, message",
    [
        ([], [], "0 answers and references for 0"),
        (["a"], [["a"], ["b"]], "1 answers and references for 2"),
        (["a", "b"], [["a"], []], "answer 1 has no reference"),
    ],
)
def test_answers_without_references_are_a_value_error(
    metric: Callable[..., Any], answers: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(answers, references)


@pytest.mark.parametrize(
    "metric, module", [(bleu_statistics, "sacrebleu.metrics.bleu"), (rouge_each, "rouge_score.rouge_scorer")]
)
def test_without_the_packages_the_error_says_what_to_install(
    metric: Callable[..., Any], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DLPLoRAError, match=r'pip install "dlp-lora\[eval\]"'):
        metric(["a"], [["a"]])


def test_a_bootstrap_interval_of_a_mean_is_the_normal_one_where_there_are_many_values() -> None:
    values = [0.0, 1.0] * 200
    low, high = bootstrap(values, num_resamples=4000)
    half = 1.96 * 0.5 / math.sqrt(400)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.006)


def test_a_bootstrap_takes_any_statistic_and_is_the_same_for_the_same_seed() -> None:
    values = np.arange(50.0)
    assert bootstrap(values, np.median, seed=1) == bootstrap(values, np.median, seed=1)
    assert bootstrap(values, np.median, seed=1) != bootstrap(values, np.median, seed=2)
    assert bootstrap([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert bootstrap([1.0]) == (1.0, 1.0)


def test_values_that_cannot_be_resampled_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="no values to resample"):
        bootstrap([])
