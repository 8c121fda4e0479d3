"""Random adapters: a base model's shapes in, PEFT folders out. They cost as much as trained ones."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dlp_lora.bank.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.peft_format import LoraWeights, write_adapter

NUM_DISTINCT = 32  # of many adapters; the others are links to their files


def write_random_adapters(
    model: str | Path, folder: Path, num_adapters: int, *, r: int, target_modules: Sequence[str]
) -> dict[str, Path]:
    """Writes adapters small enough that the text stays text, with sentences in it; gives their folders by name.

    Raises:
        ValueError: if the model has no linear layers of these names.
    """
    shapes = _shapes(model, target_modules)
    paths = {name: folder / name for name in (f"adapter_{i:04d}" for i in range(num_adapters))}
    for i, path in enumerate(paths.values()):
        if i < NUM_DISTINCT:
            write_adapter(path, _random(shapes, r, seed=i), rank=r)
            _name_targets(path)
            continue
        path.mkdir()
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            (path / file).hardlink_to(folder / f"adapter_{i % NUM_DISTINCT:04d}" / file)
    return paths


def _shapes(model: str | Path, target_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(str(model), trust_remote_code=False)
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = empty.get_output_embeddings()
    layers = {name: shape for name, shape in linear_layers(empty).items() if empty.get_submodule(name) is not head}
    if list(target_modules) == ["all-linear"]:
        return layers
    found = {name: shape for name, shape in layers.items() if name.rpartition(".")[2] in target_modules}
    if not found:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise ValueError(f"{Path(model).name} has no layers {list(target_modules)}; there are {', '.join(known)}")
    return found


def _name_targets(path: Path) -> None:
    """Names the modules by their last part, as PEFT writes them: whole names, many times as many, slow it down."""
    config = json.loads((path / CONFIG_FILE).read_text())
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _random(shapes: Mapping[str, tuple[int, int]], r: int, *, seed: int) -> dict[str, LoraWeights]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraWeights(
            a=0.02 * torch.randn(r, d_in, generator=generator),
            b=0.002 * torch.randn(d_out, r, generator=generator),
            scaling=2.0,
        )
        for name, (d_in, d_out) in shapes.items()
    }
