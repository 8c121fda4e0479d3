"""The settings of an adapter's training: this package's and the paper's."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from dlp_lora.files import as_json
from dlp_lora.tasks.task import PromptFormat

Schedule = Literal["cosine", "constant", "warmup_stable_decay"]
SaveDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class AdapterTrainingArgs:
    """The settings of a LoRA's training. The defaults are this package's recipe; `PAPER` is the paper's."""

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "k_proj", "v_proj", "o_proj")
    learning_rate: float = 2e-3
    warmup: float = 0.06  # share of the steps; with warmup_stable_decay of those of the first epoch
    schedule: Schedule = "cosine"
    decay: float = 0.2  # share of the steps over which warmup_stable_decay falls to zero, in a line
    weight_decay: float = 0.0
    epochs: float = 1.0
    batch_size: int = 8
    max_length: int = 1024  # tokens; longer examples are left out and counted, as are those beyond the model's context
    max_grad_norm: float = 1.0
    prompt_format: PromptFormat = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # as {"enable_thinking": False}
    seed: int = 0
    checkpoint_seconds: float = 300.0  # between two checkpoints; no setting of the result
    save_dtype: SaveDtype = "float32"  # of the adapter's file; bfloat16 halves it
    cpu_tricks: bool = True  # precision, passes and memory that are fast on CPUs; else those of PyTorch and PEFT

    def __post_init__(self) -> None:
        for name in ("r", "lora_alpha", "learning_rate", "epochs", "batch_size", "max_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"AdapterTrainingArgs.{name} must be positive, got {getattr(self, name)}")
        if not self.checkpoint_seconds >= 0:
            raise ValueError(f"AdapterTrainingArgs.checkpoint_seconds is at least 0, got {self.checkpoint_seconds}")
        for name in ("lora_dropout", "warmup", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"AdapterTrainingArgs.{name} must be in [0, 1), got {getattr(self, name)}")
        choices_of = {"schedule": Schedule, "prompt_format": PromptFormat, "save_dtype": SaveDtype}
        for name, choices in ((name, get_args(kind)) for name, kind in choices_of.items()):
            if getattr(self, name) not in choices:
                raise ValueError(f"AdapterTrainingArgs.{name} must be one of {choices}, got {getattr(self, name)!r}")

    def identity(self) -> dict[str, Any]:
        """The settings on which the trained weights depend, as JSON data."""
        found: dict[str, Any] = as_json(asdict(self))
        del found["checkpoint_seconds"]
        if self.cpu_tricks:  # as adapters of before have it
            del found["cpu_tricks"]
        if not self.chat_template_kwargs:  # as adapters of before have it
            del found["chat_template_kwargs"]
        if self.save_dtype == "float32":  # as adapters of before have it
            del found["save_dtype"]
        return found


PAPER = AdapterTrainingArgs(
    lora_dropout=0.1,
    target_modules=("q_proj", "v_proj"),
    learning_rate=5e-5,
    warmup=0.0,
    schedule="constant",
    weight_decay=0.01,
    batch_size=1,
)
"""Section 4.1 and the released code: q_proj and v_proj, r 8, alpha 16, dropout 0.1, AdamW 5e-5, batch 1."""

PRESETS = {"default": AdapterTrainingArgs(), "paper": PAPER}
