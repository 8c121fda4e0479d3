"""Commands on bundles: bundle, add-task, remove-task."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dlp_lora.cli.common import JsonOption, ModelHubOptions, ModelOption, base_model, base_of, layers_of, say
from dlp_lora.cli.json_lines import print_json
from dlp_lora.cli.options import with_options
from dlp_lora.files import check_replaceable, name_of
from dlp_lora.policy import RoutingSettings


@with_options
def bundle(
    hub_options: ModelHubOptions,
    adapters: Annotated[Path, typer.Option("--adapters", "-a", help="Folder of PEFT adapter folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder to write.")],
    router: Annotated[Path | None, typer.Option("--router", "-r", help="Router folder.")] = None,
    model: ModelOption = None,
    p: Annotated[float, typer.Option(help="Fuse the most likely adapters up to this probability.")] = 0.6,
    weighting: Annotated[str, typer.Option(help="renormalised or paper (Eq. 5).")] = "renormalised",
    min_confidence: Annotated[
        float, typer.Option(help="If the router is less sure than this, the base model answers.")
    ] = 0.0,
    unsure: Annotated[
        str, typer.Option(help="If no adapter fits: base (model), keep (the mixture in use), or likeliest (adapters).")
    ] = "base",
    min_tokens: Annotated[
        int | None, typer.Option(help="Shortest sentence, in tokens, after which the mixture may change. [default: 1]")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="Lead of another adapter that changes the mixture. [default: 0.2]")
    ] = None,
    kv_policy: Annotated[
        str, typer.Option(help="The KV cache at a switch: recompute or keep.")
    ] = RoutingSettings.kv_policy,
    prompt_routing: Annotated[
        str,
        typer.Option(
            help="Prompts of several questions: apart, questions (each in turn), whole, or sentences (Eq. 6)."
        ),
    ] = RoutingSettings.prompt_routing,
) -> None:
    """Put adapters, router and policy into one folder that `load` and every command take.

    Example: `dlp-lora bundle --model M --adapters adapters/ --router router/ --out bundle/`
    """
    from dlp_lora import Switching, TopP, load_router
    from dlp_lora.bank.check import check_adapters
    from dlp_lora.engine.base import Base
    from dlp_lora.engine.bundle import BUNDLE_FILE, check_names, write_bundle
    from dlp_lora.errors import AdapterError

    check_replaceable(out, BUNDLE_FILE)
    options: dict[str, Any] = {"unsure": unsure, "min_tokens": min_tokens, "margin": margin}
    switching = {key: value for key, value in options.items() if value is not None}
    settings = RoutingSettings(
        policy=TopP(p, weighting=weighting, min_confidence=min_confidence),  # type: ignore[arg-type]
        switching=Switching(**switching),
        kv_policy=kv_policy,  # type: ignore[arg-type]
        prompt_routing=prompt_routing,  # type: ignore[arg-type]
    )
    base = base_model(model)
    layers = layers_of(base, hub_options)
    checks = check_adapters(layers, adapters)
    if refused := [check for check in checks if not check.fits]:
        raise AdapterError(refused[0].reason)
    loaded = load_router(router) if router is not None else None
    if loaded is not None:
        check_names(loaded.names, [check.name for check in checks])
    write_bundle(
        out,
        base=Base.of(
            layers.source, bundle=out, revision=layers.revision, subfolder=layers.subfolder, folder=layers.folder
        ),
        adapters={check.name: check.path for check in checks},
        router=loaded,
        settings=settings,
    )
    say(f"wrote {out}: {len(checks)} adapters, {'a router' if loaded else 'no router'}, base {base}")


def add_task(
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="The bundle to extend.")],
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="PEFT adapter folder.")],
    examples: Annotated[Path, typer.Option(help="JSON lines with prompt and answer, as in a task folder.")],
    name: Annotated[str | None, typer.Option(help="The adapter's name. [default: its folder's]")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model: folder or hub id. [default: the bundle's]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for the choice among many examples.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Add an adapter to a bundle, in seconds; 32 examples are often enough for its router.

    Example: `dlp-lora add-task --bundle bundle/ --adapter adapters/units --examples units.jsonl`
    """
    from dlp_lora.bank.check import check_adapters, model_layout
    from dlp_lora.engine.bundle import BUNDLE_FILE, read_bundle
    from dlp_lora.errors import AdapterError
    from dlp_lora.tasks import Task, read_examples
    from dlp_lora.training.extend import add_to_bundle

    check_replaceable(bundle, BUNDLE_FILE)
    name = name or name_of(adapter)
    read = read_bundle(bundle)
    place: dict[str, Any] = {} if model else read.base.place
    (fits,) = check_adapters(model_layout(base_of(read, model), **place), {name: adapter})
    if not fits.fits:
        raise AdapterError(fits.reason)
    task = Task(name=name, train=read_examples(examples), test=())
    done = add_to_bundle(bundle, task, adapter, seed=seed)
    if as_json:
        print_json(done.to_dict())
        return
    tried = "too few to leave some out" if done.accuracy is None else f"{done.accuracy:.0%} of those left out found"
    say(f"{task.name}: {done.num_examples} examples ({tried}), {done.seconds:.1f} s")
    say(f"wrote {bundle}: {len(done.names)} adapters")


def remove_task(
    name: Annotated[str, typer.Argument(help="The adapter to remove.")],
    bundle: Annotated[Path, typer.Option("--bundle", "-b", help="The bundle.")],
) -> None:
    """Remove an adapter from a bundle and its router; the other adapters are routed as before.

    Example: `dlp-lora remove-task units --bundle bundle/`
    """
    from dlp_lora.engine.bundle import BUNDLE_FILE
    from dlp_lora.training.extend import remove_from_bundle

    check_replaceable(bundle, BUNDLE_FILE)
    left = remove_from_bundle(bundle, name)
    say(f"wrote {bundle}: {len(left)} adapters")
