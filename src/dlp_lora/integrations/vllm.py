"""vLLM: a plug-in with which any plain vLLM server answers under mixtures: `model="dlp:math=0.6,units=0.4"`.

vLLM finds it by the entry point `vllm.general_plugins` if dlp-lora is installed in its environment. An environment
variable names the adapters:

    DLP_LORA_BUNDLE=bundle/ VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank 64

A mixture is written as one PEFT adapter. Its path has a hash of its content, because vLLM's prefix cache identifies
adapters by name and path. There is no router here: the client names the mixture for the whole answer.
"""

import asyncio
import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

from dlp_lora.bank.adapter_files import WEIGHTS_FILE, find_adapters
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.check import model_layout
from dlp_lora.bank.limits import rounded
from dlp_lora.bank.mixture_folder import MixtureFolder, Source, read_source
from dlp_lora.engine.bundle import is_bundle, read_bundle
from dlp_lora.errors import AdapterError, DLPLoRAError
from dlp_lora.policy import Mixture, mixture_of

logger = logging.getLogger("vllm.dlp_lora")  # below vLLM's logger, whose output is shown

PREFIX = "dlp:"
BUNDLE = "DLP_LORA_BUNDLE"  # a bundle, or a folder of PEFT adapter folders
CACHE = "DLP_LORA_ADAPTER_CACHE"
CACHE_MB = "DLP_LORA_ADAPTER_CACHE_MB"
DEFAULT_CACHE_MB = 2048.0


def register() -> None:
    """Registers the resolver of such names; vLLM calls this at the start of each of its processes."""
    if BUNDLE not in os.environ:
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    mixtures = ServedMixtures(
        Path(os.environ[BUNDLE]),
        cache=Path(os.environ[CACHE]) if CACHE in os.environ else None,
        cache_mb=float(os.environ.get(CACHE_MB, DEFAULT_CACHE_MB)),
    )

    class Resolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not there where types are checked
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            if not lora_name.startswith(PREFIX):
                return None
            try:
                path = await asyncio.to_thread(mixtures.path, base_model_name, lora_name.removeprefix(PREFIX))
            except (DLPLoRAError, ValueError) as error:
                logger.error("%s: %s", lora_name, error)  # the client gets a 404
                return None
            from vllm.lora.request import LoRARequest

            number = int.from_bytes(hashlib.sha256(lora_name.encode()).digest()[:4]) >> 1
            return LoRARequest(lora_name=lora_name, lora_int_id=number + 1, lora_path=str(path))

    LoRAResolverRegistry.register_resolver("dlp-lora", Resolver())


class ServedMixtures:
    """Mixtures of the adapters of a bundle, written at their first request.

    vLLM reads a mixture again after it has dropped it from memory, and never reports that it needs it no more. So none
    is deleted; if they take more than `cache_mb` megabytes, new ones are refused. Those of earlier processes make room.
    """

    def __init__(self, bundle: Path, *, cache: Path | None, cache_mb: float) -> None:
        self._bundle = bundle
        self._cache = cache
        self._cache_mb = cache_mb
        self._folder: MixtureFolder | None = None
        self._sources: dict[str, Source] = {}
        self._lock = threading.Lock()

    def path(self, base_model: str, text: str) -> Path:
        """Returns the folder of a mixture such as "math=0.6,units=0.4".

        Raises:
            ValueError: if the text is not a mixture.
            AdapterError: if there is no such adapter, it does not fit the base model, or there is no more room.
        """
        mixture = rounded(mixture_of(text))
        with self._lock:
            folder = self._opened(base_model)
            if unknown := sorted(mixture.keys() - self._sources.keys()):
                raise AdapterError(f"no adapter {unknown[0]!r}; there are {', '.join(sorted(self._sources))}")
            if not mixture:
                raise ValueError("the mixture is empty; ask for the base model by its name")
            entry = folder.claim(mixture, self._sources)
            if entry.num_users > 1:
                return entry.path
            try:
                self._check_room(folder, 0 if entry.nbytes else self._least_size(mixture))
                folder.write(entry, mixture, self._sources)
                self._check_room(folder)
            except BaseException:
                folder.release(entry)
                folder.delete(entry)
                raise
            for other in folder.surplus():
                folder.delete(other)
            return entry.path

    def _least_size(self, mixture: Mixture) -> int:
        """The size of a mixture that is not written, without the zeros that fill up lower ranks."""
        return sum((self._sources[name].adapter.path / WEIGHTS_FILE).stat().st_size for name in mixture)

    def _check_room(self, folder: MixtureFolder, size: int = 0) -> None:
        sizes = [*(entry.nbytes for entry in folder.used if entry.nbytes), *([size] if size else [])]
        if (total := sum(sizes)) > self._cache_mb * 2**20:
            raise AdapterError(
                f"{len(sizes) - 1} mixtures are written, and with another one they take {total / 2**20:.3g} MB, more "
                f"than the {self._cache_mb:g} of {CACHE_MB}; raise it"
            )

    def _opened(self, base_model: str) -> MixtureFolder:
        if self._folder is None:
            layout: BaseLayers = model_layout(base_model)
            bundle = self._bundle
            adapters = read_bundle(bundle).adapters if is_bundle(bundle) else find_adapters(bundle)
            self._sources = {name: read_source(path, name, layout) for name, path in adapters.items()}
            self._folder = MixtureFolder(self._cache, base=base_model, layout=layout, budget_mb=self._cache_mb)
        return self._folder
