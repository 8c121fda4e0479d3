"""Tasks as plain data: an Example is a question with its answer, a Task is a named set of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dlp_lora.errors import TaskError

REQUIRED_KEYS = ("prompt", "answer")
OPTIONAL_KEYS = ("choices", "references", "answer_prefix", "complete", "tools")
IGNORED_KEYS = ("id", "meta")

PromptFormat = Literal["auto", "chat", "plain"]
"""The form of a prompt for the model: in its chat template, as plain text, or in the template if there is one."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with the answer that an adapter learns to give."""

    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None
    """The options of a multiple-choice question; None if the answer is free text."""
    references: tuple[str, ...] = ()
    """All accepted answers; the answer itself always counts as one."""
    answer_prefix: str = ""
    """The start of the answer, which is read and not learned: the sentences of other tasks."""
    complete: bool = True
    """False if the answer continues with another task's sentence, so that no end-of-sequence is learned."""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """JSON schemas of the tools that the answer may call, for the chat template."""

    def __post_init__(self) -> None:
        for key in REQUIRED_KEYS:
            if not getattr(self, key).strip():
                raise TaskError(f"{key!r} is empty; expected text; fill it in or remove the example")
        if not all(choice.strip() for choice in self.choices or ()):
            raise TaskError(f"one of the choices {list(self.choices or ())} is empty; fill it in or remove it")
        if self.choices is not None and self.answer not in self.choices:
            raise TaskError(
                f"'answer' is {self.answer!r}, which is none of the choices {list(self.choices)}; "
                "make it one of them, letter for letter, or leave 'choices' out"
            )

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every answer that counts as right, each once."""
        return tuple(dict.fromkeys((self.answer, *self.references)))

    @classmethod
    def from_json(cls, row: object) -> "Example":
        """Makes an example from one decoded JSON line; a TaskError names the wrong key."""
        if not isinstance(row, dict):
            raise TaskError(f"found {_kind(row)}, expected a JSON object with 'prompt' and 'answer'")
        _check_keys(row)
        return cls(
            prompt=_text(row, "prompt"),
            answer=_text(row, "answer"),
            choices=_texts(row, "choices"),
            references=_texts(row, "references") or (),
            answer_prefix=_text(row, "answer_prefix", default=""),
            complete=_flag(row, "complete", default=True),
            tools=_objects(row, "tools"),
        )

    def to_json(self) -> dict[str, Any]:
        """The example as a JSON object, without the keys that have their default."""
        row: dict[str, Any] = {"prompt": self.prompt, "answer": self.answer}
        if self.choices is not None:
            row["choices"] = list(self.choices)
        if self.references:
            row["references"] = list(self.references)
        if self.answer_prefix:
            row["answer_prefix"] = self.answer_prefix
        if not self.complete:
            row["complete"] = False
        if self.tools:
            row["tools"] = [dict(tool) for tool in self.tools]
        return row


@dataclass(frozen=True, kw_only=True)
class Task:
    """A named set of examples: the ones to learn from, and the ones to be scored on."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def same_prompt(prompt: str) -> str:
    """A key of a prompt: equal for prompts that differ only in white space."""
    return " ".join(prompt.split())


def _check_keys(row: Mapping[str, object]) -> None:
    known = (*REQUIRED_KEYS, *OPTIONAL_KEYS, *IGNORED_KEYS)
    unknown = [key for key in row if key not in known]
    if unknown:
        raise TaskError(
            f"unknown key {unknown[0]!r}; known keys are {', '.join(known)}; "
            "correct the spelling, or put your own data under 'meta'"
        )
    for key in REQUIRED_KEYS:
        if key not in row:
            raise TaskError(f"no key {key!r}; every line needs 'prompt' and 'answer'; add it")


def _text(row: Mapping[str, object], key: str, *, default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        raise TaskError(f"{key!r} is {_kind(value)}, expected a string; put it in quotes")
    return _encodable(value, key)


def _texts(row: Mapping[str, object], key: str) -> tuple[str, ...] | None:
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, list):
        raise TaskError(f"{key!r} is {_kind(value)}, expected a list of strings or null; put it in brackets")
    for item in value:
        if not isinstance(item, str):
            raise TaskError(f"{key!r} holds {_kind(item)}, expected strings only; put it in quotes")
    return tuple(_encodable(item, key) for item in value)


def _objects(row: Mapping[str, object], key: str) -> tuple[Mapping[str, Any], ...]:
    value = row.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise TaskError(f"{key!r} is {_kind(value)}, expected a list of objects or null")
    return tuple(value)


def _flag(row: Mapping[str, object], key: str, *, default: bool) -> bool:
    value = row.get(key, default)
    if not isinstance(value, bool):
        raise TaskError(f"{key!r} is {_kind(value)}, expected true or false, without quotes")
    return value


def _encodable(text: str, key: str) -> str:
    # JSON can spell half a surrogate pair ("\ud83d"), which no tokenizer and no UTF-8 file accepts.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{key!r} holds {text[error.start]!r}, half of a character; expected Unicode text; "
            "write the file with ensure_ascii=False, or repair the text"
        ) from error
    return text


def _kind(value: object) -> str:
    """The JSON type of a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {value!r}" if len(value) <= 40 else "a string"
    return "a list" if isinstance(value, list) else "an object"
