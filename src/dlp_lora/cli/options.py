"""Options from dataclasses, so that options of several commands are declared once, with default and help."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import update_wrapper
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from dlp_lora.files import parse_json


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for each annotated field of each of its parameters that is a dataclass.

    A field is annotated with its help, as `Annotated[int, "Rounds after the warm-up."]`, or with an Option of Typer's.
    Several values, `tuple[int, ...]`, are given with commas between them.
    """
    own: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, kind in get_type_hints(command, include_extras=True).items():
        if is_dataclass(kind):
            groups[name] = kind
        elif name != "return":
            parameter = inspect.signature(command).parameters[name]
            own.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=kind))
    options = {name: _options(group) for name, group in groups.items()}

    def run(**given: Any) -> None:
        for name, group in groups.items():
            values = {option: given.pop(option) for option in options[name]}
            given[name] = group(**{k: _parsed(group, k, v) for k, v in values.items() if v is not None})
        command(**given)

    update_wrapper(run, command)
    del run.__wrapped__  # type: ignore[attr-defined]  # Typer and the reference read this signature
    parameters = [*own, *(p for group in options.values() for p in group.values())]
    run.__signature__ = inspect.Signature(sorted(parameters, key=_is_optional))  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Reads numbers with commas between them."""
    try:
        return tuple(map(int, words(text)))
    except ValueError as error:
        raise ValueError(f"--{option} takes whole numbers with commas between them, got {text!r}") from error


def words(text: str) -> tuple[str, ...]:
    """Reads words with commas between them, without the spaces around them."""
    return tuple(part.strip() for part in text.split(","))


def json_object(option: str, text: str | None) -> dict[str, Any]:
    """Reads an option whose value is a JSON object; an empty text is an empty object."""
    if text is None:
        return {}
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"--{option} takes a JSON object, got {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"--{option} takes a JSON object, got {text!r}")
    return value


def _options(group: Any) -> dict[str, inspect.Parameter]:
    hints, options = get_type_hints(group, include_extras=True), {}
    for field in fields(group):
        if get_origin(hints[field.name]) is not Annotated:
            continue
        kind, help_ = get_args(hints[field.name])
        option = typer.Option(help=help_) if isinstance(help_, str) else help_
        default: Any = inspect.Parameter.empty if field.default is MISSING else field.default
        if get_origin(kind) is tuple:
            kind, default = (str, ",".join(map(str, default))) if default else (str | None, None)
            option.help = f"{option.help} Comma-separated."
        options[field.name] = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )
    return options


def _parsed(group: Any, name: str, value: Any) -> Any:
    kind = get_type_hints(group)[name]
    if get_origin(kind) is not tuple:
        return value
    if get_args(kind)[0] is int:
        return whole_numbers(name.replace("_", "-"), value)
    return words(value)


def _is_optional(parameter: inspect.Parameter) -> bool:
    return parameter.default is not inspect.Parameter.empty
