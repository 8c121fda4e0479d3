"""Cutting: the text of a stream in, pieces that belong to one sentence each out."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dlp_lora.serve.backend import SentenceStart


@dataclass
class SentenceCutter:
    """Cuts the text of a stream at the beginnings of sentences, so that each piece belongs to one."""

    num_sent: int = 0  # characters
    _starts: deque[SentenceStart] = field(default_factory=deque)

    def begin(self, start: SentenceStart) -> None:
        """Notes the start of a sentence in the next text.

        Sentences that began in the rest of an answer behind its stop string have no text: they move to this start.
        """
        self._starts = deque(replace(each, offset=min(each.offset, start.offset)) for each in self._starts)
        self._starts.append(start)

    def cut(self, text: str) -> Iterator[tuple[str, SentenceStart | None]]:
        """Yields the text in pieces, each with the sentence that begins with it, if one does."""
        start: SentenceStart | None = None
        while self._starts and self._starts[0].offset < self.num_sent + len(text):
            length = max(0, self._starts[0].offset - self.num_sent)
            if length or start is not None:
                yield text[:length], start
                text = text[length:]
                self.num_sent += length
            start = self._starts.popleft()
        if text or start is not None:
            yield text, start
            self.num_sent += len(text)
