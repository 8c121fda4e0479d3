from typing import Any

import pytest

from conftest import CHAT_TEMPLATE, byte_tokenizer
from dlp_lora import TaskError
from dlp_lora.chat import Chat
from dlp_lora.tasks import Example
from dlp_lora.tasks.formats import as_prompt, encode_example, resolve_format

CHAT, PLAIN = byte_tokenizer(chat_template=CHAT_TEMPLATE), byte_tokenizer(chat_template=None)
EOS_ID = 256


def text(ids: list[int]) -> str:
    return str(CHAT.decode(ids))


@pytest.mark.parametrize(
    "tokenizer, asked, found",
    [
        (CHAT, "auto", "chat"),
        (CHAT, "chat", "chat"),
        (CHAT, "plain", "plain"),
        (PLAIN, "auto", "plain"),
        (PLAIN, "plain", "plain"),
    ],
)
def test_auto_is_the_chat_template_where_there_is_one(tokenizer: Any, asked: Any, found: str) -> None:
    assert resolve_format(tokenizer, asked) == found


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(TaskError, match="the tokenizer has no chat template; use 'plain'"):
        resolve_format(PLAIN, "chat")


def test_a_prompt_is_one_user_message_or_the_text_itself() -> None:
    assert as_prompt(CHAT, "Hi", "auto") == Chat(messages=[{"role": "user", "content": "Hi"}])
    assert as_prompt(CHAT, "Hi", "plain") == "Hi"


@pytest.mark.parametrize(
    "prompt, separator", [("Q: one? A:", " "), ("one?", "\n"), ("one? ", ""), ("one?\n", ""), ("Say it", "\n")]
)
def test_what_separates_a_plain_prompt_from_its_answer_is_learned(prompt: str, separator: str) -> None:
    read, learned = encode_example(PLAIN, Example(prompt=prompt, answer="Two."), "plain")
    assert text(read) == prompt
    assert text(learned[:-1]) == f"{separator}Two."
    assert learned[-1] == EOS_ID


def test_a_chat_prompt_ends_where_the_assistant_begins() -> None:
    read, learned = encode_example(CHAT, Example(prompt="one?", answer="Two."), "chat")
    assert text(read) == "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    assert text(learned) == "Two.<|im_end|>"


@pytest.mark.parametrize("tokenizer, asked, separator", [(PLAIN, "plain", "\n"), (CHAT, "chat", "")])
def test_an_answer_prefix_is_read_after_the_separator(tokenizer: Any, asked: Any, separator: str) -> None:
    example = Example(prompt="one? two?", answer_prefix="One.", answer=" Two.")
    read, learned = encode_example(tokenizer, example, asked)
    without, _ = encode_example(tokenizer, Example(prompt="one? two?", answer="x"), asked)
    assert text(read) == text(without) + f"{separator}One."
    assert text(learned) == " Two.<|im_end|>"


@pytest.mark.parametrize("asked", ["plain", "chat"])
def test_an_answer_that_goes_on_learns_no_end(asked: Any) -> None:
    _, learned = encode_example(CHAT, Example(prompt="one?\n", answer="One. The", complete=False), asked)
    assert text(learned) == "One. The"


def test_a_tokenizer_without_an_end_learns_none() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    tokenizer.eos_token = None
    _, learned = encode_example(tokenizer, Example(prompt="one? ", answer="Two."), "plain")
    assert text(learned) == "Two."


def test_a_whole_answer_reads_and_learns_what_its_two_halves_do() -> None:
    whole = encode_example(PLAIN, Example(prompt="p", answer="One. Two."), "plain")
    first = encode_example(PLAIN, Example(prompt="p", answer="One.", complete=False), "plain")
    second = encode_example(PLAIN, Example(prompt="p", answer_prefix="One.", answer=" Two."), "plain")
    assert [*first[0], *first[1]] == second[0]
    assert [*whole[0], *whole[1]] == [*second[0], *second[1]]
