"""The layout of a base model: its linear layers by name, and the other facts for reading adapters."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

# This module must not import torch for them.
Module = Any
Tensor = Any


class BaseLayers(dict[str, tuple[int, int]]):
    """Maps the linear layers of a base model to their (d_in, d_out), in the order of the model.

    It also knows the model's other modules, so that adapters are read as PEFT reads them for this model. It imports
    torch only for these.

    Args:
        layers: the linear layers.
        build: returns the model, or one like it on the meta device; it is called at most once.
        tensor: returns a weight of the model by its name, or None if it has or reaches none.
        parameters: the shapes of all weights by name, if they are known without the model; transformers then renames
            nothing in its type, and its text model is called "model".
        source: the model's name or path, or "".
        folder: the folder of its files, or None if they are not on this machine.
        revision: the branch, tag or commit of `source` that it was read from, if one was chosen.
        subfolder: the folder inside `source` that it was read from, if it is not `source` itself.
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        *,
        build: Callable[[], Module] | None = None,
        tensor: Callable[[str], Tensor | None] | None = None,
        parameters: Mapping[str, tuple[int, ...]] | None = None,
        source: str = "",
        folder: Path | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        super().__init__(layers)
        self._build = build
        self._parameters = parameters
        self._tensor = tensor
        self.source = source
        self.folder = folder
        self.revision = revision
        self.subfolder = subfolder

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled layout has no access to the model."""
        return {**vars(self), "_build": None, "_tensor": None}

    @cached_property
    def skeleton(self) -> Module:
        """A copy of the model without its weights, not to be changed; None if only names of layers are known."""
        build, self._build = self._build, None  # nothing of the model is kept
        return None if build is None else without_weights(build(), self)

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """The types of all modules by name; only those of linear layers if no more is known."""
        if self._parameters is not None:
            parts = [name.split(".") for name in self._parameters]
            names = [".".join(part[:i]) for part in parts for i in range(1, len(part))]
            return {name: "Linear" if name in self else "module" for name in names}
        if self.skeleton is None:
            return dict.fromkeys(self, "Linear")
        return {name: type(module).__name__ for name, module in self.skeleton.named_modules() if name}

    @cached_property
    def segments(self) -> frozenset[str]:
        """The parts of all modules' names."""
        return frozenset(part for name in self.modules for part in name.split("."))

    @cached_property
    def parameters(self) -> Mapping[str, tuple[int, ...]] | None:
        """The shapes of all weights by name; None if they are not known."""
        if self._parameters is not None or self.skeleton is None:
            return self._parameters
        named = [*self.skeleton.named_parameters(remove_duplicate=False), *self.skeleton.named_buffers()]
        return {name: tuple(weight.shape) for name, weight in named}

    @cached_property
    def is_renamed(self) -> bool:
        """Whether transformers, and so PEFT, renames layers of older checkpoints for this type of model."""
        if self._parameters is not None:
            return False
        config: Any = getattr(self.skeleton, "config", None)
        if getattr(config, "model_type", None) is None:
            return False
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        return get_checkpoint_conversion_mapping(config.model_type) is not None

    @cached_property
    def text_model(self) -> str:
        """The name of the decoder, which is one of several parts in a multimodal model; "" for the model itself."""
        if self._parameters is not None:
            return "model"
        if not hasattr(self.skeleton, "get_decoder"):
            return ""
        decoder = self.skeleton.get_decoder()
        return next((name for name, module in self.skeleton.named_modules() if module is decoder), "")

    def tensor(self, name: str) -> Tensor | None:
        """Returns a weight of the model; None if it has no such weight or its weights are out of reach."""
        return None if self._tensor is None else self._tensor(name)


def without_weights(model: Module, layers: Mapping[str, tuple[int, int]]) -> Module:
    """Copies the modules of a model, with weights on the meta device and without hooks.

    `layers` are linear layers, which are copied as plain ones even if they are quantised.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules: dict[int, nn.Module] = {}
    weights: dict[int, torch.Tensor] = {}

    def bare(weight: torch.Tensor) -> torch.Tensor:
        if id(weight) not in weights:
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            empty = torch.empty(weight.shape, dtype=dtype, device="meta")
            is_parameter = isinstance(weight, nn.Parameter)
            weights[id(weight)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        return weights[id(weight)]

    def copied(module: nn.Module, name: str) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        if name in layers and type(module) is not nn.Linear and not isinstance(module, Conv1D):
            d_in, d_out = layers[name]
            bias = getattr(module, "bias", None) is not None
            plain = nn.Linear(d_in, d_out, bias=bias, device="meta").requires_grad_(requires_grad=False)
            modules[id(module)] = plain
            return plain
        other = modules[id(module)] = object.__new__(type(module))
        state: dict[str, Any] = {
            key: OrderedDict() if "_hooks" in key else value for key, value in vars(module).items()
        }
        for key in ("forward", "_hf_hook", "_old_forward"):
            state.pop(key, None)
        state["_parameters"] = {key: p if p is None else bare(p) for key, p in module._parameters.items()}
        state["_buffers"] = {key: b if b is None else bare(b) for key, b in module._buffers.items()}
        state["_modules"] = {
            key: m if m is None else copied(m, f"{name}.{key}".lstrip(".")) for key, m in module._modules.items()
        }
        vars(other).update(state)
        return other

    return copied(model, "")
