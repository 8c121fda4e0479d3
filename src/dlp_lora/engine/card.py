"""The model card of a bundle: a README.md with the hub's metadata, its adapters, its router and how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlp_lora.bank.adapter_folder import read_folder
from dlp_lora.engine.base import Base
from dlp_lora.policy import RoutingSettings
from dlp_lora.router import Router

CARD_FILE = "README.md"
MARK = "<!-- dlp-lora writes this file again with the bundle; without this line it stays as it is -->"


def is_card(file: Path) -> bool:
    """Whether this package wrote a README, and not its owner."""
    return file.is_file() and MARK in file.read_text(encoding="utf-8", errors="replace")


def model_card(
    *, name: str, base: Base, adapters: Mapping[str, Path], router: Router | None, settings: RoutingSettings
) -> str:
    """Writes the card of a bundle; `name` is that of its folder or repository."""
    head: dict[str, Any] = {"library_name": "dlp-lora"}
    if base.name:
        head["base_model"] = base.name
    head |= {"tags": ["lora", "peft", "dlp-lora"], "pipeline_tag": "text-generation"}
    front = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in head.items())
    return f"""---
{front}---
{MARK}

# {name.rsplit("/", 1)[-1]}

{len(adapters)} LoRA adapters for {_base(base)}, of which [dlp-lora](https://pypi.org/project/dlp-lora/) chooses and
mixes those that fit, at the prompt and at every new sentence.

| adapter | rank | targets |
| --- | --- | --- |
{"".join(_row(adapter, path) for adapter, path in adapters.items())}
{_router(router)}

Routing: {settings}

## Use

    pip install dlp-lora
    dlp-lora generate --bundle {name} --show-routing "Your prompt"

```python
import dlp_lora

engine = dlp_lora.load({json.dumps(name, ensure_ascii=False)})
print(engine.generate("Your prompt", max_new_tokens=128).text)
```
"""


def _base(base: Base) -> str:
    if base.origin == "hub":
        return f"[{base.name}](https://huggingface.co/{base.name})"
    return f"`{base.name}`" if base.name else "a base model without a name"


def _row(name: str, path: Path) -> str:
    loras = read_folder(path, name).loras
    ranks = sorted({lora.rank for lora in loras.values()})
    targets = sorted({module.rsplit(".", 1)[-1] for module in loras})
    return f"| {name.replace('|', chr(92) + '|')} | {', '.join(map(str, ranks))} | {', '.join(targets)} |\n"


def _router(router: Router | None) -> str:
    if router is None:
        return "It has no router: choose adapters with `engine.fixed`."
    measured = getattr(router, "measured", None)
    return f"Router: {type(router).__name__}, {measured or 'whose accuracy was not measured'}."
