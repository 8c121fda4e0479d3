"""Nearness: the distance of a text to its adapter's texts, so that a router knows when none fits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

RIDGE = 0.1  # of the features' mean variance, added to each
DIRECTIONS = 128  # in which the features vary most; the others add little and cost time
TINY = 1e-6  # for adapters whose texts are all the same


class Nearness(nn.Module):
    """Minus the log of the squared Mahalanobis distance from features to their adapter's mean (Lee et al. 2018, arXiv
    1807.03888), divided by its mean over that adapter's texts. So adapters with diverse texts accept larger distances.

    All adapters share one covariance, along its principal directions.
    """

    whiten: Float[Tensor, "hidden directions"]  # maps Mahalanobis distance to Euclidean distance
    centres: Float[Tensor, "adapters directions"]
    spreads: Float[Tensor, " adapters"]

    def __init__(
        self,
        whiten: Float[Tensor, "hidden directions"],
        centres: Float[Tensor, "adapters directions"],
        spreads: Float[Tensor, " adapters"],
    ) -> None:
        super().__init__()
        self.register_buffer("whiten", whiten)
        self.register_buffer("centres", centres)
        self.register_buffer("spreads", spreads)

    @classmethod
    def of(cls, features: Float[Tensor, "adapters texts hidden"]) -> "Nearness":
        """Fits the means and the covariance to some texts of each adapter."""
        features = features.double()
        means = features.mean(dim=1)
        gaps = features - means[:, None]
        flat = gaps.flatten(0, 1)
        variances, directions = torch.linalg.eigh(flat.T @ flat / len(flat))
        widths = (variances + RIDGE * variances.mean() + TINY).sqrt()
        whiten = (directions / widths)[:, -DIRECTIONS:].contiguous()  # the eigenvalues ascend
        spreads = (gaps @ whiten).square().sum(dim=-1).mean(dim=-1) + TINY
        return cls(whiten.float(), (means @ whiten).float(), spreads.float())

    def forward(
        self, features: Float[Tensor, "batch hidden"], owners: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """Gives the scores, on the CPU; higher is nearer. `owners` are the indices of the adapters."""
        distances = self._distances(features, owners) / self.spreads[owners]
        return -distances.clamp(min=1e-12).log().cpu()

    def reaching(
        self,
        features: Float[Tensor, "texts hidden"],
        owners: Int[Tensor, " texts"],
        least: Float[Tensor, " texts"],
        *,
        coverage: float,
    ) -> "Nearness":
        """Widens the spreads until `coverage` of each adapter's texts reach the score `least`; no spread becomes
        smaller.
        """
        needed = self._distances(features, owners) * least.to(features).exp()
        spreads = self.spreads.clone()
        for owner in owners.unique().tolist():
            spreads[owner] = torch.maximum(spreads[owner], needed[owners == owner].quantile(coverage))
        return Nearness(self.whiten, self.centres, spreads)

    def only(self, kept: list[int]) -> "Nearness":
        """Keeps some of the adapters."""
        return Nearness(self.whiten, self.centres[kept], self.spreads[kept])

    def _distances(
        self, features: Float[Tensor, "batch hidden"], owners: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        return (features.float() @ self.whiten - self.centres[owners]).square().sum(dim=1)
