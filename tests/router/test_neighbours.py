"""How like the examples of adapters that joined later a prompt is."""

import math
import random

import pytest
import torch
from torch import Tensor

from dlp_lora.router.neighbours import MIN_EXAMPLES, Neighbours, Prompts

DIMS = 24
VOCAB = 400


def prompts(kind: int, num: int, *, seed: int) -> Prompts:
    """Prompts of a kind: half of their tokens are of its ten, and their bags lie around its centre."""
    rng = random.Random(f"{kind} {seed}")
    generator = torch.Generator().manual_seed(1000 * kind + seed)
    centre = 3 * torch.randn(DIMS, generator=torch.Generator().manual_seed(kind))
    ids = [
        [rng.randrange(10 * kind, 10 * kind + 10) if j % 2 else rng.randrange(VOCAB) for j in range(16)]
        for _ in range(num)
    ]
    return Prompts(centre + torch.randn(num, DIMS, generator=generator), ids)


JOINING = {"a": 10, "b": 11, "c": 12}  # their kinds


@pytest.fixture(scope="module")
def trained() -> Neighbours:
    return Neighbours.of([prompts(kind, 50, seed=0) for kind in range(6)])


@pytest.fixture(scope="module")
def neighbours(trained: Neighbours) -> Neighbours:
    return trained.joined({name: prompts(kind, 32, seed=0) for name, kind in JOINING.items()})


def fits(neighbours: Neighbours, asked: Prompts) -> Tensor:
    return (neighbours(asked) > 0).float().mean(dim=0)


def test_prompts_like_the_examples_fit_their_adapter_and_others_none(neighbours: Neighbours) -> None:
    own = torch.stack([fits(neighbours, prompts(kind, 100, seed=1)) for kind in JOINING.values()])
    foreign = torch.stack([fits(neighbours, prompts(kind, 100, seed=1)) for kind in range(13, 20)])
    assert own.diag().mean() >= 0.9
    assert own.diag().min() >= 0.8  # the share of each varies as its examples do
    assert (own - own.diag().diag()).max() <= 0.02
    assert foreign.max() <= 0.02


def test_the_threshold_keeps_most_examples_each_left_out(trained: Neighbours) -> None:
    one = prompts(10, 41, seed=0)
    kept = []
    for i in range(41):
        rest = [j for j in range(41) if j != i]
        joined = trained.joined({"a": Prompts(one.bags[rest], [one.ids[j] for j in rest])})
        kept.append(float(joined(Prompts(one.bags[i : i + 1], [one.ids[i]]))) > 0)
    assert 0.85 <= sum(kept) / len(kept) <= 0.98


@pytest.mark.parametrize("num", [1, 2, MIN_EXAMPLES - 1])
def test_few_examples_are_enough(trained: Neighbours, num: int) -> None:
    joined = trained.joined({"a": prompts(10, num, seed=0)})
    own, foreign = (fits(joined, prompts(kind, 200, seed=1)) for kind in (10, 13))
    assert own > 0.5
    assert foreign < 0.1


def test_the_likeness_is_the_mean_of_three_cosines(trained: Neighbours) -> None:
    one, other = (trained.read(Prompts(torch.ones(1, DIMS) * x, [ids])) for x, ids in ((1, [5, 6, 7]), (2, [6, 7, 6])))
    units = torch.cosine_similarity((torch.ones(DIMS) - trained.mean) @ trained.whiten,
                                    (2 * torch.ones(DIMS) - trained.mean) @ trained.whiten, dim=0)  # fmt: skip

    def weight(words: set[int]) -> float:
        return math.sqrt(sum(float(trained.rarity[word]) ** 2 for word in words))

    tokens = weight({6, 7}) ** 2 / weight({5, 6, 7}) / weight({6, 7})
    places = [set(own.places[own.places >= len(trained.rarity) // 2].tolist()) for own in (one, other)]
    assert [len(own) for own in places] == [2, 2]  # (5, 6), (6, 7) and (6, 7), (7, 6)
    pairs = weight(places[0] & places[1]) ** 2 / weight(places[0]) / weight(places[1])
    assert float(one.likeness(other)) == pytest.approx((float(units) + tokens + pairs) / 3, abs=1e-5)


def test_an_odd_prompt_has_finite_scores(neighbours: Neighbours) -> None:
    assert neighbours(Prompts(torch.zeros(3, DIMS), [[], [4], [4] * 500])).isfinite().all()


def test_a_batch_is_its_rows_alone(neighbours: Neighbours) -> None:
    asked = prompts(10, 5, seed=2)
    alone = [neighbours(Prompts(asked.bags[i : i + 1], asked.ids[i : i + 1])) for i in range(5)]
    torch.testing.assert_close(neighbours(asked), torch.cat(alone))


def test_one_that_leaves_is_as_if_it_had_never_joined(trained: Neighbours, neighbours: Neighbours) -> None:
    left = neighbours.only(["a", "c"])
    never = trained.joined({name: prompts(JOINING[name], 32, seed=0) for name in ("a", "c")})
    asked = prompts(12, 20, seed=1)
    assert left.names == ("a", "c")
    assert torch.equal(left(asked), never(asked))


def test_one_by_one_is_all_at_once(trained: Neighbours, neighbours: Neighbours) -> None:
    for name, kind in JOINING.items():
        trained = trained.joined({name: prompts(kind, 32, seed=0)})
    assert torch.equal(trained(prompts(11, 20, seed=1)), neighbours(prompts(11, 20, seed=1)))


def test_saved_weights_give_the_same_scores(neighbours: Neighbours) -> None:
    again = Neighbours.from_weights(neighbours.names, dict(neighbours.named_buffers()))
    asked = prompts(11, 20, seed=1)
    assert torch.equal(neighbours(asked), again(asked))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (3, 100)])
def test_tasks_of_few_prompts_teach_what_they_can(sizes: tuple[int, int]) -> None:
    found = Neighbours.of([prompts(kind, num, seed=0) for kind, num in enumerate(sizes)])
    scores = found.joined({"a": prompts(10, 5, seed=0)})(prompts(10, 5, seed=1))
    assert scores.isfinite().all()
