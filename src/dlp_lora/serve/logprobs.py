"""Log-probabilities: tokens with their scores in, the objects of the two APIs out."""

import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from dlp_lora.engine.text import decode
from dlp_lora.serve.backend import PromptScores, Token
from dlp_lora.serve.schema import CompletionLogprobs, TokenLogprob, TopLogprob

LEAST = -9999.0  # instead of minus infinity, which JSON does not have


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token], num_top: int) -> list[TokenLogprob]:
    """The entries of a chat's tokens."""
    entries: list[TokenLogprob] = []
    for token in tokens:
        top = [_entry(tokenizer, id_, logprob) for id_, logprob in list(token.top.items())[:num_top]]
        entries.append({**_entry(tokenizer, token.id, token.logprob), "top_logprobs": top})
    return entries


class CompletionScores:
    """The log-probabilities of a completion; `offset` is the place of the next token in its text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def prompt(self, ids: Sequence[int], scores: PromptScores) -> CompletionLogprobs:
        """Those of an echoed prompt."""
        rows = zip(ids, scores.logprobs, scores.top, strict=True)
        return self._of([(id_, logprob, top) for id_, logprob, top in rows])

    def answer(self, tokens: Sequence[Token]) -> CompletionLogprobs:
        """Those of tokens of the answer."""
        return self._of([(token.id, token.logprob, token.top) for token in tokens])

    def _of(self, rows: Sequence[tuple[int, float | None, Mapping[int, float]]]) -> CompletionLogprobs:
        logprobs: CompletionLogprobs = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for id_, logprob, top in rows:
            text = token_text(self._tokenizer, id_)
            logprobs["text_offset"].append(self._offset)
            logprobs["tokens"].append(text)
            logprobs["token_logprobs"].append(None if logprob is None else _finite(logprob))
            logprobs["top_logprobs"].append(None if logprob is None else self._top({**top, id_: logprob}))
            self._offset += len(text)
        return logprobs

    def _top(self, top: Mapping[int, float]) -> dict[str, float]:
        told: dict[str, float] = {}
        for id_, logprob in sorted(top.items(), key=lambda pair: -pair[1]):
            told.setdefault(token_text(self._tokenizer, id_), _finite(logprob))  # the likeliest of equal texts
        return told


def joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Concatenates log-probabilities."""
    return {
        "text_offset": [offset for part in parts for offset in part["text_offset"]],
        "token_logprobs": [logprob for part in parts for logprob in part["token_logprobs"]],
        "tokens": [token for part in parts for token in part["tokens"]],
        "top_logprobs": [top for part in parts for top in part["top_logprobs"]],
    }


def token_text(tokenizer: PreTrainedTokenizerBase, id_: int) -> str:
    """The text of one token, also of a special one."""
    return decode(tokenizer, [id_], skip_special_tokens=False)


def _entry(tokenizer: PreTrainedTokenizerBase, id_: int, logprob: float | None) -> TopLogprob:
    text = token_text(tokenizer, id_)
    return {"token": text, "logprob": _finite(0.0 if logprob is None else logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST
