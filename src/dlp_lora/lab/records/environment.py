"""The environment of a measurement: hardware and versions, for the record."""

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("dlp-lora", "torch", "transformers", "peft", "tokenizers", "numpy", "sacrebleu", "rouge-score")


def environment() -> dict[str, Any]:
    """Gives hardware, thread count and package versions as JSON data."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    """The packages that are installed: those of an extra need not be."""
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines) if v}
    name = fields.get("model name") or platform.processor() or platform.machine()
    detail = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    features = [f for f in ("avx512_bf16", "amx_bf16") if f in fields.get("flags", "").split()]
    return f"{name}{detail}{' with ' + ', '.join(features) if features else ''}"
