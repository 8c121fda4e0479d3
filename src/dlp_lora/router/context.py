"""What every router reads and gives: a Context in, a probability per adapter name out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from dlp_lora.errors import RouterError


@dataclass(frozen=True)
class Context:
    """What the router reads, as plain text without special tokens or chat template.

    `prompt` is what is asked now: the newest turn, or one sentence of a prompt that is routed sentence by sentence.
    `answer` is its answer before the sentence that opens now, `sentence` the first token of that; both are empty at
    the prompt. `history` is what was said before the prompt: earlier turns, or earlier sentences.
    """

    prompt: str
    answer: str = ""
    sentence: str = ""
    history: str = ""

    @property
    def text(self) -> str:
        """All of it as one text, for routers that read one: each part begins on a line of its own."""
        return f"{self.history}\n{self.prompt}\n{self.answer}{self.sentence}".strip()


@runtime_checkable
class Router(Protocol):
    """Gives each adapter name a probability; the names join it with the bank."""

    names: tuple[str, ...]

    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]: ...

    def save_pretrained(self, path: str | Path) -> None: ...


def check_labels(names: Sequence[str]) -> tuple[str, ...]:
    """Gives the adapter names of a router as a tuple.

    Raises:
        RouterError: if there is none, or one comes twice.
    """
    if not names or len(set(names)) != len(names):
        raise RouterError(f"a router needs at least one adapter name, each once; got {list(names)}")
    return tuple(names)
