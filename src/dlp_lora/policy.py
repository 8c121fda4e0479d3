"""Fusion policies: router probabilities in, a Mixture of adapters out (section 3.2, Eqs. 4 and 5)."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from dlp_lora.errors import RouterError

Weighting = Literal["renormalised", "paper"]
KVPolicy = Literal["keep", "recompute"]
Unsure = Literal["base", "keep", "likeliest"]
PromptRouting = Literal["whole", "questions", "apart", "sentences"]

# Probabilities are float32 sums: 0.3 + 0.3 reaches p = 0.6, and so does 0.59999999.
TOLERANCE = 1e-6


class Mixture(Mapping[str, float]):
    """Which adapters are fused, and how much of each: adapter name to weight, heaviest first.

    An empty mixture is the base model alone. Weights may be any finite numbers; the policies here
    return weights that sum to 1. Immutable and hashable.

    `left_out` names adapters that were chosen but had no room. Two mixtures may be equal and differ in it.

    >>> Mixture({"units": 0.4, "math": 0.6})
    Mixture(math=0.6, units=0.4)
    """

    __slots__ = ("_weights", "left_out")

    def __init__(self, weights: Mapping[str, float] | None = None, *, left_out: Sequence[str] = ()) -> None:
        weights = dict(weights or {})
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"the weight of adapter {name!r} must be a finite number, got {weight!r}")
        self._weights = {n: float(w) for n, w in sorted(weights.items(), key=lambda nw: -nw[1])}
        self.left_out = tuple(left_out)

    def __getitem__(self, name: str) -> float:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __hash__(self) -> int:
        return hash(frozenset(self._weights.items()))

    def __repr__(self) -> str:
        return f"Mixture({', '.join(f'{n}={w:.3g}' for n, w in self.items())})"


@runtime_checkable
class FusionPolicy(Protocol):
    """Turns a probability per adapter name into a mixture; an empty mixture abstains.

    It is asked where some adapter fits, or where its method `ignores_router(names)`, if it has one, is true.
    """

    def __call__(self, probabilities: Mapping[str, float]) -> Mixture: ...


@dataclass(frozen=True, kw_only=True)
class _Weighted:
    """The weights of selected adapters, and the confidence below which the policy selects none."""

    # "renormalised" is p_i / sum(p). "paper" is Eq. 5, a softmax of probabilities rather than of logits, which
    # squeezes any pair into [0.5, 0.73]: an adapter of probability 0.01 gets more than a quarter.
    weighting: Weighting = "renormalised"
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {get_args(Weighting)}, got {self.weighting!r}")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must be in [0, 1], got {self.min_confidence}")

    def _mix(self, selected: Mapping[str, float]) -> Mixture:
        if not selected or max(selected.values()) < self.min_confidence:
            return Mixture()
        scores = {n: math.exp(p) if self.weighting == "paper" else p for n, p in selected.items()}
        total = math.fsum(scores.values())
        # p = 1 also selects adapters of probability 0; an adapter without weight is not fused.
        return Mixture({n: score / total for n, score in scores.items() if score > 0})


@dataclass(frozen=True)
class TopP(_Weighted):
    """Fuses the smallest set of most likely adapters whose probabilities reach `p`; always at least one.

    The paper's text and code (nucleus selection, p = 0.6). Ties go to the adapter named first.
    """

    p: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"TopP.p must be in (0, 1], got {self.p}")

    def __call__(self, probabilities: Mapping[str, float]) -> Mixture:
        selected: dict[str, float] = {}
        mass = 0.0
        for name, p in _ranked(probabilities):
            # An adapter stays if the mass before it is still short of p, so one always stays.
            if selected and mass >= self.p - TOLERANCE:
                break
            selected[name] = p
            mass += p
        return self._mix(selected)


@dataclass(frozen=True)
class Threshold(_Weighted):
    """Fuses every adapter whose probability is at least `p`, as in Eq. 4; this may be none."""

    p: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"Threshold.p must be in (0, 1], got {self.p}")

    def __call__(self, probabilities: Mapping[str, float]) -> Mixture:
        return self._mix({n: p for n, p in _ranked(probabilities) if p >= self.p})


@dataclass(frozen=True)
class TopK(_Weighted):
    """Fuses the `k` most likely adapters. Ties go to the adapter named first."""

    k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopK.k must be a whole number of at least 1, got {self.k}")

    def __call__(self, probabilities: Mapping[str, float]) -> Mixture:
        return self._mix(dict(_ranked(probabilities)[: self.k]))


@dataclass(frozen=True)
class Only:
    """Fuses one adapter at weight 1 and ignores the router: the task's adapter, as an oracle."""

    name: str

    def __call__(self, probabilities: Mapping[str, float]) -> Mixture:
        if self.name not in probabilities:
            raise ValueError(f"Only({self.name!r}): no such adapter; there are {', '.join(sorted(probabilities))}")
        return Mixture({self.name: 1.0})

    def ignores_router(self, names: Collection[str]) -> bool:
        """Whether it chooses among these adapters even if the router says that none fits."""
        return self.name in names


@dataclass(frozen=True)
class Uniform:
    """Fuses every adapter with the same weight and ignores the router: an ablation."""

    def __call__(self, probabilities: Mapping[str, float]) -> Mixture:
        return Mixture(dict.fromkeys(probabilities, 1 / len(probabilities))) if probabilities else Mixture()

    def ignores_router(self, names: Collection[str]) -> bool:
        """Whether it chooses among these adapters even if the router says that none fits."""
        return True


@dataclass(frozen=True, kw_only=True)
class Switching:
    """When the beginning of a sentence may change the mixture.

    The mixture stays if the last sentence is shorter than `min_tokens`. It also stays if the most likely adapter is not
    at least `margin` more probable than the heaviest one in use. If no adapter fits, `unsure` decides: "base" uses the
    base model, "keep" keeps the mixture in use, and "likeliest" uses the most likely adapters anyway.
    """

    min_tokens: int = 1
    margin: float = 0.2
    unsure: Unsure = "base"

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise ValueError(f"Switching.min_tokens must be at least 1, got {self.min_tokens}")
        if not 0 <= self.margin <= 1:
            raise ValueError(f"Switching.margin must be in [0, 1], got {self.margin}")
        if self.unsure not in get_args(Unsure):
            raise ValueError(f"Switching.unsure must be one of {get_args(Unsure)}, got {self.unsure!r}")


@dataclass(frozen=True, kw_only=True)
class RoutingSettings:
    """The settings of routing that `load`, `generate`, `using`, bundles and commands share.

    `policy` turns probabilities into a mixture. `switching` says when a new sentence may change the mixture.
    `kv_policy` is about the tokens before a switch: "recompute" encodes the whole context again under the new mixture;
    "keep" leaves the tokens as they were encoded. `prompt_routing` is about prompts with several questions. "apart"
    answers each question in a separate context; if a question needs another one, it does as "questions". "questions"
    routes each line of the answer by its question. "whole" routes the prompt as one text. "sentences" also encodes each
    sentence of the prompt under its own mixture.
    """

    policy: FusionPolicy = TopP()
    switching: Switching = Switching()
    kv_policy: KVPolicy = "recompute"
    prompt_routing: PromptRouting = "apart"

    def __post_init__(self) -> None:
        for name, choices in (("kv_policy", get_args(KVPolicy)), ("prompt_routing", get_args(PromptRouting))):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
        for name, kind in (("policy", FusionPolicy), ("switching", Switching)):
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The settings' names."""
        return tuple(field.name for field in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """Gives the settings as JSON data.

        Raises:
            ValueError: if the policy is not of this module, because only these can be saved by name.
        """
        data = {name: getattr(self, name) for name in self.names()}
        return {**data, "policy": policy_to_dict(self.policy), "switching": asdict(self.switching)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "RoutingSettings":
        """Reads the data of `to_dict`.

        Raises:
            ValueError, TypeError, KeyError: if the data are wrong.
        """
        parts = {"policy": policy_from_dict(data["policy"]), "switching": Switching(**data["switching"])}
        return cls(**{**data, **parts})


POLICIES: dict[str, type] = {cls.__name__: cls for cls in (TopP, Threshold, TopK, Only, Uniform)}


def choose(policy: FusionPolicy, row: Mapping[str, float], unsure: Unsure = "base") -> tuple[dict[str, float], Mixture]:
    """Applies a policy to a router's row; returns probabilities that sum to 1, and the mixture.

    The row may sum to less than 1: the rest is the probability that no adapter fits. If the rest is half or more, the
    mixture is empty, unless `unsure` is "likeliest". A row of zeros, for an empty text, gives an empty mixture, too.
    Policies that ignore the router (`ignores_router`) choose all the same.

    Raises:
        RouterError: if a number of the row is not a probability.
    """
    if not all(0 <= p <= 1 + TOLERANCE for p in row.values()):  # false for NaN, too
        name = next(name for name, p in row.items() if not 0 <= p <= 1 + TOLERANCE)
        raise RouterError(f"the router gave {name} {row[name]}, expected a number from 0 to 1; train it again")
    fits = math.fsum(row.values())
    sums_to_1 = fits <= 0 or abs(fits - 1) < TOLERANCE
    probabilities = dict(row) if sums_to_1 else {name: p / fits for name, p in row.items()}
    is_asked = fits > (0 if unsure == "likeliest" else 0.5) or ignores_router(policy, row)
    return probabilities, policy(probabilities) if is_asked else Mixture()


def ignores_router(policy: FusionPolicy, names: Collection[str]) -> bool:
    """Whether a policy chooses among these adapters even if the router says that none fits, as its method of this name
    says; without one, it does not.
    """
    found = getattr(policy, "ignores_router", None)
    return found is not None and bool(found(names))


def mixture_of(text: str) -> Mixture:
    """Reads "math=0.6,units=0.4"; a name alone has weight 1, and an empty text is the base model."""
    mixture: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, weight = part.partition("=")
        name = name.strip()
        if name in mixture:
            raise ValueError(f"{name!r} is in the mixture twice; give each adapter one weight")
        try:
            mixture[name] = float(weight if sign else 1)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f'{part!r} is not NAME=WEIGHT; write for example "math=0.6,units=0.4"')
    return Mixture(mixture)


def with_p(policy: FusionPolicy, p: float) -> TopP:
    """Changes the `p` of a top-p policy; replaces any other policy by top-p."""
    return replace(policy, p=p) if isinstance(policy, TopP) else TopP(p)


def policy_to_dict(policy: FusionPolicy) -> dict[str, Any]:
    """Writes one of the policies of this module as JSON data."""
    if type(policy) not in POLICIES.values():
        raise ValueError(f"{type(policy).__name__} is not one of {', '.join(POLICIES)}; it cannot be saved by name")
    return {"type": type(policy).__name__, **asdict(policy)}  # type: ignore[call-overload]


EXPECTED: Mapping[Any, tuple[Any, str]] = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a string"),
}


def policy_from_dict(data: Mapping[str, Any]) -> FusionPolicy:
    """Reads the data of `policy_to_dict`.

    Raises:
        ValueError: if there is no such policy, or it has no such settings.
    """
    settings = dict(data)
    name = settings.pop("type", None)
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
    kinds = {field.name: field.type for field in fields(POLICIES[name])}
    for key, value in settings.items():
        if key not in kinds:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(kinds) or 'none'}")
        expected, what = EXPECTED.get(kinds[key], (object, ""))
        if not isinstance(value, expected) or (expected is not object and isinstance(value, bool)):
            raise ValueError(f"{name}.{key} must be {what}, got {value!r}")
    if missing := [key for key in kinds if kinds[key] is str and key not in settings]:
        raise ValueError(f"{name} needs its {missing[0]}")
    policy: FusionPolicy = POLICIES[name](**settings)
    return policy


def _ranked(probabilities: Mapping[str, float]) -> list[tuple[str, float]]:
    for name, p in probabilities.items():
        if not 0 <= p <= 1 + TOLERANCE:  # false for NaN too
            raise ValueError(f"the router gave adapter {name!r} the probability {p}, which is not in [0, 1]")
    return sorted(probabilities.items(), key=lambda np: -np[1])
