"""The routing picture (Fig. 3): a conversation in, its text coloured by adapter with the weights at the side out."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlp_lora.lab.report.markup import Markup, escape_markdown, number

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


def turns(conversation: Mapping[str, Any], *, labels: Mapping[str, str]) -> tuple[Turn, ...]:
    """The sentences of a conversation's answer; `labels` gives adapters' short names, where they have one."""
    return tuple(_turn(sentence, labels) for sentence in conversation.get("trace") or ())


def routing_picture(conversation: Mapping[str, Any], *, labels: Mapping[str, str]) -> Markup:
    """Shows a prompt and its answer, sentence by sentence, with the adapters that spoke."""
    spoken = turns(conversation, labels=labels)
    prompt = conversation.get("prompt") or ""
    return Markup(markdown=_markdown(prompt, spoken), html=_html(prompt, spoken))


def _turn(sentence: Mapping[str, Any], labels: Mapping[str, str]) -> Turn:
    mixture, probabilities = sentence.get("mixture") or {}, sentence.get("probabilities") or {}
    first = max(mixture, key=lambda name: mixture[name], default=None)
    return Turn(
        text=sentence.get("text") or "",
        weights={labels.get(name, name): weight for name, weight in mixture.items()} or {BASE_MODEL: 1.0},
        probability=probabilities.get(first),
        switched=bool(sentence.get("switched")),
    )


def _markdown(prompt: str, spoken: Sequence[Turn]) -> str:
    # A line may begin like a heading or a list.
    lines = (re.sub(r"^(\d*)([#=+.)-])", r"\1\\\2", escape_markdown(line)) for line in prompt.splitlines())
    quoted = "\n".join(f"> {line}  " for line in lines)
    rows = [
        f"| {escape_markdown(turn.text)} | {escape_markdown(_weights(turn))} | {_probability(turn)} |"
        for turn in spoken
    ]
    return "\n".join((quoted, "", "| Sentence | Adapters | Router |", "| --- | --- | ---: |", *rows))


def _html(prompt: str, spoken: Sequence[Turn]) -> str:
    adapters = dict.fromkeys(name for turn in spoken for name in turn.weights if name != BASE_MODEL)
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(adapters)} | {BASE_MODEL: _BASE_COLOUR}
    rows = "".join(_turn_html(turn, colours) for turn in spoken)
    return f'<div class="routing"><p class="prompt">{html.escape(prompt)}</p>{rows}</div>'


def _turn_html(turn: Turn, colours: Mapping[str, str]) -> str:
    colour = colours[turn.speaker]
    bar = "".join(
        f'<i style="width:{100 * weight:.1f}%;background:{colours[name]}"></i>' for name, weight in turn.weights.items()
    )
    router = f"<small>router {_probability(turn)}</small>" if turn.probability is not None else ""
    # Two digits of alpha: a tint that leaves text legible on a light and on a dark page.
    return (
        f'<div class="turn"><p style="background:{colour}3d;border-color:{colour}">{html.escape(turn.text.strip())}</p>'
        f'<div class="weights"><span class="bar">{bar}</span>{html.escape(_weights(turn))} {router}</div></div>'
    )


def _weights(turn: Turn) -> str:
    heaviest = sorted(turn.weights.items(), key=lambda item: -item[1])
    shown = ", ".join(name if weight == 1 else f"{name} {number(100 * weight)} %" for name, weight in heaviest)
    return f"{shown} (switched)" if turn.switched else shown


def _probability(turn: Turn) -> str:
    return "–" if turn.probability is None else f"{number(100 * turn.probability)} %"
