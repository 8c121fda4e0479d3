from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from conftest import byte_tokenizer, lively_model
from dlp_lora.engine.calls import Endings

TOKENS = st.lists(st.integers(0, 9), max_size=12)
SOME = st.frozensets(st.integers(0, 9), max_size=3)


@given(answer=TOKENS, behind=st.lists(st.integers(0, 9), max_size=4), eos=st.frozensets(st.integers(0, 9), min_size=1))
def test_an_answer_ends_with_its_first_end_token_whatever_follows(
    answer: list[int], behind: list[int], eos: frozenset[int]
) -> None:
    before = [token for token in answer if token not in eos]
    tokens = [*before, min(eos), *behind]
    assert Endings(eos, frozenset({3}), has_others=True).trim([tokens, answer], {3})[0] == [*before, min(eos)]


@given(answer=TOKENS, num_pads=st.integers(0, 3), special=SOME)
def test_without_an_end_token_only_special_padding_is_taken_off(
    answer: list[int], num_pads: int, special: frozenset[int]
) -> None:
    padded = answer + [7] * num_pads
    assert Endings(pad_ids=frozenset({7})).trim([padded, padded], special) == [padded, padded]
    endings = Endings(pad_ids=frozenset({7}), has_others=True)
    assert endings.trim([padded], special) == [padded]  # nothing goes on while this row has stopped
    found, _ = endings.trim([padded, padded], special)
    while 7 in special and answer[-1:] == [7]:
        answer = answer[:-1]
    assert found == (answer if 7 in special else answer + [7] * num_pads)


@pytest.mark.parametrize("where", ["argument", "config of the call", "config of the model"])
def test_a_call_ends_where_generate_ends_it(where: str) -> None:
    model: Any = lively_model()
    prompt = torch.tensor([byte_tokenizer()("A question:").input_ids])
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, prompt.shape[1] :].tolist()
    end = plain[5]
    kwargs: dict[str, Any] = {}
    model.generation_config.eos_token_id = end if where == "config of the model" else 255
    if where == "config of the call":
        kwargs["generation_config"] = GenerationConfig(eos_token_id=[end])
    if where == "argument":
        kwargs |= {"eos_token_id": end, "generation_config": GenerationConfig(eos_token_id=255)}
    answer = model.generate(prompt, **{"max_new_tokens": 12, "do_sample": False, **kwargs})[0, prompt.shape[1] :]
    endings = Endings.of_call(kwargs, model.generation_config)
    assert endings.eos_ids == {end}
    assert endings.trim([plain], ()) == [answer.tolist()]


def test_outside_generate_rows_end_as_the_models_or_the_tokenizers_do() -> None:
    tokenizer = byte_tokenizer()
    endings = Endings.of_model(GenerationConfig(eos_token_id=[1, 2], pad_token_id=5), tokenizer)
    assert endings.eos_ids == {1, 2, tokenizer.eos_token_id}
    assert endings.pad_ids == {5, tokenizer.pad_token_id} - {None}
