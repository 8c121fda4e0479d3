"""Attaching: replaces a model's linear layers by fused layers, and puts the same base layers back."""

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.cpu import check_prepacking, prepack
from dlp_lora.bank.device import computing_device, offloaded_weight
from dlp_lora.bank.group import FusedPair, Group, keep_alignment
from dlp_lora.bank.linear import FusedLinear, Outputs, Place, is_ordinary, is_plain
from dlp_lora.bank.paths import PLAIN, Paths, Setting, check_setting, fixed
from dlp_lora.bank.peft_format import check_base_copies
from dlp_lora.bank.store import Entry
from dlp_lora.bank.timing import Trial, time_paths
from dlp_lora.errors import ModelError
from dlp_lora.policy import Mixture

# Names of layers of one parent that read one input, in the order they are called.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, ...
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("query", "key", "value"),
)


_LISTS = (nn.ModuleList, nn.ModuleDict)

DEFAULT: Setting = "auto"
"""The default paths."""


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
    layers = BaseLayers(shapes, build=lambda: model, tensor=_weights_of(model), source=source)
    assert layers.skeleton is not None  # copied now, before anything is attached
    return layers


def _weights_of(model: nn.Module) -> Callable[[str], Tensor | None]:
    """Gives the weights of a model by name as long as it lives."""
    alive = weakref.ref(model)

    def tensor(name: str) -> Tensor | None:
        path, _, attribute = name.rpartition(".")
        try:
            module = alive().get_submodule(path)  # type: ignore[union-attr]
        except AttributeError:
            return None
        weight = getattr(module, attribute, None)
        if isinstance(weight, Tensor) and weight.is_meta:
            weight = offloaded_weight(getattr(module, "base_layer", module), attribute)
        return weight if isinstance(weight, Tensor) and not weight.is_meta else None

    return tensor


def _where(model: nn.Module) -> Callable[[], tuple[torch.dtype, torch.device]]:
    """Gives the dtype and the device for a model's adapters, as long as the model lives."""
    alive = weakref.ref(model)

    def where() -> tuple[torch.dtype, torch.device]:
        model = alive()
        assert model is not None
        return pair_dtype(model), computing_device(model)

    return where


def pair_dtype(model: nn.Module) -> torch.dtype:
    """Gives the dtype for adapters: the model's; but float32 on a CPU for a model in 16 bits, because there a product
    of rank 24 takes three times as long in 16 bits.
    """
    # Quantised weights may have a dtype without addition.
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
    dtype = next(dtypes, torch.float32)
    return torch.float32 if computing_device(model).type == "cpu" and dtype.itemsize < 4 else dtype


def siblings(model: nn.Module) -> list[tuple[str, ...]]:
    """Lists the linear layers of one parent that read one input and can be computed in one product."""
    groups = []
    for parent, module in model.named_modules():
        for names in SIBLINGS:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), nn.Module)]
            if len(layers) == len(names) and all(map(is_plain, layers)) and _can_be_stacked(layers):
                groups.append(tuple(f"{parent}.{name}".lstrip(".") for name in names))
    return groups


def attach(
    model: nn.Module, bank: AdapterBank, *, paths: Setting | Paths | None = None, new: Collection[Entry] | None = None
) -> Paths:
    """Replaces each layer that an adapter of the bank changes by a FusedLinear, and returns the paths.

    Unless a layer's path is plain, its weights become views of a tensor that has A under them, without a second copy.
    This also holds for siblings that no adapter changes, and for single layers that have a faster way than `F.linear`.
    "auto" times the ways on a CPU and is "stacked" elsewhere. Prepacked weights are a second copy of the base weights:
    the next `fuse` sees weights that were loaded or copied into the base, but no changes of their `.data`. With
    gradients, and while nothing is active, the base layers compute.

    It may be called again for more adapters: then `paths` is the result of the first call. With the entries of `new`
    ones, which are not in the bank yet, only these are checked.

    Raises:
        AdapterError: if an adapter has copies of base weights, and they differ from the model's.
        ModelError: if weights cannot be prepacked here.
    """
    paths = DEFAULT if paths is None else paths
    check_setting(paths)
    first = next(model.parameters())
    if paths == "prepacked":
        check_prepacking(first)
    for adapter in bank.adapters.values() if new is None else [entry.adapter for entry in new]:
        check_base_copies(adapter, _weights_of(model))
    bank.follow(_where(model))
    bank.forget()
    touched = bank.touched(new or ())
    groups = [group for group in bank.groups if not isinstance(_siblings(model, group)[0][0], FusedLinear)]
    stackable = [group for group in groups if _is_stackable(_siblings(model, group))]
    if paths == "prepacked" and not stackable and not any(group.prepacked_nbytes for group in bank.groups):
        raise ModelError(
            f"no layer of {type(model).__name__} can be prepacked: none is a plain nn.Linear; leave it out"
        )
    if paths == "auto" and first.device.type == "cpu" and stackable:
        paths = _timed(model, stackable, touched)
    elif not isinstance(paths, Paths):
        paths = fixed("stacked" if paths == "auto" else paths, [group.label for group in stackable])
    for group in groups:
        group.ways = paths.of(group.label) if group in stackable else PLAIN
        if group not in touched and not group.gains:
            continue
        if not isinstance(_siblings(model, group)[0][0], FusedLinear):
            _put(model, group, stacked=not group.ways.is_plain)
        if group.ways.is_prepacked:
            group.prepack(prepack)
    return paths


def detach(model: nn.Module) -> None:
    """Puts the base layers back: the same objects, with the weights that they had."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedLinear):
            module.group.unstack()
            model.set_submodule(name, module.base_layer)


@contextmanager
@torch.inference_mode(False)  # of its steps, not of the block
def merged(model: nn.Module, bank: AdapterBank, mixture: Mixture) -> Iterator[None]:
    """Adds a mixture to the base weights for a while: `W + B A`, in float32 and rounded once.

    A copy of the changed weights restores them bit for bit; a subtraction would leave rounding errors.

    Raises:
        ModelError: if a layer has no ordinary weight, such as a quantised layer.
        ValueError: if the base weights hold another mixture already.
    """
    pristine: list[tuple[FusedLinear, Tensor]] = []
    merging = ExitStack()
    try:
        with bank.lock:
            if bank.is_merged:
                raise ValueError("the base weights hold another mixture; leave engine.merged() first")
            bank.fuse([mixture])
            pairs = list(_fused_pairs(model))
            bank.clear()
            _check_mergeable(model, [module for module, _ in pairs])
            for module, (a, b, _) in pairs:
                pristine.append((module, module.weight.detach().clone()))
                delta = a.detach().float() @ b.detach().float()  # (d_in, d_out)
                delta = delta if isinstance(module.base_layer, Conv1D) else delta.T
                module.weight.data.copy_(module.weight.data.float() + delta)
            merging.enter_context(bank.merging())
        yield
    finally:
        with bank.lock:
            merging.close()
            for module, weight in pristine:
                module.weight.data.copy_(weight)


def _timed(model: nn.Module, groups: Sequence[Group], touched: Sequence[Group]) -> Paths:
    """The fastest paths; layers whose fastest way is the base's become base layers again."""
    for group in groups:
        _put(model, group, stacked=True)
    trials = [
        Trial(group, list(zip(*_siblings(model, group), strict=True)), is_touched=group in touched) for group in groups
    ]
    paths = time_paths(trials)
    for group in groups:
        group.ways = paths.of(group.label)
        if group.ways.is_plain or not (group in touched or group.gains):
            _take_off(model, group)
    return paths


def _put(model: nn.Module, group: Group, *, stacked: bool) -> None:
    """Replaces a group's layers by fused layers."""
    layers = _siblings(model, group)
    if stacked:
        group.stack(layers)  # type: ignore[arg-type]
    outputs = [Outputs() for _ in layers[0]]
    for s, names in enumerate(group.modules):
        for i, name in enumerate(names):
            place = place_of(model, name)
            model.set_submodule(name, FusedLinear(layers[s][i], group, s, i, outputs[i], place=place))


def place_of(model: nn.Module, name: str) -> Place:
    """The input of a layer (see `linear.Place`), from its place in the model."""
    parts = name.split(".")
    lists = [i for i in range(1, len(parts)) if isinstance(model.get_submodule(".".join(parts[:i])), _LISTS)]
    if any("expert" in part and "shared" not in part for part in parts) or len(lists) > 1:
        return "experts"
    if isinstance(model, PreTrainedModel):
        head = model.get_output_embeddings()
        if head is not None and model.get_submodule(name) in (head, getattr(head, "base_layer", None)):
            return "head"
        decoder = model.get_decoder() if model.config.get_text_config() is not model.config else model
        if decoder is not None and decoder is not model and model.get_submodule(name) not in {*decoder.modules()}:
            return "images"
    return "text"


def _take_off(model: nn.Module, group: Group) -> None:
    """Puts a group's base layers back."""
    group.unstack()
    for names in group.modules:
        for name in names:
            model.set_submodule(name, cast(FusedLinear, model.get_submodule(name)).base_layer)


def _siblings(model: nn.Module, group: Group) -> list[list[nn.Module]]:
    """The layers of a group, by sibling and layer."""
    return [[model.get_submodule(name) for name in names] for names in group.modules]


def _is_stackable(siblings: Sequence[Sequence[nn.Module]]) -> bool:
    layers = [layer for each in siblings for layer in each]
    return all(map(is_plain, layers)) and _can_be_stacked(layers)


def _fused_pairs(model: nn.Module) -> Iterator[tuple[FusedLinear, FusedPair]]:
    for module in (module for module in model.modules() if isinstance(module, FusedLinear)):
        pairs = module.group.active and module.group.active.pairs[module.sibling]
        if pairs:
            yield module, pairs[module.layer]


def _check_mergeable(model: nn.Module, modules: Sequence[FusedLinear]) -> None:
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for module in modules:
        weight = module.weight  # a method of some quantised layers
        if not is_ordinary(weight) or weight.is_meta or uses[id(weight)] != 1:
            name = module.group.modules[module.sibling][module.layer]
            raise ModelError(
                f"{name} is quantised, offloaded or shares its weight with another layer; use fixed() instead"
            )


def _can_be_stacked(layers: Sequence[nn.Module]) -> bool:
    weights: list[Any] = [layer.weight for layer in layers]
    if any(w.device.type not in ("cpu", "cuda") for w in weights):
        return False  # offloaded ones are on "meta"; other devices were not tested
    if len({id(w) for w in weights}) < len(weights):
        return False  # layers that share one weight cannot have a place each
    return len({(w.dtype, w.device, w.shape[1]) for w in weights}) == 1 and keep_alignment(weights)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):  # GPT-2: the weight is stored (d_in, d_out)
        return module.nx, module.nf
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    # Quantised linear layers are not nn.Linear everywhere, but all say their features.
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None
