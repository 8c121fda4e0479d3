"""Chat templates backwards: the text of a conversation in, its turns out.

A template is code, so this module learns its text around the turns by rendering conversations of known contents.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlp_lora.chat import in_parts, reads_parts, template_arguments
from dlp_lora.engine.turns import ASSISTANT, TOOL, USER

SYSTEM = "system"
ROLES = (USER, ASSISTANT, SYSTEM, TOOL, "developer")
CONVERSATIONS = (
    *([role] for role in ROLES),
    *([*pair] for pair in product(ROLES, ROLES)),
    *([USER, first, second] for first, second in product((ASSISTANT, TOOL), ROLES)),
    *([USER, ASSISTANT, first, second] for first, second in product((USER, TOOL), ROLES)),
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER],
)
# Each argument of the template is tried with these values.
SHORT = ([USER], [SYSTEM, USER], [USER, ASSISTANT, USER], [USER, ASSISTANT, TOOL])
MAX_ARGUMENTS = 8
NO_ARGUMENTS = {"messages", "tools", "documents", "add_generation_prompt", "namespace", "range", "raise_exception"}
# A block that a template writes for thoughts before the answer: an empty one, or one that is still open.
NO_THOUGHT = re.compile(r"\s*(?:<(\w+)>\s*</\1>|[<\[](?:think|thought|reason)\w*[>\]]\s*\Z)\s*", re.IGNORECASE)

START, END = "start", "end"


@dataclass(frozen=True)
class Span:
    """The place of a turn in a text; a new answer is an empty turn of the assistant."""

    role: str
    start: int
    end: int


class ChatTemplate:
    """The text of a tokenizer's chat template before, between and after turns.

    `read` decodes tokens with special ones, to the text in which turns are found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, read: Callable[[list[int]], str]) -> None:
        self._bos = tokenizer.bos_token
        by_speaker: dict[str, dict[str, str]] = {}  # by the previous speaker: the text, and the next speaker
        for roles, texts, then in _rendered(tokenizer, read):
            texts[0] = self.without_bos(texts[0])
            for before, text, after in zip([START, *roles], texts, [*roles, then], strict=True):
                if before == START and not text.strip():
                    text = ""
                if text.strip() or before == START:
                    _note(by_speaker.setdefault(before, {}), text, after)
        self._openings = by_speaker.pop(START, {})
        self._following = by_speaker
        self._glue = {role: _pattern(texts) for role, texts in by_speaker.items()}

    def spans(self, text: str) -> list[Span] | None:
        """Finds the turns of a conversation; None if the text is not in this template."""
        start = len(text) - len(self.without_bos(text))
        if openings := [opening for opening in self._openings if opening and text.startswith(opening, start)]:
            opening = max(openings, key=len)
            return self._spans(text, start + len(opening), self._openings[opening])
        if "" not in self._openings:
            return None
        # The first turn has no text around it, like raw text; but after raw text no answer begins.
        spans = self._spans(text, start, self._openings[""])
        return spans if len(spans) > 1 and spans[-1].role == ASSISTANT else None

    def without_bos(self, text: str) -> str:
        """Removes beginning-of-sequence tokens, which a template may write, the tokenizer may add, or both."""
        while self._bos and text.startswith(self._bos):
            text = text.removeprefix(self._bos).lstrip()
        return text

    def _spans(self, text: str, start: int, role: str) -> list[Span]:
        spans: list[Span] = []
        while True:
            match = self._glue[role].search(text, start) if role in self._glue else None
            end = match.start() if match else len(text)
            if role == ASSISTANT and (thought := NO_THOUGHT.match(text, start, end)):
                start = thought.end()
            spans.append(Span(role, start, end))
            if match is None or match.lastgroup == END:
                return spans
            start, role = match.end(), self._following[role][match.group()]


def _note(following: dict[str, str], text: str, after: str) -> None:
    """Notes the next speaker after a text; the likeliest one, if templates write the same text for several roles."""
    order = (*ROLES, END)
    following[text] = min(after, following.get(text, END), key=order.index)


def _pattern(following: Mapping[str, str]) -> re.Pattern[str]:
    texts = sorted(following, key=len, reverse=True)
    ends = "|".join(re.escape(text.rstrip()) for text in texts if following[text] == END)
    between = [re.escape(text) for text in texts if following[text] != END]
    return re.compile("|".join([*([rf"(?P<{END}>(?:{ends})\s*\Z)"] if ends else []), *between]))


def _rendered(
    tokenizer: PreTrainedTokenizerBase, read: Callable[[list[int]], str]
) -> Iterator[tuple[list[str], list[str], str]]:
    """Renders conversations; returns their roles, the texts around the contents, and the next speaker."""
    try:
        template = str(tokenizer.get_chat_template())
        arguments = template_arguments(template) - NO_ARGUMENTS - set(tokenizer.special_tokens_map)
    except Exception:  # several templates may have no default one: the arguments select it
        return
    changes: list[dict[str, Any]] = [
        {name: value} for name in sorted(arguments)[:MAX_ARGUMENTS] for value in (True, False)
    ]

    def texts(roles: list[str], **kwargs: Any) -> list[str] | None:
        messages: list[Any] = [{"role": role, "content": f"@@{i}@@"} for i, role in enumerate(roles)]
        if reads_parts(template):
            messages = [in_parts(message) for message in messages]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
        except Exception:
            return None  # a template may refuse a role or an order of roles: then no such conversation exists
        # As it reads after tokenizing: some tokenizers add spaces beside special tokens.
        decoded = read(tokenizer(text, add_special_tokens=False)["input_ids"])
        for written in (decoded, text):
            around = re.split(r"@@(\d+)@@", written)
            if around[1::2] == [str(i) for i in range(len(roles))]:
                return around[::2]
        return None

    for roles in CONVERSATIONS:
        closed, opened = (texts(roles, add_generation_prompt=prompt) for prompt in (False, True))
        if closed is not None:
            yield roles, closed, END
        if opened is not None and opened != closed:
            yield roles, opened, ASSISTANT
    for roles, change in product(SHORT, changes):
        opened = texts(roles, add_generation_prompt=True, **change)
        if opened is not None and opened != texts(roles, add_generation_prompt=False, **change):
            yield roles, opened, ASSISTANT
