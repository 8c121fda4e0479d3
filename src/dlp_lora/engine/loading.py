"""Loading: paths or hub ids of a base model, adapters and a router in, or of a bundle; an engine out."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.bank.attach import linear_layers, pair_dtype, siblings
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.peft_format import FILES as ADAPTER_FILES
from dlp_lora.bank.peft_format import Adapter, check_base_name, find_adapters, read_adapter
from dlp_lora.engine.arrow import ArrowRouter
from dlp_lora.engine.bundle import FILES, is_bundle, read_bundle
from dlp_lora.engine.engine import Engine
from dlp_lora.errors import AdapterError, BundleError, ModelError
from dlp_lora.files import local_folder
from dlp_lora.policy import FusionPolicy, KVPolicy, PromptRouting, Switching, policy_from_dict
from dlp_lora.router import EncoderRouter, MiniMLP, PrototypeRouter, Router, router_type
from dlp_lora.sentences import Segmenter, SentenceSegmenter

Adapters = str | Path | Mapping[str, str | Path]


def load(
    model: str | Path | PreTrainedModel,
    *,
    adapters: Adapters | None = None,
    router: str | Path | Router | None = None,
    policy: FusionPolicy | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | Path | PreTrainedModel | None = None,
    segmenter: Callable[[], Segmenter] = SentenceSegmenter,
    switching: Switching | None = None,
    kv_policy: KVPolicy | None = None,
    prompt_routing: PromptRouting | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    strict: bool = False,
    budget_mb: float | None = None,
    prepack: bool = False,
    **model_kwargs: Any,
) -> Engine:
    """Makes an engine out of a base model, adapters and a router; or out of a bundle, which holds all of it.

    Args:
        model: a path or hub id of a base model or of a bundle, or a model already in memory (with `tokenizer`).
        adapters: a folder of PEFT adapter folders, or a path or hub id by name.
        router: a folder written by `train-router`, or any Router; None leaves the choice to `Engine.fixed`.
        policy: which adapters are fused; `TopP(0.6)` unless given or in the bundle.
        segmenter: makes what finds the sentences of an answer, one a row.
        switching: when a sentence may change the mixture, and what answers where no adapter fits.
        kv_policy: what a switch does to the tokens before it: "keep" leaves them as they were encoded, "recompute"
            encodes them anew.
        prompt_routing: "questions" answers those of a prompt that asks several in their turn, "whole" takes every
            prompt as one, "sentences" also encodes each sentence of a prompt under its own mixture.
        base_model: takes the place of the base model that a bundle names.
        dtype: of the base model, "auto" as it was saved.
        device: where the base model is moved; by default it stays where `from_pretrained` puts it, the CPU.
        budget_mb: keeps adapters on disk and at most so many megabytes of them in memory, those used last.
        prepack: on a CPU, holds the linear layers' weights once more as oneDNN multiplies them, for faster tokens.
            What is then done to the `.data` of the base's weights is not seen.
        strict: refuses adapters that say they were trained on a model of another name, instead of warning.
        model_kwargs: go to `AutoModelForCausalLM.from_pretrained`; none may be left for a model in memory.

    Raises:
        DLPLoRAError: of the kind that says which part cannot be used, and why.
    """
    bundle_path = _bundle_path(model, adapters)
    if bundle_path is not None:
        bundle = read_bundle(bundle_path)
        adapters = bundle.adapters if adapters is None else adapters
        router = bundle.router if router is None else router
        policy = policy or policy_from_dict(bundle.policy)
        switching = switching or Switching(**bundle.switching)
        kv_policy = kv_policy or cast(KVPolicy, bundle.kv_policy)
        prompt_routing = prompt_routing or cast(PromptRouting, bundle.prompt_routing)
        model = base_model or bundle.base_model
        if model == "":
            raise BundleError(f"{bundle_path} was saved from a model without a name; pass base_model=")
    elif base_model is not None:
        raise ValueError("base_model replaces the base of a bundle, but the first argument is no bundle")
    if adapters is None:
        what = model if isinstance(model, str | Path) else f"a {type(model).__name__} in memory"
        raise BundleError(f"{what} is no bundle; give adapters=, a folder of PEFT adapters or {{name: path}}")
    model, tokenizer = load_model(model, tokenizer, dtype=dtype, device=device, **model_kwargs)
    layout = linear_layers(model)
    bank = AdapterBank(
        layout,
        _read_adapters(adapters, layout, model.config._name_or_path, weights=budget_mb is None, strict=strict),
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
        policy=policy,
        segmenter=segmenter,
        switching=switching,
        kv_policy=kv_policy or "keep",
        prompt_routing=prompt_routing or "questions",
        prepack=prepack,
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
    found = router_type(path)
    if found == "arrow":
        return ArrowRouter.from_pretrained(path, base)
    kinds = {"mini-mlp": MiniMLP, "encoder": EncoderRouter, "prototypes": PrototypeRouter}
    return cast(Router, kinds[found].from_pretrained(path))  # type: ignore[attr-defined]


def _bundle_path(model: Any, adapters: Adapters | None) -> Path | None:
    if not isinstance(model, str | Path):
        return None
    if is_bundle(model):
        return Path(model)
    if adapters is None:
        path = local_folder(model, files=FILES, error=BundleError)
        return path if is_bundle(path) else None
    return None


def _read_adapters(
    adapters: Adapters, layout: BaseLayers, base: str, *, weights: bool, strict: bool
) -> Iterator[Adapter]:
    """One at a time: the bank holds them in a form of its own."""
    if not isinstance(adapters, Mapping):
        adapters = find_adapters(adapters)
    if not adapters:
        raise AdapterError("adapters= is empty; give at least one adapter")
    for name, source in adapters.items():
        folder = local_folder(source, files=ADAPTER_FILES, error=AdapterError)
        found = read_adapter(folder, name, weights=weights, layout=layout, stacklevel=4)
        check_base_name(found, base, strict=strict, stacklevel=4)  # load's caller
        yield found
