"""Stored KV: the KV of finished rows, for requests that begin with the same tokens.

K and V of a token depend on the tokens up to it, and on their mixtures. So both are the key of an entry: `contents` has
the content of each token's mixture, with hashes of the adapters' weights. An adapter that was loaded again under its
old name is another one.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from dlp_lora.serve.cache import SpareCache

Content = bytes
"""The content of a mixture; equal for adapters with equal numbers and equal weights in the mixture."""


@dataclass(frozen=True, eq=False)
class Entry:
    """The KV of some tokens."""

    tokens: list[int]
    contents: list[Content]
    cache: SpareCache


class KeptKV:
    """KV of up to `budget_mb` megabytes; the least recently used goes first."""

    def __init__(self, budget_mb: float) -> None:
        if budget_mb < 0:
            raise ValueError(f"cache_mb must not be negative, got {budget_mb}")
        self.budget = int(budget_mb * 2**20)
        self.nbytes = 0
        self._entries: OrderedDict[int, Entry] = OrderedDict()  # the least recently used first
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int], contents: Sequence[Content], *, capacity: int) -> SpareCache | None:
        """Returns a copy of the KV of the longest beginning that an entry has, or None."""
        best, length = None, 0
        for number, entry in self._entries.items():
            if (same := shared(entry, tokens, contents)) > length:
                best, length = number, same
        if best is None:
            return None
        self._entries.move_to_end(best)
        return self._entries[best].cache.take(0, num_tokens=length, capacity=capacity)

    def keep(self, tokens: Sequence[int], contents: Sequence[Content], cache: SpareCache, row: int) -> None:
        """Stores a copy of the KV of a row, unless another entry begins with it."""
        if not self.budget or not tokens or cache.nbytes_of(len(tokens)) > self.budget:
            return
        shorter: list[int] = []
        for number, entry in self._entries.items():
            same = shared(entry, tokens, contents)
            if same == len(tokens):
                self._entries.move_to_end(number)
                return
            if same == len(entry.tokens):
                shorter.append(number)
        for number in shorter:
            self._drop(number)
        copy = cache.take(row, num_tokens=len(tokens), capacity=len(tokens))
        self._entries[next(self._numbers)] = Entry(list(tokens), list(contents), copy)
        self.nbytes += copy.nbytes
        while self.nbytes > self.budget:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Drops all entries."""
        self._entries.clear()
        self.nbytes = 0

    def _drop(self, number: int) -> None:
        self.nbytes -= self._entries.pop(number).cache.nbytes


def shared(entry: Entry, tokens: Sequence[int], contents: Sequence[Content]) -> int:
    """The number of first tokens that an entry has under the same mixtures."""
    low, high = 0, min(len(entry.tokens), len(tokens))

    def begins(n: int) -> bool:
        return entry.tokens[low:n] == tokens[low:n] and entry.contents[low:n] == contents[low:n]

    if begins(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if begins(middle) else (low, middle)
    return low
