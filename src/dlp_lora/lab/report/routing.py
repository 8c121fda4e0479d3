"""The routing picture (Fig. 3): a conversation in, its text coloured by adapter with the weights at the side out."""

from collections.abc import Mapping
from dataclasses import dataclass

from dlp_lora.lab.records.run import Conversation, Spoken
from dlp_lora.lab.records.table import MISSING, Table, number, table_of

BASE_MODEL = "base model"
# Okabe and Ito's colours; the adapter's name stands beside its text, so the colour is only a second hint.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800")
_BASE_COLOUR = "#8d939c"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A sentence, the weights of the adapters that spoke it, and how likely the router found the first of them."""

    text: str
    weights: Mapping[str, float]
    probability: float | None
    switched: bool

    @property
    def speaker(self) -> str:
        """The adapter of the greatest weight."""
        return max(self.weights, key=lambda name: self.weights[name])

    @property
    def shown_weights(self) -> str:
        """The adapters with their weights, the heaviest first."""
        heaviest = sorted(self.weights.items(), key=lambda item: -item[1])
        shown = ", ".join(name if weight == 1 else f"{name} {number(100 * weight)} %" for name, weight in heaviest)
        return f"{shown} (switched)" if self.switched else shown

    @property
    def shown_probability(self) -> str:
        """What the router gave the first adapter."""
        return MISSING if self.probability is None else f"{number(100 * self.probability)} %"


@dataclass(frozen=True, kw_only=True)
class Routing:
    """A prompt and its answer, sentence by sentence, with the adapters that spoke."""

    prompt: str
    turns: tuple[Turn, ...]

    @property
    def colours(self) -> dict[str, str]:
        """A colour for each adapter."""
        adapters = dict.fromkeys(name for turn in self.turns for name in turn.weights if name != BASE_MODEL)
        return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(adapters)} | {BASE_MODEL: _BASE_COLOUR}

    @property
    def table(self) -> Table:
        """The same without colours."""
        rows = [(turn.text, turn.shown_weights, turn.shown_probability) for turn in self.turns]
        return table_of("", ("Sentence", "Adapters", "Router"), rows, num_labels=2)


def routing_picture(conversation: Conversation, *, labels: Mapping[str, str]) -> Routing:
    """Shows a prompt and its answer; `labels` gives adapters' short names, where they have one."""
    return Routing(prompt=conversation.prompt, turns=tuple(_turn(spoken, labels) for spoken in conversation.trace))


def _turn(spoken: Spoken, labels: Mapping[str, str]) -> Turn:
    first = max(spoken.mixture, key=lambda name: spoken.mixture[name], default="")
    return Turn(
        text=spoken.text,
        weights={labels.get(name, name): weight for name, weight in spoken.mixture.items()} or {BASE_MODEL: 1.0},
        probability=spoken.probabilities.get(first),
        switched=spoken.switched,
    )
