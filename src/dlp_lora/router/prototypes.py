"""PrototypeRouter: no training at all. A frozen sentence encoder, and the mean vector of a few texts per adapter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dlp_lora.errors import RouterError
from dlp_lora.files import parse_json
from dlp_lora.router.context import Context, check_labels, has_text, listed
from dlp_lora.router.encoder import TextEncoder
from dlp_lora.router.folder import SavedRouter, reading_router, write_router

TEMPERATURE = 0.05
MIN_TEXTS = 8  # fewer that can be left out say little about a temperature
BATCH_SIZE = 32


class PrototypeRouter(nn.Module):
    """Routes by cosine: the adapter whose nearest prototype lies closest to the text wins.

    A prototype is the mean of texts' unit vectors, itself a unit vector. Probabilities are the softmax of
    cosine / temperature. It reads a context as one text (`Context.text`); blank text fits none.
    """

    prototypes: Tensor
    owners: Tensor

    def __init__(
        self,
        names: Sequence[str],
        encoder: TextEncoder,
        prototypes: Float[Tensor, "prototypes dim"],
        owners: Int[Tensor, " prototypes"],
        *,
        temperature: float = TEMPERATURE,
    ) -> None:
        """Puts given prototypes into use; `owners[i]` is the place in `names` of prototype i's adapter."""
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

    @classmethod
    def from_texts(
        cls,
        texts: Mapping[str, str | Sequence[str]],
        encoder: TextEncoder | str | Path,
        *,
        num_prototypes: int = 1,
        temperature: float | None = None,
    ) -> "PrototypeRouter":
        """Makes a router from a description, or a few example texts, of each adapter.

        Args:
            encoder: a folder or hub id of any sentence encoder that is mean-pooled, or one in memory.
            num_prototypes: how many an adapter has at most; its texts are clustered into so many.
            temperature: if not given, it is fitted by leaving out one text at a time, where at least two adapters
                have several texts and these are 8 or more; else it is 0.05.

        Raises:
            RouterError: if there is no adapter, or one has no text.
        """
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes must be at least 1, got {num_prototypes}")
        names = check_labels(sorted(texts))
        if not isinstance(encoder, TextEncoder):
            encoder = TextEncoder.from_pretrained(encoder)
        vectors: list[Tensor] = []
        clusters: list[Tensor] = []
        owners: list[int] = []
        for owner, name in enumerate(names):
            own = _own_texts(name, texts[name])
            units = torch.cat([embed(encoder, own[i : i + BATCH_SIZE]).cpu() for i in range(0, len(own), BATCH_SIZE)])
            assigned = _cluster(units, num_prototypes)
            vectors.append(units)
            clusters.append(assigned + len(owners))
            owners += [owner] * (int(assigned.max()) + 1)
        units, assigned, owned = torch.cat(vectors), torch.cat(clusters), torch.tensor(owners)
        sums = torch.zeros(len(owned), encoder.dim).index_add(0, assigned, units)
        if temperature is None:
            temperature = _fit_temperature(units, assigned, sums, owned)
        router = cls(names, encoder, F.normalize(sums, dim=-1), owned, temperature=temperature)
        return router.to(encoder.model.device).eval()

    @torch.no_grad()
    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]:
        """Gives a probability per adapter, on the CPU."""
        texts = [context.text for context in contexts]
        # One by one: beside longer texts padding would shift the last digits, which the temperature multiplies.
        cosines = torch.cat([embed(self.encoder, [text]) @ self.prototypes.T for text in texts])
        scores = _nearest(cosines, self.owners, len(self.names))
        return (scores / self.temperature).softmax(dim=-1).cpu() * has_text(contexts)[:, None]

    def __repr__(self) -> str:
        return f"PrototypeRouter({listed(self.names)}; {len(self.prototypes)} prototypes)"

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the router to a folder, the encoder with it; the folder is replaced as a whole."""
        write_router(
            path,
            SavedRouter(
                type="prototypes",
                names=self.names,
                settings={"temperature": self.temperature, **self.encoder.settings},
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
            router.load_state_dict(saved.weights)
        return router.eval()


@torch.no_grad()
def embed(encoder: TextEncoder, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
    """Gives the unit vectors of texts."""
    return F.normalize(encoder([encoder.frame(ids) for ids in encoder.encode_all(texts)]), dim=-1)


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


def _fit_temperature(
    units: Float[Tensor, "texts dim"],
    clusters: Int[Tensor, " texts"],
    sums: Float[Tensor, "prototypes dim"],
    owners: Int[Tensor, " prototypes"],
) -> float:
    """Fits the temperature on each text's cosines to prototypes that were made without it, if there are enough."""
    rows = torch.arange(len(units))
    cosines = units @ F.normalize(sums, dim=-1).T
    rest = sums[clusters] - units
    # A prototype of this text alone is gone with it.
    alone = clusters.bincount()[clusters] == 1
    cosines[rows, clusters] = (units * F.normalize(rest, dim=-1)).sum(dim=-1).masked_fill(alone, -1.0)
    labels = owners[clusters]
    kept = labels.bincount()[labels] > 1
    if kept.sum() < MIN_TEXTS or len(labels[kept].unique()) < 2:
        return TEMPERATURE
    scores = _nearest(cosines[kept], owners, int(owners.max()) + 1)
    # Where all texts are told apart, the likelihood alone would sharpen without end.
    candidates = torch.logspace(-1.7, 0, 86)
    losses = torch.stack([F.cross_entropy(scores / t, labels[kept]) for t in candidates])
    return float(candidates[losses.argmin()])
