"""PrototypeRouter: a frozen sentence encoder, and the mean vector of a few texts per adapter; no training.

Everyday prompts (`everyday.json`) take the place of foreign texts. A text fits an adapter if it is as near to it as the
adapter's texts are, and nearer than to everyday prompts.
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
MIN_TEXTS = 8  # with fewer texts the temperature is too uncertain
BATCH_SIZE = 32
TINY = 1e-3  # of a cosine, for adapters whose texts are all the same


class PrototypeRouter(nn.Module):
    """Routes by cosine: the adapter with the prototype nearest to the text wins.

    A prototype is the normalised mean of texts' unit vectors. Probabilities are the softmax of cosine / temperature.
    The router reads a context as one text (`Context.text`); a blank text fits no adapter.

    With `fit`, the router may find that no adapter fits. The score compares the nearness of the text to its adapter
    with its nearness to any everyday prompt, and, if there are examples, with the nearness of the adapter's texts.
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
        """`owners[i]` is the index in `names` of prototype i's adapter."""
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
            num_prototypes: the largest number of an adapter's prototypes; its texts are clustered into so many.
            temperature: by default it is fitted, with one text left out at a time, if at least two adapters have
                several texts and these are 8 or more; otherwise it is 0.05.
            everyday: at least two prompts that fit no adapter, for the threshold; by default those of `everyday.json`.

        Raises:
            RouterError: if there is no adapter, or one has no text.
            ValueError: if there are fewer than two everyday prompts.
        """
        everyday = everyday_prompts() if everyday is None else everyday
        _check_everyday(len(everyday))
        if not isinstance(encoder, TextEncoder):
            encoder = TextEncoder.from_pretrained(encoder)
        return cls.from_units(
            {name: _embed_all(encoder, _as_texts(name, examples)) for name, examples in texts.items()},
            encoder,
            num_prototypes=num_prototypes,
            temperature=temperature,
            everyday=_embed_all(encoder, everyday),
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
        """Makes a router as `from_texts` does, from the unit vectors of the texts (`embed`)."""
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes must be at least 1, got {num_prototypes}")
        _check_everyday(len(everyday))
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
        # An adapter with a single text has no other text for comparison.
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
        return torch.cat([self.of_units(unit) for unit in self._units(contexts)]) * has_text(contexts)[:, None]

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
        """Scores how surely a text belongs to any of the adapters; higher is surer."""
        return torch.cat([self._score(unit) for unit in self._units(contexts)])

    def _score(self, unit: Float[Tensor, "1 dim"]) -> Float[Tensor, " 1"]:
        cosines = self._cosines(unit)
        return cosines.amax(dim=-1).cpu() if self.fit is None else self.fit(unit, cosines)

    def _units(self, contexts: Sequence[Context]) -> list[Float[Tensor, "1 dim"]]:
        # One by one, and so are their products with the prototypes: beside other texts the last digits shift, which
        # the temperature multiplies.
        return [embed(self.encoder, [context.text]) for context in contexts]

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
    """Scores how well a text fits its adapter: nearer than to everyday prompts, and as near as the adapter's texts."""

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
        spreads are infinite. `margin` is the deviation of this difference: a text's cosine to its adapter minus its
        largest cosine to an everyday prompt.
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
        """Fits the numbers to everyday prompts and to texts; each text's cosines are to prototypes made without it."""
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
        """The numbers that are not tensors, as JSON data."""
        return {"margin": self.margin, "threshold": asdict(self.threshold)}

    def _scores(
        self, cosines: Float[Tensor, "batch adapters"], nearest: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        best, owners = cosines.max(dim=-1)
        return (best - self.typical[owners]) / self.spreads[owners] + (best - nearest) / self.margin


def _check_everyday(num: int) -> None:
    if num < 2:
        raise ValueError(
            f"a threshold takes at least 2 everyday prompts, got {num}; leave `everyday` out for the default"
        )


@torch.no_grad()
def embed(encoder: TextEncoder, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
    """Gives the unit vectors of texts."""
    return F.normalize(encoder([encoder.frame(ids) for ids in encoder.encode_all(texts)]), dim=-1)


def _embed_all(encoder: TextEncoder, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
    return torch.cat([embed(encoder, texts[i : i + BATCH_SIZE]).cpu() for i in range(0, len(texts), BATCH_SIZE)])


def read_descriptions(file: str | Path) -> dict[str, str | list[str]]:
    """Reads a JSON file that describes each adapter: by a sentence, or by a few examples of its prompts.

    Raises:
        RouterError: if the file is damaged or has another form.
    """
    try:
        texts = parse_json(Path(file).read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RouterError(f"{file} is not JSON: {error}") from error
    except ValueError as error:
        raise RouterError(f"{file}: {error}") from error
    if not isinstance(texts, dict) or not all(isinstance(value, str | list) for value in texts.values()):
        raise RouterError(f'{file} does not hold {{"name": "description" or ["example", ...]}}')
    return texts


def _as_texts(name: str, examples: str | Sequence[str]) -> list[str]:
    texts = [examples] if isinstance(examples, str) else list(examples)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RouterError(f"{name!r} has {texts or 'no text'}; give it a description or a list of examples, none blank")
    return texts


def _nearest(
    cosines: Float[Tensor, "batch prototypes"], owners: Int[Tensor, " prototypes"], num_adapters: int
) -> Float[Tensor, "batch adapters"]:
    lowest = cosines.new_full((len(cosines), num_adapters), -1.0)
    return lowest.scatter_reduce(1, owners.expand_as(cosines), cosines, "amax")


def _cluster(units: Float[Tensor, "texts dim"], num: int, *, rounds: int = 10) -> Int[Tensor, " texts"]:
    """Spherical k-means; it starts with texts far from each other and leaves out empty clusters."""
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
    # Without its only text, a prototype does not exist.
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
    """Mean and deviation of the cosines of each adapter's texts to it; the latter shrunk to that of all texts, and
    infinite for an adapter with one text.
    """
    num_adapters = cosines.shape[1]
    typical, spreads = torch.zeros(num_adapters), torch.full((num_adapters,), torch.inf)
    if not has_examples:
        return typical, spreads
    likeness = cosines[torch.arange(len(labels)), labels]
    for owner in labels.unique().tolist():
        texts = likeness[labels == owner]
        typical[owner] = texts.mean()
        spreads[owner] = (texts.std() + likeness.std()) / 2
    return typical, spreads.clamp(min=TINY)
