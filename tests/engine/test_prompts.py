from collections.abc import Callable
from typing import Any

import pytest

from conftest import CHAT_TEMPLATE, HashRouter, byte_tokenizer
from dlp_lora import Context, Engine
from dlp_lora.chat import Chat
from dlp_lora.engine.prompts import as_batch, encode_chat, encode_prompt, fitting
from dlp_lora.engine.routing import Prompt
from dlp_lora.errors import PromptError

USER = {"role": "user", "content": "Why?"}
BEGUN = {"role": "assistant", "content": "Because it"}
TOOL = {"role": "tool", "content": "It rains."}


def asked(engine: Engine) -> list[Context]:
    assert isinstance(engine.router, HashRouter)
    return engine.router.asked


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], Context("Why?")),
        ([{"role": "developer", "content": "Be brief."}, USER], Context("Why?", history="Be brief.")),
        ([USER, {"role": "assistant", "content": "call"}, TOOL], Context("Why?", history="call\nIt rains.")),
        ([{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], Context("Why?")),
        ([{"role": "user", "content": "USER: <|im_start|>user\nWhy?"}], Context("USER: <|im_start|>user\nWhy?")),
    ],
    ids=["user", "developer", "tool", "parts", "words of a template"],
)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["generate", "stream"])
def test_the_router_reads_the_messages_as_they_were_given(
    make_engine: Callable[..., Engine], messages: list[Any], expected: Context, is_streamed: bool
) -> None:
    engine = make_engine()
    if is_streamed:
        list(engine.stream(messages, max_new_tokens=2))
    else:
        engine.generate(messages, max_new_tokens=2)
    assert asked(engine)[0] == expected


def test_an_answer_that_was_begun_is_routed_as_one_that_goes_on(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(prompt_routing="whole")
    answer = engine.generate([USER, BEGUN], max_new_tokens=16, do_sample=False)
    first, *others = asked(engine)
    # A sentence of the test's segmenter has six characters.
    assert first == Context("Why?", "Becaus", "e it")
    assert all(context.answer.startswith("Because it") for context in others)
    assert others
    through_model = make_engine(prompt_routing="whole")
    encoded = encode_chat(engine.tokenizer, [USER, BEGUN])
    through_model.generate(engine.tokenizer.decode(list(encoded.tokens)), max_new_tokens=16, do_sample=False)
    assert asked(through_model) == asked(engine)
    assert "Because" not in answer.text


def test_chats_of_a_batch_have_tools_and_arguments_of_their_own(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.tokenizer = byte_tokenizer(chat_template="{% if tools %}{{ 'T' }}{% endif %}{{ mood }}" + str(CHAT_TEMPLATE))
    chats = [Chat(messages=[USER], chat_template_kwargs={"mood": "A"}), Chat(messages=[USER])]
    batch, single = as_batch(chats, chat_template_kwargs={"mood": "B"}, tools=[{"type": "function"}])
    texts = [engine.tokenizer.decode(list(encode_prompt(engine.tokenizer, chat).tokens))[:2] for chat in batch]
    assert (texts, single) == (["TA", "TB"], False)


def test_arguments_of_chats_are_refused_beside_a_string(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(PromptError, match="tools: for chats, but a prompt is a string"):
        make_engine().generate("Why?", tools=[{"type": "function"}])


def test_an_encoded_chat_says_what_starts_its_row() -> None:
    encoded = encode_chat(byte_tokenizer(), [USER, BEGUN])
    assert encoded.prompt == Prompt(history="", text="Why?", answer="Because it")
    assert encode_prompt(byte_tokenizer(), "Why?").prompt is None


def test_the_oldest_questions_of_a_long_chat_are_dropped_with_their_answers() -> None:
    tokenizer = byte_tokenizer()
    system = {"role": "system", "content": "Be brief."}
    turns = [{"role": role, "content": f"{i}" * 20} for i in range(3) for role in ("user", "assistant")]
    chat = Chat(messages=[system, *turns, USER])
    whole = len(encode_prompt(tokenizer, chat).tokens)
    assert fitting(tokenizer, chat, max_tokens=whole) == chat
    assert fitting(tokenizer, chat, max_tokens=whole - 1).messages == [system, *turns[2:], USER]
    assert fitting(tokenizer, chat, max_tokens=1).messages == [system, USER]
