"""Token ids in, plain text out: what a router reads and what a person sees."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import pairwise

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dlp_lora.sentences import Segmenter

REPLACEMENT = "\ufffd"
PATIENCE = 16  # tokens after which broken bytes are taken for broken


class Detokenizer:
    """Decodes a growing list of tokens piece by piece, holding back characters whose bytes are still to come.

    `read` decodes a few tokens; without it, the tokenizer does, and leaves special tokens out.
    The pieces concatenate to what decoding all tokens at once gives. Only the last few tokens are decoded again
    at each step, so a step costs the same however long the text is.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, read: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._decode = read or partial(decode, tokenizer)
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
        other = Detokenizer(self._tokenizer, read=self._decode)
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


@dataclass(frozen=True)
class Passage:
    """A sentence of a prompt, what stands before it, and its tokens from `start` to `end`, those of the template that
    lead to it included.
    """

    text: str
    history: str
    start: int
    end: int


class PromptReader:
    """Turns the tokens of a prompt into the text that the router reads: no special tokens, no chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._decode = decoder(tokenizer)
        self._day = date.today()
        self._templates = [_chat_glue(tokenizer)]
        specials = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials)) or "(?!)")

    def __call__(self, tokens: Sequence[int]) -> str:
        """Decodes a prompt; the turns of a conversation stand on lines of their own."""
        return "\n".join(filter(None, self.turns(tokens)))

    def turns(self, tokens: Sequence[int]) -> tuple[str, str]:
        """Decodes a prompt into what was said before and the newest turn; without a template it is one turn."""
        if getattr(self._tokenizer, "chat_template", None):
            text = _without_bos(self._tokenizer, decode(self._tokenizer, tokens, skip_special_tokens=False))
            if glue := self._glue_of(text):
                turns = [turn for part in glue.split(text) if (turn := self._special.sub("", part).strip())]
                return "\n".join(turns[:-1]), turns[-1] if turns else ""
        return "", decode(self._tokenizer, tokens).strip()

    def sentences(
        self, tokens: Sequence[int], segmenter: Callable[[], Segmenter], *, min_tokens: int = 1
    ) -> list[Passage]:
        """Cuts a prompt into sentences; a turn of a conversation opens one, too. None is left before `min_tokens`.

        What stands behind the last of them, and the last token in any case, is in none: there the answer begins.
        """
        text, tiles = self._aligned(tokens)
        read, places, turns = self._visible(text)
        first_tokens, offsets = [token for token, _ in tiles], [offset for _, offset in tiles]

        def tile(i: int) -> int:
            return bisect_right(offsets, places[i]) - 1

        starts: list[tuple[int, int]] = []  # in what is read, in tokens
        for begin, stop in pairwise([*turns, len(read)]):
            turn = read[begin:stop]
            opening = len(turn) - len(turn.lstrip())
            for start in [opening, *(o for o in segmenter().push(turn) if o > opening)]:
                if not turn[start:].strip():
                    continue
                # The first sentence of a turn has the tokens of the template that lead to it.
                first = begin + start if start > opening else max(begin - 1, 0)
                token = first_tokens[tile(first)]
                if not starts:
                    starts.append((begin + start, 0))
                elif token - starts[-1][1] >= min_tokens and read[starts[-1][0] : begin + start].strip():
                    starts.append((begin + start, token))
        if not starts:
            return []
        behind = [*first_tokens, len(tokens)][tile(len(read.rstrip()) - 1) + 1]
        end = min(behind, len(tokens) - 1)
        return [
            Passage(read[start:stop], read[:start], first, last)
            for (start, first), (stop, last) in pairwise([*starts, (len(read), end)])
            if first < last
        ]

    def _glue_of(self, text: str) -> re.Pattern[str] | None:
        """What stands around the contents of a conversation, if the text is one of the chat template."""
        if date.today() != self._day:  # templates may print it, and conversations last over midnight
            self._day = date.today()
            self._templates = [_chat_glue(self._tokenizer), self._templates[0]]
        return next((glue for openings, glue in self._templates if glue and text.startswith(openings)), None)

    def _aligned(self, tokens: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and where in it the characters of a token, or of a few tokens together, begin."""
        detokenizer = Detokenizer(self._tokenizer, read=self._decode)
        text, first, tiles = "", 0, []
        for i, token in enumerate(tokens):
            piece = detokenizer.push(token) or (detokenizer.flush() if i == len(tokens) - 1 else "")
            if piece:
                tiles.append((first, len(text)))
                text, first = text + piece, i + 1
        return text, tiles

    def _visible(self, text: str) -> tuple[str, list[int], list[int]]:
        """What the router reads, where each character of it stands in the text, and where turns begin in it."""
        hidden = self._special
        if glue := self._glue_of(_without_bos(self._tokenizer, text)):
            hidden = re.compile(f"(?P<glue>{glue.pattern})|{hidden.pattern}")
        read, end = "", 0
        places: list[int] = []
        turns = [0]
        for match in hidden.finditer(text):
            read += text[end : match.start()]
            places += range(end, match.start())
            if match.lastgroup:
                read += "\n"
                places.append(match.start())
                turns.append(len(read))
            end = match.end()
        return read + text[end:], [*places, *range(end, len(text))], turns


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """Makes what decodes tokens as they are, special ones included, a few at a time.

    Where tokens are bytes, it joins those of each, which it keeps, in about half of the tokenizer's own time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, decoders.ByteLevel):
        return partial(decode, tokenizer, skip_special_tokens=False)
    values = {character: value for value, character in bytes_to_unicode().items()}
    known: dict[int, bytes] = {}

    def bytes_of(token: int) -> bytes:
        text = str(backend.id_to_token(token) or "")
        # A token that was added stands for its own text.
        return bytes(values[c] for c in text) if all(c in values for c in text) else text.encode()

    def read(tokens: Sequence[int]) -> str:
        for token in tokens:
            if token not in known:
                known[token] = bytes_of(token)
        return b"".join([known[token] for token in tokens]).decode("utf-8", "replace")

    return read


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Decodes tokens as they are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # what the tokenizer itself calls; in less than half the time of its decode()
        return str(backend.decode(list(tokens), skip_special_tokens=skip_special_tokens))
    return str(
        tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    )


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
            read = decode(tokenizer, ids, skip_special_tokens=False)
            parts = re.split("|".join(contents), read if all(c in read for c in contents) else str(text))
            parts[0] = _without_bos(tokenizer, parts[0])
            openings.append(parts[0])
            glue.update(parts)
    openings = [opening for opening in openings if opening]
    if not openings:
        return (), None
    pattern = "|".join(re.escape(part) for part in sorted(glue, key=len, reverse=True) if part.strip())
    return tuple(openings), re.compile(pattern)
