"""The route command."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlp_lora.cli.common import (
    BundleOption,
    HubOptions,
    ModelHubOptions,
    ModelOption,
    PolicyOption,
    RouterOption,
    base_model,
    base_of,
)
from dlp_lora.cli.json_lines import print_json, questions
from dlp_lora.cli.options import with_options

if TYPE_CHECKING:
    from dlp_lora.router import Context, Router


@with_options
def route(
    hub_options: HubOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; without it, JSON lines are read from stdin.")
    ] = None,
    router: RouterOption = None,
    bundle: BundleOption = None,
    model: ModelOption = None,
    p: PolicyOption = None,
) -> None:
    """Show which adapters a prompt would use; only a router made from adapters loads the language model.

    If the prompt asks several questions, the line has these `questions`, and the adapters of the first.

    Reads lines `{"prompt": ...}` or `{"messages": [...]}`. Optional keys are `"history"`, the text before the prompt,
    and `"answer"`, the answer so far (or a last message of the assistant). Prints one line for each, with `probs` (they
    sum to 1), `mixture`, `confidence`, `fits` (the probability that any adapter fits) and `abstained`. Example: `echo
    '{"prompt": "Convert 3 km to metres."}' | dlp-lora route --router router/`
    """
    from dlp_lora.engine.bundle import FILES, check_names, read_bundle
    from dlp_lora.errors import BundleError
    from dlp_lora.policy import RoutingSettings, with_p
    from dlp_lora.router.questions import decide, read_held

    if unread := hub_options.adapter_revision or hub_options.adapter_subfolder:
        raise ValueError(f"route reads no adapters; leave out the option with {unread!r}")
    if bundle is not None and router is None:
        parts = read_bundle(hub_options.folder(bundle, files=FILES, error=BundleError))
        if parts.router is None:
            raise ValueError(f"{bundle} has no router; train one with train-router")
        place = {} if model else parts.base.place
        of_base = replace(
            hub_options,
            revision=hub_options.base_revision or place.get("revision"),
            subfolder=hub_options.base_subfolder or place.get("subfolder"),
        )
        chooser = _load(parts.router, lambda: base_of(parts, model), of_base)
        check_names(chooser.names, list(parts.adapters))
        settings = parts.settings
    elif router is not None and bundle is None:
        if of_bundle := [name for name in ("base_revision", "base_subfolder") if getattr(hub_options, name)]:
            option = of_bundle[0]
            raise ValueError(f"--{option.replace('_', '-')} is for a bundle; use --{option.removeprefix('base_')}")
        chooser = _load(router, lambda: base_model(model), hub_options)
        settings = RoutingSettings()
    else:
        raise ValueError("give --router or --bundle, and not both")
    if p is not None:
        settings = replace(settings, policy=with_p(settings.policy, p))
    read = partial(read_held, chooser)
    for _, record in questions(prompt):
        print_json(decide(read, context_of(record), settings).to_dict())


def context_of(record: dict[str, Any]) -> "Context":
    """Reads a line of JSON as a router reads a growing answer: the newest sentence apart from those before."""
    from dlp_lora.chat import Chat, check_text
    from dlp_lora.engine.turns import read_chat
    from dlp_lora.router import Context
    from dlp_lora.sentences import split

    options = {name: record[name] for name in ("continue_final_message",) if name in record}
    if "messages" in record:
        context = read_chat(Chat(messages=record["messages"], **options))
    else:
        context = Context(record["prompt"])
    history, answer = record.get("history", ""), record.get("answer", context.answer)
    for text in (history, answer, context.prompt):
        if not isinstance(text, str):
            raise ValueError(f"prompt, messages, history and answer must be strings, got {text!r}")
        check_text(text)
    sentences = split(answer) or [""]
    return Context(
        context.prompt,
        "".join(sentences[:-1]),
        sentences[-1],
        history="\n".join(filter(None, [history, context.history])),
    )


def _load(source: str | Path, base: Callable[[], str], hub_options: HubOptions) -> "Router":
    """Reads a router; only one made from adapters loads the base model."""
    from dlp_lora.errors import RouterError
    from dlp_lora.hub import is_repo_id
    from dlp_lora.router import load_text_router, router_type
    from dlp_lora.router.folder import FILES

    place = {"revision": hub_options.router_revision, "subfolder": hub_options.router_subfolder}
    folder = Path(source)
    if is_repo_id(source) or any(place.values()):
        folder = hub_options.hub().folder(source, files=FILES, error=RouterError, **place)
    if router_type(folder) != "arrow":
        return load_text_router(folder)
    from dlp_lora.engine.loading import load_model, load_router

    of_model = {field.name for field in fields(ModelHubOptions)}
    options = {name: value for name, value in hub_options.given().items() if name in of_model}
    return load_router(folder, base=load_model(base(), **options)[0])
