"""Passes: new tokens of many rows in, scores out, in one forward pass of the model.

A part is a KV cache with new tokens for each of its rows: the decoding rows are one part, and each new prompt is
another. The tokens of all parts are packed into one sequence. So weights are read once and each layer is called once,
and a prompt costs little in a pass that runs anyway. Only attention is computed part by part, with the function and the
masks of transformers that each part would have in a separate pass.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from dlp_lora.engine.cache import cache_argument
from dlp_lora.engine.engine import Engine
from dlp_lora.errors import ModelError
from dlp_lora.policy import Mixture
from dlp_lora.serve.cache import SpareCache

logger = logging.getLogger(__name__)

PACKED = "dlp_lora_packed"  # the name of the attention function of packs, and of its argument for the pack
SDPA = "sdpa"  # transformers' function, called for each part
ROUNDING = 0.05  # of the largest score: allowed difference between a pack and its parts alone

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Rows of one KV cache, and equally many new tokens of each, with the mixture of each token.

    `wants` selects scores: of no token, of the last one of each row, or of all.
    """

    cache: SpareCache
    tokens: Sequence[Sequence[int]]
    mixtures: Sequence[Sequence[Mixture]]
    wants: Literal["none", "last", "all"] = "last"

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.tokens)

    @property
    def num_new(self) -> int:
        """The number of new tokens in each row."""
        return len(self.tokens[0])

    @property
    def num_wanted(self) -> int:
        """The number of last tokens of each row with scores."""
        return {"none": 0, "last": 1, "all": self.num_new}[self.wants]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """The result of a pass: the scores of each part, and the times of fusing and of the whole pass."""

    scores: Sequence[Tensor]  # (rows, tokens, vocab)
    fuse_ms: float
    pass_ms: float


class Passes:
    """Runs parts through an engine's model: packed into one pass if the model allows it, else in separate passes.

    K and V of the new tokens are then in the caches; the caller advances these.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.can_pack = self._can_pack()

    def run(self, parts: Sequence[Part]) -> Scored:
        """Encodes the new tokens of all parts."""
        if len(parts) > 1 and self.can_pack:
            return self._packed(parts)
        each = [self._alone(part) for part in parts]
        return Scored(
            scores=[done.scores[0] for done in each],
            fuse_ms=sum(done.fuse_ms for done in each),
            pass_ms=sum(done.pass_ms for done in each),
        )

    def _alone(self, part: Part) -> Scored:
        """Runs one part, as a batch that is padded on the left."""
        engine, cache, num_new = self._engine, part.cache, part.num_new
        mixtures, numbers = numbered(part.mixtures)
        started = time.perf_counter()
        with engine.under(mixtures, numbers, reuse=num_new == 1) as forward:
            fused = time.perf_counter()
            cache.reserve(num_new)
            logits: Tensor = forward(
                input_ids=torch.tensor(part.tokens, device=engine.device),
                attention_mask=cache.mask(num_new, engine.device),
                position_ids=cache.positions(num_new, engine.device),
                use_cache=True,
                logits_to_keep=max(1, part.num_wanted),
                **cache_argument(cache),
            ).logits
        scores = logits[:, logits.shape[1] - part.num_wanted :]
        return Scored(scores=[scores], fuse_ms=_ms(started, fused), pass_ms=_ms(started))

    def _packed(self, parts: Sequence[Part]) -> Scored:
        """Runs parts as one sequence."""
        engine = self._engine
        started = time.perf_counter()
        pack = Pack(parts, engine.model, engine.device)
        mixtures, numbers = numbered([pack.in_order([part.mixtures for part in parts])])
        start_fuse = time.perf_counter()
        with engine.under(mixtures, numbers, reuse=True) as forward:
            fused = time.perf_counter()
            with pack.attending():
                logits: Tensor = forward(
                    input_ids=torch.tensor([pack.in_order([part.tokens for part in parts])], device=engine.device),
                    position_ids=torch.tensor([pack.positions], device=engine.device),
                    use_cache=True,
                    logits_to_keep=max(1, pack.num_wanted),
                    **cache_argument(pack),
                    **{PACKED: pack},
                ).logits
        return Scored(scores=pack.scores(logits[0]), fuse_ms=_ms(start_fuse, fused), pass_ms=_ms(started))

    @torch.no_grad()
    def _can_pack(self) -> bool:
        """Tests whether the model's scores are the same in a pack.

        Its attention must use transformers' interface, and must need no more about a token's place than its position.
        """
        model: Any = self._engine.model
        config = model.config.get_text_config()
        if not model._supports_attention_backend or config._attn_implementation != SDPA:
            return False
        AttentionInterface.register(PACKED, _attend)
        alone = _trial(lambda parts: [self._alone(part).scores[0] for part in parts])
        try:
            packed = _trial(lambda parts: self._packed(parts).scores)
        except Exception as error:  # the model may come from anywhere, and go any way
            logger.info("%s reads each prompt in a pass of its own: %r", type(model).__name__, error)
            return False
        return all(bool((a - b).abs().max() <= ROUNDING * a.abs().max()) for a, b in zip(alone, packed, strict=True))


class Pack(Cache):  # type: ignore[misc]
    """Parts as one sequence, which ends with the tokens with scores.

    Tokens with scores come in the reverse order of the parts, so that those of the last part follow its other tokens: a
    part whose tokens are neighbours is a view of the sequence. It is also the model's KV cache, and passes K and V on
    to the caches of the parts.
    """

    layers: Any

    def __init__(self, parts: Sequence[Part], model: PreTrainedModel, device: torch.device) -> None:
        super().__init__(layers=[])
        self._parts = parts
        self._config: Any = model.config.get_text_config()
        for part in parts:
            part.cache.reserve(part.num_new)
        tokens = [(p, r, t) for p, part in enumerate(parts) for r in range(part.num_rows) for t in range(part.num_new)]
        # Stable: the tokens of a part stay in their order.
        self._order = sorted(tokens, key=lambda token: (1, -token[0]) if self._is_wanted(token) else (0, token[0]))
        self.num_wanted = sum(map(self._is_wanted, tokens))
        self._places = [
            _index([i for i, (p, _, _) in enumerate(self._order) if p == number], device)
            for number in range(len(parts))
        ]
        self._masks = [_masks(part, model, device) for part in parts]
        self._attention: Callable[..., Any] = AttentionInterface()[SDPA]
        self._states: list[tuple[Tensor, Tensor]] | None = None  # K and V by part, of the next attention

    @property
    def positions(self) -> list[int]:
        """The position of each token in its row."""
        return [self._parts[p].cache.lengths[r] + t for p, r, t in self._order]

    def in_order(self, values: Sequence[Sequence[Sequence[T]]]) -> list[T]:
        """Brings values by part, row and token into the order of the sequence."""
        return [values[p][r][t] for p, r, t in self._order]

    def scores(self, logits: Float[Tensor, "tokens vocab"]) -> list[Tensor]:
        """Distributes the scores to the parts."""
        chosen = logits[len(logits) - self.num_wanted :]  # also for a model that scores all tokens
        backwards = self._parts[::-1]
        each = chosen.split([part.num_rows * part.num_wanted for part in backwards])
        return [
            scores.view(part.num_rows, part.num_wanted, logits.shape[1])
            for part, scores in zip(backwards, each, strict=True)
        ][::-1]

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Lets the model's attention use packs in the block.

        Raises:
            ModelError: if a layer's attention did not.
        """
        before = self._config._attn_implementation
        self._config._attn_implementation = PACKED
        try:
            yield
            self._check(None)
        finally:
            self._config._attn_implementation = before

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Writes K and V of new tokens of one layer into the caches of their parts."""
        self._check(None)
        self._states = [
            part.cache.update(_rows(key_states, part, place), _rows(value_states, part, place), layer_idx)
            for part, place in zip(self._parts, self._places, strict=True)
        ]
        return key_states, value_states

    def attend(self, module: Any, query: Tensor, **kwargs: Any) -> Float[Tensor, "1 tokens heads dim"]:
        """Attends, part by part, to the last written K and V."""
        self._check(list)
        states, self._states = self._states or [], None
        outputs: Tensor | None = None
        for part, place, (keys, values), masks in zip(self._parts, self._places, states, self._masks, strict=True):
            mask = masks[self._config.layer_types[module.layer_idx]] if isinstance(masks, dict) else masks
            output, _ = self._attention(module, _rows(query, part, place), keys, values, mask, **kwargs)
            if outputs is None:
                outputs = output.new_empty(1, len(self._order), *output.shape[2:])
            outputs[0, place] = output.flatten(0, 1)
        assert outputs is not None
        return outputs

    def _is_wanted(self, token: tuple[int, int, int]) -> bool:
        part, _, number = token
        return number >= self._parts[part].num_new - self._parts[part].num_wanted

    def _check(self, kind: type | None) -> None:
        """Checks that each layer writes K and V, and then attends to them."""
        if isinstance(self._states, list) != (kind is list):
            raise ModelError("a layer does not attend to the keys and values that it has just written")


def numbered(mixtures: Sequence[Sequence[Mixture]]) -> tuple[list[Mixture], Int[Tensor, "rows tokens"] | None]:
    """Turns mixtures by row and token into the arguments of `Engine.under`: one per row, or all different ones and the
    number of each token's.
    """
    if all(len(set(row)) == 1 for row in mixtures):
        return [row[0] for row in mixtures], None
    numbers = {mixture: i for i, mixture in enumerate(dict.fromkeys(m for row in mixtures for m in row))}
    return list(numbers), torch.tensor([[numbers[mixture] for mixture in row] for row in mixtures])


def _attend(module: nn.Module, query: Tensor, *_: object, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention function of packs; it ignores its keys, values and mask, because the pack has them."""
    pack: Pack = kwargs.pop(PACKED)
    return pack.attend(module, query, **kwargs), None


def _trial(run: Callable[[Sequence[Part]], Sequence[Tensor]]) -> Sequence[Tensor]:
    """Scores of a pass over two rows that decode, the end of a prompt, and another prompt."""

    def part(cache: SpareCache, *rows: list[int]) -> Part:
        return Part(cache=cache, tokens=rows, mixtures=[[Mixture()] * len(row) for row in rows])

    caches = [SpareCache(num_rows=1, capacity=num_tokens) for num_tokens in (4, 2, 8, 2)]
    begun = [part(cache, row) for cache, row in zip(caches, ([1, 2, 3, 4], [5, 6], [7, 6, 5, 4, 3]), strict=False)]
    run(begun)
    for each in begun:
        each.cache.advance(each.num_new)
    batch = SpareCache(num_rows=0, capacity=0)
    for cache in caches[:2]:
        batch.append(cache)
    return run([part(caches[2], [2, 1, 2]), part(batch, [3], [4]), part(caches[3], [5, 1])])


def _masks(part: Part, model: PreTrainedModel, device: torch.device) -> Any:
    """The mask of the model's attention for a part alone, or one for each kind of layer; None for no mask."""
    make: Callable[..., Any] = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    masks = make(
        config=model.config,
        inputs_embeds=torch.empty(part.num_rows, part.num_new, 0, dtype=model.dtype, device=device),
        attention_mask=part.cache.mask(part.num_new, device),
        position_ids=None,
        **cache_argument(part.cache),
    )
    if isinstance(masks, Tensor) and masks.ndim != 4:
        raise ModelError(f"{type(model).__name__} makes its masks itself")
    return masks


def _index(places: Sequence[int], device: torch.device) -> slice | Tensor:
    """Places in a sequence as an index; a slice, which copies nothing, if they are neighbours."""
    if places[-1] - places[0] == len(places) - 1:
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, device=device)


def _rows(states: Float[Tensor, "1 heads tokens dim"], part: Part, place: slice | Tensor) -> Tensor:
    """A part's tokens of a sequence, as a batch."""
    rows: Tensor = states[0][:, place].unflatten(1, (part.num_rows, part.num_new))
    return rows.transpose(0, 1)


def _ms(start: float, end: float | None = None) -> float:
    return ((time.perf_counter() if end is None else end) - start) * 1e3
