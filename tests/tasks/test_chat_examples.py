from typing import Any

import pytest

from conftest import CHAT_TEMPLATE, byte_tokenizer
from dlp_lora.errors import PromptError, TaskError
from dlp_lora.tasks import Example
from dlp_lora.tasks.formats import encode_example
from dlp_lora.training.args import AdapterTrainingArgs

TOOL = {"type": "function", "function": {"name": "weather"}}
ROW: dict[str, Any] = {"prompt": "Is it warm?", "answer": "Yes.", "tools": [TOOL]}
TEMPLATE = (
    "{% if tools %}{{ 'TOOLS ' + tools[0]['function']['name'] }}{% endif %}{% if shouts %}{{ 'LOUD' }}{% endif %}"
    + str(CHAT_TEMPLATE)
)


def read(row: dict[str, Any], template: str = TEMPLATE, prompt_format: Any = "chat", **kwargs: Any) -> str:
    tokenizer = byte_tokenizer(chat_template=template)
    return str(tokenizer.decode(encode_example(tokenizer, Example.from_json(row), prompt_format, kwargs)[0]))


def test_tools_and_arguments_of_the_template_are_read_in_training() -> None:
    assert read(ROW).startswith("TOOLS weather<|im_start|>user\nIs it warm?")
    assert read(ROW, shouts=True).startswith("TOOLS weatherLOUD<|im_start|>user")
    assert Example.from_json(ROW).to_json() == ROW
    assert len({Example.from_json(ROW)}) == 1


def test_tools_that_nothing_reads_are_refused() -> None:
    with pytest.raises(TaskError, match="the example has tools, which only a chat template reads"):
        read(ROW, prompt_format="plain")
    with pytest.raises(PromptError, match="does not read tools"):
        read(ROW, str(CHAT_TEMPLATE))
    with pytest.raises(TaskError, match="'tools' is a string, expected a list of objects"):
        Example.from_json({**ROW, "tools": "weather" * 10})


def test_adapters_of_before_are_those_without_arguments_of_the_template() -> None:
    assert "chat_template_kwargs" not in AdapterTrainingArgs().identity()
    assert AdapterTrainingArgs(chat_template_kwargs={"shouts": True}).identity()["chat_template_kwargs"]
