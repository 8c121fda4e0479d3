"""A safetensors file without torch: the dtypes and shapes of its tensors, and checks of their bits."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dlp_lora.errors import AdapterError

# Floating-point types: the unsigned integer of their width, the bits of the exponent, the sign bit.
_FLOATS: dict[str, tuple[type[np.unsignedinteger[Any]], int, int]] = {
    "F64": (np.uint64, 0x7FF0000000000000, 1 << 63),
    "F32": (np.uint32, 0x7F800000, 1 << 31),
    "F16": (np.uint16, 0x7C00, 1 << 15),
    "BF16": (np.uint16, 0x7F80, 1 << 15),
    "F8_E5M2": (np.uint8, 0x7C, 1 << 7),
    "F8_E4M3": (np.uint8, 0x7F, 1 << 7),  # has no infinity: NaN alone has all of these bits
}


@dataclass(frozen=True)
class TensorInfo:
    """The entry of one tensor in the header of the file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether it has real numbers, not integers, booleans or complex ones."""
        return self.dtype in _FLOATS


class TensorFile:
    """One safetensors file.

    Raises:
        AdapterError: if it is missing, truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="np") as file:
                parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                self.tensors = {
                    key: TensorInfo(dtype=part.get_dtype(), shape=tuple(part.get_shape()))
                    for key, part in parts.items()
                }
        except (SafetensorError, OSError, ValueError) as error:
            fault = "is truncated or not a safetensors file"
            if _is_lfs_pointer(path):
                raise AdapterError(f"{path} {fault} but a pointer of Git LFS; fetch it with `git lfs pull`") from error
            raise AdapterError(f"{path} {fault} ({error}); copy it again") from error

    def is_finite(self, key: str) -> bool:
        """Whether no number of a floating-point tensor is NaN or infinite."""
        integer, exponent, _ = _FLOATS[self.tensors[key].dtype]
        mask = integer(exponent)
        return not bool(((self._bits(key, integer) & mask) == mask).any())

    def is_zero(self, key: str) -> bool:
        """Whether all numbers of a tensor are zero."""
        integer, _, sign = _FLOATS.get(self.tensors[key].dtype, (np.uint8, 0, 0))
        return not bool((self._bits(key, integer) & ~integer(sign)).any())

    def read(self, key: str) -> bytearray:
        """The bytes of a tensor."""
        start, stop = self._offsets[key]
        with self.path.open("rb") as file:
            file.seek(start)
            return bytearray(file.read(stop - start))

    def _bits(self, key: str, integer: type[np.unsignedinteger[Any]]) -> npt.NDArray[Any]:
        start, stop = self._offsets[key]
        return (
            np.memmap(self.path, dtype=np.uint8, mode="r")[start:stop].view(integer)
            if stop > start
            else np.zeros(0, integer)
        )

    @cached_property
    def _offsets(self) -> dict[str, tuple[int, int]]:
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        first = 8 + length
        return {
            key: (first + value["data_offsets"][0], first + value["data_offsets"][1])
            for key, value in header.items()
            if key != "__metadata__"
        }


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False
