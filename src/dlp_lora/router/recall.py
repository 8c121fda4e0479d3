"""Recall: a part of a prompt in, evidence whether it is a question of its adapter out.

A router learns single sentences too. So a sentence of an instruction ("Bitte lies den folgenden Text.") may fit an
adapter that translates from its language. But that adapter's prompts share more than their language: the words that ask
for a translation. So a part is compared with examples of whole prompts, as prompts are compared in `neighbours`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlp_lora.router.neighbours import OF_EXAMPLES, Examples, left_out, nearest

KEPT = 32  # examples of each adapter
LOST = 0.01  # share of an adapter's prompts that are less like its examples than `inner`
FOREIGN = 0.99  # share of the foreign texts that are less like them than `outer`
LEAST_GAP = 0.1  # between `inner` and `outer` if an adapter's prompts are to be told from foreign texts
MOST = math.log(99)  # the largest evidence


class Recall(nn.Module):
    """Gives the evidence in log-odds, from the mean likeness of a part to the five nearest examples of its adapter.

    Nearly all prompts of the adapter have a likeness above `inner`, and nearly all foreign texts one below `outer`. In
    the middle between these, the evidence is 0. At `inner` and `outer` it is at its largest, for and against. If they
    are close to each other, the adapter's prompts are too diverse, and the evidence is always 0.
    """

    middles: Float[Tensor, " adapters"]
    slopes: Float[Tensor, " adapters"]

    def __init__(
        self, examples: Sequence[Examples], middles: Float[Tensor, " adapters"], slopes: Float[Tensor, " adapters"]
    ) -> None:
        super().__init__()
        self.examples = nn.ModuleList(examples)
        self._examples = tuple(examples)  # with their type
        self.register_buffer("middles", middles)
        self.register_buffer("slopes", slopes)

    @classmethod
    def of(cls, tasks: Sequence[Examples], foreign: Examples) -> "Recall":
        """Keeps some prompts of each task, and compares with them the others, and texts of no task."""
        kept = [task.only(range(min(KEPT, len(task)))) for task in tasks]
        middles, slopes = [], []
        for task, examples in zip(tasks, kept, strict=True):
            outer = float(nearest(examples.likeness(foreign)).quantile(FOREIGN))
            likeness = examples.likeness(task)
            others = torch.cat([left_out(likeness[: len(examples)]), nearest(likeness[len(examples) :]).cpu()])
            inner = float(others.quantile(LOST)) if len(others) else outer
            middles.append((inner + outer) / 2)
            slopes.append(2 * MOST / (inner - outer) if inner - outer >= LEAST_GAP else 0.0)
        return cls(kept, torch.tensor(middles), torch.tensor(slopes))

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> "Recall":
        """Makes it from its saved weights."""
        middles, slopes = weights["middles"], weights["slopes"]
        examples = [Examples(*(weights[f"examples.{i}.{part}"] for part in OF_EXAMPLES)) for i in range(len(slopes))]
        return cls(examples, middles, slopes)

    def forward(
        self, parts: Examples, owners: Int[Tensor, " parts"], wholes: Examples | None = None
    ) -> Float[Tensor, " parts"]:
        """Gives the evidence, on the CPU.

        Args:
            owners: the indices of the parts' likeliest adapters.
            wholes: the longer prompt of each part. If it is as much like its adapter's prompts as the part is, the
                evidence is at its largest against the part.
        """
        likeness = self._likeness(parts, owners)
        evidence = (self.slopes.cpu()[owners] * (likeness - self.middles.cpu()[owners])).clamp(-MOST, MOST)
        if wholes is not None:
            evidence[self._likeness(wholes, owners) >= likeness] = -MOST
        return evidence

    def _likeness(self, texts: Examples, owners: Int[Tensor, " texts"]) -> Float[Tensor, " texts"]:
        """The mean likeness of each text to the nearest examples of its adapter, on the CPU."""
        likeness = torch.zeros(len(owners))
        for owner in owners.unique().tolist():  # type: ignore[no-untyped-call]
            rows = (owners == owner).nonzero()[:, 0].tolist()
            likeness[rows] = nearest(self._examples[owner].likeness(texts.only(rows))).cpu()
        return likeness

    def only(self, kept: Sequence[int]) -> "Recall":
        """Keeps some of the adapters, in this order."""
        rows = list(kept)
        return Recall([self._examples[i] for i in rows], self.middles[rows], self.slopes[rows])


def with_evidence(fits: Float[Tensor, " parts"], evidence: Float[Tensor, " parts"]) -> Float[Tensor, " parts"]:
    """Gives the probabilities that parts are questions, from those that an adapter fits.

    Evidence for a question is added to the log-odds. With evidence against it, a part is no question, however well it
    fits.
    """
    log_odds = fits.logit()
    return torch.where(evidence < 0, torch.minimum(log_odds, evidence), log_odds + evidence).sigmoid()
