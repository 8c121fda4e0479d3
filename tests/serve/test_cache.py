"""Caches with room to spare hold for each row what it has written, wherever that lies; kept KV is found by content."""

from itertools import takewhile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import tiny_model
from dlp_lora.errors import ModelError
from dlp_lora.serve.cache import SpareCache, check_layers
from dlp_lora.serve.kept import Entry, KeptKV, shared

HEADS, DIM, NUM_LAYERS = 2, 3, 2


def write(cache: SpareCache, num_tokens: int, first: int) -> list[Tensor]:
    """Has a pass write numbers of its own; gives the keys of the first layer that attention saw, and what is new."""
    rows = len(cache.lengths)
    new = torch.arange(first, first + rows * HEADS * num_tokens * DIM).double().view(rows, HEADS, num_tokens, DIM)
    cache.reserve(num_tokens)
    seen = [cache.update(new + layer, -new - layer, layer) for layer in range(NUM_LAYERS)]
    cache.advance(num_tokens)
    for layer, (keys, values) in enumerate(seen):
        assert torch.equal(keys + values, torch.zeros_like(keys))  # the two go together
        assert torch.equal(keys[:, :, -num_tokens:], new + layer)
    return [seen[0][0], new]


def row_of(num_tokens: int, first: int) -> tuple[SpareCache, Tensor]:
    cache = SpareCache(num_rows=1, capacity=num_tokens)
    return cache, write(cache, num_tokens, first)[1][0]


@settings(deadline=None)
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("join"), st.integers(1, 90)),
            st.tuples(st.just("step"), st.integers(1, 40)),
            st.tuples(st.just("leave"), st.integers(0, 9)),
            st.tuples(st.just("take"), st.integers(0, 9)),
        ),
        max_size=25,
    )
)
def test_rows_keep_what_they_have_written_while_others_join_and_leave(actions: list[tuple[str, int]]) -> None:
    batch, rows, count = SpareCache(num_rows=0, capacity=0), list[Tensor](), 0
    for action, number in actions:
        count += 10_000
        if action == "join":
            row, keys = row_of(number, count)
            batch.append(row)
            rows.append(keys)
        elif not rows:
            continue
        elif action == "step":
            for i in range(number):
                keys, new = write(batch, 1, count + 100 * i)
                mask = batch.mask(0, torch.device("cpu"))
                rows = [torch.cat([row, one], dim=1) for row, one in zip(rows, new, strict=True)]
                for i_row, row in enumerate(rows):
                    assert torch.equal(keys[i_row, :, keys.shape[2] - row.shape[1] :], row)
                    assert mask is None or int(mask[i_row].sum()) == row.shape[1]
        elif action == "leave":
            batch.remove(number % len(rows))
            rows[number % len(rows)] = rows[-1]
            rows.pop()
        else:
            row = rows[number % len(rows)]
            num_tokens = 1 + number % row.shape[1]
            taken = batch.take(number % len(rows), num_tokens=num_tokens, capacity=num_tokens + 5)
            keys, new = write(taken, 3, count)
            assert torch.equal(keys[0], torch.cat([row[:, :num_tokens], new[0]], dim=1))
        assert list(batch.lengths) == [row.shape[1] for row in rows]


def test_a_step_copies_nothing_while_there_is_room() -> None:
    batch = SpareCache(num_rows=0, capacity=0)
    for i in range(3):
        batch.append(row_of(10 + i, 0)[0])
    write(batch, 1, 0)
    places = [layer.keys.data_ptr() for layer in batch.layers]
    nbytes = batch.nbytes
    for i in range(20):
        write(batch, 1, i)
    assert [layer.keys.data_ptr() for layer in batch.layers] == places
    for _ in range(500):  # rows that have gone leave their columns to the others
        batch.append(row_of(5, 0)[0])
        write(batch, 1, 0)
        batch.remove(batch.lengths.index(max(batch.lengths)))
    assert batch.nbytes <= 4 * nbytes


def test_rows_that_have_gone_give_their_memory_back() -> None:
    batch = SpareCache(num_rows=0, capacity=0)
    row, keys = row_of(10, 0)
    batch.append(row)
    alone = batch.nbytes
    for i in range(12):
        batch.append(row_of(400, 1000 * i)[0])
    assert batch.nbytes > 100 * alone
    while len(batch.lengths) > 1:
        batch.remove(1)
    assert batch.nbytes <= 4 * alone
    seen, new = write(batch, 1, 0)
    assert torch.equal(seen[0], torch.cat([keys, new[0]], dim=1))


@given(
    pairs=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([b"a", b"b"])), max_size=12),
    others=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([b"a", b"b"])), max_size=12),
)
def test_an_entry_is_shared_up_to_the_first_token_or_mixture_that_differs(
    pairs: list[tuple[int, bytes]], others: list[tuple[int, bytes]]
) -> None:
    cache, _ = row_of(1, 0)
    entry = Entry([token for token, _ in pairs], [content for _, content in pairs], cache)
    same = len(list(takewhile(lambda both: both[0] == both[1], zip(pairs, others, strict=False))))
    assert shared(entry, [token for token, _ in others], [content for _, content in others]) == same


def test_what_was_used_longest_ago_goes_first_and_a_longer_entry_takes_the_place_of_a_shorter() -> None:
    cache, keys = row_of(12, 0)
    kept = KeptKV(cache.nbytes / 2**20)

    def keep(tokens: list[int]) -> None:
        kept.keep(tokens, [b""] * len(tokens), cache, 0)

    def found(tokens: list[int]) -> int:
        cache = kept.find(tokens, [b""] * len(tokens), capacity=20)
        return 0 if cache is None else cache.lengths[0]

    keep([1, 2, 3])
    keep([1, 2, 3, 4])
    keep([1, 2])
    assert len(kept) == 1
    keep([9] * 6)
    assert (found([1, 2, 3, 5]), found([9]), len(kept)) == (3, 1, 2)
    keep([5] * 4)
    assert (found([1, 2, 3, 5]), found([9]), found([5]), len(kept)) == (0, 1, 1, 2)
    taken = kept.find([9] * 9, [b""] * 9, capacity=20)
    assert taken is not None
    assert torch.equal(taken.layers[0].keys[0, :, :6], keys[:, :6])


def test_a_row_that_is_larger_than_the_budget_takes_no_place() -> None:
    small, _ = row_of(4, 0)
    large, _ = row_of(12, 0)
    kept = KeptKV(2 * small.nbytes / 2**20)
    kept.keep([1, 2, 3, 4], [b""] * 4, small, 0)
    kept.keep(list(range(1, 13)), [b""] * 12, large, 0)
    assert len(kept) == 1
    assert kept.find([1, 2, 3, 4], [b""] * 4, capacity=8) is not None


def test_a_model_whose_cache_is_no_keys_and_values_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    check_layers(tiny_model("llama"))
    config = MambaConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match=r"MambaForCausalLM keeps .* in its cache"):
        check_layers(MambaForCausalLM(config))
