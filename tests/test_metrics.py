import pytest

from dlp_lora.evals.metrics import contains, exact_match, normalise


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
        ("12 March", ["12 March."], True),
        ("anything", ["."], False),
        ("anything", [""], False),
        ("anything", [], False),
        ("", ["x"], False),
    ],
)
def test_a_reference_must_stand_in_the_answer_as_whole_words(answer: str, references: list[str], right: bool) -> None:
    assert contains(answer, references) is right
