"""Traces: a backend's sentences in, their JSON for the client out."""

from collections.abc import Mapping, Sequence

from dlp_lora.engine.trace import Sentence
from dlp_lora.policy import Mixture
from dlp_lora.serve.backend import SentenceStart
from dlp_lora.serve.schema import SentenceTrace


def start_of(start: SentenceStart) -> SentenceTrace:
    """The facts about a sentence at its start."""
    fields: SentenceTrace = {
        "sentence": start.number,
        "start": start.position,
        "offset": start.offset,
        "mixture": dict(start.mixture),
        "probabilities": rounded(start.probabilities),
        "switched": start.switched,
        "abstained": start.abstained,
        "route_ms": round(start.route_ms, 3),
    }
    return _with_left_out(fields, start.mixture)


def sentences_of(trace: Sequence[Sentence], num_characters: int | None = None) -> list[SentenceTrace]:
    """The facts about the sentences of an answer at its end, with only the sent text."""
    sentences: list[SentenceTrace] = []
    offset = 0
    for number, sentence in enumerate(trace):
        end = offset + len(sentence.text)
        seen = end if num_characters is None else min(end, num_characters)
        entry: SentenceTrace = {
            "sentence": number,
            "start": sentence.start,
            "offset": offset,
            "mixture": dict(sentence.mixture),
            "probabilities": rounded(sentence.probabilities),
            "switched": sentence.switched,
            "abstained": sentence.abstained,
            "route_ms": round(sentence.route_ms, 3),
            "end": sentence.end,
            "text": sentence.text[: max(0, seen - offset)],
            "fuse_ms": round(sentence.fuse_ms, 3),
            "encode_ms": round(sentence.encode_ms, 3),
        }
        if sentence.kept_tokens is not None:
            entry["kept_tokens"] = sentence.kept_tokens
        sentences.append(_with_left_out(entry, sentence.mixture))
        offset = end
    return sentences


def _with_left_out(fields: SentenceTrace, mixture: Mixture) -> SentenceTrace:
    return {**fields, "left_out": list(mixture.left_out)} if mixture.left_out else fields


def rounded(probabilities: Mapping[str, float]) -> dict[str, float]:
    """The probabilities for a client."""
    return {name: round(p, 6) for name, p in probabilities.items()}
