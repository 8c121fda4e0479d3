"""KV caches with room to spare: rows that join and leave, and tokens that are written in place.

All rows end in one column, so a row that is shorter than others is padded on the left, as transformers expects it. K
and V of a step are written into the column behind; nothing is copied but where a row joins or leaves, or where the
columns are used up.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dlp_lora.errors import ModelError

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
ROOM = 64  # columns that a cache has to spare, at least, when it is laid out


class Columns:
    """Which columns of its buffers a cache uses: those from `start` to `end`, of `num_rows` rows."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # by row
        self.end = 0
        self.capacity = 0

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    @property
    def width(self) -> int:
        """The length of the longest row."""
        return max(self.lengths, default=0)

    @property
    def start(self) -> int:
        """The first column of the longest row."""
        return self.end - self.width


class SpareLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a cache: what attention sees are the columns in use, a view of its buffers.

    It keeps all tokens, also where a layer attends to a window of them: the model's mask leaves the others out.
    """

    is_croppable = False
    keys: Any  # None before the first tokens
    values: Any

    def __init__(self, columns: Columns, max_rows: int = 1) -> None:
        super().__init__()
        self.columns = columns
        self.max_rows = max_rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers, of zeros: what a mask leaves out must be finite."""
        self.device = key_states.device
        self.keys, self.values = (
            states.new_zeros(self.max_rows, states.shape[1], self.columns.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Writes K and V of new tokens, and gives those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        columns, stop = self.columns, self.columns.end + key_states.shape[2]
        rows, seen = slice(columns.num_rows), slice(columns.start, stop)
        self.keys[rows, :, columns.end : stop] = key_states
        self.values[rows, :, columns.end : stop] = value_states
        return self.keys[rows, :, seen], self.values[rows, :, seen]

    def get_seq_length(self) -> int:
        """How many columns are in use."""
        return self.columns.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns attention sees, and from which on."""
        return self.columns.width + query_length, 0


class SpareCache(Cache):  # type: ignore[misc]
    """The KV cache of some rows; a model's forward may be given it, and `advance` says that the pass has ended.

    `max_rows` and `capacity` (in tokens) say for how much room is made at first; there is more when it is needed.
    """

    layers: Any  # of SpareLayer

    def __init__(self, *, num_rows: int, capacity: int, max_rows: int = 1) -> None:
        super().__init__(layers=[])
        self.layers = []
        self.columns = Columns()
        self.columns.lengths = [0] * num_rows
        self.columns.capacity = capacity
        self.max_rows = max(max_rows, num_rows)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def lengths(self) -> Sequence[int]:
        """How many tokens each row has."""
        return self.columns.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its buffers take."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._made())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Writes K and V of new tokens of one layer, and gives those of all."""
        while len(self.layers) <= layer_idx:
            self.layers.append(SpareLayer(self.columns, self.max_rows))
        layer: SpareLayer = self.layers[layer_idx]
        return layer.update(key_states, value_states)

    def reserve(self, num_tokens: int) -> None:
        """Makes room for so many more tokens in each row."""
        columns = self.columns
        if columns.end + num_tokens <= columns.capacity:
            return
        width = columns.width
        needed = width + num_tokens
        # Half as much to spare, so that a token is moved a few times at most, however long its row grows.
        if needed + needed // 2 > columns.capacity:
            columns.capacity = max(needed + needed // 2, needed + ROOM)
        self._lay(columns.start, width, rows=self.max_rows)

    def advance(self, num_tokens: int) -> None:
        """Counts the tokens that a pass has written into each row."""
        self.columns.end += num_tokens
        self.columns.lengths = [length + num_tokens for length in self.columns.lengths]

    def mask(self, num_new: int, device: torch.device) -> Tensor | None:
        """Which columns hold a token, those to come included: (rows, columns); None if all do."""
        columns = self.columns
        if min(columns.lengths) == columns.width:
            return None
        starts = torch.tensor([columns.width - length for length in columns.lengths], device=device)
        return (torch.arange(columns.width + num_new, device=device) >= starts[:, None]).long()

    def positions(self, num_new: int, device: torch.device) -> Tensor:
        """Where in its row each token to come stands: (rows, tokens)."""
        lengths = torch.tensor(self.columns.lengths, device=device)
        return lengths[:, None] + torch.arange(num_new, device=device)

    def append(self, row: "SpareCache") -> None:
        """Takes the only row of another cache in, behind its own rows."""
        columns, (length,) = self.columns, row.lengths
        if columns.num_rows == self.max_rows:
            self.max_rows *= 2
            self._lay(columns.start, columns.width, rows=self.max_rows)
        if length > columns.end:  # its first tokens would stand before the first column
            needed = length + max(ROOM, length // 2)
            columns.capacity = max(columns.capacity, needed)
            self._lay(columns.start, columns.width, rows=self.max_rows, end=length)
        i, source = columns.num_rows, row.columns
        columns.lengths.append(length)
        while len(self.layers) < len(row.layers):
            self.layers.append(SpareLayer(columns, self.max_rows))
        for layer, other in zip(self.layers, row.layers, strict=True):
            if not other.is_initialized:
                continue
            if not layer.is_initialized:
                layer.lazy_initialization(other.keys, other.values)
            for target, new in ((layer.keys, other.keys), (layer.values, other.values)):
                target[i, :, columns.end - length : columns.end] = new[0, :, source.end - length : source.end]

    def take(self, i: int, *, num_tokens: int, capacity: int) -> "SpareCache":
        """Gives a copy of the first tokens of a row, in a cache of its own with room for `capacity` tokens."""
        taken = SpareCache(num_rows=1, capacity=capacity)
        taken.columns.lengths, taken.columns.end = [num_tokens], num_tokens
        first = self.columns.end - self.columns.lengths[i]
        for layer in self.layers:
            copy = SpareLayer(taken.columns)
            taken.layers.append(copy)
            if layer.is_initialized:
                copy.lazy_initialization(layer.keys, layer.values)
                copy.keys[0, :, :num_tokens] = layer.keys[i, :, first : first + num_tokens]
                copy.values[0, :, :num_tokens] = layer.values[i, :, first : first + num_tokens]
        return taken

    def remove(self, i: int) -> None:
        """Drops a row; the last one takes its number."""
        columns = self.columns
        last, length = columns.num_rows - 1, columns.lengths[-1]
        if i != last:
            used = slice(columns.end - length, columns.end)
            for layer in self._made():
                layer.keys[i, :, used] = layer.keys[last, :, used]
                layer.values[i, :, used] = layer.values[last, :, used]
            columns.lengths[i] = length
        columns.lengths.pop()
        if not columns.lengths:
            columns.end = 0
        self._shrink()

    def wipe(self, i: int) -> None:
        """Makes what a row holds zero: it was not finite, and would spoil what attends to it behind a mask."""
        for layer in self._made():
            layer.keys[i].zero_()
            layer.values[i].zero_()

    def clear(self) -> None:
        """Drops all rows, and the buffers, in which there may be anything after a failure."""
        self.layers.clear()
        self.columns.lengths, self.columns.end, self.columns.capacity = [], 0, 0

    def _shrink(self) -> None:
        """Gives memory back where a quarter of the buffers would do."""
        columns, rows = self.columns, max(1, self.columns.num_rows)
        capacity = columns.width + max(ROOM, columns.width // 2)
        if 4 * rows * capacity <= self.max_rows * columns.capacity:
            self.max_rows, columns.capacity = rows, capacity
            self._lay(columns.start, columns.width, rows=rows)

    def _made(self) -> list[SpareLayer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def _lay(self, start: int, width: int, *, rows: int, end: int | None = None) -> None:
        """Moves the columns in use so that they end at `end`, or begin at 0; into larger buffers where they need them.

        Layer by layer, so that no second copy of all is ever held.
        """
        end = width if end is None else end
        columns = self.columns
        for layer in self._made():
            layer.max_rows = rows
            for name in ("keys", "values"):
                old: Float[Tensor, "rows heads columns dim"] = getattr(layer, name)
                used = old[: columns.num_rows, :, start : start + width]
                if old.shape[0] == rows and old.shape[2] == columns.capacity:
                    new, used = old, used.clone()  # the two may overlap
                else:
                    new = old.new_zeros(rows, old.shape[1], columns.capacity, old.shape[3])
                new[: columns.num_rows, :, end - width : end] = used
                setattr(layer, name, new)
        columns.end = end


def check_layers(model: PreTrainedModel) -> None:
    """Checks that the rows of a model's KV cache can join and leave.

    Raises:
        ModelError: if it keeps something else than K and V of each token.
    """
    cache = DynamicCache(config=model.config)
    if strange := {type(layer).__name__ for layer in cache.layers if type(layer) not in PLAIN}:
        raise ModelError(
            f"{type(model).__name__} keeps {', '.join(sorted(strange))} in its cache, and the server batches rows of "
            "plain keys and values alone; use engine.generate"
        )
