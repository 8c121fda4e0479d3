"""Attaching: fused layers in the place of a model's linear layers, and the very same base layers back."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.cpu import _has_faster_way, check_prepacking, prepacked
from dlp_lora.bank.group import LowRank, keep_alignment
from dlp_lora.bank.linear import FusedLinear, Outputs, is_plain
from dlp_lora.bank.peft_format import check_base_copies
from dlp_lora.errors import ModelError
from dlp_lora.policy import Mixture

# Names of layers of one parent that read one input, in the order they are called.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, ...
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
)


def linear_layers(model: nn.Module) -> BaseLayers:
    """Maps each linear layer of a model to its (d_in, d_out), in the order of the model.

    Raises:
        ModelError: if fused layers or PEFT's are attached to the model already, or it has no linear layer.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(
            "the model carries PEFT adapters already, which would be part of every mixture; take the plain base "
            "(PeftModel's unload() gives it back) and pass the adapters' folders"
        )
    if any(isinstance(module, FusedLinear) for module in model.modules()):
        raise ModelError("the model has fused layers attached already; call detach() on its engine first")
    shapes = {name: shape for name, module in model.named_modules() if (shape := _shape(module)) is not None}
    if not shapes:
        raise ModelError(f"{type(model).__name__} has no linear layer to attach to")
    source = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    layout = BaseLayers(shapes, build=weakref.ref(model), tensor=_weights_of(model), source=source)  # type: ignore[arg-type]
    assert layout.skeleton is not None  # copied now, before anything is attached
    return layout


def _weights_of(model: nn.Module) -> Callable[[str], Tensor | None]:
    """Gives the weights of a model by name as long as it lives."""
    alive = weakref.ref(model)

    def tensor(name: str) -> Tensor | None:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(alive().get_submodule(module), attribute, None)  # type: ignore[union-attr]
        except AttributeError:
            return None
        return found if isinstance(found, Tensor) and not found.is_meta else None

    return tensor


def pair_dtype(model: nn.Module) -> torch.dtype:
    """Gives the dtype to hold adapters in: the model's own; on a CPU float32 for a model in 16 bits, where a product of
    rank 24 takes three times as long.
    """
    parameter = next(model.parameters())
    return torch.float32 if parameter.device.type == "cpu" and parameter.itemsize < 4 else parameter.dtype


def siblings(model: nn.Module) -> list[tuple[str, ...]]:
    """Lists the linear layers of one parent that read one input and can be computed in one product."""
    found = []
    for parent, module in model.named_modules():
        for names in SIBLINGS:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), nn.Module)]
            if len(layers) == len(names) and all(map(is_plain, layers)) and _are_alike(layers):
                found.append(tuple(f"{parent}.{name}".lstrip(".") for name in names))
    return found


def attach(model: nn.Module, bank: AdapterBank, *, stack: bool = True, prepack: bool = False) -> None:
    """Puts a FusedLinear in the place of each layer that an adapter of the bank changes; may be called again.

    Where `stack`, the weights of plain layers become views of a tensor that holds A under them; nothing is held twice.
    So do those of siblings that no adapter changes, which are one product, too, while something is fused; and on a CPU
    those of single layers, where one row is multiplied faster than by `F.linear`.

    Where `prepack`, all stacked weights are held once more in oneDNN's layout, those of layers that no adapter changes
    as well, and multiplied there while something is fused. The next `fuse` sees weights that were loaded or copied into
    the base since, but not what was done to their `.data`.

    Raises:
        AdapterError: if an adapter was trained on a base whose weights differ from the model's, where it tells.
        ModelError: if weights cannot be prepacked here.
    """
    if prepack:
        check_prepacking(next(model.parameters()))
    for name in bank.unattached:
        check_base_copies(bank.adapters[name], _weights_of(model))
    bank.unattached.clear()
    bank.clear()
    touched = bank.touched()
    for group in bank.groups:
        layers = [[model.get_submodule(name) for name in names] for names in group.modules]
        if isinstance(layers[0][0], FusedLinear):
            continue
        flat = [layer for own in layers for layer in own]
        is_stackable = stack and all(map(is_plain, flat)) and _are_alike(flat)
        gains = is_stackable and (prepack or len(layers) > 1 or _has_faster_way(flat[0].weight))
        if group not in touched and not gains:
            continue
        if is_stackable:
            group.stack(layers)  # type: ignore[arg-type]
            if prepack:
                group.prepack(prepacked)
        outputs = [Outputs() for _ in layers[0]]
        for s, names in enumerate(group.modules):
            for i, name in enumerate(names):
                model.set_submodule(name, FusedLinear(layers[s][i], group, s, i, outputs[i]))
    if prepack and not any(group.prepacked_nbytes for group in bank.groups):
        detach(model)
        raise ModelError(
            f"no layer of {type(model).__name__} can be prepacked: none is a plain nn.Linear; leave it out"
        )


def detach(model: nn.Module) -> None:
    """Puts the base layers back: the same objects, with the weights that they had."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedLinear):
            module.group.unstack()
            model.set_submodule(name, module.base_layer)


@contextmanager
def merged(model: nn.Module, bank: AdapterBank, mixture: Mixture) -> Iterator[None]:
    """Adds a mixture to the base weights for a while: `W + B A`, in float32 and rounded once.

    A copy of the weights that it changes gives them back, bit for bit; to subtract it again would drift.

    Raises:
        ModelError: if a layer has no weight of its own to add to.
    """
    pristine: list[tuple[FusedLinear, Tensor]] = []
    try:
        with bank.lock:
            bank.fuse([mixture])
            found = list(_fused_pairs(model))
            _check_mergeable(model, [module for module, _ in found])
            for module, (a, b, _) in found:
                pristine.append((module, module.weight.detach().clone()))
                delta = a.detach().float() @ b.detach().float()  # (d_in, d_out)
                delta = delta if isinstance(module.base_layer, Conv1D) else delta.T
                module.weight.data.copy_(module.weight.data.float() + delta)
            bank.clear()
            bank.is_merged = True
        yield
    finally:
        with bank.lock:
            bank.is_merged = False
            for module, weight in pristine:
                module.weight.data.copy_(weight)


def _fused_pairs(model: nn.Module) -> Iterator[tuple[FusedLinear, LowRank]]:
    for module in (module for module in model.modules() if isinstance(module, FusedLinear)):
        pairs = module.group.active and module.group.active[module.sibling]
        if pairs:
            yield module, pairs[module.layer]


def _check_mergeable(model: nn.Module, modules: Sequence[FusedLinear]) -> None:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in modules:
        weight = module.weight  # a method of some quantised layers
        if not (isinstance(weight, Tensor) and weight.is_floating_point()) or uses[id(weight)] != 1:
            name = module.group.modules[module.sibling][module.layer]
            raise ModelError(f"{name} is quantised or shares its weight with another layer; use fixed() instead")


def _are_alike(layers: Sequence[nn.Module]) -> bool:
    weights: list[Any] = [layer.weight for layer in layers]
    if any(w.is_meta for w in weights) or len({id(w) for w in weights}) < len(weights):
        return False  # layers that share one weight cannot have a place each
    return len({(w.dtype, w.device, w.shape[1]) for w in weights}) == 1 and keep_alignment(weights)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):  # GPT-2: the weight is stored (d_in, d_out)
        return module.nx, module.nf
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    # Quantised linear layers are not nn.Linear everywhere, but all say their features.
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None
