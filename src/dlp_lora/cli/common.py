"""Shared parts of the commands: consoles, options, the engine of a command, and commands to try next."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from dlp_lora.errors import DLPLoRAError
from dlp_lora.hub import Hub
from dlp_lora.policy import KVPolicy, PromptRouting

if TYPE_CHECKING:
    from dlp_lora import Engine, RoutingLog
    from dlp_lora.bank.base_layers import BaseLayers
    from dlp_lora.engine.bundle import Bundle
    from dlp_lora.engine.outline import Outline


console = Console(emoji=False)  # ":a:" in an answer is no emoji
stderr = Console(stderr=True, emoji=False)

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Base model: folder or hub id. [default: SmolLM2-135M-Instruct]")
]
DataOption = Annotated[
    str, typer.Option("--data", "-d", help='Folder of task folders (docs/data-format.md), or "hub" for the catalog.')
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
AdaptersOption = Annotated[
    str | None, typer.Option("--adapters", "-a", help="Folder or hub id with PEFT adapter folders.")
]
RouterOption = Annotated[str | None, typer.Option("--router", "-r", help="Router: folder or hub id.")]
BundleOption = Annotated[
    str | None, typer.Option("--bundle", "-b", help="Bundle: folder or hub id, instead of model, adapters and router.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
PolicyOption = Annotated[
    float | None,
    typer.Option("--p", help="Fuse the most likely adapters up to this probability. [default: the bundle's, else 0.6]"),
]
PromptRoutingOption = Annotated[
    PromptRouting | None,
    typer.Option(
        "--prompt-routing",
        help="Prompts of several questions: each apart, in a separate context; each in turn, in one context "
        "(questions); whole, as one text; or by sentences (Eq. 6). [default: the bundle's, else apart]",
    ),
]
KVPolicyOption = Annotated[
    KVPolicy | None,
    typer.Option(
        "--kv-policy",
        help="The KV cache at a switch: encode the context again, or keep it. [default: the bundle's, else recompute]",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs", help="Arguments of the chat template as JSON: '{\"enable_thinking\": false}'."
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1, mps, ...; auto takes the first of cuda, mps and cpu that exists."
    ),
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Precision of the base model; auto keeps the saved one."),
]
PrepackOption = Annotated[
    bool, typer.Option("--prepack", help="Decode faster on a CPU; needs a second copy of the linear layers' weights.")
]
BudgetOption = Annotated[
    float | None,
    typer.Option("--budget-mb", help="Keep adapters on disk, and at most this many megabytes of them in memory."),
]
LogOption = Annotated[
    Path | None, typer.Option("--log-routing", help="Append each decision of the router to this file of JSON lines.")
]
LogTextOption = Annotated[
    bool, typer.Option("--log-text", help="Write the texts that the router reads into the log, too.")
]


def of_hub(help: str, *names: str) -> Any:
    """An option about the Hugging Face hub."""
    return typer.Option(*names, help=help, rich_help_panel="Hugging Face hub")


@dataclass(frozen=True, kw_only=True)
class ModelHubOptions:
    """A base model's place on the hub, and the access to the hub."""

    revision: Annotated[str | None, of_hub("Branch, tag or commit of the base model.")] = None
    subfolder: Annotated[str | None, of_hub("Folder inside the base model.")] = None
    trust_remote_code: Annotated[
        bool, of_hub("Run the code that the base model's repository brings.", "--trust-remote-code")
    ] = False
    token: Annotated[
        str | None, of_hub("Token for private repositories; HF_TOKEN is safer, as others cannot read it.")
    ] = None
    cache_dir: Annotated[Path | None, of_hub("Folder of downloads. [default: the hub's usual cache]")] = None
    local_files_only: Annotated[bool, of_hub("Use only the cache and no server.", "--local-files-only")] = False

    def given(self) -> dict[str, Any]:
        """The set options by name, for `dlp_lora.load`."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in options.items() if value not in (None, False)}

    def hub(self) -> Hub:
        """The access to the hub."""
        return Hub(token=self.token, cache_dir=self.cache_dir, local_files_only=self.local_files_only)

    def folder(self, source: str | Path, *, files: Sequence[str], error: type[DLPLoRAError]) -> Path:
        """The local folder of a path or hub id, at the revision and subfolder of the options.

        Raises:
            DLPLoRAError: of the given kind, if there is no such folder or repository.
        """
        return self.hub().folder(source, files=files, error=error, revision=self.revision, subfolder=self.subfolder)


@dataclass(frozen=True, kw_only=True)
class HubOptions(ModelHubOptions):
    """The place of a bundle or its parts on the hub."""

    revision: Annotated[
        str | None, of_hub("Branch, tag or commit of the bundle, or of the base model without a bundle.")
    ] = None
    subfolder: Annotated[str | None, of_hub("Folder inside the bundle, or inside the base model without a bundle.")] = (
        None
    )
    base_revision: Annotated[str | None, of_hub("Branch, tag or commit of the base model of a bundle.")] = None
    base_subfolder: Annotated[str | None, of_hub("Folder inside the base model of a bundle.")] = None
    adapter_revision: Annotated[str | None, of_hub("Branch, tag or commit of --adapters.")] = None
    adapter_subfolder: Annotated[str | None, of_hub("Folder inside --adapters.")] = None
    router_revision: Annotated[str | None, of_hub("Branch, tag or commit of --router.")] = None
    router_subfolder: Annotated[str | None, of_hub("Folder inside --router.")] = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The engine of a command: a bundle, or its parts."""

    bundle: BundleOption = None
    model: ModelOption = None
    adapters: AdaptersOption = None
    router: RouterOption = None
    p: PolicyOption = None
    prompt_routing: PromptRoutingOption = None
    kv_policy: KVPolicyOption = None
    device: DeviceOption = "auto"
    dtype: DtypeOption = "auto"
    prepack: PrepackOption = False
    budget_mb: BudgetOption = None
    log_routing: LogOption = None
    log_text: LogTextOption = False


def check_serve_extra() -> None:
    """Checks that the packages of the server are installed.

    Raises:
        ValueError: if they are not.
    """
    try:
        import fastapi  # noqa: F401
        import httpx  # noqa: F401
    except ImportError as error:
        raise ValueError('the server needs more packages: pip install "dlp-lora[serve]"') from error


def open_engine(options: EngineOptions, hub: HubOptions, *, need_router: bool = True) -> "Engine":
    """Loads the engine that the options describe."""
    from dlp_lora import load
    from dlp_lora.policy import with_p

    settings: dict[str, Any] = {
        "prompt_routing": options.prompt_routing,
        "kv_policy": options.kv_policy,
        "device": options.device,
        "dtype": options.dtype,
        "prepack": options.prepack,
        "budget_mb": options.budget_mb,
        "routing_log": _routing_log(options),
        **hub.given(),
    }
    _check_parts(options, need_router=need_router)
    if options.bundle is not None:
        engine = load(options.bundle, base_model=options.model, **settings)
    else:
        engine = load(base_model(options.model), adapters=options.adapters, router=options.router, **settings)
    if options.p is not None:
        engine.policy = with_p(engine.policy, options.p)
    return engine


def open_outline(options: EngineOptions, hub: HubOptions, *, need_router: bool = False) -> "Outline":
    """Reads what the options describe, without the base model's weights."""
    from dlp_lora.engine.outline import read_outline
    from dlp_lora.policy import with_p

    for name in ("device", "dtype", "prepack", "budget_mb"):
        if getattr(options, name) != getattr(EngineOptions, name):
            raise ValueError(f"--{name.replace('_', '-')} is for --backend local; leave it out")
    of_bundle = {"revision": hub.revision, "subfolder": hub.subfolder} if options.bundle is not None else {}
    if others := [name for name in hub.given() if name not in of_bundle]:
        raise ValueError(
            f"--{others[0].replace('_', '-')} is for --backend local; leave it out: another program reads the base "
            "model, and HF_TOKEN, HF_HOME and HF_HUB_OFFLINE hold for both"
        )
    _check_parts(options, need_router=need_router)
    if options.bundle is not None:
        parts: dict[str, Any] = {"bundle": options.bundle, "base_model": options.model, **of_bundle}
    else:
        parts = {"base_model": base_model(options.model), "adapters": options.adapters, "router": options.router}
    outline = read_outline(**parts, prompt_routing=options.prompt_routing, kv_policy=options.kv_policy)
    call = replace(outline.call, routing_log=_routing_log(options))
    if options.p is not None:
        call = call.changed({"policy": with_p(call.settings.policy, options.p)})
    return replace(outline, call=call)


def _check_parts(options: EngineOptions, *, need_router: bool) -> None:
    if options.bundle is not None:
        if options.adapters is not None or options.router is not None:
            raise ValueError("--bundle holds adapters and router; leave --adapters and --router out")
    elif options.adapters is None or (options.router is None and need_router):
        raise ValueError("give --bundle, or --adapters and --router")


def _routing_log(options: EngineOptions) -> "RoutingLog | None":
    from dlp_lora import RoutingLog

    if options.log_text and options.log_routing is None:
        raise ValueError("--log-text writes into the file of --log-routing; give one")
    return None if options.log_routing is None else RoutingLog(options.log_routing, with_text=options.log_text)


def base_model(model: str | None) -> str:
    """The named base model, else the default model."""
    from dlp_lora.default_model import default_model, is_converted

    if model is not None:
        return model
    if not is_converted():
        say("preparing the default model (once: about 40 s)")
    return str(default_model())


def layers_of(model: str, hub: ModelHubOptions) -> "BaseLayers":
    """The layers of a base model, without a download of its weights."""
    from dlp_lora.bank.check import model_layout

    return model_layout(
        model,
        revision=hub.revision,
        subfolder=hub.subfolder,
        trust_remote_code=hub.trust_remote_code,
        hub=hub.hub(),
    )


def base_of(bundle: "Bundle", model: str | None) -> str:
    """The named base model, else the bundle's.

    Raises:
        BundleError: if neither is here.
    """
    return model or bundle.base_model


def say(text: str) -> None:
    """Prints a line on standard error without markup, because paths may look like markup."""
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


def say_error(text: str) -> None:
    """Prints an error as one line on standard error, without markup."""
    stderr.print(Text("error:", "bold red"), " ".join(text.split()), markup=False, soft_wrap=True)


def to_try(*args: str | Path) -> str:
    """A command of this program, quoted for a shell."""
    return shlex.join([*_program(), *map(str, args)])


def _program() -> list[str]:
    # As it was started: the environment may not be on the PATH, or another one may.
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return [sys.executable, "-m", "dlp_lora"]
    on_path = which("dlp-lora")
    return ["dlp-lora"] if on_path and Path(on_path).resolve() == started.resolve() else [str(started)]
