"""llama.cpp: a model, its KV cache and its adapters, through the low-level functions of `llama-cpp-python`."""

import ctypes
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dlp_lora.errors import AdapterError, ModelError
from dlp_lora.serve.backend import BackendError

logger = logging.getLogger(__name__)

EXTRA = 'llama.cpp needs more packages: pip install "dlp-lora[llama-cpp]"'
FLAGS = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
BUILD = f'CMAKE_ARGS="{FLAGS}" pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python'
PROBE_S = 300
# It imports no torch, so that it takes one second.
PROBE = """
import sys
import llama_cpp as cpp

cpp.llama_backend_init()
model = cpp.llama_model_load_from_file(sys.argv[1].encode(), cpp.llama_model_default_params())
if not model:
    sys.exit(1)
params = cpp.llama_context_default_params()
params.n_ctx = 64
context = cpp.llama_init_from_model(model, params)
batch = cpp.llama_batch_get_one((cpp.llama_token * 1)(0), 1)
sys.exit(cpp.llama_decode(context, batch) if context else 1)
"""
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR


@dataclass(frozen=True)
class LoadedAdapter:
    """A LoRA in llama.cpp's memory."""

    pointer: Any


def check_runs(path: Path) -> None:
    """Decodes one token of a model in a child process, because a build for another CPU ends its process.

    Raises:
        ModelError: if llama.cpp is not installed, or cannot run the model.
    """
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        raise ModelError(EXTRA)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)], capture_output=True, text=True, errors="replace", timeout=PROBE_S
    )
    if done.returncode == 0:
        return
    if done.returncode < 0:
        raise ModelError(
            f"llama.cpp ended with signal {-done.returncode} at its first token: it was built for instructions that "
            f"this machine does not run (some virtual machines show AMX but forbid it); build it again: {BUILD}"
        )
    lines = done.stderr.strip().splitlines() or ["no message"]
    reason = next((line for line in lines if "error" in line.lower()), lines[-1])
    raise ModelError(f"llama.cpp cannot run {path}: {reason}")


class LlamaContext:
    """A model with the KV of several sequences, for one thread.

    Args:
        path: the GGUF file.
        max_context: number of tokens of one sequence.
        max_sequences: number of sequences.
        num_threads: number of threads that compute.
        chunk_tokens: largest number of tokens in one call of `decode`.
        num_gpu_layers: number of layers in GPU memory, if llama.cpp was built for a GPU.

    Raises:
        ModelError: if the file cannot be read, or there is not enough memory.
        ValueError: if llama.cpp does not have so many sequences.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_context: int,
        max_sequences: int,
        num_threads: int,
        chunk_tokens: int = 256,
        num_gpu_layers: int = 0,
    ) -> None:
        import llama_cpp

        self._cpp: Any = llama_cpp
        self._context = None
        if not 1 <= max_sequences <= (limit := int(llama_cpp.llama_max_parallel_sequences())):
            raise ValueError(f"llama.cpp answers 1 to {limit} requests at once, got {max_sequences}")
        self._log = llama_cpp.llama_log_callback(_log)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = num_gpu_layers
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise ModelError(f"llama.cpp cannot read {path}; give a GGUF file")
        self.num_context: int = llama_cpp.llama_model_n_ctx_train(self._model)
        self.chunk_tokens = max(chunk_tokens, max_sequences)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = min(max_context, self.num_context) * max_sequences
        context.n_batch = context.n_ubatch = self.chunk_tokens
        context.n_seq_max = max_sequences
        context.n_threads = context.n_threads_batch = num_threads
        context.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise ModelError(f"llama.cpp has no memory for {max_sequences} sequences of {max_context} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(self.chunk_tokens, 0, 1)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        buffer = ctypes.create_string_buffer(64)
        self._cpp.llama_model_meta_val_str(self._model, b"general.architecture", buffer, len(buffer))
        return buffer.value.decode()

    def load_adapter(self, path: Path) -> LoadedAdapter:
        """Reads a LoRA from a GGUF file.

        Raises:
            AdapterError: if it does not fit the model.
        """
        pointer = self._cpp.llama_adapter_lora_init(self._model, str(path).encode())
        if not pointer:
            raise AdapterError(f"llama.cpp cannot apply {path}; its log has the reason")
        return LoadedAdapter(pointer)

    def free_adapter(self, adapter: LoadedAdapter) -> None:
        """Frees the memory of a LoRA that is not applied."""
        self._cpp.llama_adapter_lora_free(adapter.pointer)

    def apply(self, adapters: Sequence[tuple[LoadedAdapter, float]]) -> None:
        """Applies LoRAs, each with its scale, to the next calls of `decode`."""
        n = len(adapters)
        pointers = (self._cpp.llama_adapter_lora_p_ctypes * n)(*(adapter.pointer for adapter, _ in adapters))
        scales = (ctypes.c_float * n)(*(scale for _, scale in adapters))
        if self._cpp.llama_set_adapters_lora(self._context, pointers, n, scales):
            raise BackendError("llama.cpp refused the adapters of a mixture")

    def decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> Float[Tensor, "wanted vocab"]:
        """Encodes tokens: (sequence, position, id, whether its scores are wanted). Returns the wanted scores.

        Raises:
            BackendError: if there is no room, or llama.cpp fails.
        """
        assert len(tokens) <= self.chunk_tokens
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (sequence, position, token, is_wanted) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = is_wanted
        if code := self._cpp.llama_decode(self._context, batch):
            raise BackendError(
                "llama.cpp has no room for more tokens" if code == 1 else f"llama.cpp failed with code {code}"
            )
        rows = [
            torch.frombuffer(self._scores(i), dtype=torch.float32).clone()
            for i, (_, _, _, is_wanted) in enumerate(tokens)
            if is_wanted
        ]
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def forget(self, sequence: int) -> None:
        """Drops the KV of a sequence."""
        self._cpp.llama_memory_seq_rm(self._memory, sequence, 0, -1)

    def close(self) -> None:
        """Frees the model, its KV and its adapters."""
        if self._context:
            self._cpp.llama_batch_free(self._batch)
            self._cpp.llama_free(self._context)
            self._cpp.llama_model_free(self._model)
            self._context = None

    def _scores(self, i: int) -> Any:
        pointer = self._cpp.llama_get_logits_ith(self._context, i)
        return ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self.vocab_size)).contents


def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL:
        logger.error("llama.cpp: %s", text.decode(errors="replace").strip())
