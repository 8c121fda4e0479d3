"""Outlines: a bundle or its parts in, all of it except the base model's weights out, for a process that lets another
one compute the answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.check import check_adapters, model_layout
from dlp_lora.engine.arrow import ArrowRouter
from dlp_lora.engine.base import Base
from dlp_lora.engine.bundle import check_names, read_bundle
from dlp_lora.engine.calls import Call, Endings
from dlp_lora.engine.engine import Engine
from dlp_lora.engine.loading import adapter_folders, bundle_folder, load_router
from dlp_lora.errors import AdapterError, BundleError, ModelError, RouterError, reason_of
from dlp_lora.hub import Hub
from dlp_lora.policy import RoutingSettings
from dlp_lora.sentences import Segmenter, SentenceSegmenter


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The facts about a model with adapters and a router, without the weights.

    `source` is the base model's path or hub id, `max_context` the number of tokens that it reads, `vocab_size` the
    number that it knows, and `call` has the default settings of answers.
    """

    source: str
    base: Base
    tokenizer: PreTrainedTokenizerBase
    generation_config: GenerationConfig
    max_context: int | None
    vocab_size: int
    layout: BaseLayers
    adapters: Mapping[str, Path]
    call: Call

    @classmethod
    def of(cls, engine: Engine) -> "Outline":
        """Describes an engine."""
        config: Any = engine.model.config
        embeddings: Any = engine.model.get_input_embeddings()
        return cls(
            source=config._name_or_path,
            base=Base.of(config._name_or_path),
            tokenizer=engine.tokenizer,
            generation_config=engine.model.generation_config,
            max_context=_context(config),
            vocab_size=embeddings.num_embeddings,
            layout=engine.bank.base,
            adapters={name: adapter.path for name, adapter in engine.bank.adapters.items()},
            call=engine.call,
        )


def read_outline(
    bundle: str | Path | None = None,
    *,
    base_model: str | None = None,
    adapters: str | Path | None = None,
    router: str | Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    segmenter: Callable[[], Segmenter] = SentenceSegmenter,
    **changes: Any,
) -> Outline:
    """Reads the outline of a bundle, or of a base model with adapters and a router; all are paths or hub ids.

    Args:
        bundle: the bundle.
        base_model: replaces the bundle's, or belongs to `adapters` and `router`.
        adapters: a folder of PEFT adapter folders.
        router: the router.
        revision: the branch, tag or commit of the bundle's repository.
        subfolder: the folder of the bundle inside its repository or path.
        segmenter: makes a segmenter for an answer.
        changes: routing settings; None keeps the default.

    Raises:
        DLPLoRAError: if a part cannot be used, with the reason; its class names the part.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    folders: Mapping[str, Path]
    hub = Hub()
    if bundle is not None:
        folder = bundle_folder(bundle, None, hub, revision=revision, subfolder=subfolder)
        read = read_bundle(bundle if folder is None else folder)
        if not base_model and read.base.place:
            raise BundleError(
                f"{read.path} was made for {read.base}, and another program reads the base model here: download it, "
                "and give its folder with --model, or base_model= in Python"
            )
        source, base, folders, settings = base_model or read.base_model, read.base, read.adapters, read.settings
        router = read.router
    elif base_model is None or adapters is None:
        raise ValueError("give a bundle, or a base model and a folder of adapters")
    else:
        source, base, folders, settings = (
            base_model,
            Base.of(base_model),
            adapter_folders(adapters, hub),
            RoutingSettings(),
        )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"the base model {source!r} cannot be read: {reason_of(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare ones for files that it cannot read
        reason = reason_of(error)
        raise ModelError(f"the base model {source!r} has no tokenizer that can be loaded: {reason}") from error
    try:
        generation_config = GenerationConfig.from_pretrained(source)
    except OSError:  # it has no context length
        generation_config = GenerationConfig.from_model_config(config)
    layout = model_layout(source)
    if refused := [check for check in check_adapters(layout, folders) if not check.fits]:
        raise AdapterError(refused[0].reason)
    loaded = None if router is None else load_router(router, hub=hub)
    if isinstance(loaded, ArrowRouter):
        raise RouterError(f"{router} runs the base model to route, whose weights are in another process here")
    if loaded is not None:
        check_names(loaded.names, list(folders))
    call = Call(
        settings=replace(settings, **changes),
        router=loaded,
        segmenter=segmenter,
        endings=Endings.of_model(generation_config, tokenizer),
    )
    return Outline(
        source=source,
        base=base,
        tokenizer=tokenizer,
        generation_config=generation_config,
        max_context=_context(config),
        vocab_size=config.get_text_config().vocab_size,
        layout=layout,
        adapters=folders,
        call=call,
    )


def _context(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)
