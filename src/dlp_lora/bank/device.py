"""Devices: choosing one, and finding the one on which a model computes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dlp_lora.errors import ModelError


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Returns an available device; "auto" is the first available of cuda, mps and cpu.

    Raises:
        ValueError: if there is no such device.
    """
    if device == "auto":
        return torch.device(_kinds()[0])
    try:
        if torch.device(device).type != "meta":
            torch.empty(0, device=device)
            return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # a CPU build asserts that there is a GPU
        raise _missing(device) from error
    raise _missing(device)


def computing_device(model: nn.Module) -> torch.device:
    """Returns the device on which a model computes; offloaded weights are moved there for each pass."""
    return next(_devices_of(model), (torch.device("cpu"), ""))[0]


def check_devices(model: nn.Module) -> None:
    """Checks that a model computes on one device.

    Raises:
        ModelError: if it computes on several, or has weights on the meta device that nothing loads.
    """
    names = dict(reversed(list(_devices_of(model))))
    if len(names) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in reversed(names.items()))
        raise ModelError(
            f"the model computes on several devices ({places}), and adapters are fused on one: put it on one, as with "
            "device='cuda:0', and let device_map send what does not fit to 'cpu' or 'disk'"
        )


def _devices_of(model: nn.Module) -> Iterator[tuple[torch.device, str]]:
    """The device of each module with weights, with its name."""
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            device = _hooked_device(module) if parameter.is_meta else parameter.device
            if device is None:
                raise ModelError(
                    f"{name or 'the model'} is on the meta device and has no weights; load them before the engine"
                )
            yield device, name


def _kinds() -> list[str]:
    """The available kinds of device, the fastest first."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, is_there in kinds.items() if is_there]


def _missing(device: str | torch.device) -> ValueError:
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    names += [kind for kind in _kinds() if kind != "cuda"]
    return ValueError(f"there is no device {str(device)!r} here; there is {', '.join(names)}")


def offloaded_weight(module: nn.Module, name: str) -> Tensor | None:
    """Returns a weight of a module that accelerate's hook loads for each pass; None if there is none."""
    for hook in _hooks(module):
        weight: Tensor | None = (getattr(hook, "weights_map", None) or {}).get(name)
        if weight is not None:
            return weight
    return None


def _hooks(module: nn.Module) -> list[Any]:
    """Accelerate's hooks on a module."""
    hook: Any = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))


def _hooked_device(module: nn.Module) -> torch.device | None:
    """The device to which accelerate's hook on a module moves its weights."""
    for each in _hooks(module):
        device = getattr(each, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
