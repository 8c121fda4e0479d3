"""The adapter bank: N adapters stacked over the layers of a model; mixtures in, fused low-rank pairs out
(section 3.3, Eq. 6).

A mixture of R adapters of rank r is one LoRA of rank R*r: their A's lie side by side along the rank axis, so do
their B's, and the weights go into B. A sentence pays once for the choice, and each token pays two matmuls however
many adapters the bank holds. Where rows of a batch differ, or sentences of a prompt, the pair holds the union of their
adapters and a gate of shape (batch, 1, rank) or (batch, seq, rank) weighs the low-rank activations row by row or token
by token.
"""

import gc
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dlp_lora.bank.adapter_folder import check_shapes
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.group import Block, Group
from dlp_lora.bank.peft_format import Adapter, files_stamp
from dlp_lora.errors import AdapterError
from dlp_lora.policy import Mixture

# Buffers start at the rank of the whole bank, but no larger than this for one layer; a wider mixture doubles them.
START_CAPACITY = 512

Place = tuple[int, int]
"""Where an adapter's LoRAs go: the number of a group, and which of its siblings."""


class AdapterBank:
    """N adapters for one base model, ready to be fused in any mixture.

    `layout` maps each linear layer of the base model to its (d_in, d_out), `siblings` lists those that read one
    input; `fused.linear_layers` and `fused.siblings` read them. Each adapter is held once, as blocks; `adapters` says
    their shapes. With a `budget_mb`, those that were read without their weights stay on disk; what is fused is loaded,
    and the least recently used make room for it, those that rows still run with last.

    `lock` is held while adapters are added or removed, and by a forward pass from its fusing to its end: what one
    thread adds never moves what another one computes with. `in_use` names the adapters that rows still run with,
    removed or not; the controller of an engine says it.

    Raises:
        AdapterError: if an adapter does not fit the layout, or two adapters have one name.
    """

    def __init__(
        self,
        layout: Mapping[str, tuple[int, int]],
        adapters: Iterable[Adapter] = (),
        *,
        siblings: Sequence[tuple[str, ...]] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        budget_mb: float | None = None,
    ) -> None:
        if budget_mb is not None and budget_mb <= 0:
            raise ValueError(f"budget_mb must be positive, got {budget_mb}")
        self.budget_mb = budget_mb
        self.num_misses = 0  # adapters that had to be loaded to be fused
        self.lock = threading.RLock()
        self._layout = layout if isinstance(layout, BaseLayers) else BaseLayers(layout)
        self._dtype = dtype
        self._device = torch.device(device)
        self._blocks: dict[str, dict[Place, Block]] = {}  # the least recently used first
        self._ranks: dict[str, dict[Place, int]] = {}
        self._on_disk: set[str] = set()  # their blocks may go, and are read again
        self._stamps: dict[str, tuple[tuple[int, int], ...]] = {}  # of their files as they were added
        self.unattached: set[str] = set()  # added since the model was last attached to
        self._retired: dict[str, Adapter] = {}  # removed, but still in use
        self.in_use: Callable[[], set[str]] = set
        self.adapters: dict[str, Adapter] = {}
        self.groups = [
            Group(modules, d_in, d_outs, dtype=dtype, device=self._device)
            for modules, d_in, d_outs in _alike(self._layout, siblings)
        ]
        self._site = {
            module: ((g, s), i)
            for g, group in enumerate(self.groups)
            for s, modules in enumerate(group.modules)
            for i, module in enumerate(modules)
        }
        self._fused: tuple[tuple[Mixture, ...], int | None] | None = None  # what the buffers hold, if that is known
        self._union: list[str] = []  # the adapters that were fused last, in the order they lie in
        self._is_in_order = True  # which is that of the bank
        self._max_rank = 0  # of a compiled pass
        self.is_padded = False  # what is fused is for a compiled pass
        self.is_merged = False  # the base weights hold a mixture: nothing is fused beside it
        for adapter in adapters:
            self._add(adapter)
        self._reserve()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order they were added."""
        return tuple(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def layout(self) -> BaseLayers:
        """The linear layers of the base model that the adapters are for."""
        return self._layout

    @property
    def num_parameters(self) -> int:
        """How many numbers the adapters hold."""
        return sum(lora.a.numel() + lora.b.numel() for a in self.adapters.values() for lora in a.modules.values())

    def tensors(self) -> list[Tensor]:
        """Everything that the bank holds, for counting memory: adapters and buffers."""
        blocks = [t for own in self._blocks.values() for block in own.values() for t in (block.a, block.b)]
        buffers = [t for group in self.groups for t in group.buffers()]
        return [*blocks, *buffers]

    def add(self, adapter: Adapter) -> None:
        """Adds one adapter; mixtures may use it from the next `fuse` on. Buffers stay where they are.

        Raises:
            AdapterError: if it does not fit the layout, its name is taken, or rows still run with a removed adapter of
                its name.
        """
        with self.lock:
            self._add(adapter)
            self.pad(self._max_rank)  # modules that no adapter changed before

    def remove(self, name: str) -> None:
        """Removes one adapter. Rows that run with it keep it, and its memory is theirs until they end or switch.

        Where its files are gone or were written anew and it is not in memory, their next pass says so.
        """
        with self.lock:
            if name not in self.adapters:
                raise AdapterError(self._unknown(name))
            if name in self.in_use():
                with suppress(AdapterError):
                    self._load([name])  # its files may go, too
            self._retired[name] = self.adapters.pop(name)
            self._on_disk.discard(name)
            self.unattached.discard(name)
            self._drop_retired()
            if name in self._union:
                self._fused = None

    def check_files(self, name: str) -> None:
        """Checks that an adapter's folder holds what was added, so that it may be read or copied again.

        Raises:
            AdapterError: if it does not.
        """
        path = {**self.adapters, **self._retired}[name].path
        try:
            found = files_stamp(path)
        except OSError as error:
            raise AdapterError(f"{path}, the folder of the adapter {name!r}, cannot be read: {error}") from error
        if found != self._stamps.get(name):
            raise AdapterError(f"{path} was written anew since it was added as {name!r}; remove that and add it again")

    def touched(self) -> list[Group]:
        """The groups in which at least one adapter changes a module."""
        touched = {g for name in self.adapters for g, _ in self._ranks[name]}
        return [group for g, group in enumerate(self.groups) if g in touched]

    def pad(self, max_rank: int) -> None:
        """Makes room for compiled passes, of mixtures of at most this rank in one layer; 0 for none."""
        self._max_rank = max_rank
        if not max_rank:
            return
        places = {place for own in self._ranks.values() for place in own}
        for g, group in enumerate(self.groups):
            # What was padded once stays so: a graph counts on it.
            group.pad([max_rank if (g, s) in places or rank else 0 for s, rank in enumerate(group.padded)])
        self._fused = None

    def fuse(
        self,
        mixtures: Sequence[Mixture],
        tokens: Int[Tensor, "batch seq"] | None = None,
        *,
        goes_on: bool = False,
        padded: bool = False,
    ) -> None:
        """Fuses one mixture for the whole batch, or one a row, into every group's pairs.

        With `tokens`, `mixtures[tokens[b, t]]` is that of one token alone, and the next pass must be over just these.
        Where rows differ and `goes_on` is set, adapters that were fused for the pass before keep their places, so that
        only new ones are copied; otherwise what is computed does not hang on what was fused before, to the last bit.
        Where `padded`, for a compiled pass over as many rows as there are mixtures, if they fit in: then `is_padded`.

        Raises:
            AdapterError: if a mixture names an adapter that the bank does not hold.
        """
        if self.is_merged:
            return
        if sum(group.repack() for group in self.groups):  # of all of them
            self._fused = None
        rows = tuple(mixtures) if len(set(mixtures)) > 1 else tuple(mixtures[:1])
        tokens = None if len(rows) == 1 else tokens
        goes_on = goes_on and len(rows) > 1 and not padded
        asked = (rows, len(mixtures) if padded else None)
        if asked == self._fused and tokens is None and (goes_on or self._is_in_order):
            return
        self._drop_retired()
        used = {name for row in rows for name in row}
        held = {**self.adapters, **self._retired}
        for name in used:
            if name not in held:
                raise AdapterError(self._unknown(name))
        union = in_order = [name for name in held if name in used]
        self._load(union)
        if goes_on:
            union = self._in_place(union)
        self._is_in_order = union == in_order
        self._fused = None  # what breaks off half-way must be fused anew
        self._union = union
        self.is_padded = padded and self._fits(union)
        for g, group in enumerate(self.groups):
            here = [[name for name in union if (g, s) in self._blocks[name]] for s in range(len(group.modules))]
            if not any(here) and not (self.is_padded and any(group.padded)):
                group.rest(plain=not union and not self.is_padded)
                continue
            blocks = [[self._blocks[name][g, s] for name in names] for s, names in enumerate(here)]
            if len(rows) == 1 and not self.is_padded:
                group.write(blocks, [[rows[0][name] for name in names] for names in here], None)
            else:
                gate = self._gate(rows, here, blocks, group.padded if self.is_padded else None)
                gate = gate[:, None] if tokens is None else gate[tokens.to(self._device)]
                ones = [[1.0] * len(names) for names in here]
                group.write(blocks, ones, gate, batch=len(mixtures) if self.is_padded else None)
        self._fused = asked if tokens is None else None

    def clear(self) -> None:
        """Fuses nothing: the base model."""
        self.fuse([Mixture()])

    def _add(self, adapter: Adapter) -> None:
        if adapter.name in self.adapters:
            raise AdapterError(f"two adapters are named {adapter.name!r} (the second: {adapter.path}); rename one")
        self.check(adapter)
        self._drop_retired()
        if adapter.name in self._retired:
            gc.collect()  # their KV cache may be gone but for a cycle
            self._drop_retired()
        if adapter.name in self._retired:
            raise AdapterError(
                f"rows still run with the removed adapter {adapter.name!r}; let them end and drop their KV caches, or "
                f"add {adapter.path} under another name"
            )
        self.adapters[adapter.name] = adapter.without_weights()
        self._ranks[adapter.name] = {
            place: max(adapter.modules[module].rank for module in layers.values())
            for place, layers in self._places(adapter).items()
        }
        with suppress(OSError):  # one that was never in a folder
            self._stamps[adapter.name] = files_stamp(adapter.path)
        if adapter.is_loaded:
            self._blocks[adapter.name] = self._make_blocks(adapter)
        else:
            self._on_disk.add(adapter.name)
        self.unattached.add(adapter.name)

    def _reserve(self) -> None:
        """Makes room in the buffers."""
        total: Counter[Place] = Counter()
        for own in self._ranks.values():
            total.update(own)
        for g, group in enumerate(self.groups):
            ranks = [min(START_CAPACITY, total[g, s]) for s in range(len(group.modules))]
            group.reserve(sum(ranks), ranks)

    def _gate(
        self,
        rows: Sequence[Mixture],
        names: Sequence[Sequence[str]],
        blocks: Sequence[Sequence[Block]],
        padded: Sequence[int] | None,
    ) -> Float[Tensor, "mixtures rank"]:
        parts = []
        for s, (here, own) in enumerate(zip(names, blocks, strict=True)):
            weights = torch.tensor([[row.get(name, 0.0) for name in here] for row in rows], dtype=torch.float32)
            weights = weights.repeat_interleave(torch.tensor([block.rank for block in own], dtype=torch.long), dim=1)
            parts.append(weights if padded is None else F.pad(weights, (0, padded[s] - weights.shape[1])))
        return torch.cat(parts, dim=1).to(self._device, self._dtype)

    def _fits(self, names: Sequence[str]) -> bool:
        return all(
            sum(self._ranks[name].get((g, s), 0) for name in names) <= rank
            for g, group in enumerate(self.groups)
            for s, rank in enumerate(group.padded)
        )

    def _load(self, names: Sequence[str]) -> None:
        """Has the blocks of the named adapters in memory, as the most recently used."""
        for name in names:
            if name in self._blocks:
                self._blocks[name] = self._blocks.pop(name)
                continue
            found = {**self.adapters, **self._retired}[name].with_weights()
            self.check_files(name)
            self._blocks[name] = self._make_blocks(found)
            self.num_misses += 1
        if self.budget_mb is None:
            return
        size = {name: sum(block.nbytes for block in own.values()) for name, own in self._blocks.items()}
        over = sum(size.values()) - self.budget_mb * 2**20
        if over <= 0:
            return
        in_use = self.in_use()
        idle = [name for name in self._blocks if name in self._on_disk and name not in names]
        for name in sorted(idle, key=in_use.__contains__):  # else rows that take turns would evict each other's
            if over <= 0:
                return
            del self._blocks[name]
            over -= size[name]

    def _make_blocks(self, adapter: Adapter) -> dict[Place, Block]:
        return {place: self._block(adapter, place, layers) for place, layers in self._places(adapter).items()}

    def _places(self, adapter: Adapter) -> dict[Place, dict[int, str]]:
        """Which modules the adapter changes: by place, then layer."""
        places: dict[Place, dict[int, str]] = {}
        for module in adapter.modules:
            place, layer = self._site[module]
            places.setdefault(place, {})[layer] = module
        return places

    def _drop_retired(self) -> None:
        """Frees the removed adapters that no row runs with any more."""
        if not self._retired:
            return
        for name in set(self._retired) - self.in_use():
            del self._retired[name], self._ranks[name]
            self._blocks.pop(name, None)
            self._stamps.pop(name, None)
            if name in self._union:
                self._fused = None

    def _in_place(self, names: Sequence[str]) -> list[str]:
        """Orders names so that those that were fused before stay where they were. New ones take the places of others;
        what is left of these lies idle, unless it would be more than a quarter of the rank."""
        before = [name for name in self._union if name in self._blocks]
        new = iter([name for name in names if name not in before])
        order = [name if name in names else next(new, name) for name in before] + list(new)
        rank = {name: sum(self._ranks[name].values()) for name in order}
        idle = sum(rank[name] for name in order if name not in names)
        return order if 4 * idle <= sum(rank.values()) else list(names)

    def _block(self, adapter: Adapter, place: Place, layers: Mapping[int, str]) -> Block:
        group, s = self.groups[place[0]], place[1]
        rank = max(adapter.modules[module].rank for module in layers.values())
        a = torch.zeros(group.num_layers, rank, group.d_in, dtype=self._dtype, device=self._device)
        b = torch.zeros(group.num_layers, rank, group.d_outs[s], dtype=self._dtype, device=self._device)
        for layer, module in layers.items():
            lora = adapter.modules[module]
            a[layer, : lora.rank] = lora.a
            b[layer, : lora.rank] = lora.b.float().T * lora.scaling
        return Block(a, b)

    def check(self, adapter: Adapter) -> None:
        """Checks that an adapter fits the layout.

        Raises:
            AdapterError: if it does not.
        """
        shapes = {module: (lora.a.shape[1], lora.b.shape[0]) for module, lora in adapter.modules.items()}
        check_shapes(adapter.path, shapes, self._layout, adapter.base_model)

    def _unknown(self, name: str) -> str:
        return f"no adapter {name!r}; there are {', '.join(sorted(self.names)) or 'none'}"


def _alike(
    layout: Mapping[str, tuple[int, int]], siblings: Sequence[tuple[str, ...]]
) -> list[tuple[list[list[str]], int, list[int]]]:
    """Gathers sets of siblings that differ only in their layer's number: (names by sibling, d_in, d_out by sibling)."""
    family = {name: names for names in siblings for name in names}
    alike: dict[tuple[tuple[str, tuple[int, int]], ...], list[tuple[str, ...]]] = {}
    for names in dict.fromkeys(family.get(module, (module,)) for module in layout):
        alike.setdefault(tuple((re.sub(r"\d+", "*", name), layout[name]) for name in names), []).append(names)
    return [
        ([list(layers) for layers in zip(*families, strict=True)], kinds[0][1][0], [d_out for _, (_, d_out) in kinds])
        for kinds, families in alike.items()
    ]
