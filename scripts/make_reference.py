"""Writes docs/reference from the code: cli.md from the commands' help, python.md from what the package exports."""

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.main import get_command

import dlp_lora
from dlp_lora.cli.app import app

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
GENERATED = "<!-- Written by scripts/make_reference.py; run `make docs`. -->"
WIDTH = 100
NAMES: Mapping[str, tuple[str, ...]] = {
    "Load": ("load", "load_router"),
    "Engine and answers": ("Engine", "Generation", "Sentence", "Stream", "Piece"),
    "Settings": ("RoutingSettings", "Switching", "RoutingLog"),
    "Mixtures and policies": ("Mixture", "FusionPolicy", "TopP", "Threshold", "TopK", "Only", "Uniform"),
    "Routers": ("Router", "Context", "MiniMLP", "EncoderRouter", "PrototypeRouter", "ArrowRouter"),
    "Sentences": ("Segmenter", "SentenceSegmenter"),
    "Errors": (
        *("DLPLoRAError", "AdapterError", "BundleError", "ModelError", "PromptError", "RouterError"),
        *("TaskError", "TrainingError"),
    ),
}
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "Answer": ("generate", "chat", "serve", "route"),
    "Bundles and adapters": ("bundle", "add-task", "remove-task", "check", "export"),
    "Train": (
        *("train-adapter", "train-adapters", "train-router", "router-from-descriptions", "router-from-adapters"),
        "learning-curve",
    ),
    "Evaluate": ("eval", "reproduce", "report", "lm-eval", "tasks"),
    "Try": ("demo",),
    "Benchmarks": ("bench",),
}
METAVARS = {Path: "PATH", str: "TEXT", int: "INTEGER", float: "NUMBER"}


def main() -> None:
    """Writes every page."""
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Gives the text of each page by its file name."""
    return {"cli.md": cli_reference(), "python.md": python_reference()}


def cli_reference() -> str:
    """Gives the help of every command as one page."""
    program = get_command(app)
    parts = [GENERATED, "# Command line", _help(program)]
    for title, names in _grouped(COMMANDS, program.list_commands(None)):
        parts.append(f"## {title}")
        for name in names:
            parts += _command(program.get_command(None, name), f"dlp-lora {name}")
    return "\n\n".join(parts) + "\n"


def python_reference() -> str:
    """Gives every public name with its signature and docstring as one page."""
    parts = [GENERATED, "# Python", "Everything here is imported from `dlp_lora`; all else may change."]
    for title, names in _grouped(NAMES, dlp_lora.__all__):
        parts.append(f"## {title}")
        for name in names:
            parts += _name(name, getattr(dlp_lora, name))
    return "\n\n".join(parts) + "\n"


def _grouped(groups: Mapping[str, tuple[str, ...]], names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The names by group. A name without a group is an error, so that none is forgotten."""
    left = set(names)
    for title, members in groups.items():
        yield title, [name for name in members if name in left]
        left -= set(members)
    if left:
        raise SystemExit(f"{', '.join(sorted(left))} has no group in scripts/make_reference.py")


def _command(command: Any, path: str) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name in sorted(command.list_commands(None)):
            yield from _command(command.get_command(None, name), f"{path} {name}")
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    shown = [p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments]
    yield f"### {path}"
    yield _fenced(" ".join([path, "[OPTIONS]", *shown]))
    yield _help(command)
    types = get_type_hints(inspect.unwrap(command.callback))
    rows = [_parameter(p, types[p.name]) for p in command.params if p.name in types]
    yield _fenced("\n".join(_row(left, right) for left, right in rows))


def _help(command: Any) -> str:
    return inspect.cleandoc(command.help or "")


def _parameter(parameter: Any, kind: Any) -> tuple[str, str]:
    notes = [parameter.help or ""]
    if parameter.required:
        notes.append("[required]")
    elif isinstance(parameter.default, bool):
        if parameter.secondary_opts:
            notes.append(f"[default: {(parameter.opts if parameter.default else parameter.secondary_opts)[0]}]")
    elif parameter.default is not None:
        notes.append(f"[default: {parameter.default}]")
    if parameter.param_type_name == "argument":
        return parameter.name.upper(), " ".join(notes)
    names = ", ".join(sorted([*parameter.opts, *parameter.secondary_opts], key=len))
    kinds = (kind, *get_args(kind))
    shown = [METAVARS[found] for found in kinds if found in METAVARS]
    shown += ["|".join(get_args(found)) for found in kinds if get_origin(found) is Literal]
    return " ".join([names, *shown]), " ".join(notes)


def _row(left: str, right: str) -> str:
    # A default stays on one line.
    whole = re.sub(r"\[.*?\]", lambda match: match[0].replace(" ", "\0"), right)
    wrapped = textwrap.wrap(whole, WIDTH - 34, break_long_words=False, break_on_hyphens=False)
    lines = [line.replace("\0", " ") for line in wrapped]
    if len(left) > 32:
        lines = ["", *lines]
    first, *rest = lines or [""]
    return "\n".join([f"{left:<34}{first}".rstrip(), *(" " * 34 + line for line in rest)])


def _name(name: str, value: Any) -> Iterator[str]:
    yield f"### {name}"
    if not (inspect.isclass(value) and issubclass(value, Exception | str)) and not _is_protocol(value):
        yield _fenced(_signature(name, value), "python")
    yield _docstring(value)
    if not inspect.isclass(value) or issubclass(value, Exception):
        return
    for member, method in vars(value).items():
        if member.startswith("_") and not (member == "__call__" and _is_protocol(value)):
            continue
        yield from _member(name, member, method)


def _member(owner: str, name: str, member: Any) -> Iterator[str]:
    if isinstance(member, property):
        yield f"#### {owner}.{name}"
        yield _docstring(member)
        return
    function = getattr(member, "__func__", member)
    if inspect.isfunction(function) and (function.__doc__ or name == "__call__" or owner in ("Router", "Segmenter")):
        yield f"#### {owner}.{name}"
        yield _fenced(_signature(name, function), "python")
        if function.__doc__:
            yield _docstring(function)


def _signature(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    shown = []
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        keyword_only |= parameter.kind is parameter.VAR_POSITIONAL
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = f"{stars}{parameter.name}"
        if parameter.annotation is not parameter.empty:
            text += f": {_annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {_default(parameter.default)}"
        shown.append(text)
    result = "" if inspect.isclass(value) else f" -> {_annotation(signature.return_annotation)}"
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) <= WIDTH - 4:
        return line
    return "\n".join([f"{name}(", *(f"    {text}," for text in shown), f"){result}"])


def _annotation(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    # Without the modules: pathlib.Path is Path. And 'Engine', named within itself, is Engine.
    text = re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text).replace("'Engine'", "Engine")
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)


def _default(default: Any) -> str:
    return default.__name__ if isinstance(default, type) else repr(default)


def _docstring(value: Any) -> str:
    text = inspect.getdoc(value) or ""
    generated = is_dataclass(value) and re.match(r"\w+\(.*\)$", text)
    paragraphs = [] if generated else text.split("\n\n")
    # Examples and lists of arguments keep their lines.
    return "\n\n".join(
        _fenced(paragraph, "python") if paragraph.startswith(">>>") else _listed(paragraph) for paragraph in paragraphs
    )


def _listed(paragraph: str) -> str:
    """A section such as "Args:" as a list of its entries."""
    title, separator, entries = paragraph.partition(":\n    ")
    if not separator:
        return paragraph
    lines = re.sub(r"\n {8,}", " ", entries).split("\n    ")
    items = [re.sub(r"^([\w, ]+): ", r"`\1`: ", line) for line in lines]
    return f"**{title}**\n\n" + "\n".join(f"- {item}" for item in items)


def _is_protocol(value: Any) -> bool:
    return bool(getattr(value, "_is_protocol", False))


def _fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"


if __name__ == "__main__":
    main()
