"""The adapter bank: N adapters stacked over the layers of a model; mixtures in, fused low-rank pairs out
(section 3.3, Eq. 6).

A mixture of R adapters of rank r is one LoRA of rank R*r: their A's lie side by side along the rank axis, so do
their B's, and the weights go into B. A sentence pays once for the choice, and each token pays two matmuls however
many adapters the bank holds. Where rows of a batch differ, or sentences of a prompt, the pair holds the union of their
adapters and a gate of shape (batch, 1, rank) or (batch, seq, rank) weighs the low-rank activations row by row or token
by token.
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
from dlp_lora.bank.store import AdapterStore, Lease, content_digest
from dlp_lora.bank.turns import TurnLock
from dlp_lora.policy import Mixture

# Buffers start at the rank of the whole bank, but no larger than this for one layer; a wider mixture doubles them.
START_CAPACITY = 512


@dataclass(frozen=True)
class Plan:
    """The mixtures of a pass, and how their adapters lie in the buffers."""

    rows: tuple[Mixture, ...]  # one for all rows, or one a row; one a token number where `by_token`
    adapters: tuple[str, ...]  # in the order they lie; a few may lie idle
    batch: int | None = None  # rows of a compiled pass, which it is padded for
    by_token: bool = False


class AdapterBank:
    """N adapters for one base model, ready to be fused in any mixture.

    `layout` maps each linear layer of the base model to its (d_in, d_out), `siblings` lists those that read one
    input; `attach.linear_layers` and `attach.siblings` read them. `store` holds the adapters, with a `budget_mb` only
    some of them in memory; `groups` are the layers and the buffers; `base` is what is known of the base model's layers.

    A pass is between `fuse`, which copies what does not lie in the buffers yet and makes it active, and `clear`. `lock`
    is held all the while, and while adapters are added or removed: what one thread adds never moves what another one
    computes with.

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
        self.plan: Plan | None = None  # what lies in the buffers, where that is known
        self._dtype, self._device = dtype, placing.device
        self._where: Callable[[], tuple[torch.dtype, torch.device]] | None = None  # the model wants adapters to be
        self._was_where: tuple[torch.dtype, torch.device] | None = None
        self._max_rank = 0  # of a compiled pass
        self._is_merged = False
        for adapter in adapters:
            self.store.add(adapter)
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
        """How many numbers the adapters hold."""
        return sum(lora.a.numel() + lora.b.numel() for a in self.adapters.values() for lora in a.modules.values())

    @property
    def is_padded(self) -> bool:
        """Whether the buffers are laid for a compiled pass."""
        return self.plan is not None and self.plan.batch is not None

    @property
    def is_merged(self) -> bool:
        """Whether the base weights hold a mixture: nothing is fused beside it."""
        return self._is_merged

    def tensors(self) -> list[Tensor]:
        """Everything that the bank holds, for counting memory: adapters and buffers."""
        return [*self.store.tensors(), *(tensor for group in self.groups for tensor in group.buffers())]

    def add(self, adapter: Adapter) -> None:
        """Adds one adapter; mixtures may use it from the next `fuse` on. Buffers stay where they are.

        Raises:
            AdapterError: if it does not fit the layout, its name is taken, or a removed adapter of its name is leased
                to one that does not follow.
        """
        with self.lock:
            self.store.add(adapter)
            self.pad(self._max_rank)  # modules that no adapter changed before
            self.plan = None

    def remove(self, name: str) -> None:
        """Removes one adapter. Who holds a lease on it keeps it, and its memory, until the lease is given up.

        Where its files are gone or were written again and it is not in memory, the next pass with it says so.

        Raises:
            AdapterError: if there is none of this name.
        """
        with self.lock:
            self.store.remove(name)
            self.plan = None

    def lease(self, mixtures: Iterable[Mapping[str, float]], *, follows: bool = False) -> Lease:
        """Keeps the adapters of mixtures, removed or not, for as long as somebody refers to the lease that it gives.

        If it `follows`, another adapter may be added under the name of one that was removed: who holds the lease fuses
        `lease.of(mixture)`.

        Raises:
            AdapterError: if a mixture names an adapter that the bank does not hold.
        """
        with self.lock:
            return self.store.lease((name for mixture in mixtures for name in mixture), follows=follows)

    def are_ready(self, names: Iterable[str]) -> bool:
        """Whether adapters are in memory, and `content` knows what they hold: what `prepare` does takes no time.

        Raises:
            AdapterError: if the bank holds no adapter of a name.
        """
        with self.lock:
            return all(self.store.entry(name).is_ready for name in names)

    def prepare(self, names: Iterable[str]) -> None:
        """Loads adapters, and computes what `content` tells of them, in this thread; passes go on meanwhile.

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
        """Says what a mixture is made of: equal for equal weights of adapters that hold equal numbers, whatever their
        names. The adapters must be ready.
        """
        with self.lock:
            parts = sorted((self.store.digest(name), weight) for name, weight in mixture.items())
        return hashlib.sha256(repr(parts).encode()).digest()

    def touched(self) -> list[Group]:
        """The groups in which at least one adapter changes a module."""
        numbers = {place.family for name in self.names for place in self.store.entry(name).ranks}
        return [group for g, group in enumerate(self.groups) if g in numbers]

    def pad(self, max_rank: int) -> None:
        """Makes room for compiled passes, of mixtures of at most this rank in one layer; 0 for none."""
        self._max_rank = max_rank
        if not max_rank:
            return
        places = {place for name in self.names for place in self.store.entry(name).ranks}
        for g, group in enumerate(self.groups):
            # What was padded once stays so: a graph counts on it.
            group.pad([max_rank if Place(g, s) in places or rank else 0 for s, rank in enumerate(group.padded)])
        self.plan = None

    def follow(self, where: Callable[[], tuple[torch.dtype, torch.device]]) -> None:
        """Goes along with a model from now on, whatever casts or moves it; `where` gives the dtype and the device that
        it wants adapters in."""
        self.catch_up()
        self._where, self._was_where = where, where()

    def catch_up(self, *, layers: Collection[int] | None = None) -> None:
        """Goes where the model went since. With `layers`, only weights of these tell whether some have moved."""
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

        With `tokens`, `mixtures[tokens[b, t]]` is that of one token alone, and the next pass must be over just these.
        Where rows differ and `reuse` is set, adapters that lie in the buffers keep their places, so that only new ones
        are copied; otherwise the result does not depend on what was fused before, to the last bit. Prepacked weights
        are compared with the base's unless `reuse` is set, as that takes as long as a layer.
        `reads` tells what the pass reads: layers check by it that a gate is laid over the rows that it is for.
        Where `padded`, for a compiled pass over as many rows as there are mixtures, if they fit in: then `is_padded`.

        Raises:
            AdapterError: if a mixture names an adapter that the bank does not hold.
        """
        if self._is_merged:
            return
        for group in self.groups:
            group.reads = reads
        # What moves a whole model moves its first layers, too, and to look at them alone takes no time.
        self.catch_up(layers=(0,) if reuse else None)
        if not reuse and sum(group.repack() for group in self.groups):  # of all of them
            self.plan = None
        plan = self._plan(tuple(mixtures), by_token=tokens is not None, reuse=reuse, padded=padded)
        if plan == self.plan and not plan.by_token:
            for group in self.groups:
                group.activate()
            return
        loras = dict(zip(plan.adapters, self.store.load(plan.adapters), strict=True))
        self.plan = None  # what breaks off half-way is laid again
        for g, group in enumerate(self.groups):
            self._lay(plan, g, group, loras, tokens)
        self.plan = plan

    def clear(self) -> None:
        """Makes nothing active: the base model. What lies in the buffers stays there for the next `fuse`."""
        for group in self.groups:
            group.clear()

    def forget(self) -> None:
        """Has the next `fuse` lay everything again; nothing is active until then."""
        self.plan = None
        self.clear()

    @contextmanager
    def merging(self) -> Iterator[None]:
        """Fuses nothing for a while, as the base weights hold a mixture."""
        self.clear()
        self._is_merged = True
        try:
            yield
        finally:
            self._is_merged = False

    def _plan(self, mixtures: tuple[Mixture, ...], *, by_token: bool, reuse: bool, padded: bool) -> Plan:
        """Gives the plan for a pass, with the entries of the store and what lies in the buffers."""
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
        """Lays the adapters of a plan that change a group's modules side by side, and makes them active."""
        places = [Place(g, s) for s in range(len(group.modules))]
        names = [[name for name in plan.adapters if place in loras[name]] for place in places]
        if not any(names) and not (plan.batch is not None and any(group.padded)):
            # With nothing fused anywhere the layers are the base's, bit for bit.
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
