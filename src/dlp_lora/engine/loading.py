"""Loading: paths or hub ids of a base model, adapters and a router in, or of a bundle; an engine out."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.bank.attach import linear_layers, pair_dtype, siblings
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.paths import Paths, Setting
from dlp_lora.bank.peft_format import FILES as ADAPTER_FILES
from dlp_lora.bank.peft_format import Adapter, check_base_name, find_adapters, read_adapter
from dlp_lora.engine.arrow import ArrowRouter
from dlp_lora.engine.bundle import FILES, Bundle, is_bundle, read_bundle
from dlp_lora.engine.engine import Engine
from dlp_lora.errors import AdapterError, BundleError, ModelError
from dlp_lora.files import local_folder
from dlp_lora.policy import RoutingSettings
from dlp_lora.router import Router, load_text_router, router_type
from dlp_lora.sentences import Segmenter, SentenceSegmenter

Adapters = str | Path | Mapping[str, str | Path]


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
    device: str | torch.device | None = None,
    strict: bool = False,
    budget_mb: float | None = None,
    prepack: bool = False,
    paths: Setting | Paths | None = None,
    **kwargs: Any,
) -> Engine:
    """Makes an engine out of a base model, adapters and a router; or out of a bundle, which holds all of it.

    Args:
        model: a path or hub id of a base model or of a bundle, or a model already in memory (with `tokenizer`).
        adapters: a folder of PEFT adapter folders, or a path or hub id by name.
        router: a folder written by `train-router`, or any Router; None leaves the choice to `Engine.fixed`.
        settings: how the router is asked and obeyed: those of the bundle, or RoutingSettings(), unless given. Single
            ones may be given by name, as `policy=TopP(0.9)` or `kv_policy="keep"`.
        segmenter: makes what finds the sentences of an answer, one a row.
        base_model: takes the place of the base model that a bundle names.
        dtype: of the base model, "auto" as it was saved.
        device: where the base model is moved; by default it stays where `from_pretrained` puts it, the CPU.
        strict: refuses adapters that say they were trained on a model of another name, instead of warning.
        budget_mb: keeps adapters on disk and at most so many megabytes of them in memory, those used last.
        paths: in which way layers are multiplied: "auto" times the ways on this CPU, for about a second, and takes the
            base's own unless another is faster; "plain", "stacked", "columns", "halves", "prepacked", or the `paths`
            of another engine. "prepacked", which "auto" takes only if it needs less than a quarter of the free memory,
            holds the linear layers' weights once more as oneDNN multiplies them: what is then done to the `.data` of
            the base's weights is not seen.
        prepack: the same as `paths="prepacked"`.
        kwargs: routing settings; others go to `AutoModelForCausalLM.from_pretrained`, and none may be left for a model
            in memory.

    Raises:
        DLPLoRAError: of the kind that says which part cannot be used, and why.
    """
    changes = {name: kwargs.pop(name) for name in RoutingSettings.names() if name in kwargs}
    changes = {name: value for name, value in changes.items() if value is not None}
    bundle_path = _bundle_path(model, adapters)
    if bundle_path is not None:
        bundle = read_bundle(bundle_path)
        adapters = bundle.adapters if adapters is None else adapters
        router = bundle.router if router is None else router
        if settings is None and "kv_policy" not in changes:
            _tell_kept_policy(bundle_path, bundle)
        settings = settings or bundle.settings
        model = base_model or bundle.base_model
        if model == "":
            raise BundleError(f"{bundle_path} was saved from a model without a name; pass base_model=")
    elif base_model is not None:
        raise ValueError("base_model replaces the base of a bundle, but the first argument is no bundle")
    settings = replace(settings or RoutingSettings(), **changes)
    if adapters is None:
        what = model if isinstance(model, str | Path) else f"a {type(model).__name__} in memory"
        raise BundleError(f"{what} is no bundle; give adapters=, a folder of PEFT adapters or {{name: path}}")
    model, tokenizer = load_model(model, tokenizer, dtype=dtype, device=device, **kwargs)
    bank = AdapterBank(
        linear_layers(model),
        _read_adapters(adapters, model.config._name_or_path, weights=budget_mb is None, strict=strict),
        siblings=siblings(model),
        dtype=pair_dtype(model),
        device=model.device,
        budget_mb=budget_mb,
    )
    return Engine(
        model,
        tokenizer,
        bank,
        router=load_router(router, base=model) if isinstance(router, str | Path) else router,
        settings=settings,
        segmenter=segmenter,
        prepack=prepack,
        paths=paths,
    )


def load_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the plain base model and its tokenizer, to answer with.

    Raises:
        ModelError: if it cannot be loaded.
        ValueError: if an argument is for models that are loaded, and this one is in memory.
    """
    if isinstance(model, str | Path):
        if "torch_dtype" in kwargs:
            raise ValueError("the base model's precision is dtype= here, not torch_dtype=")
        source = str(model)
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
            # Safetensors only: a pickled checkpoint can run code.
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **kwargs)
        except (OSError, ValueError) as error:
            raise ModelError(f"the base model {source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    elif unused := [*kwargs, *(["dtype"] if dtype != "auto" else [])]:
        raise ValueError(f"{', '.join(unused)}: no argument for a model that is in memory already")
    if tokenizer is None:
        raise ValueError("a model in memory comes with its tokenizer: load(model, tokenizer=...)")
    if device is not None:
        model = model.to(device)
    return model.eval(), tokenizer


def load_router(path: str | Path, *, base: PreTrainedModel | None = None) -> Router:
    """Reads a router folder of any type.

    Args:
        base: the base model, which an ArrowRouter runs to route; the others do without.

    Raises:
        RouterError: if a file is missing or damaged, the router is of a later version or was made for another base.
    """
    if router_type(path) == "arrow":
        return ArrowRouter.from_pretrained(path, base)
    return load_text_router(path)


def _bundle_path(model: Any, adapters: Adapters | None) -> Path | None:
    if not isinstance(model, str | Path):
        return None
    if is_bundle(model):
        return Path(model)
    if adapters is None:
        path = local_folder(model, files=FILES, error=BundleError)
        return path if is_bundle(path) else None
    return None


def _tell_kept_policy(path: Path, bundle: Bundle) -> None:
    """Says that a bundle has what was the default before, where it may not have been chosen."""
    if bundle.format == 1 and bundle.settings.kv_policy == "keep":
        warnings.warn(
            f"{path} was saved with kv_policy='keep', which was the default then; with 'recompute', the default now, "
            "later questions of a prompt are answered right more often: pass kv_policy=, or save the bundle again",
            stacklevel=3,
        )


def _read_adapters(adapters: Adapters, base: str, *, weights: bool, strict: bool) -> Iterator[Adapter]:
    """One at a time: the bank holds them in a form of its own."""
    if not isinstance(adapters, Mapping):
        adapters = find_adapters(adapters)
    if not adapters:
        raise AdapterError("adapters= is empty; give at least one adapter")
    for name, source in adapters.items():
        found = read_adapter(local_folder(source, files=ADAPTER_FILES, error=AdapterError), name, weights=weights)
        check_base_name(found, base, strict=strict, stacklevel=4)  # load's caller
        yield found
