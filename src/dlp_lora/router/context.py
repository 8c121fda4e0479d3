"""The input and output of every router: a Context in, a probability per adapter name out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dlp_lora.errors import RouterError

LEAST_FIT = 1e-30  # the smallest probability that any adapter fits a text
CHARS_BEFORE = 8_000  # of the text before a sentence of a prompt: more would take memory, and has hardly any weight


@dataclass(frozen=True)
class Context:
    """The text that a router reads, without special tokens or chat template.

    `prompt` is the question to answer: the newest turn, or one sentence of a prompt that is routed by sentences.
    `answer` is the answer so far without the new sentence, and `sentence` is the new sentence's first token. Both are
    empty when the prompt is routed. `history` is the text before the prompt: earlier turns, or the last of the earlier
    sentences.
    `is_part` marks a prompt that is a part of a longer one. It may be an instruction, so a router may be stricter.
    With `whole`, the longer prompt, a part must also be more like prompts of its adapter than the longer one is.
    """

    prompt: str
    answer: str = ""
    sentence: str = ""
    history: str = ""
    is_part: bool = False
    whole: str = ""

    @property
    def text(self) -> str:
        """The question and its answer as one text, for routers that read one; the history is left out, as it may be
        long.
        """
        return f"{self.prompt}\n{self.answer}{self.sentence}".strip()


class Encoded(NamedTuple):
    """The token ids of a context; `answer` has those of the context's answer and sentence."""

    history: Sequence[int]
    prompt: Sequence[int]
    answer: Sequence[int]


@runtime_checkable
class Router(Protocol):
    """Gives each adapter name a probability; the names join it with the bank.

    A row may sum to less than 1: the rest is the probability that none of them fits.
    """

    names: tuple[str, ...]

    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]: ...

    def save_pretrained(self, path: str | Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Turns logits and scores into probabilities; fitted on held-out texts.

    Logits are divided by the temperature. A score says how well any adapter fits: the free energy of the logits, unless
    the router has a better score. At `fit_threshold` the probability that any adapter fits is 0.5, and `fit_slope` is
    the slope of its log-odds. Without a threshold, some adapter always fits.
    """

    temperature: float = 1.0
    fit_threshold: float | None = None
    fit_slope: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "fit_slope"):
            if not getattr(self, name) > 0:
                raise ValueError(f"a router's {name} must be positive, got {getattr(self, name)}")

    def energy(self, logits: Float[Tensor, "batch adapters"]) -> Float[Tensor, " batch"]:
        """The free energy: high if a text belongs to any of the adapters (Liu et al. 2020, arXiv 2010.03759)."""
        return (logits.float().cpu() / self.temperature).logsumexp(dim=-1)

    def log_odds(self, scores: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Turns scores into the log-odds that any adapter fits, on the CPU; infinite without a threshold."""
        scores = scores.float().cpu()
        at = self.fit_threshold
        return torch.full_like(scores, torch.inf) if at is None else self.fit_slope * (scores - at)

    def score(self, log_odds: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Gives the scores with these log-odds."""
        return log_odds / self.fit_slope + (self.fit_threshold or 0.0)

    def probabilities(
        self, logits: Float[Tensor, "batch adapters"], scores: Float[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch adapters"]:
        """Gives probabilities, on the CPU; what a row lacks to 1 is the probability that none fits."""
        probabilities = (logits.float().cpu() / self.temperature).softmax(dim=-1)
        scores = self.energy(logits) if scores is None else scores
        fits = torch.sigmoid(self.log_odds(scores)).clamp(min=LEAST_FIT)  # 0 would mean a text that is blank
        return probabilities * fits[:, None]


def fit_temperature(
    logits: Float[Tensor, "texts adapters"], labels: Int[Tensor, " texts"], candidates: Float[Tensor, " candidates"]
) -> float:
    """The candidate under which the labels are likeliest.

    Where all texts are told apart, a sharper one always is: the candidates say where that ends.
    """
    losses = torch.stack([F.cross_entropy(logits / temperature, labels) for temperature in candidates])
    return float(candidates[losses.argmin()])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A router's accuracy, and the number of prompts: test prompts, or training prompts that were held out."""

    accuracy: float
    num_prompts: int
    measured_on: Literal["test", "held-out"] = "test"

    def __str__(self) -> str:
        kind = "test prompts" if self.measured_on == "test" else "training prompts that were held out"
        return f"right on {self.accuracy:.1%} of {self.num_prompts:,} {kind}"


def listed(names: Sequence[str], *, most: int = 4) -> str:
    """How many adapters there are, and the names of the first, for a `repr`."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} adapters: {shown or 'none'}"


def has_text(contexts: Sequence[Context]) -> Float[Tensor, " batch"]:
    """1 if a context has a visible character, else 0: then no adapter fits."""

    def is_visible(text: str) -> bool:
        return any(char.isprintable() and not char.isspace() for char in text)

    texts = [(c.prompt, c.answer, c.sentence, c.history) for c in contexts]
    return torch.tensor([float(any(map(is_visible, parts))) for parts in texts])


def check_labels(names: Sequence[str]) -> tuple[str, ...]:
    """Gives the adapter names of a router as a tuple.

    Raises:
        RouterError: if there is no name, or a name comes twice.
    """
    if not names or len(set(names)) != len(names):
        raise RouterError(f"a router needs at least one adapter name, each once; got {list(names)}")
    return tuple(names)
