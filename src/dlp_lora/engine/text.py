"""Token ids in, plain text out, for routers and for people."""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from dlp_lora.engine.template import ChatTemplate, Span
from dlp_lora.engine.turns import ASSISTANT, USER, Turn, read_turns
from dlp_lora.router import Context
from dlp_lora.router.context import CHARS_BEFORE
from dlp_lora.sentences import Segmenter

REPLACEMENT = "\ufffd"
PATIENCE = 16  # tokens after which broken bytes are taken for broken


class Detokenizer:
    """Decodes a growing list of tokens piece by piece, and holds back incomplete characters.

    Together, the pieces are the text of all tokens. Each step decodes only the last few tokens again, so its cost does
    not depend on the text's length.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._decode = partial(decode, tokenizer, skip_special_tokens=skip_special_tokens)
        self._window: list[int] = []  # the tokens since the last but one piece
        self._read = 0  # how many of them are in a piece already

    def push(self, token: int) -> str:
        """Adds a token; returns the text that it completes, or ""."""
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
        """Returns the held-back text, with broken characters."""
        piece = self._rest()
        self._read = len(self._window)
        return piece

    def copy(self) -> "Detokenizer":
        """Returns an independent copy."""
        other = copy(self)
        other._window = list(self._window)
        return other

    def _release(self) -> str:
        """Returns the broken characters that no later token can complete, cut at a place where the text does not
        change.
        """
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
    """A sentence of a prompt, the text before it as far as routers read it, and its tokens from `start` to `end`, with
    the template's tokens before it.
    """

    text: str
    history: str
    start: int
    end: int


class PromptReader:
    """Turns the tokens of a prompt into text for the router, without special tokens and chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._made_of: tuple[date, str] | None = None
        self._templates: list[ChatTemplate] = []
        specials = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials)) or "(?!)")

    def __call__(self, tokens: Sequence[int]) -> str:
        """Decodes a prompt; each turn of a conversation is on separate lines."""
        context = self.context(tokens)
        return "\n".join(filter(None, [context.history, context.prompt, context.answer]))

    def context(self, tokens: Sequence[int]) -> Context:
        """Decodes a prompt, with the beginning of an answer, into the router's context."""
        turns = self._turns(tokens)
        return Context(decode(self._tokenizer, tokens).strip()) if turns is None else read_turns(turns)

    def is_user_last(self, tokens: Sequence[int]) -> bool:
        """Whether no other turn stands between the user's latest turn and the answer."""
        speakers = [turn.role for turn in self._turns(tokens) or () if turn.role != ASSISTANT or turn.text.strip()]
        return not speakers or speakers[-1] == USER

    def sentences(
        self, tokens: Sequence[int], segmenter: Callable[[], Segmenter], *, min_tokens: int = 1
    ) -> list[Passage]:
        """Cuts a prompt into sentences; each turn begins one, too. Sentences have at least `min_tokens` tokens.

        Text after the last sentence, and always the last token, belong to no sentence: there the answer begins.
        """
        text, tiles = self._aligned(tokens)
        read, places, turns = self._visible(text)
        first_tokens, offsets = [token for token, _ in tiles], [offset for _, offset in tiles]

        def tile(i: int) -> int:
            return bisect_right(offsets, places[i]) - 1

        starts: list[tuple[int, int]] = []  # in what is read, in tokens
        for begin, stop in pairwise([*turns, len(read)]):
            turn = read[begin:stop]
            opening, visible = len(turn) - len(turn.lstrip()), len(turn.rstrip())
            for start in [opening, *(o for o in segmenter().push(turn) if o > opening)]:
                if start >= visible:
                    continue
                # The first sentence of a turn includes the template's tokens before it.
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
            Passage(read[start:stop], read[max(0, start - CHARS_BEFORE) : start], first, last)
            for (start, first), (stop, last) in pairwise([*starts, (len(read), end)])
            if first < last
        ]

    def _turns(self, tokens: Sequence[int]) -> list[Turn] | None:
        """The turns of a conversation, if the prompt is in the chat template."""
        if not getattr(self._tokenizer, "chat_template", None):
            return None
        text = decode(self._tokenizer, tokens, skip_special_tokens=False)
        if (spans := self._spans(text)) is None:
            return None
        return [Turn(span.role, self._special.sub("", text[span.start : span.end])) for span in spans]

    def _spans(self, text: str) -> list[Span] | None:
        """The places of a conversation's turns, if the text is in the chat template."""
        if not getattr(self._tokenizer, "chat_template", None):
            return None
        # Templates may print the day, and conversations last over midnight; users may set another template.
        if (made_of := (date.today(), str(self._tokenizer.chat_template))) != self._made_of:
            read = partial(decode, self._tokenizer, skip_special_tokens=False)
            self._templates = [ChatTemplate(self._tokenizer, read), *self._templates[:1]]
            self._made_of = made_of  # last: another thread may read meanwhile
        candidates = (template.spans(text) for template in self._templates)
        return next((spans for spans in candidates if spans is not None), None)

    def _aligned(self, tokens: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and the offsets in it where a token, or a few tokens together, begin."""
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=False)
        text, first, tiles = "", 0, []
        for i, token in enumerate(tokens):
            piece = detokenizer.push(token) or (detokenizer.flush() if i == len(tokens) - 1 else "")
            if piece:
                tiles.append((first, len(text)))
                text, first = text + piece, i + 1
        return text, tiles

    def _visible(self, text: str) -> tuple[str, list[int], list[int]]:
        """The prompt's text for the router, the offsets of its characters in the whole text, and those of turns."""
        spans = self._spans(text)
        turns, read, places = [0], "", list[int]()
        if spans and spans[-1].role == ASSISTANT:  # the last turn is the answer: only the line break before it counts
            spans = [*spans[:-1], Span(ASSISTANT, spans[-1].start, spans[-1].start)]
        end = 0
        for span in [Span("", 0, len(text))] if spans is None else spans:
            if spans is not None:
                read += "\n"
                places.append(end)
                turns.append(len(read))
            start = span.start
            for match in self._special.finditer(text, span.start, span.end):
                read += text[start : match.start()]
                places += range(start, match.start())
                start = match.end()
            read += text[start : span.end]
            places += range(start, span.end)
            end = span.end
        return read, places, turns


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Decodes tokens as they are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # the tokenizer calls this itself; it takes less than half the time of decode()
        return str(backend.decode(list(tokens), skip_special_tokens=skip_special_tokens))
    return str(
        tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    )
