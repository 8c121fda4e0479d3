"""The exceptions of the package, as a tree.

DLPLoRAError
├── AdapterError     a PEFT adapter folder that cannot be fused exactly
│   └── AdapterChangedError  one whose files changed since it was added
├── RouterError      a router folder, its labels or its output
├── BundleError      a bundle folder
├── TaskError        a task folder or an example in it
├── ModelError       a base model that cannot be loaded or attached to
├── PromptError      a prompt that cannot be answered
├── TrainingError    a training run that cannot start or go on
└── RecordError      a record of results that is missing, damaged, or of another version or run
"""


class DLPLoRAError(Exception):
    """Bad files, adapters, tasks or prompts; the command line prints it as one line."""


class AdapterError(DLPLoRAError):
    """A PEFT adapter folder that cannot be fused exactly."""


class AdapterChangedError(AdapterError):
    """An adapter whose files were written again, or are gone, since it was added as `name`."""

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class RouterError(DLPLoRAError):
    """A router folder, its labels or its output."""


class BundleError(DLPLoRAError):
    """A bundle folder that is missing, damaged or of another version."""


class TaskError(DLPLoRAError):
    """A task folder, or an example in it, that cannot be read."""


class ModelError(DLPLoRAError):
    """A base model that cannot be loaded or attached to."""


class PromptError(DLPLoRAError):
    """A prompt that cannot be answered."""


class TrainingError(DLPLoRAError):
    """A training run that cannot start or go on."""


class RecordError(DLPLoRAError):
    """A record of results that is missing, damaged, or of another version or run."""


def reason_of(error: BaseException) -> str:
    """The first line of a library's error, and the next ones if it ends in a colon; its type if it has no text."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join([first, *others]) if first.rstrip().endswith(":") else first


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory: PyTorch has a class for that on accelerators alone."""
    is_pytorchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_pytorchs)
