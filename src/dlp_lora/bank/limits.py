"""Limits: any mixture in, a mixture that fits into slots of fixed rank out."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction

from dlp_lora.policy import FusionPolicy, Mixture, ignores_router

PARTS = 64  # weights are whole multiples of its inverse, so that nearly equal mixtures are the same


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a mixture: weights of whole 64ths, and a sum of ranks of at most `max_rank`."""

    max_rank: int
    rank_of: Callable[[str], int]

    def fit(self, mixture: Mixture) -> Mixture:
        """Returns the nearest mixture within the limits. The lightest adapters are left out until the others fit; the
        others then share the weight.
        """
        names = list(mixture)  # heaviest first
        while len(names) > 1 and sum(map(self.rank_of, names)) > self.max_rank:
            names.pop()
        kept = {name: mixture[name] for name in names}
        if len(kept) == len(mixture):
            return rounded(mixture)
        share = math.fsum(mixture.values()) / math.fsum(kept.values())
        left_out = [name for name in mixture if name not in kept]
        return Mixture(rounded({name: weight * share for name, weight in kept.items()}), left_out=left_out)

    def check(self, mixture: Mixture) -> Mixture:
        """Rounds a mixture that a caller fixed.

        Raises:
            ValueError: if its rank is too large.
        """
        if (rank := sum(map(self.rank_of, mixture))) > self.max_rank:
            raise ValueError(
                f"the adapters of {dict(mixture)} have a rank of {rank} together, and this server takes "
                f"{self.max_rank}; ask for fewer, or start it with --max-rank {rank}"
            )
        return rounded(mixture)


@dataclass(frozen=True)
class Within:
    """A policy whose mixtures are fitted into limits."""

    policy: FusionPolicy
    limits: Limits

    def __call__(self, probabilities: Mapping[str, float]) -> Mixture:
        return self.limits.fit(self.policy(probabilities))

    def ignores_router(self, names: Collection[str]) -> bool:
        """Whether the policy chooses among these adapters even if the router says that none fits."""
        return ignores_router(self.policy, names)


def rounded(weights: Mapping[str, float]) -> Mixture:
    """Rounds weights to whole 64ths by the largest remainder: their sum stays, and none becomes zero."""
    return Mixture({name: units / PARTS for name, units in parts(weights).items()})


def parts(weights: Mapping[str, float]) -> dict[str, int]:
    """Gives weights as whole numbers of 64ths."""
    # Fractions, because a sum of floats may lose small weights beside large ones.
    exact = {name: Fraction(weight) * PARTS for name, weight in weights.items() if weight}
    if not all(share > 0 for share in exact.values()):
        return {name: round(share) or (1 if share > 0 else -1) for name, share in exact.items()}
    units = {name: max(1, math.floor(share)) for name, share in exact.items()}
    total = max(round(sum(exact.values())), len(exact))
    while (missing := total - sum(units.values())) != 0:
        # The weight that is furthest above its share and not yet the smallest; the first of equal ones.
        step = 1 if missing > 0 else -1
        name = max((n for n in units if units[n] + step >= 1), key=lambda n: step * (exact[n] - units[n]))
        units[name] += step
    return units
