"""Nearness: how near a text lies to those that a router learned, so that it can tell when no adapter fits."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

RIDGE = 0.1  # of the features' mean variance, added to each
DIRECTIONS = 128  # in which the features vary most; the others say little of fit and cost time
TINY = 1e-6  # where all texts of an adapter are one


class Nearness(nn.Module):
    """Minus the log of the squared Mahalanobis distance from features to the nearest adapter's mean (Lee et al. 2018,
    arXiv 1807.03888), over what it is for that adapter's own texts on average. So adapters of manifold texts reach
    further.

    One covariance for all, along its principal directions. It is fitted once; an adapter that joins later has a mean
    and a spread of its own, and changes nothing for the others.
    """

    whiten: Float[Tensor, "hidden directions"]  # Euclidean distance between what it maps to is Mahalanobis'
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
        """Fits it to some texts of each adapter."""
        features = features.double()
        means = features.mean(dim=1)
        gaps = features - means[:, None]
        flat = gaps.flatten(0, 1)
        variances, directions = torch.linalg.eigh(flat.T @ flat / len(flat))
        widths = (variances + RIDGE * variances.mean() + TINY).sqrt()
        whiten = (directions / widths)[:, -DIRECTIONS:].contiguous()  # the eigenvalues ascend
        spreads = (gaps @ whiten).square().sum(dim=-1).mean(dim=-1) + TINY
        return cls(whiten.float(), (means @ whiten).float(), spreads.float())

    def forward(self, features: Float[Tensor, "batch hidden"]) -> Float[Tensor, " batch"]:
        """Gives the scores, on the CPU; higher is nearer."""
        # Without a product: of a few rows it takes a third of the time.
        distances = torch.cdist(
            features.float() @ self.whiten, self.centres, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return -(distances.square() / self.spreads).amin(dim=1).clamp(min=1e-12).log().cpu()

    def joined(
        self,
        features: Float[Tensor, "adapters texts hidden"],
        least: Float[Tensor, "adapters texts"],
        *,
        coverage: float,
    ) -> "Nearness":
        """Takes in adapters that joined later, each reaching so far that `coverage` of its texts score `least`."""
        mapped = features.float() @ self.whiten
        centres = mapped.mean(dim=1)
        distances = (mapped - centres[:, None]).square().sum(dim=-1)  # (adapters, texts)
        spreads = (distances * least.exp()).quantile(coverage, dim=1) + TINY
        return Nearness(self.whiten, torch.cat([self.centres, centres]), torch.cat([self.spreads, spreads]))

    def only(self, kept: list[int]) -> "Nearness":
        """Keeps some of the adapters."""
        return Nearness(self.whiten, self.centres[kept], self.spreads[kept])
