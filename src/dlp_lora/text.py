"""Token ids in, plain text out: what a router reads and what a person sees."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
PATIENCE = 16  # tokens after which broken bytes are taken for broken


class Detokenizer:
    """Decodes a growing list of tokens piece by piece, holding back characters whose bytes are still to come.

    The pieces concatenate to what decoding all tokens at once gives. Only the last few tokens are decoded again
    at each step, so a step costs the same however long the text is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the tokens since the last but one piece
        self._read = 0  # how many of them are in a piece already

    def push(self, token: int) -> str:
        """Adds a token; returns the text that it completes, "" while there is none."""
        self._window.append(token)
        piece = self._rest()
        if not piece:
            return ""
        if piece.endswith(REPLACEMENT):
            return self._release() if len(self._window) - self._read > PATIENCE else ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return piece

    def flush(self) -> str:
        """Returns what was held back, broken characters included."""
        piece = self._rest()
        self._read = len(self._window)
        return piece

    def copy(self) -> "Detokenizer":
        """Returns an independent copy."""
        other = Detokenizer(self._tokenizer)
        other._window, other._read = list(self._window), self._read
        return other

    def _release(self) -> str:
        """Returns the broken characters that no token to come can complete, cut where the text does not change."""
        whole, read = self._decode(self._window), self._decode(self._window[: self._read])
        for cut in range(len(self._window) - 3, self._read, -1):  # three bytes may still become a character
            head = self._decode(self._window[:cut])
            if head + self._decode(self._window[cut:]) == whole:
                self._window, self._read = self._window[cut:], 0
                return head[len(read) :]
        return ""

    def _rest(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._read])) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode(self._tokenizer, tokens)


class PromptReader:
    """Turns the tokens of a prompt into the text that the router reads: no special tokens, no chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._openings, self._glue = _chat_glue(tokenizer)

    def __call__(self, tokens: Sequence[int]) -> str:
        """Decodes a prompt; the turns of a conversation stand on lines of their own."""
        if self._glue is not None:
            text = _without_bos(self._tokenizer, _decode_all(self._tokenizer, tokens))
            if text.startswith(self._openings):
                text = self._glue.sub("\n", text)
                for special in self._tokenizer.all_special_tokens:
                    text = text.replace(special, "")
                return text.strip()
        return decode(self._tokenizer, tokens).strip()


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Decodes generated tokens as they are, without special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # what the tokenizer itself calls; in less than half the time of its decode()
        return str(backend.decode(list(tokens), skip_special_tokens=True))
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _decode_all(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    # A template may hold it, the tokenizer may add it, and both may do so at once.
    while tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text.removeprefix(tokenizer.bos_token).lstrip()
    return text


def _chat_glue(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], re.Pattern[str] | None]:
    """Finds what a chat template puts around contents, by rendering conversations of known contents."""
    if not getattr(tokenizer, "chat_template", None):
        return (), None
    openings: list[str] = []
    glue: set[str] = set()
    for roles in (["user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"]):
        contents = [f"@@{i}@@" for i in range(len(roles))]
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        for prompt in (True, False):
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except Exception:
                continue  # a template may refuse a role: then no prompt of such roles exists
            # As it reads once tokenized: some tokenizers put spaces beside special tokens.
            ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
            read = _decode_all(tokenizer, ids)
            parts = re.split("|".join(contents), read if all(c in read for c in contents) else str(text))
            parts[0] = _without_bos(tokenizer, parts[0])
            openings.append(parts[0])
            glue.update(parts)
    openings = [opening for opening in openings if opening]
    if not openings:
        return (), None
    pattern = "|".join(re.escape(part) for part in sorted(glue, key=len, reverse=True) if part.strip())
    return tuple(openings), re.compile(pattern)
