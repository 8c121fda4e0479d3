"""PrototypeRouter: no training at all. A frozen sentence encoder, and the mean vector of a few texts per adapter.

What people ask every day (`everyday.json`) stands for all that no adapter is for: a text fits an adapter if it lies as
near to it as the adapter's texts do, and nearer than to those.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlp_lora.errors import RouterError
from dlp_lora.files import parse_json
from dlp_lora.router.context import Calibration, Context, check_labels, fit_temperature, has_text, listed
from dlp_lora.router.encoder import TextEncoder
from dlp_lora.router.everyday import Threshold, everyday_prompts
from dlp_lora.router.folder import SavedRouter, reading_router, write_router

TEMPERATURE = 0.05
MIN_TEXTS = 8  # fewer that can be left out say little about a temperature
BATCH_SIZE = 32
TINY = 1e-3  # of a cosine: where all texts of an adapter are one


class PrototypeRouter(nn.Module):
    """Routes by cosine: the adapter whose nearest prototype lies closest to the text wins.

    A prototype is the mean of texts' unit vectors, itself a unit vector. Probabilities are the softmax of
    cosine / temperature. It reads a context as one text (`Context.text`); blank text fits none.

    With `fit` it may say that none fits. The score for that is how much nearer the text lies to its adapter than to any
    everyday prompt, and, where adapters have examples, how near that is for texts of this adapter.
    """

    prototypes: Tensor
    owners: Tensor
    fit: "Fit | None"

    def __init__(
        self,
        names: Sequence[str],
        encoder: TextEncoder,
        prototypes: Float[Tensor, "prototypes dim"],
        owners: Int[Tensor, " prototypes"],
        *,
        temperature: float = TEMPERATURE,
        fit: "Fit | None" = None,
    ) -> None:
        """Puts prototypes into use; `owners[i]` is the place in `names` of prototype i's adapter."""
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"a router's temperature must be positive, got {temperature}")
        self.names = check_labels(names)
        if set(owners.tolist()) != set(range(len(self.names))):
            raise RouterError(f"each of {', '.join(self.names)} needs a prototype, and each prototype one of them")
        self.encoder = encoder
        self.temperature = temperature
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("owners", owners)
        self.fit = fit

    @classmethod
    def from_texts(
        cls,
        texts: Mapping[str, str | Sequence[str]],
        encoder: TextEncoder | str | Path,
        *,
        num_prototypes: int = 1,
        temperature: float | None = None,
        everyday: Sequence[str] | None = None,
    ) -> "PrototypeRouter":
        """Makes a router from a description, or a few example texts, of each adapter.

        Args:
            encoder: a folder or hub id of any sentence encoder that is mean-pooled, or one in memory.
            num_prototypes: how many an adapter has at most; its texts are clustered into so many.
            temperature: if not given, it is fitted by leaving out one text at a time, where at least two adapters
                have several texts and these are 8 or more; else it is 0.05.
            everyday: prompts that no adapter is for, by which it learns to say so; by default those of `everyday.json`.

        Raises:
            RouterError: if there is no adapter, or one has no text.
        """
        if not isinstance(encoder, TextEncoder):
            encoder = TextEncoder.from_pretrained(encoder)
        return cls.from_units(
            {name: _embed_all(encoder, _own_texts(name, own)) for name, own in texts.items()},
            encoder,
            num_prototypes=num_prototypes,
            temperature=temperature,
            everyday=_embed_all(encoder, everyday_prompts() if everyday is None else everyday),
        )

    @classmethod
    def from_units(
        cls,
        texts: Mapping[str, Float[Tensor, "texts dim"]],
        encoder: TextEncoder,
        *,
        everyday: Float[Tensor, "prompts dim"],
        num_prototypes: int = 1,
        temperature: float | None = None,
    ) -> "PrototypeRouter":
        """Makes a router as `from_texts` does, from the unit vectors that the encoder gives the texts (`embed`)."""
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes must be at least 1, got {num_prototypes}")
        names = check_labels(sorted(texts))
        clusters: list[Tensor] = []
        owners: list[int] = []
        for owner, name in enumerate(names):
            assigned = _cluster(texts[name], num_prototypes)
            clusters.append(assigned + len(owners))
            owners += [owner] * (int(assigned.max()) + 1)
        units, assigned, owned = torch.cat([texts[name] for name in names]), torch.cat(clusters), torch.tensor(owners)
        sums = torch.zeros(len(owned), encoder.dim).index_add(0, assigned, units)
        labels = owned[assigned]
        cosines = _nearest(_without_itself(units, assigned, sums), owned, len(names))
        # A single text has no other to be compared with.
        among = labels.bincount()[labels] > 1
        cosines, labels = cosines[among], labels[among]
        if temperature is None:
            temperature = _fit_temperature(cosines, labels)
        prototypes = F.normalize(sums, dim=-1)
        fit = Fit.of(units[among], cosines, labels, everyday, _nearest(everyday @ prototypes.T, owned, len(names)))
        router = cls(names, encoder, prototypes, owned, temperature=temperature, fit=fit)
        return router.to(encoder.model.device).eval()

    @torch.no_grad()
    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]:
        """Gives a probability per adapter, on the CPU."""
        return self.of_units(self._units(contexts)) * has_text(contexts)[:, None]

    def of_units(self, units: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch adapters"]:
        """Gives a probability per adapter, on the CPU, for the unit vectors of texts."""
        cosines = self._cosines(units)
        calibration = Calibration(temperature=self.temperature)
        if self.fit is None:
            return calibration.probabilities(cosines)
        threshold = self.fit.threshold
        calibration = replace(calibration, fit_threshold=threshold.at, fit_slope=threshold.slope)
        return calibration.probabilities(cosines, self.fit(units, cosines))

    @torch.no_grad()
    def scores(self, contexts: Sequence[Context]) -> Float[Tensor, " batch"]:
        """Says how surely a text belongs to any of the adapters; higher is surer."""
        units = self._units(contexts)
        cosines = self._cosines(units)
        return cosines.amax(dim=-1).cpu() if self.fit is None else self.fit(units, cosines)

    def _units(self, contexts: Sequence[Context]) -> Float[Tensor, "batch dim"]:
        # One by one: beside longer texts padding would shift the last digits, which the temperature multiplies.
        return torch.cat([embed(self.encoder, [context.text]) for context in contexts])

    def _cosines(self, units: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch adapters"]:
        return _nearest(units @ self.prototypes.T, self.owners, len(self.names))

    def __repr__(self) -> str:
        return f"PrototypeRouter({listed(self.names)}; {len(self.prototypes)} prototypes)"

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the router to a folder, the encoder with it; the folder is replaced as a whole."""
        write_router(
            path,
            SavedRouter(
                type="prototypes",
                names=self.names,
                settings={
                    "temperature": self.temperature,
                    "fit": None if self.fit is None else self.fit.settings,
                    **self.encoder.settings,
                },
                weights=self.state_dict(),
                tokenizer=self.encoder.tokenizer,
            ),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "PrototypeRouter":
        """Reads a folder that `save_pretrained` wrote.

        Raises:
            RouterError: if a file is missing or damaged, or the router is of another type or a later version.
        """
        with reading_router(path, "prototypes") as saved:
            router = cls(
                saved.names,
                TextEncoder.from_settings(saved.settings, saved.tokenizer),
                saved.weights["prototypes"],
                saved.weights["owners"],
                temperature=saved.settings["temperature"],
            )
            if settings := saved.settings.get("fit"):  # earlier versions never abstained
                threshold = Threshold(**settings["threshold"])
                weights = [saved.weights[f"fit.{name}"] for name in FIT_WEIGHTS]
                router.fit = Fit(*weights, margin=settings["margin"], threshold=threshold)
            router.load_state_dict(saved.weights)
        return router.eval()


FIT_WEIGHTS = ("everyday", "typical", "spreads")


class Fit(nn.Module):
    """How well a text fits its adapter: nearer than everyday prompts lie, and as near as the adapter's texts."""

    everyday: Float[Tensor, "prompts dim"]
    typical: Float[Tensor, " adapters"]
    spreads: Float[Tensor, " adapters"]

    def __init__(
        self,
        everyday: Float[Tensor, "prompts dim"],
        typical: Float[Tensor, " adapters"],
        spreads: Float[Tensor, " adapters"],
        *,
        margin: float,
        threshold: Threshold,
    ) -> None:
        """`typical` and `spreads` are mean and deviation of the cosines of each adapter's texts; without examples the
        spreads are infinite. `margin` is the deviation of a text's cosine to its adapter less that to everyday prompts.
        """
        super().__init__()
        for name, tensor in zip(FIT_WEIGHTS, (everyday, typical, spreads), strict=True):
            self.register_buffer(name, tensor)
        self.margin, self.threshold = margin, threshold

    @classmethod
    def of(
        cls,
        units: Float[Tensor, "texts dim"],
        cosines: Float[Tensor, "texts adapters"],
        labels: Int[Tensor, " texts"],
        everyday: Float[Tensor, "prompts dim"],
        everyday_cosines: Float[Tensor, "prompts adapters"],
    ) -> "Fit":
        """Fits it to texts, with cosines to prototypes that were made without them, and to everyday prompts."""
        others = (everyday @ everyday.T).fill_diagonal_(-1.0).amax(dim=-1)
        nearest = (units @ everyday.T).amax(dim=-1)
        has_examples = len(labels) >= MIN_TEXTS
        typical, spreads = _spread(cosines, labels, has_examples=has_examples)
        gaps = cosines.amax(dim=-1) - nearest if has_examples else everyday_cosines.amax(dim=-1) - others
        fit = cls(
            everyday, typical, spreads, margin=max(float(gaps.std()), TINY), threshold=Threshold(at=0.0, slope=1.0)
        )
        inside = fit._scores(cosines, nearest) if has_examples else cosines.new_zeros(0)
        fit.threshold = Threshold.between(inside, fit._scores(everyday_cosines, others))
        return fit

    def forward(
        self, units: Float[Tensor, "batch dim"], cosines: Float[Tensor, "batch adapters"]
    ) -> Float[Tensor, " batch"]:
        """Gives the scores, on the CPU."""
        return self._scores(cosines, (units @ self.everyday.T).amax(dim=-1)).cpu()

    @property
    def settings(self) -> dict[str, Any]:
        """What is no tensor, as JSON data."""
        return {"margin": self.margin, "threshold": asdict(self.threshold)}

    def _scores(
        self, cosines: Float[Tensor, "batch adapters"], nearest: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        best, owners = cosines.max(dim=-1)
        return (best - self.typical[owners]) / self.spreads[owners] + (best - nearest) / self.margin


@torch.no_grad()
def embed(encoder: TextEncoder, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
    """Gives the unit vectors of texts."""
    return F.normalize(encoder([encoder.frame(ids) for ids in encoder.encode_all(texts)]), dim=-1)


def _embed_all(encoder: TextEncoder, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
    return torch.cat([embed(encoder, texts[i : i + BATCH_SIZE]).cpu() for i in range(0, len(texts), BATCH_SIZE)])


def read_descriptions(file: str | Path) -> dict[str, str | list[str]]:
    """Reads a JSON file that describes each adapter: by a sentence, or by a few examples of what it is asked.

    Raises:
        RouterError: if it is something else.
    """
    try:
        texts = parse_json(Path(file).read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RouterError(f"{file} is not JSON: {error}") from error
    except ValueError as error:
        raise RouterError(f"{file}: {error}") from error
    if not isinstance(texts, dict) or not all(isinstance(value, str | list) for value in texts.values()):
        raise RouterError(f'{file} does not hold {{"name": "description" or ["example", ...]}}')
    return texts


def _own_texts(name: str, texts: str | Sequence[str]) -> list[str]:
    own = [texts] if isinstance(texts, str) else list(texts)
    if not own or not all(isinstance(text, str) and text.strip() for text in own):
        raise RouterError(f"{name!r} has {own or 'no text'}; give it a description or a list of examples, none blank")
    return own


def _nearest(
    cosines: Float[Tensor, "batch prototypes"], owners: Int[Tensor, " prototypes"], num_adapters: int
) -> Float[Tensor, "batch adapters"]:
    lowest = cosines.new_full((len(cosines), num_adapters), -1.0)
    return lowest.scatter_reduce(1, owners.expand_as(cosines), cosines, "amax")


def _cluster(units: Float[Tensor, "texts dim"], num: int, *, rounds: int = 10) -> Int[Tensor, " texts"]:
    """Spherical k-means, begun with texts far from each other; clusters that come out empty are left out."""
    chosen = [0]
    while len(chosen) < min(num, len(units)):
        chosen.append(int((units @ units[chosen].T).amax(dim=1).argmin()))
    centres = units[chosen]
    for _ in range(rounds):
        assigned = (units @ centres.T).argmax(dim=1)
        sums = torch.zeros_like(centres).index_add(0, assigned, units)
        centres = F.normalize(sums, dim=-1)
    used: tuple[Tensor, Tensor] = assigned.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return used[1]


def _without_itself(
    units: Float[Tensor, "texts dim"], clusters: Int[Tensor, " texts"], sums: Float[Tensor, "prototypes dim"]
) -> Float[Tensor, "texts prototypes"]:
    """Each text's cosines to prototypes that were made without it."""
    cosines = units @ F.normalize(sums, dim=-1).T
    rest = sums[clusters] - units
    # A prototype of this text alone is gone with it.
    alone = clusters.bincount()[clusters] == 1
    rows = torch.arange(len(units))
    cosines[rows, clusters] = (units * F.normalize(rest, dim=-1)).sum(dim=-1).masked_fill(alone, -1.0)
    return cosines


def _fit_temperature(cosines: Float[Tensor, "texts adapters"], labels: Int[Tensor, " texts"]) -> float:
    if len(labels) < MIN_TEXTS or len(labels.unique()) < 2:
        return TEMPERATURE
    return fit_temperature(cosines, labels, torch.logspace(-1.7, 0, 86))


def _spread(
    cosines: Float[Tensor, "texts adapters"], labels: Int[Tensor, " texts"], *, has_examples: bool
) -> tuple[Float[Tensor, " adapters"], Float[Tensor, " adapters"]]:
    """Mean and deviation of the cosines of each adapter's texts to it; the latter shrunk to that of all texts."""
    num_adapters = cosines.shape[1]
    if not has_examples:
        return torch.zeros(num_adapters), torch.full((num_adapters,), torch.inf)
    found = cosines[torch.arange(len(labels)), labels]
    typical, spreads = found.mean().repeat(num_adapters), found.std().repeat(num_adapters)
    for owner in labels.unique().tolist():
        texts = found[labels == owner]
        typical[owner] = texts.mean()
        spreads[owner] = (texts.std() + spreads[owner]) / 2
    return typical, spreads.clamp(min=TINY)
