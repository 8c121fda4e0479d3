"""Sentence starts: pieces of generated text in, offsets of new sentences out.

This is the "first token of every new sentence" of Fig. 1 of the paper (arXiv 2410.01497), which names no rule
for it. Libraries for whole texts (sentencex, pysbd) need to know the language and the text after the sentence.
A decoding loop knows neither. So an automaton reads one character at a time, and decides at the first visible
character after a possible end. The result does not depend on how the text is cut into pieces.

A missed start costs little: the mixture changes one sentence later. A wrong start, such as in "Dr. Smith", costs a
sentence. So in doubtful cases the sentence continues: after an initial ("J. K. Rowling", also "you and I."), after
"etc.", "a.m." or "U.S.", after a number that opens a line.
"""

import copy
import unicodedata
from itertools import pairwise
from typing import Protocol, runtime_checkable


@runtime_checkable
class Segmenter(Protocol):
    """Finds the sentence starts of a text that arrives in pieces."""

    def push(self, text: str) -> list[int]:
        """Read the next piece; return the offsets, in the text so far, of the sentence starts it reveals."""
        ...

    def copy(self) -> "Segmenter":
        """Return an independent segmenter that has read the same text."""
        ...


class SentenceSegmenter:
    """Sentence starts by rules, for prose, Markdown and code in any of the larger languages.

    The first sentence starts at 0 and is never reported. An offset is that of the first visible character of
    a sentence, so spaces, closing quotes and emoji belong to the sentence before them.

    >>> segmenter = SentenceSegmenter()
    >>> [segmenter.push(piece) for piece in ("Dr. No is 3", ".5 m tall. ", "Is", " he?")]
    [[], [], [22], []]
    """

    def __init__(self) -> None:
        self._offset = 0
        self._is_begun = False  # something visible was read
        self._fence = ""  # the ``` that opened the block of code we are in
        self._line = ""  # how this line begins
        self._words = ("", "")  # the two words before `_word`, in this sentence and line
        self._word = ""  # the latest word, up to `_end`
        self._end = ""  # terminators and closing marks after `_word`: ".", '?!"'
        self._spaces = self._newlines = self._indent = 0  # since the last visible character

    def push(self, text: str) -> list[int]:
        """Read the next piece; return the offsets, in the text so far, of the sentence starts it reveals."""
        starts = []
        for char in text:
            if char.isspace():
                self._read_space(char)
            # Joiners, variation selectors and accents belong to the character before them.
            elif char.isascii() or unicodedata.category(char) not in ("Cf", "Mn", "Me"):
                if self._is_start(char):
                    starts.append(self._offset)
                    self._words, self._word, self._end = ("", ""), "", ""
                self._read_visible(char)
            self._offset += 1
        return starts

    def copy(self) -> "Segmenter":
        """Return an independent segmenter that has read the same text."""
        return copy.copy(self)

    def _read_space(self, char: str) -> None:
        self._spaces += 1
        self._indent += 4 if char == "\t" else 1
        if char not in "\n\u2028\u2029":
            return
        self._newlines += 1
        self._indent = 0
        line = self._line.lstrip(_LIST_MARKS).rstrip()
        if self._fence:
            if line.startswith(self._fence) and not line.strip(self._fence):
                self._fence = ""
                self._newlines = 2  # a new sentence begins after the block, as after a blank line
        elif line[:3] in ("```", "~~~") and "`" not in line.lstrip("`"):
            self._fence = line[: len(line) - len(line.lstrip(line[0]))]
        self._line = ""

    def _read_visible(self, char: str) -> None:
        if char in _TERMINATORS or (self._end and char in (_CLOSERS if self._spaces else _CLOSERS_IF_TOUCHING)):
            self._end = (self._end + char)[-_KEPT:]
        elif not (self._end and _is_symbol(char)):
            if self._spaces and (self._word or self._end):
                self._words = ("", "") if self._newlines else (self._words[1], self._word + self._end)
                self._word = ""
            if self._word or char.isalnum():
                self._word = (self._word + self._end * (not self._spaces) + char)[-_KEPT:]
            self._end = ""
        if len(self._line) < _KEPT + (char == "`"):  # one at which long inline code ends: it opens no block
            self._line += char
        self._spaces = self._newlines = self._indent = 0
        self._is_begun = True

    def _is_start(self, char: str) -> bool:
        if self._fence or not self._is_begun:
            return False
        if self._newlines:
            return self._newlines > 1 or self._opens_line(char)
        if not self._end:
            return False
        return self._opens_after_space(char) if self._spaces else self._opens_after_cjk(char)

    def _opens_line(self, char: str) -> bool:
        if _is_lower(char) or char in _CLOSERS:
            return False  # hard-wrapped text, the end of a block of code
        is_code = self._indent >= 4 and not self._end
        return not is_code or char.isdigit() or char in _BULLETS

    def _opens_after_space(self, char: str) -> bool:
        is_letter = char.isalpha() and not _is_lower(char)
        if not (is_letter or char.isnumeric() or char in _OPENERS):
            return False
        terminators = self._end.rstrip(_CLOSERS_IF_TOUCHING)
        is_ellipsis = "…" in terminators or ".." in terminators
        is_factorial = terminators == "!" and self._word[-1:].isdigit()
        if is_ellipsis or is_factorial:
            return is_letter or char in "¿¡"
        return terminators != "." or not self._is_abbreviated(char)

    def _opens_after_cjk(self, char: str) -> bool:
        if not self._end.rstrip(_CLOSERS).endswith(_CJK_TERMINATORS):
            return False
        if self._end == "．" and self._word[-1:].isdigit() and char.isdigit():
            return False
        is_quoting = self._end[-1] in _CLOSERS and "ぁ" <= char <= "ゟ"  # 「はい。」と言った
        return (char.isalnum() and not is_quoting) or char in _OPENERS

    def _is_abbreviated(self, char: str) -> bool:
        """Whether the full stop after the latest word is no end of a sentence, if `char` follows."""
        word, (before, previous) = self._word, self._words
        if not previous and (word.replace(".", "").isdigit() or set(word.lower()) <= set("ivx")):
            return True  # the marker of a list item or heading: "1. First", "2.1. Setup", "IV. Results"
        if word.isdigit():
            is_ordinal = len(word) <= 2 and _leads_ordinal(before, previous)
            return is_ordinal or (word == "1" and previous.endswith(":"))
        if (word in _UNITS and previous[-1:].isdigit()) or previous.lower() in _LABELS:
            return False
        letters = word.replace("-", "").split(".")
        if all(len(letter) == 1 and (letter.isupper() or letter.islower()) for letter in letters):
            return word not in ("x", "y")  # "J.", "z. B.", "U.S."; variables end sentences
        name = word.lower().replace("’", "'").rpartition("'")[2]
        if name in _BEFORE_NUMBER:
            return char.isdigit()
        return name in _ABBREVIATIONS or name.endswith("str") or f"{previous.lower()} {name}" in _PAIRS


class LineSegmenter:
    """A sentence is a line: for answers of one line each.

    A line break is certain, so the segmenter reports the start at once, before the first character of the new line.
    So the new mixture already samples the first token of the line.

    >>> LineSegmenter().push("Yes\\nNo. Or")
    [4]
    """

    def __init__(self) -> None:
        self._offset = 0

    def push(self, text: str) -> list[int]:
        """Read the next piece; return the offsets, in the text so far, of the sentence starts it reveals."""
        starts = [self._offset + i + 1 for i, char in enumerate(text) if char == "\n"]
        self._offset += len(text)
        return starts

    def copy(self) -> "Segmenter":
        """Return an independent segmenter that has read the same text."""
        return copy.copy(self)


def split(text: str, segmenter: Segmenter | None = None) -> list[str]:
    """Cut a whole text into sentences that concatenate to it, with a segmenter that has read nothing yet.

    >>> split("Is it 3.5 km? Yes, e.g. on Main St. today.  Good.")
    ['Is it 3.5 km? ', 'Yes, e.g. on Main St. today.  ', 'Good.']
    """
    starts = (segmenter or SentenceSegmenter()).push(text)
    return [text[start:stop] for start, stop in pairwise([0, *starts, len(text)]) if start < stop]


def _is_lower(char: str) -> bool:
    return char.islower() and not "ა" <= char <= "ჿ"  # Georgian is written without capitals


def _is_symbol(char: str) -> bool:
    """Emoji, their skin tones and the like, which close a sentence rather than open one."""
    return not char.isascii() and unicodedata.category(char) in ("So", "Sk")


def _leads_ordinal(before: str, previous: str) -> bool:
    """German day or rank: "am 3. Oktober", "Montag, 3. Oktober", "3. 10. 1990", but not "I am 12. You"."""
    if previous.endswith("."):
        return previous[:-1].isdigit()
    return (previous.lower() in _ORDINAL_LEADS and before != "I") or previous.endswith(("tag,", "woch,"))


def _lexicon(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KEPT = 40  # characters of context, more than any rule looks at
_CJK_TERMINATORS = ("。", "！", "？", "．", "｡")  # no space follows them
_TERMINATORS = frozenset(".!?…‼⁇⁈⁉‽؟۔।॥։።။។" + "".join(_CJK_TERMINATORS))
_CLOSERS = ")]}»›”’」』）】〉》］｝〕"
_CLOSERS_IF_TOUCHING = _CLOSERS + "\"'“‘«‹*_`~"  # after a space these open
_OPENERS = frozenset("\"'“‘„‚«‹([{<「『（【〈《［｛〔¿¡*_`#@$€£•\\")
_BULLETS = frozenset("-*+•`~")  # and a fence
_LIST_MARKS = " \t>-*+.)0123456789"
_UNITS = _lexicon("g m l s h C F K ft hr mm ms oz")
_LABELS = _lexicon("answer choice class grade group option plan team type vitamin")
_ORDINAL_LEADS = _lexicon("ab am bis das dem den der des die ihr ihrem im jeden sein seinem seit und vom zum zur")
_PAIRS = frozenset(("et al", "p. ex", "par ex", "per es", "z. hd"))
# Ordinary words or names of months: abbreviations only if a number follows.
_BEFORE_NUMBER = _lexicon(
    """abs apr art aug bd cap ch chap dec dez est feb jan jul jun kap mar max min no nos nov num núm oct okt
    sec sep sept vol"""
)
# English, German, Spanish, Italian, French; dotted single letters ("e.g.", "d. h.") need no entry.
_ABBREVIATIONS = _lexicon(
    """approx assn ave blvd bros capt cf cmdr co col corp dept dr eds eq eqs etc ex fig figs ft gen gov hon
    inc insp jr lt ltd maj messrs mr mrs ms mt mx oz ph.d pp prof rep resp rev sen sgt sr st supt tbsp tsp
    univ viz vs b.sc m.sc d.phil
    aufl bzgl bzw ca chr dipl evtl fr geb ggf hr hrsg inkl ing jh jhd mio mrd nr sog std tel usw vgl zzgl
    aprox av avda dña dra ee ej gral lic pág págs p.ej sra sres srta ud uds uu ee.uu vd vds
    avv cfr dott dott.ssa ecc geom pag pagg prof.ssa sig sigg sig.na sig.ra
    env éd mlle mlles mm mme mmes pr ste"""
)
