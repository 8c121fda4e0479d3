from datetime import datetime
from typing import Any

import pytest

from conftest import CHAT_TEMPLATE, byte_tokenizer
from dlp_lora.chat import Chat, chat_tokens, prints_time, template_arguments, text_of
from dlp_lora.errors import PromptError

USER = {"role": "user", "content": "Why?"}
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = "{% if tools %}{{ 'TOOLS ' + tools[0]['function']['name'] + '\n' }}{% endif %}" + CHAT_TEMPLATE
THINKING = CHAT_TEMPLATE + "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def text(template: str = CHAT_TEMPLATE, **chat: Any) -> str:
    tokenizer = byte_tokenizer(chat_template=template)
    return str(tokenizer.decode(chat_tokens(tokenizer, Chat(**{"messages": [USER], **chat}))))


class TestChatTokens:
    @pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS], ids=["strings", "parts"])
    @pytest.mark.parametrize("content", ["Why?", [{"type": "text", "text": "Why?"}]], ids=["string", "parts"])
    def test_content_is_written_as_the_template_reads_it(self, template: str, content: Any) -> None:
        assert "user\nWhy?<|im_end|>" in text(template, messages=[{"role": "user", "content": content}])

    def test_tools_reach_the_template(self) -> None:
        assert text(TOOLS, tools=[TOOL]).startswith("TOOLS weather\n")
        assert text(TOOLS) == text()

    def test_tools_that_the_template_does_not_read_are_refused(self) -> None:
        with pytest.raises(PromptError, match="does not read tools"):
            text(tools=[TOOL])

    def test_arguments_reach_the_template(self) -> None:
        assert text(THINKING, chat_template_kwargs={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
        assert text(THINKING, chat_template_kwargs={"enable_thinking": True}) == text()

    def test_an_argument_that_the_template_does_not_read_is_named(self) -> None:
        with pytest.warns(UserWarning, match="does not read enable_thinking"):
            assert text(chat_template_kwargs={"enable_thinking": False}) == text()

    @pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "add_generation_prompt"])
    def test_arguments_of_transformers_are_none_of_the_template(self, name: str) -> None:
        with pytest.raises(PromptError, match=f"{name} cannot be among the arguments"):
            text(chat_template_kwargs={name: "x"})

    def test_a_last_message_of_the_assistant_goes_on(self) -> None:
        chat = [USER, {"role": "assistant", "content": "Because "}]
        assert text(messages=chat).endswith("assistant\nBecause ")
        assert text(messages=chat, continue_final_message=False).endswith("Because <|im_end|>\n<|im_start|>assistant\n")
        assert text(continue_final_message=True).endswith("user\nWhy?")

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{{ raise_exception('turns must alternate') }}", "turns must alternate"),
            ("{{ messages[0]['name'] + 'x' }}", "no attribute 'name'"),
            ("{% for m in messages", "Jinja"),
        ],
        ids=["refuses", "asks for more", "damaged"],
    )
    def test_a_template_that_refuses_a_chat_says_why(self, template: str, reason: str) -> None:
        with pytest.raises(PromptError, match=reason):
            text(template)

    def test_a_call_of_a_tool_has_its_arguments_as_an_object(self) -> None:
        template = "{% for m in messages %}{{ m['tool_calls'][0]['function']['arguments']['city'] }}{% endfor %}"
        call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
        assert (
            text(
                template,
                messages=[{"role": "assistant", "content": None, "tool_calls": [call]}, USER][:1],
                continue_final_message=False,
            )
            == "Rome"
        )

    @pytest.mark.parametrize("arguments", ["{", "[" * 100_000])
    def test_arguments_that_are_not_json_stay_as_they_are(self, arguments: str) -> None:
        template = "{{ messages[0]['tool_calls'][0]['function']['arguments'] }}"
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        asked = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        assert text(template, messages=asked, continue_final_message=False) == arguments


@pytest.mark.parametrize(
    "content",
    [None, 3, [{"type": "image_url", "image_url": {}}], ["Why?"], [{"type": "text"}]],
    ids=["none", "number", "image", "bare string", "no text"],
)
def test_a_message_of_anything_but_text_is_refused(content: Any) -> None:
    with pytest.raises(PromptError, match=r"expected parts|must be a string"):
        text_of({"role": "user", "content": content})


def test_arguments_of_a_template_are_what_it_reads_and_does_not_set() -> None:
    set_first = "{% if not tools is defined %}{% set tools = none %}{% endif %}{% set x = 1 %}{{ x }}{{ tools }}"
    assert template_arguments(set_first) == {"tools"}
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert template_arguments(marked) == {"messages"}


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", 'strftime_now( "%d %b %Y" )'])
def test_a_template_prints_the_given_time(call: str) -> None:
    template = "{% if strftime_now is defined %}{{ " + call + " }}{% endif %} " + CHAT_TEMPLATE
    dated = byte_tokenizer(chat_template=template)
    now = datetime(2026, 11, 30)
    assert str(dated.decode(chat_tokens(dated, Chat(messages=[USER]), now=now))).startswith("30 Nov 2026 ")
    assert prints_time(dated)
    assert not prints_time(byte_tokenizer())
    dated.chat_template = {"default": CHAT_TEMPLATE, "tool_use": template}  # type: ignore[assignment]
    assert prints_time(dated)
