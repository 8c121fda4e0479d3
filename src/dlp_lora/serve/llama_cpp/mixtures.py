"""Mixtures in llama.cpp: adapters with weights in, the same LoRAs with scales applied to a context."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dlp_lora.bank.mixture_folder import Source, Sources, read_source
from dlp_lora.engine.outline import Outline
from dlp_lora.policy import Mixture
from dlp_lora.serve.llama_cpp.adapter_file import layer_names, write_gguf
from dlp_lora.serve.llama_cpp.library import LlamaContext, LoadedAdapter

Part = tuple[str, float]
"""An adapter's content, and its weight."""


class Mixtures:
    """Applies mixtures to a context. It loads an adapter at its first use, and frees it after its last.

    Args:
        context: the context.
        config: of the base model.
    """

    def __init__(self, context: LlamaContext, config: Any) -> None:
        self._context = context
        self._config = config
        self._architecture = context.architecture
        self._loaded: dict[str, LoadedAdapter] = {}  # by content
        self._applied: tuple[Part, ...] = ()

    @property
    def loaded(self) -> frozenset[str]:
        """The contents of the loaded adapters."""
        return frozenset(self._loaded)

    def read(self, path: str | Path, name: str, outline: Outline) -> Source:
        """Reads an adapter's folder without its weights.

        Raises:
            AdapterError: if it cannot be read, or changes a layer that llama.cpp does not have.
        """
        source = read_source(path, name, outline.layout)
        layer_names(source.adapter, self._config, self._architecture)
        return source

    def apply(self, mixture: Mixture, sources: Sources) -> None:
        """Applies a mixture to the next tokens.

        Raises:
            AdapterError: if the folder of an adapter cannot be read any more.
        """
        parts = parts_of(mixture, sources)
        if parts != self._applied:
            loaded = [(self._load(sources[name]), weight) for name, weight in mixture.items()]
            self._context.apply(loaded)
            self._applied = parts

    def free_unused(self, in_use: Sequence[Sources]) -> None:
        """Frees the adapters that neither are applied nor belong to `in_use`."""
        needed = {content for content, _ in self._applied}
        needed |= {source.content for sources in in_use for source in sources.values()}
        for content in self._loaded.keys() - needed:
            self._context.free_adapter(self._loaded.pop(content))

    def _load(self, source: Source) -> LoadedAdapter:
        if source.content not in self._loaded:
            with TemporaryDirectory(prefix="dlp-lora-") as folder:
                path = Path(folder) / "adapter.gguf"
                write_gguf(path, source.with_weights(), self._config, architecture=self._architecture)
                self._loaded[source.content] = self._context.load_adapter(path)
        return self._loaded[source.content]


def parts_of(mixture: Mixture, sources: Mapping[str, Source]) -> tuple[Part, ...]:
    """Returns the contents of a mixture's adapters with their weights: equal for equal deltas."""
    return tuple(sorted((sources[name].content, weight) for name, weight in mixture.items()))
