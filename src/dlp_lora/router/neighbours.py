"""Neighbours: adapters that join a trained router later. They are recognised by their examples, without training.

The trained layers give similar features to all texts that they never learned, so distances between features accept
foreign texts. The words of these texts differ. So a prompt is compared with the examples of each adapter that joined:
by the bags that the layers read, by its tokens, and by its pairs of neighbouring tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

RIDGE = 0.5  # of the bags' mean variance within a task, added to each
PLACES = 2**15  # hash places of tokens, and as many of pairs
NEAREST = 5  # examples that count
LOST = 0.06  # target share of the examples of joined adapters that fit none
MIN_EXAMPLES = 16  # with fewer examples this share is too uncertain
SIZES = (1, 2, 4, 8, 16, 32, 64)  # numbers of examples for which the usual likeness is stored
SURE, SURE_SHARE = 0.99, 0.8  # this share of an adapter's prompts fits with this probability
TINY = 1e-3


class Prompts(NamedTuple):
    """Prompts as the router reads them: their bags, concatenated, and their token ids."""

    bags: Float[Tensor, "prompts bags"]
    ids: Sequence[Sequence[int]]


class Usual(NamedTuple):
    """The usual numbers of an adapter's prompts: mean and deviation of their likeness to its examples; the score that
    nearly all of them reach (`least`), and the distance from there to the score of most (`room`).
    """

    mean: float
    deviation: float
    least: float
    room: float


class Examples(nn.Module):
    """Prompts in the form for comparison: unit vectors of their bags, of their tokens and of their pairs."""

    units: Float[Tensor, "prompts bags"]
    places: Int[Tensor, " words"]  # of tokens and pairs, one prompt after the other
    weights: Float[Tensor, " words"]
    lengths: Int[Tensor, " prompts"]

    def __init__(
        self,
        units: Float[Tensor, "prompts bags"],
        places: Int[Tensor, " words"],
        weights: Float[Tensor, " words"],
        lengths: Int[Tensor, " prompts"],
    ) -> None:
        super().__init__()
        for name, tensor in zip(OF_EXAMPLES, (units, places, weights, lengths), strict=True):
            self.register_buffer(name, tensor)

    def __len__(self) -> int:
        return len(self.lengths)

    def only(self, rows: Sequence[int]) -> "Examples":
        """Keeps some of the prompts."""
        words = list(zip(*(part.split(self.lengths.tolist()) for part in (self.places, self.weights)), strict=True))
        kept = [words[row] for row in rows]
        places, weights = (torch.cat(part) for part in zip(*kept, strict=True))
        return Examples(self.units[rows], places, weights, self.lengths[rows])

    def likeness(self, prompts: "Examples") -> Float[Tensor, "prompts examples"]:
        """The mean of the three cosines between prompts and these examples."""
        of_word = torch.arange(len(self), device=self.lengths.device).repeat_interleave(self.lengths)
        blank = self.units.new_zeros(2 * PLACES)
        rows = []
        lengths = prompts.lengths.tolist()
        for places, weights in zip(prompts.places.split(lengths), prompts.weights.split(lengths), strict=True):
            shared = blank.index_put((places,), weights)[self.places] * self.weights
            rows.append(self.units.new_zeros(len(self)).index_add(0, of_word, shared))
        return (prompts.units @ self.units.T + torch.stack(rows)) / 3


class Neighbours(nn.Module):
    """Scores prompts by their likeness to the examples of adapters that joined; 0 is the threshold.

    The score is the mean likeness to the five nearest examples minus the typical likeness, in deviations. The typical
    likeness is the mean of two numbers: that of the adapter's examples, each left out in turn, and that of the tasks
    that the router was trained on. So an adapter with diverse texts accepts more, but not all. The deviation is that of
    the trained tasks. One threshold for all joined adapters accepts at least 94 % of their examples, each left out.
    """

    whiten: Float[Tensor, "bags bags"]
    mean: Float[Tensor, " bags"]
    rarity: Float[Tensor, " places"]  # weight of each token and pair, larger if fewer tasks use it
    usual: Float[Tensor, "sizes 4"]

    def __init__(
        self, weights: Mapping[str, Tensor], names: Sequence[str] = (), examples: Sequence[Examples] = ()
    ) -> None:
        """Makes it from the weights that do not depend on the joined adapters, by name, and from these adapters."""
        super().__init__()
        self.names = tuple(names)
        for name in OF_TASKS:
            self.register_buffer(name, weights[name])
        self.examples = nn.ModuleList(examples)
        self._examples = tuple(examples)  # with their type
        self._usual = [Usual(*row) for row in self.usual.tolist()]
        self._typical, self._least, self._slope = self._fit()

    @classmethod
    def of(cls, tasks: Sequence[Prompts]) -> "Neighbours":
        """Measures the variation within each trained task; no adapter has joined yet."""
        bags = [task.bags.double() for task in tasks]
        gaps = torch.cat([task_bags - task_bags.mean(dim=0) for task_bags in bags])
        variances, directions = torch.linalg.eigh(gaps.T @ gaps / len(gaps))
        whiten = directions / (variances + RIDGE * variances.mean() + 1e-12).sqrt()
        used = torch.zeros(2 * PLACES)
        for task in tasks:
            for ids in task.ids:
                used[torch.cat(_places(ids))] += 1 / len(task.ids)
        weights = {
            "whiten": whiten.float().contiguous(),
            "mean": torch.cat(bags).mean(dim=0).float(),
            "rarity": 1 + ((len(tasks) + 2) / (1 + used)).log(),
            "usual": torch.tensor([[0.0, 1.0, 0.0, 1.0]]).repeat(len(SIZES), 1),
        }
        read, most = cls(weights).read, SIZES[-1] + 1
        some = [read(Prompts(task.bags[:most], task.ids[:most])) for task in tasks]
        usual = _usual([examples.likeness(examples) for examples in some])
        return cls({**weights, "usual": torch.tensor(usual)})

    @classmethod
    def from_weights(cls, names: Sequence[str], weights: Mapping[str, Tensor]) -> "Neighbours":
        """Makes it from its saved weights."""
        examples = [Examples(*(weights[f"examples.{i}.{part}"] for part in OF_EXAMPLES)) for i in range(len(names))]
        return cls(weights, names, examples)

    def joined(self, tasks: Mapping[str, Prompts]) -> "Neighbours":
        """Adds adapters by name, with examples of their prompts."""
        examples = [*self._examples, *map(self.read, tasks.values())]
        return Neighbours(dict(self.named_buffers()), (*self.names, *tasks), examples)

    def only(self, names: Sequence[str]) -> "Neighbours":
        """Keeps some adapters, in this order."""
        examples = [self._examples[self.names.index(name)] for name in names]
        return Neighbours(dict(self.named_buffers()), names, examples)

    def read(self, prompts: Prompts) -> Examples:
        """Turns prompts into the form for comparison."""
        words = [_places(ids) for ids in prompts.ids]
        weights = [F.normalize(self.rarity[part.to(self.rarity.device)], dim=0) for parts in words for part in parts]
        return Examples(
            F.normalize((prompts.bags.float() - self.mean) @ self.whiten, dim=-1),
            torch.cat([part for parts in words for part in parts]).to(self.rarity.device),
            torch.cat(weights),
            torch.tensor([sum(map(len, parts)) for parts in words], device=self.rarity.device),
        )

    def forward(self, prompts: Prompts) -> Float[Tensor, "prompts adapters"]:
        """Gives each prompt's score for each adapter, on the CPU."""
        read = self.read(prompts)
        scores = [
            (nearest(examples.likeness(read)) - typical) / deviation - self._least
            for examples, (typical, deviation) in zip(self._examples, self._typical, strict=True)
        ]
        return torch.stack(scores, dim=1).cpu()

    def logits(self, prompts: Prompts) -> Float[Tensor, "prompts adapters"]:
        """Gives the scores as log-odds that each adapter fits, regardless of the others."""
        scores: Float[Tensor, "prompts adapters"] = self(prompts)
        return self._slope * scores

    def _fit(self) -> tuple[list[tuple[float, float]], float, float]:
        """The typical likeness of each adapter, with its deviation; the threshold; the slope of the log-odds there."""
        typical, scores = [], []
        for examples in self._examples:
            usual = self._usual_of(len(examples))
            likeness = left_out(examples.likeness(examples))
            middle = (float(likeness.mean()) + usual.mean) / 2 if len(likeness) else usual.mean
            typical.append((middle, usual.deviation))
            scores.append((likeness - middle) / usual.deviation)
        usual = self._usual_of(min(map(len, self._examples), default=SIZES[-1]))
        joined = torch.cat(scores) if scores else torch.zeros(0)
        # Examples that are nearly the same would set a threshold that later prompts miss: it is at most the usual one.
        least = usual.least
        if len(joined) >= MIN_EXAMPLES:
            least = min(least, float(joined.quantile(LOST)))
        return typical, least, math.log(SURE / (1 - SURE)) / usual.room

    def _usual_of(self, num_examples: int) -> Usual:
        return self._usual[sum(size <= num_examples for size in SIZES) - 1]


OF_TASKS = ("whiten", "mean", "rarity", "usual")
OF_EXAMPLES = ("units", "places", "weights", "lengths")


def _places(ids: Sequence[int]) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " pairs"]]:
    """The places of a text's distinct tokens, and of its distinct pairs of neighbours."""
    tokens = torch.tensor(ids, dtype=torch.long)
    pairs = tokens[:-1] * 1_000_003 + tokens[1:] * 31
    return (tokens % PLACES).unique(), PLACES + (pairs % PLACES).unique()  # type: ignore[no-untyped-call]


def nearest(likeness: Float[Tensor, "prompts examples"]) -> Float[Tensor, " prompts"]:
    """The mean likeness to the nearest examples."""
    return likeness.topk(min(NEAREST, likeness.shape[1]), dim=1).values.mean(dim=1)


def left_out(likeness: Float[Tensor, "examples examples"]) -> Float[Tensor, " scored"]:
    """Each example's mean likeness to the nearest others; empty if there is no other."""
    num = len(likeness)
    if num < 2:
        return likeness.new_zeros(0).cpu()
    others = likeness[~torch.eye(num, dtype=torch.bool, device=likeness.device)].view(num, num - 1)
    return nearest(others).cpu()


def _usual(likeness: Sequence[Float[Tensor, "_ _"]]) -> list[Usual]:
    """The usual numbers for each size; those of the next smaller size if no task has so many texts."""
    numbers = [Usual(mean=0.5, deviation=0.1, least=-2.0, room=1.0)]  # if no task has two texts
    for size in SIZES:
        # Each text is compared with the texts before it in turn.
        rows = [
            torch.stack([nearest(alike[i].roll(-i - 1)[None, :size])[0] for i in range(len(alike))])
            for alike in likeness
            if len(alike) > size
        ]
        if not rows:
            numbers.append(numbers[-1])
            continue
        everything = torch.cat(rows)
        mean, deviation = float(everything.mean()), max(float(everything.std()), TINY)
        scores = torch.cat([(row - (row.mean() + mean) / 2) / deviation for row in rows])
        least = float(scores.quantile(LOST))
        room = max(float(scores.quantile(1 - SURE_SHARE)) - least, TINY)
        numbers.append(Usual(mean=mean, deviation=deviation, least=least, room=room))
    return numbers[1:]
