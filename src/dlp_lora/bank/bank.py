"""The adapter bank: N adapters stacked over the layers of a model; mixtures in, fused low-rank pairs out
(section 3.3, Eq. 6).

A mixture of R adapters of rank r is one LoRA of rank R*r: their A's are concatenated along the rank axis, so are their
B's, and the weights are multiplied into B. This happens once per sentence. Each token costs two matmuls, for any number
of adapters in the bank. If rows of a batch or sentences of a prompt have different mixtures, the pair has all their
adapters. A gate of shape (batch, 1, rank) or (batch, seq, rank) then weighs the low-rank activations by row or token.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.group import Group, Reads
from dlp_lora.bank.layout import Layout, Place, StackedLora
from dlp_lora.bank.peft_format import Adapter
from dlp_lora.bank.store import AdapterStore, Entry, Lease, content_digest
from dlp_lora.bank.turns import TurnLock
from dlp_lora.policy import Mixture

# Buffers start with the rank of the whole bank, at most this for one layer; a wider mixture doubles them.
START_CAPACITY = 512


@dataclass(frozen=True)
class Plan:
    """The mixtures of a pass, and the order of their adapters in the buffers."""

    rows: tuple[Mixture, ...]  # one for all rows, or one per row; one per token number if `by_token`
    adapters: tuple[str, ...]  # in the order of the buffers; a few may be unused
    batch: int | None = None  # rows of a compiled pass, for which it is padded
    by_token: bool = False


class AdapterBank:
    """N adapters for one base model, ready to be fused in any mixture.

    `layout` maps each linear layer of the base model to its (d_in, d_out), `siblings` lists those that read one
    input; `attach.linear_layers` and `attach.siblings` read them. `store` has the adapters, with a `budget_mb` only
    some of them in memory. `groups` have the layers and the buffers; `base` describes the base model's layers.

    A pass begins with `fuse`, which copies missing adapters into the buffers and makes them active, and ends with
    `clear`. A thread holds `lock` during a pass, and while it adds or removes adapters. So no thread moves the buffers
    with which another one computes.

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
        self.base = layout if isinstance(layout, BaseLayers) else BaseLayers(layout)
        placing = Layout(self.base, siblings, dtype=dtype, device=torch.device(device))
        self.lock = TurnLock()
        self.loading = threading.Lock()  # one adapter is prepared at a time
        self.store = AdapterStore(placing, budget_mb=budget_mb)
        self.groups = [Group(*family, dtype=dtype, device=placing.device) for family in placing.families]
        self.plan: Plan | None = None  # the content of the buffers, if it is known
        self._dtype, self._device = dtype, placing.device
        self._where: Callable[[], tuple[torch.dtype, torch.device]] | None = None  # the model wants adapters to be
        self._was_where: tuple[torch.dtype, torch.device] | None = None
        self._max_rank = 0  # of a compiled pass
        self._is_merged = False
        for adapter in adapters:
            self.store.enter([self.store.entry_for(adapter)])
        self._reserve()

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name, in the order they were added: their shapes, without the weights."""
        return self.store.adapters

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order they were added."""
        return tuple(self.store.adapters)

    def __len__(self) -> int:
        return len(self.store.adapters)

    @property
    def num_parameters(self) -> int:
        """The number of the adapters' parameters."""
        return sum(lora.a.numel() + lora.b.numel() for a in self.adapters.values() for lora in a.modules.values())

    @property
    def is_padded(self) -> bool:
        """Whether the buffers are laid for a compiled pass."""
        return self.plan is not None and self.plan.batch is not None

    @property
    def is_merged(self) -> bool:
        """Whether a mixture is merged into the base weights; then nothing is fused."""
        return self._is_merged

    def tensors(self) -> list[Tensor]:
        """All tensors of the bank, to count memory: adapters and buffers."""
        return [*self.store.tensors(), *(tensor for group in self.groups for tensor in group.buffers())]

    def add(self, adapter: Adapter) -> None:
        """Adds one adapter; mixtures may use it from the next `fuse` on. The buffers do not move.

        Raises:
            AdapterError: if it does not fit the layout, its name is taken, or a removed adapter of its name is leased
                to one that does not follow.
        """
        with self.lock:
            self.put([self.store.entry_for(adapter)])

    def put(self, entries: Collection[Entry]) -> None:
        """Adds adapters by their entries from the store, or replaces those of their names: all of them at once.

        Mixtures use them from the next `fuse` on; rows with a lease keep the replaced ones.
        """
        with self.lock:
            self.pad(self._max_rank, entries)  # modules that no adapter changed before
            self.store.enter(entries)
            self.plan = None

    def remove(self, name: str) -> None:
        """Removes one adapter. If it is leased, it stays until the lease ends.

        A leased adapter that is not in memory is read from its files; if they are gone or changed, the pass fails.

        Raises:
            AdapterError: if there is none of this name.
        """
        with self.lock:
            self.store.remove(name)
            self.plan = None

    def lease(self, mixtures: Iterable[Mapping[str, float]], *, follows: bool = False) -> Lease:
        """Keeps the adapters of mixtures, even if they are removed, as long as the returned lease exists.

        If the lease `follows`, another adapter may get the name of a removed one; then use `lease.of(mixture)`.

        Raises:
            AdapterError: if a mixture names an adapter that the bank does not hold.
        """
        with self.lock:
            return self.store.lease((name for mixture in mixtures for name in mixture), follows=follows)

    def are_ready(self, names: Iterable[str]) -> bool:
        """Whether adapters are in memory and `content` knows their hashes, so that `prepare` takes no time.

        Raises:
            AdapterError: if the bank holds no adapter of a name.
        """
        with self.lock:
            return all(self.store.entry(name).is_ready for name in names)

    def prepare(self, names: Iterable[str]) -> None:
        """Loads adapters, and computes their hashes for `content`, in this thread; passes continue meanwhile.

        Raises:
            AdapterError: if the bank holds no adapter of a name, it cannot be read, or its files were written since.
        """
        for name in names:
            with self.loading:
                with self.lock:
                    entry = self.store.entry(name)
                stacked = self.store.read(entry)
                digest = entry.digest or content_digest(stacked)
                with self.lock:
                    self.store.put(entry, stacked, digest)

    def content(self, mixture: Mixture) -> bytes:
        """A key of a mixture's content: equal for equal weights of adapters with equal numbers, whatever their names.
        The adapters must be ready.
        """
        with self.lock:
            parts = sorted((self.store.digest(name), weight) for name, weight in mixture.items())
        return hashlib.sha256(repr(parts).encode()).digest()

    def touched(self, new: Iterable[Entry] = ()) -> list[Group]:
        """The groups in which at least one adapter changes a module, among them the `new` ones."""
        numbers = {place.family for place in self._places(new)}
        return [group for g, group in enumerate(self.groups) if g in numbers]

    def pad(self, max_rank: int, new: Iterable[Entry] = ()) -> None:
        """Makes room for compiled passes, of mixtures of at most this rank in one layer; 0 for none. The `new` adapters
        count, too.
        """
        self._max_rank = max_rank
        if not max_rank:
            return
        places = self._places(new)
        for g, group in enumerate(self.groups):
            # Padding never shrinks, because a graph depends on it.
            group.pad([max_rank if Place(g, s) in places or rank else 0 for s, rank in enumerate(group.padded)])
        self.plan = None

    def follow(self, where: Callable[[], tuple[torch.dtype, torch.device]]) -> None:
        """Follows a model if it is cast or moved; `where` gives the dtype and the device for adapters."""
        self.catch_up()
        self._where, self._was_where = where, where()

    def catch_up(self, *, layers: Collection[int] | None = None) -> None:
        """Follows the model if it was moved. With `layers`, only these layers are checked."""
        if self._where is not None and (where := self._where()) != self._was_where:
            (self._dtype, self._device), self._was_where = where, where
            self.store.place(dtype=self._dtype, device=self._device)
            for group in self.groups:
                group.place(dtype=self._dtype, device=self._device)
            self.plan = None
        if sum(group.restack(layers=layers) for group in self.groups):  # of all of them
            self.plan = None

    def fuse(
        self,
        mixtures: Sequence[Mixture],
        tokens: Int[Tensor, "batch seq"] | None = None,
        reads: Reads | None = None,
        *,
        reuse: bool = False,
        padded: bool = False,
    ) -> None:
        """Fuses one mixture for the whole batch, or one a row, into every group's pairs, and makes them active.

        With `tokens`, `mixtures[tokens[b, t]]` is the mixture of one token, and the next pass must read these tokens.
        If rows differ and `reuse` is set, adapters in the buffers keep their places, so that only new ones are copied.
        Without `reuse` the result does not depend on earlier mixtures, to the last bit. Without `reuse`, prepacked
        weights are also compared with the base's, which takes as long as a layer.
        `reads` describes the tokens of the pass; with it, layers check that a gate belongs to their rows.
        `padded` is for a compiled pass with as many rows as mixtures; if the mixtures fit in, `is_padded` is true.

        Raises:
            AdapterError: if a mixture names an adapter that the bank does not hold.
        """
        if self._is_merged:
            return
        for group in self.groups:
            group.reads = reads
        # If a whole model is moved, its first layers are moved, too; a look at these takes no time.
        self.catch_up(layers=(0,) if reuse else None)
        if not reuse and sum(group.repack() for group in self.groups):  # of all of them
            self.plan = None
        plan = self._plan(tuple(mixtures), by_token=tokens is not None, reuse=reuse, padded=padded)
        if plan == self.plan and not plan.by_token:
            for group in self.groups:
                group.activate()
            return
        loras = dict(zip(plan.adapters, self.store.load(plan.adapters), strict=True))
        self.plan = None  # unknown, in case of an error
        for g, group in enumerate(self.groups):
            self._lay(plan, g, group, loras, tokens)
        self.plan = plan

    def clear(self) -> None:
        """Makes nothing active: the base model. The buffers keep their content for the next `fuse`."""
        for group in self.groups:
            group.clear()

    def forget(self) -> None:
        """Makes nothing active, and lets the next `fuse` fill the buffers again."""
        self.plan = None
        self.clear()

    @contextmanager
    def merging(self) -> Iterator[None]:
        """Fuses nothing in the block, because a mixture is merged into the base weights."""
        self.clear()
        self._is_merged = True
        try:
            yield
        finally:
            self._is_merged = False

    def _places(self, new: Iterable[Entry]) -> set[Place]:
        """The places that an adapter changes."""
        entries = [*map(self.store.entry, self.names), *new]
        return {place for entry in entries for place in entry.ranks}

    def _plan(self, mixtures: tuple[Mixture, ...], *, by_token: bool, reuse: bool, padded: bool) -> Plan:
        """Makes the plan for a pass from the entries of the store and the content of the buffers."""
        rows = mixtures if len(set(mixtures)) > 1 else mixtures[:1]
        by_token = by_token and len(rows) > 1
        entries = {name: self.store.entry(name) for row in rows for name in row}
        order = sorted(entries, key=lambda name: entries[name].number)
        if reuse and len(rows) > 1 and not padded and self.plan is not None:
            before = self.store.loaded_among(self.plan.adapters)
            order = keep_places(order, before, rank=lambda name: self.store.entry(name).rank)
        batch = len(mixtures) if padded and self._fits(order) else None
        return Plan(rows, tuple(order), batch, by_token)

    def _lay(
        self,
        plan: Plan,
        g: int,
        group: Group,
        loras: Mapping[str, Mapping[Place, StackedLora]],
        tokens: Int[Tensor, "batch seq"] | None,
    ) -> None:
        """Concatenates the adapters of a plan that change a group's modules, and makes them active."""
        places = [Place(g, s) for s in range(len(group.modules))]
        names = [[name for name in plan.adapters if place in loras[name]] for place in places]
        if not any(names) and not (plan.batch is not None and any(group.padded)):
            # If nothing is fused anywhere, the layers are the base's, bit for bit.
            group.idle(stacked=bool(plan.adapters) or plan.batch is not None)
            return
        stacked = [[loras[name][place] for name in each] for place, each in zip(places, names, strict=True)]
        if len(plan.rows) == 1 and plan.batch is None:
            group.write(stacked, [[plan.rows[0][name] for name in each] for each in names], None)
            return
        gate = _gate(plan.rows, names, stacked, group.padded if plan.batch is not None else None)
        gate = gate.to(self._device, self._dtype)
        gate = gate[tokens.to(self._device)] if tokens is not None and plan.by_token else gate[:, None]
        group.write(stacked, [[1.0] * len(each) for each in names], gate, batch=plan.batch)

    def _reserve(self) -> None:
        """Makes room in the buffers for all adapters at once, up to a limit."""
        total: Counter[Place] = Counter()
        for name in self.names:
            total.update(self.store.entry(name).ranks)
        for g, group in enumerate(self.groups):
            ranks = [min(START_CAPACITY, total[Place(g, s)]) for s in range(len(group.modules))]
            group.reserve(sum(ranks), ranks)

    def _fits(self, names: Sequence[str]) -> bool:
        """Whether adapters fit into a compiled pass, all at once."""
        total: Counter[Place] = Counter()
        for name in names:
            total.update(self.store.entry(name).ranks)
        return all(rank <= self.groups[place.family].padded[place.sibling] for place, rank in total.items())


def keep_places(names: Sequence[str], before: Sequence[str], *, rank: Callable[[str], int]) -> list[str]:
    """Orders names so that those that lay in the buffers before stay where they were.

    New ones take the places of others. Others that are left over lie idle, unless they are more than a quarter of the
    rank: then `names` is given as it is.
    """
    new = iter([name for name in names if name not in before])
    order = [name if name in names else next(new, name) for name in before] + list(new)
    idle = sum(rank(name) for name in order if name not in names)
    return order if 4 * idle <= sum(map(rank, order)) else list(names)


def _gate(
    rows: Sequence[Mixture],
    names: Sequence[Sequence[str]],
    loras: Sequence[Sequence[StackedLora]],
    padded: Sequence[int] | None,
) -> Float[Tensor, "mixtures rank"]:
    """Each mixture's weight for each rank of each sibling, zeros up to `padded`."""
    parts = []
    for s, (each, stacked) in enumerate(zip(names, loras, strict=True)):
        weights = torch.tensor([[row.get(name, 0.0) for name in each] for row in rows], dtype=torch.float32)
        weights = weights.repeat_interleave(torch.tensor([lora.rank for lora in stacked], dtype=torch.long), dim=1)
        parts.append(weights if padded is None else F.pad(weights, (0, padded[s] - weights.shape[1])))
    return torch.cat(parts, dim=1)
