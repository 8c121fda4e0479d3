"""Whether a part of a prompt is a question of its adapter, by examples of the adapter's prompts."""

import math
import random

import pytest
import torch
from torch import Tensor

from dlp_lora.router.neighbours import Examples, Neighbours, Prompts
from dlp_lora.router.recall import KEPT, MOST, Recall, with_evidence
from reference import evidence_of_likeness

DIMS = 24
KINDS = range(3)


def texts(kind: int | None, num: int, *, seed: int) -> Prompts:
    """Texts of a kind open with its eight tokens. Texts of none have only the words that all texts share."""
    rng = random.Random(f"{kind} {seed}")
    opening = [] if kind is None else list(range(10 * kind, 10 * kind + 8))
    generator = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(DIMS, generator=torch.Generator().manual_seed(9 if kind is None else kind))
    ids = [[*opening, *(rng.randrange(100, 200) for _ in range(8))] for _ in range(num)]
    return Prompts(centre + torch.randn(num, DIMS, generator=generator), ids)


@pytest.fixture(scope="module")
def neighbours() -> Neighbours:
    return Neighbours.of([texts(kind, 60, seed=0) for kind in KINDS])


@pytest.fixture(scope="module")
def recall(neighbours: Neighbours) -> Recall:
    tasks = [neighbours.read(texts(kind, 60, seed=0)) for kind in KINDS]
    return Recall.of(tasks, neighbours.read(texts(None, 60, seed=0)))


def owned(num: int, kind: int) -> Tensor:
    return torch.full((num,), kind)


def test_prompts_of_an_adapter_are_its_questions_and_texts_without_its_words_are_none(
    neighbours: Neighbours, recall: Recall
) -> None:
    for kind in KINDS:
        assert (recall(neighbours.read(texts(kind, 40, seed=1)), owned(40, kind)) > 0).float().mean() >= 0.95
        assert (recall(neighbours.read(texts(None, 40, seed=1)), owned(40, kind)) < 0).float().mean() >= 0.95


def test_the_evidence_is_a_line_from_the_foreign_texts_to_the_prompts(neighbours: Neighbours) -> None:
    task, foreign = (neighbours.read(texts(kind, KEPT + 9, seed=2)) for kind in (0, None))
    asked = neighbours.read(texts(0, 6, seed=3))
    kept = task.only(range(KEPT))
    likeness = [kept.likeness(examples).tolist() for examples in (task, foreign, asked)]
    expected = evidence_of_likeness(*likeness, nearest=5, lost=0.01, foreign_share=0.99, most=math.log(99))
    assert Recall.of([task], foreign)(asked, owned(6, 0)).tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("num", [1, 60])
def test_examples_that_are_like_foreign_texts_give_no_evidence(neighbours: Neighbours, num: int) -> None:
    diverse, foreign = (neighbours.read(texts(None, n, seed=n)) for n in (num, 61))
    found = Recall.of([diverse], foreign)
    assert found(foreign, owned(61, 0)).tolist() == [0.0] * 61


def test_a_batch_of_several_adapters_is_its_rows_alone(neighbours: Neighbours, recall: Recall) -> None:
    asked, owners = neighbours.read(texts(1, 5, seed=4)), torch.tensor([2, 0, 1, 0, 2])
    alone = [recall(asked.only([i]), owners[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(recall(asked, owners), torch.cat(alone))


def test_an_adapter_that_leaves_changes_nothing_for_the_others(neighbours: Neighbours, recall: Recall) -> None:
    asked = neighbours.read(texts(2, 5, seed=5))
    assert torch.equal(recall.only([2, 0])(asked, owned(5, 0)), recall(asked, owned(5, 2)))


def test_saved_weights_give_the_same_evidence(neighbours: Neighbours, recall: Recall) -> None:
    asked = neighbours.read(texts(1, 5, seed=6))
    again = Recall.from_weights(dict(recall.named_buffers()))
    assert torch.equal(again(asked, owned(5, 1)), recall(asked, owned(5, 1)))


def test_a_part_with_evidence_against_it_is_no_question_however_well_it_fits() -> None:
    fits, evidence = torch.tensor([1.0, 0.999, 0.2]), torch.tensor([-0.1, -MOST, -MOST])
    assert with_evidence(fits, evidence).tolist() == pytest.approx([1 / (1 + math.exp(0.1)), 0.01, 0.01], abs=1e-6)


def test_evidence_for_a_question_is_added_to_the_log_odds() -> None:
    fits = torch.tensor([0.5, 0.9, 1.0, 0.3])
    expected = [0.99, 0.9 * 99 / (0.9 * 99 + 0.1), 1.0, 0.3]
    assert with_evidence(fits, torch.tensor([MOST, MOST, 1.0, 0.0])).tolist() == pytest.approx(expected)


def test_some_of_the_examples_are_these_alone(neighbours: Neighbours) -> None:
    prompts = texts(0, 6, seed=7)
    some = neighbours.read(prompts).only([4, 1])
    alone = neighbours.read(Prompts(prompts.bags[[4, 1]], [prompts.ids[4], prompts.ids[1]]))
    assert isinstance(some, Examples)
    for found, expected in zip(some.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_part_is_no_question_if_the_longer_prompt_is_as_much_like_its_adapters_prompts(
    neighbours: Neighbours, recall: Recall
) -> None:
    plain, foreign = texts(0, 12, seed=7), texts(None, 12, seed=7)
    longer = [[*own, *other] for own, other in zip(plain.ids, foreign.ids, strict=True)]
    mixed = Prompts((plain.bags + foreign.bags) / 2, longer)
    asked, between = neighbours.read(plain), neighbours.read(mixed)
    owners, most = owned(12, 0), [-MOST] * 12
    assert torch.equal(recall(asked, owners, between), recall(asked, owners))
    assert recall(between, owners, asked).tolist() == pytest.approx(most)
    assert recall(asked, owners, asked).tolist() == pytest.approx(most)
