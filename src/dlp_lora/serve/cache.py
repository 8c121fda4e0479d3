"""KV caches with spare room: rows join and leave, and tokens are written in place.

All rows end in the same column, so shorter rows are padded on the left, as transformers expects. K and V of a step are
written into the next column. Tensors are copied only if a row joins or leaves, or if there are no more columns.
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
ROOM = 64  # smallest number of spare columns of a new buffer


class Columns:
    """The used columns of a cache's buffers: from `start` to `end`, in `num_rows` rows."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # by row
        self.end = 0
        self.capacity = 0

    @property
    def num_rows(self) -> int:
        """The number of rows."""
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
    """One layer of a cache: attention sees the used columns, a view of its buffers.

    It keeps all tokens, even for layers with an attention window: the model's mask leaves out the others.
    """

    is_croppable = False
    keys: Any  # None before the first tokens
    values: Any

    def __init__(self, columns: Columns, max_rows: int = 1) -> None:
        super().__init__()
        self.columns = columns
        self.max_rows = max_rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes buffers of zeros, because masked values must be finite."""
        self.device = key_states.device
        self.keys, self.values = (
            states.new_zeros(self.max_rows, states.shape[1], self.columns.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Writes K and V of new tokens, and returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        columns, stop = self.columns, self.columns.end + key_states.shape[2]
        rows, seen = slice(columns.num_rows), slice(columns.start, stop)
        self.keys[rows, :, columns.end : stop] = key_states
        self.values[rows, :, columns.end : stop] = value_states
        return self.keys[rows, :, seen], self.values[rows, :, seen]

    def get_seq_length(self) -> int:
        """The number of used columns."""
        return self.columns.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of columns that attention sees, and the first one."""
        return self.columns.width + query_length, 0


class SpareCache(Cache):  # type: ignore[misc]
    """The KV cache of some rows; pass it to a model's forward, and call `advance` after the pass.

    `max_rows` and `capacity` (in tokens) set the first size of the buffers, which grow if necessary.
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
        """The number of tokens in each row."""
        return self.columns.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its buffers take."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._made())

    def nbytes_of(self, num_tokens: int) -> int:
        """Bytes of memory that so many tokens of a row take."""
        return num_tokens * sum(
            int(layer.keys[0, :, :1].nbytes + layer.values[0, :, :1].nbytes) for layer in self._made()
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Writes K and V of new tokens of one layer, and returns those of all tokens."""
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
        # Half as much spare room, so that a token is moved only a few times, even in a long row.
        if needed + needed // 2 > columns.capacity:
            columns.capacity = max(needed + needed // 2, needed + ROOM)
        self._lay(columns.start, width, rows=self.max_rows)

    def advance(self, num_tokens: int) -> None:
        """Counts the tokens that a pass has written into each row."""
        self.columns.end += num_tokens
        self.columns.lengths = [length + num_tokens for length in self.columns.lengths]

    def mask(self, num_new: int, device: torch.device) -> Tensor | None:
        """Which columns have a token, with new ones: (rows, columns); None if all have."""
        columns = self.columns
        if min(columns.lengths) == columns.width:
            return None
        starts = torch.tensor([columns.width - length for length in columns.lengths], device=device)
        return (torch.arange(columns.width + num_new, device=device) >= starts[:, None]).long()

    def positions(self, num_new: int, device: torch.device) -> Tensor:
        """The positions of the new tokens in their rows: (rows, tokens)."""
        lengths = torch.tensor(self.columns.lengths, device=device)
        return lengths[:, None] + torch.arange(num_new, device=device)

    def append(self, row: "SpareCache") -> None:
        """Appends the only row of another cache."""
        columns, (length,) = self.columns, row.lengths
        if columns.num_rows == self.max_rows:
            self.max_rows *= 2
            self._lay(columns.start, columns.width, rows=self.max_rows)
        if length > columns.end:  # its first tokens would be before the first column
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
        """Copies the first tokens of a row to a new cache with room for `capacity` tokens."""
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
        """Sets a row that is not finite to zero: even under a mask it would make other results NaN."""
        for layer in self._made():
            layer.keys[i].zero_()
            layer.values[i].zero_()

    def clear(self) -> None:
        """Drops all rows and the buffers, whose content is unknown after an error."""
        self.layers.clear()
        self.columns.lengths, self.columns.end, self.columns.capacity = [], 0, 0

    def _shrink(self) -> None:
        """Frees memory if a quarter of the buffers would be enough."""
        columns, rows = self.columns, max(1, self.columns.num_rows)
        capacity = columns.width + max(ROOM, columns.width // 2)
        if 4 * rows * capacity <= self.max_rows * columns.capacity:
            self.max_rows, columns.capacity = rows, capacity
            self._lay(columns.start, columns.width, rows=rows)

    def _made(self) -> list[SpareLayer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def _lay(self, start: int, width: int, *, rows: int, end: int | None = None) -> None:
        """Moves the used columns so that they end at `end`, or begin at 0; if necessary, into larger buffers.

        This goes layer by layer, so that there is never a second copy of all.
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
        ModelError: if it stores anything other than K and V of each token.
    """
    cache = DynamicCache(config=model.config)
    if strange := {type(layer).__name__ for layer in cache.layers if type(layer) not in PLAIN}:
        raise ModelError(
            f"{type(model).__name__} keeps {', '.join(sorted(strange))} in its cache, and the server batches rows of "
            "plain keys and values alone; use engine.generate"
        )
