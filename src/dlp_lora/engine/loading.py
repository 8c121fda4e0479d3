"""Loading: paths or hub ids of a base model, adapters and a router in, or of a bundle; an engine out."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from dlp_lora.bank.adapter_files import CONFIG_FILE as ADAPTER_CONFIG
from dlp_lora.bank.adapter_files import FILES as ADAPTER_FILES
from dlp_lora.bank.adapter_files import find_adapters
from dlp_lora.bank.attach import linear_layers, pair_dtype, siblings
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.device import check_devices, choose_device, computing_device
from dlp_lora.bank.paths import Paths, Setting
from dlp_lora.bank.peft_format import Adapter, check_base_name, read_adapter
from dlp_lora.engine.arrow import ArrowRouter
from dlp_lora.engine.bundle import FILES, Bundle, is_bundle, read_bundle
from dlp_lora.engine.engine import Engine
from dlp_lora.engine.kinds import check_config, check_kind, check_weights
from dlp_lora.engine.routing_log import RoutingLog
from dlp_lora.errors import AdapterError, BundleError, ModelError, RouterError, reason_of
from dlp_lora.files import name_of
from dlp_lora.hub import Hub, folder_inside, is_repo_id
from dlp_lora.policy import RoutingSettings
from dlp_lora.router import Router, load_text_router, router_type
from dlp_lora.router.folder import FILES as ROUTER_FILES
from dlp_lora.sentences import Segmenter, SentenceSegmenter

Adapters = str | Path | Mapping[str, str | Path]
ByName = str | Mapping[str, str] | None
"""One value for all adapters, or one for each by its name."""

OF_MODEL_AND_TOKENIZER = (
    *("revision", "subfolder", "token", "cache_dir", "local_files_only"),
    *("trust_remote_code", "code_revision", "gguf_file", "force_download", "proxies"),
)
"""The arguments that `from_pretrained` gets both for a model and for its tokenizer."""

# In a repository with a base model and an adapter, transformers would load both, or another base. This prevents it.
_NO_ADAPTER = {"subfolder": "no-adapter"}
_OF_FILES = ("revision", "token", "cache_dir", "local_files_only")
_QUIETLY = tuple(f"_raise_exceptions_for_{what}" for what in ("gated_repo", "missing_entries", "connection_errors"))


@torch.inference_mode(False)  # the weights and buffers made here outlive the call
def load(
    model: str | Path | PreTrainedModel,
    *,
    adapters: Adapters | None = None,
    router: str | Path | Router | None = None,
    settings: RoutingSettings | None = None,
    segmenter: Callable[[], Segmenter] = SentenceSegmenter,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | Path | PreTrainedModel | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "auto",
    strict: bool = False,
    budget_mb: float | None = None,
    prepack: bool = False,
    paths: Setting | Paths | None = None,
    routing_log: RoutingLog | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    base_revision: str | None = None,
    base_subfolder: str | None = None,
    adapter_revision: ByName = None,
    adapter_subfolder: ByName = None,
    router_revision: str | None = None,
    router_subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> Engine:
    """Makes an engine from a base model, adapters and a router, or from a bundle.

    Args:
        model: a path or hub id of a base model or of a bundle, or a model in memory (with `tokenizer`).
        adapters: a folder or hub id with PEFT adapter folders, or paths or hub ids by name. A hub id of a single
            adapter gives it the name of its repository.
        router: a folder or hub id of a router (see `train-router`), or a Router; with None, use `Engine.fixed`.
        settings: the routing settings, by default those of the bundle, or RoutingSettings(). Single settings may be
            passed by name, such as `policy=TopP(0.9)` or `kv_policy="keep"`.
        segmenter: makes a segmenter for each row.
        base_model: replaces the base model that a bundle names.
        dtype: of the base model; "auto" keeps the saved one.
        device: for the base model; "auto" is the first available of cuda, mps and cpu. A model in memory, one with
            `device_map` and a quantised one stay on their devices.
        strict: refuses adapters that name another base model, instead of a warning.
        budget_mb: keeps adapters on disk, and at most so many megabytes of them in memory, the latest used ones.
        paths: the ways to multiply layers. "auto" times the ways on this CPU, in about a second, and keeps the base's
            way unless another one is faster. Others are "plain", "stacked", "columns", "halves", "prepacked", or the
            `paths` of another engine. "prepacked" keeps a second copy of the linear layers' weights in oneDNN's layout,
            which misses changes of the weights' `.data`; "auto" takes it only if it needs less than a quarter of the
            free memory.
        prepack: the same as `paths="prepacked"`.
        routing_log: the file for the router's decisions.
        revision: the branch, tag or commit of the first argument's repository. `base_revision`, `adapter_revision` and
            `router_revision` are for a bundle's base model (by default those of the bundle), the adapters and the
            router; adapters by name may have one each, `{name: revision}`.
        subfolder: the folder of the first argument inside its repository or path; `base_subfolder`,
            `adapter_subfolder` and `router_subfolder` are for the others.
        token: for all private repositories.
        cache_dir: the folder of downloads, instead of the hub's usual cache.
        local_files_only: uses only the cache and no server.
        kwargs: routing settings; all others go to `AutoModelForCausalLM.from_pretrained`, and `trust_remote_code` and
            `gguf_file` also to the tokenizer's. A model in memory allows only routing settings.

    Raises:
        DLPLoRAError: if a part cannot be used, with the reason; its class names the part.
    """
    changes = {name: kwargs.pop(name) for name in RoutingSettings.names() if name in kwargs}
    changes = {name: value for name, value in changes.items() if value is not None}
    hub = Hub(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    bundle_path = bundle_folder(model, adapters, hub, revision=revision, subfolder=subfolder)
    bundle = None if bundle_path is None else read_bundle(bundle_path)
    if bundle is not None:
        adapters = bundle.adapters if adapters is None else adapters
        router = bundle.router if router is None else router
        if settings is None and "kv_policy" not in changes:
            _tell_kept_policy(bundle)
        settings = settings or bundle.settings
        place = {} if base_model else bundle.base.place
        model = base_model or bundle.base_model
        revision, subfolder = base_revision or place.get("revision"), base_subfolder or place.get("subfolder")
    elif base_model is not None or base_revision is not None or base_subfolder:
        raise ValueError(
            "base_model, base_revision and base_subfolder are for bundles, but the first argument is not a bundle"
        )
    settings = replace(settings or RoutingSettings(), **changes)
    if adapters is None:
        what = model if isinstance(model, str | Path) else f"a {type(model).__name__} in memory"
        raise BundleError(f"{what} is not a bundle; give adapters=, a folder of PEFT adapters or {{name: path}}")
    where = {"revision": revision, "subfolder": subfolder}
    with _as_missing_base(bundle if base_model is None else None):
        model, tokenizer = load_model(
            model,
            tokenizer,
            dtype=dtype,
            device=device,
            hub=hub,
            **{name: value for name, value in where.items() if value is not None},
            **kwargs,
        )
    _check_base(bundle, model, subfolder=subfolder, cache_dir=cache_dir)
    base = linear_layers(model)
    base.revision, base.subfolder = revision, subfolder
    folders = adapter_folders(adapters, hub, revision=adapter_revision, subfolder=adapter_subfolder)
    bank = AdapterBank(
        base,
        _read_adapters(folders, base, weights=budget_mb is None, strict=strict),
        siblings=siblings(model),
        dtype=pair_dtype(model),
        device=computing_device(model),
        budget_mb=budget_mb,
    )
    if isinstance(router, str | Path):
        router = load_router(router, base=model, revision=router_revision, subfolder=router_subfolder, hub=hub)
    elif router_revision is not None or router_subfolder:
        raise ValueError("router_revision and router_subfolder are for a router's path or hub id")
    return Engine(
        model,
        tokenizer,
        bank,
        router=router,
        settings=settings,
        segmenter=segmenter,
        prepack=prepack,
        paths=paths,
        routing_log=routing_log,
    )


def load_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "auto",
    hub: Hub = Hub(),  # noqa: B008  # frozen
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the plain base model and its tokenizer, or checks those in memory.

    Raises:
        ModelError: if it cannot be loaded, or the router cannot follow answers of its kind.
        ValueError: if an argument does not apply to a model in memory, or there is no such device.
    """
    if isinstance(model, str | Path):
        if "torch_dtype" in kwargs:
            raise ValueError("the base model's precision is dtype= here, not torch_dtype=")
        if kwargs.get("device_map") is not None and device != "auto":
            raise ValueError("device= and device_map= both choose the device; pass one of them")
        place = choose_device(device)
        folder_inside(model, kwargs.get("subfolder"), ModelError)
        model, tokenizer = _pretrained(str(model), tokenizer, dtype, {**_arguments(hub), **kwargs})
        # from_pretrained has already placed dispatched or quantised weights.
        is_placed = kwargs.get("device_map") is not None or (device == "auto" and hasattr(model, "hf_quantizer"))
        model = model if is_placed else model.to(place)
    else:
        if unused := [*kwargs, *(["dtype"] if dtype != "auto" else [])]:
            raise ValueError(f"{', '.join(unused)}: no argument for a model that is in memory already")
        if device != "auto":
            model = model.to(choose_device(device))
    if tokenizer is None:
        raise ValueError("a model in memory comes with its tokenizer: load(model, tokenizer=...)")
    check_devices(model)
    check_kind(model, linear_layers(model))
    return model.eval(), tokenizer


def _pretrained(
    source: str, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype | str, kwargs: dict[str, Any]
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a base model and, unless there is one already, its tokenizer."""
    # Without a value, transformers would ask on the terminal whether to run code.
    kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))
    of_both = {name: kwargs[name] for name in OF_MODEL_AND_TOKENIZER if name in kwargs}
    which = ", ".join(f"{name} {of_both[name]!r}" for name in ("revision", "subfolder", "cache_dir") if name in of_both)
    what = f"the base model {source!r}" + (f" ({which})" if which else "")
    has_adapter = _has_file(source, ADAPTER_CONFIG, of_both)
    try:
        config = AutoConfig.from_pretrained(source, **of_both)
    except (OSError, ValueError) as error:
        if has_adapter:
            raise ModelError(
                f"{source!r} is an adapter, not a base model: give its base, and the adapter as adapters={{name: path}}"
            ) from error
        raise ModelError(f"{what} cannot be loaded: {_reason(error)}") from error
    check_config(source, config)
    if has_adapter:
        warnings.warn(
            f"{source!r} holds an adapter beside the base model, which is loaded without it; adapters= takes it",
            stacklevel=5,
        )
    try:
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **of_both)
    except Exception as error:  # the tokenizers library raises bare ones for files that it cannot read
        raise ModelError(
            f"{what} has no tokenizer that can be loaded; give one with tokenizer=, or save it there: {_reason(error)}"
        ) from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,  # a pickled checkpoint can run code
            adapter_kwargs={**{name: value for name, value in of_both.items() if name in _OF_FILES}, **_NO_ADAPTER},
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{what} cannot be loaded: {_reason(error)}") from error
    except SafetensorError as error:
        raise ModelError(
            f"{what} has weights that are truncated or not in a safetensors file ({error}); copy them again, or fetch "
            "them with `git lfs pull` if they are pointers of Git LFS"
        ) from error
    model, report = loaded
    check_weights(source, list(report["missing_keys"]))
    return model, tokenizer


def load_router(
    path: str | Path,
    *,
    base: PreTrainedModel | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    hub: Hub = Hub(),  # noqa: B008  # frozen
) -> Router:
    """Reads a router of any type from a folder or hub id.

    Args:
        base: the base model, which only an ArrowRouter needs.
        revision: the branch, tag or commit of a hub id.
        subfolder: the folder inside the path or repository.
        hub: the access to the hub.

    Raises:
        RouterError: if a file is missing or damaged, the router is of a later version or was made for another base.
    """
    if is_repo_id(path) or subfolder or revision is not None:
        path = hub.folder(path, files=ROUTER_FILES, error=RouterError, revision=revision, subfolder=subfolder)
    if router_type(path) == "arrow":
        return ArrowRouter.from_pretrained(path, base)
    return load_text_router(path)


def _arguments(hub: Hub) -> dict[str, Any]:
    """The hub's arguments of `from_pretrained`, without defaults."""
    options = {"token": hub.token, "cache_dir": hub.cache_dir, "local_files_only": hub.local_files_only or None}
    return {name: value for name, value in options.items() if value is not None}


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it brings code, which is not run; read the code, and pass trust_remote_code=True if you trust it"
    return reason_of(error)


def _has_file(source: str, name: str, of_both: Mapping[str, Any]) -> bool:
    """Whether a model's folder or repository is known to have a file."""
    reach = {name: value for name, value in of_both.items() if name not in ("trust_remote_code", "gguf_file")}
    quiet = dict.fromkeys(_QUIETLY, False)
    try:
        return cached_file(source, name, **reach, **quiet) is not None
    except (OSError, ValueError):
        return False


def bundle_folder(
    model: Any, adapters: Adapters | None, hub: Hub, *, revision: str | None = None, subfolder: str | None = None
) -> Path | None:
    """Returns the folder of a bundle, if necessary downloaded; None if `model` is not a bundle."""
    if not isinstance(model, str | Path):
        return None
    if is_bundle(Path(model, subfolder or "")):
        return hub.folder(model, files=FILES, error=BundleError, revision=revision, subfolder=subfolder)
    if adapters is None:
        path = hub.folder(model, files=FILES, error=BundleError, revision=revision, subfolder=subfolder)
        return path if is_bundle(path) else None
    return None


@contextmanager
def _as_missing_base(bundle: Bundle | None) -> Iterator[None]:
    """Adds to an error that a bundle's base model may be replaced."""
    try:
        yield
    except ModelError as error:
        if bundle is None:
            raise
        raise bundle.base.missing(bundle.path, str(error)) from error


def _check_base(
    bundle: Bundle | None, model: PreTrainedModel, *, subfolder: str | None, cache_dir: str | Path | None
) -> None:
    """Warns if a bundle was made for another base model than the loaded one."""
    if bundle is None:
        return
    source = model.config._name_or_path
    commit = getattr(model.config, "_commit_hash", None)
    if differences := bundle.base.differences(source, subfolder=subfolder, commit=commit, cache_dir=cache_dir):
        warnings.warn(
            f"{bundle.path} was made for {bundle.base.name!r}, but the base model {source!r} is another one: "
            f"{'; '.join(differences)}",
            stacklevel=4,
        )


def _tell_kept_policy(bundle: Bundle) -> None:
    """Logs that a bundle has an earlier default, which its owner may not have chosen."""
    if bundle.format == 1 and bundle.settings.kv_policy == "keep":
        warnings.warn(
            f"{bundle.path} was saved with kv_policy='keep', which was the default then; with 'recompute', the default "
            "now, later questions of a prompt are answered right more often: pass kv_policy=, or save the bundle again",
            stacklevel=4,
        )


def adapter_folders(
    adapters: Adapters, hub: Hub, *, revision: ByName = None, subfolder: ByName = None
) -> dict[str, Path]:
    """The adapters' folders by name."""
    if not isinstance(adapters, Mapping):
        if isinstance(revision, Mapping) or isinstance(subfolder, Mapping):
            raise ValueError("adapter_revision and adapter_subfolder by name need adapters by name, {name: path}")
        folder = Path(adapters)
        if (is_repo_id(adapters) and not folder.is_dir()) or subfolder or revision is not None:
            files = [*ADAPTER_FILES, *(f"*/{file}" for file in ADAPTER_FILES)]
            folder = hub.folder(adapters, files=files, error=AdapterError, revision=revision, subfolder=subfolder)
            if (folder / ADAPTER_CONFIG).is_file():
                return {name_of(subfolder or adapters): folder}
        return find_adapters(folder)
    if not adapters:
        raise AdapterError("adapters= is empty; give at least one adapter")
    for option, values in {"adapter_revision": revision, "adapter_subfolder": subfolder}.items():
        if isinstance(values, Mapping) and (unknown := sorted(set(values) - set(adapters))):
            raise ValueError(f"{option} has {', '.join(unknown)}; the adapters are {', '.join(adapters)}")

    def of(values: ByName, name: str) -> str | None:
        return values.get(name) if isinstance(values, Mapping) else values

    return {
        name: hub.folder(
            source,
            files=ADAPTER_FILES,
            error=AdapterError,
            revision=of(revision, name),
            subfolder=of(subfolder, name),
        )
        for name, source in adapters.items()
    }


def _read_adapters(folders: Mapping[str, Path], base: BaseLayers, *, weights: bool, strict: bool) -> Iterator[Adapter]:
    """Reads one adapter at a time, because the bank stores them in another form."""
    for name, folder in folders.items():
        adapter = read_adapter(folder, name, weights=weights, layout=base, stacklevel=5)
        check_base_name(adapter, base.source, strict=strict, stacklevel=5)  # load's caller
        yield adapter
