"""Batches of examples: (read, learned) token lists in, the loss over the learned tokens out."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dlp_lora.engine.cache import cache_argument

POSITIONS_BY_PLACE = ("mpt", "roformer", "git")  # model types that ignore `position_ids`
MIN_SHARED = 8  # tokens: with fewer, a separate pass costs more than it saves


def answer_loss(model: Any, batch: Sequence[tuple[list[int], list[int]]], *, share: bool = False) -> Float[Tensor, ""]:
    """Returns the mean loss over the answers' tokens of a batch of (read, learned) token lists.

    Rows are padded on the left, so all answers end together, and only the last positions have logits. Of these, the
    head reads only positions before a token of an answer, because short answers beside a long one are mostly padding.

    If `share`, the common beginning of all rows (a chat template's, a task's instruction) is encoded once; gradients
    flow back through its KV cache. Only for models that `can_share`.
    """
    start = num_shared(batch) if share else 0
    cache = _encoded(model, batch[0][0][:start], len(batch)) if start else None
    if cache is not None:
        batch = [(read[start:], learned) for read, learned in batch]
    ids, mask, labels = left_padded(batch, model.device)
    kept, width = labels.shape[1], ids.shape[1]
    if cache is not None:
        mask = F.pad(mask, (start, 0), value=1)
    learned = labels != -100
    with _head_reads(model, F.pad(learned, (0, 1))):  # the last token has no next one
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -width:],
            use_cache=cache is not None,
            **({} if cache is None else cache_argument(cache)),
            logits_to_keep=kept + 1,
        ).logits
    return F.cross_entropy(logits[0].float(), labels[learned])


@contextmanager
def _head_reads(model: Any, positions: Bool[Tensor, "batch kept"]) -> Iterator[None]:
    """Lets the language-model head read only these of the last positions, as one row.

    The row is contiguous, because a frozen head would multiply a slice row by row with copies of its weight.
    """
    head, kept = model.get_output_embeddings(), positions.shape[1]
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -kept:][positions][None],))
    try:
        yield
    finally:
        hook.remove()


def num_shared(batch: Sequence[tuple[list[int], list[int]]]) -> int:
    """The number of common tokens that `answer_loss` encodes once for all rows; 0 if this does not pay."""
    start = len(shared_prefix([read for read, _ in batch])) if len(batch) > 1 else 0
    return start if start >= MIN_SHARED else 0


def shared_prefix(texts: Sequence[list[int]]) -> list[int]:
    """The common first tokens of all texts, without the last token of the shortest, before which no answer begins."""
    length = min(map(len, texts)) - 1
    columns = zip(*(text[:length] for text in texts), strict=True)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def has_dropout(model: nn.Module) -> bool:
    """Whether a model in training has dropout."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0)
        for module in model.modules()
    )


def can_share(model: Any) -> bool:
    """Whether rows of a batch may continue one KV cache in training.

    Padding then lies between the common beginning and the rest. A sliding window would count it, a recurrent state
    would read it, and positions that come from places in the cache would shift. Dropout would be the same in all rows.
    """
    if has_dropout(model) or model.config.model_type in POSITIONS_BY_PLACE:
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _encoded(model: Any, tokens: list[int], num_rows: int) -> DynamicCache | None:
    """The KV cache of tokens, for each of so many rows; None if the model keeps none, as with checkpointed layers."""
    cache = DynamicCache()
    ids = torch.tensor([tokens], device=model.device)
    places = torch.arange(len(tokens), device=model.device)[None]
    model(input_ids=ids, position_ids=places, use_cache=True, **cache_argument(cache), logits_to_keep=1)
    if cache.get_seq_length() != len(tokens):
        return None
    cache.batch_repeat_interleave(num_rows)
    return cache


def micro_batches(
    batch: Sequence[tuple[list[int], list[int]]], max_tokens: int
) -> list[list[tuple[list[int], list[int]]]]:
    """Splits a batch into parts of at most `max_tokens` tokens with padding, short examples together.

    A pass's memory for gradients grows with its tokens, and that of attention with their square.
    """
    parts: list[list[tuple[list[int], list[int]]]] = []
    for example in sorted(batch, key=lambda pair: len(pair[0]) + len(pair[1])):
        width = len(example[0]) + len(example[1])
        if parts and (len(parts[-1]) + 1) * width <= max_tokens:
            parts[-1].append(example)
        else:
            parts.append([example])
    return parts


def left_padded(
    batch: Sequence[tuple[list[int], list[int]]], device: torch.device
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"], Int[Tensor, "batch kept"]]:
    """Pads rows on the left; returns ids, mask and the labels of the last positions, -100 for none."""
    width = max(len(read) + len(learned) for read, learned in batch)
    kept = max(len(learned) for _, learned in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), kept), -100)
    for i, (read, learned) in enumerate(batch):
        ids[i, width - len(read) - len(learned) :] = torch.tensor(read + learned)
        mask[i, width - len(read) - len(learned) :] = 1
        labels[i, kept - len(learned) :] = torch.tensor(learned)
    return ids.to(device), mask.to(device), labels.to(device)


def bucketed(examples: Sequence[tuple[list[int], list[int]]], size: int, rng: random.Random) -> list[list[int]]:
    """Shuffles, then sorts by length within stretches of 16 batches, so that a batch pads little."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    stretch = 16 * size
    batches = []
    for start in range(0, len(order), stretch):
        alike = sorted(order[start : start + stretch], key=lambda i: len(examples[i][0]) + len(examples[i][1]))
        batches += [alike[i : i + size] for i in range(0, len(alike), size)]
    rng.shuffle(batches)
    return batches
