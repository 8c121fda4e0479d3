"""Commands that train adapters: train-adapter, train-adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dlp_lora.cli.common import (
    DataOption,
    JsonOption,
    ModelHubOptions,
    ModelOption,
    OutOption,
    TemplateOption,
    base_model,
)
from dlp_lora.cli.json_lines import print_json
from dlp_lora.cli.options import json_object, with_options, words
from dlp_lora.cli.progress import progress
from dlp_lora.progress import Progress
from dlp_lora.training.args import PRESETS, AdapterTrainingArgs

TasksOption = Annotated[str | None, typer.Option("--tasks", help="Comma-separated task names. [default: all]")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Train again if the settings changed.")]
DEFAULT = AdapterTrainingArgs()


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """How adapters are trained, as changes to a preset."""

    preset: Annotated[
        str, "Values of the other options: default, or paper (q_proj and v_proj, AdamW 5e-5, batch 1, dropout 0.1)."
    ] = "default"
    r: Annotated[int | None, f"Rank. [default: {DEFAULT.r}]"] = None
    lora_alpha: Annotated[int | None, f"Scaling is lora_alpha / r. [default: {DEFAULT.lora_alpha}]"] = None
    learning_rate: Annotated[float | None, f"Peak learning rate. [default: {DEFAULT.learning_rate:g}]"] = None
    epochs: Annotated[float | None, f"Passes over the examples. [default: {DEFAULT.epochs:g}]"] = None
    schedule: Annotated[
        str | None, f"Learning rate: cosine, constant or warmup_stable_decay. [default: {DEFAULT.schedule}]"
    ] = None
    batch_size: Annotated[int | None, f"Examples per step. [default: {DEFAULT.batch_size}]"] = None
    target_modules: Annotated[
        str | None, f'Comma-separated, or "all-linear". [default: {",".join(DEFAULT.target_modules)}]'
    ] = None
    prompt_format: Annotated[
        str | None,
        f"auto, chat or plain. [default: {DEFAULT.prompt_format}, the chat template of models that have one]",
    ] = None
    chat_template_kwargs: TemplateOption = None
    seed: Annotated[int | None, f"Seed of initialisation, order and dropout. [default: {DEFAULT.seed}]"] = None
    save_dtype: Annotated[
        str | None, f"Precision of the file: float32, or bfloat16, half as large. [default: {DEFAULT.save_dtype}]"
    ] = None
    cpu_tricks: Annotated[
        bool | None, "Precision, passes and memory that are fast on CPUs. [default: --cpu-tricks]"
    ] = None

    def training_args(self) -> AdapterTrainingArgs:
        """The preset, with the options that were given in the place of its values."""
        if self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset!r}; choose {' or '.join(PRESETS)}")
        options: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        del options["preset"]
        if self.target_modules is not None and self.target_modules != "all-linear":
            options["target_modules"] = words(self.target_modules)
        if self.chat_template_kwargs is not None:
            options["chat_template_kwargs"] = json_object("chat-template-kwargs", self.chat_template_kwargs)
        return replace(PRESETS[self.preset], **options)


@with_options
def train_adapter(
    task: Annotated[Path, typer.Argument(help="One task folder.")],
    out: OutOption,
    options: AdapterOptions,
    hub_options: ModelHubOptions,
    model: ModelOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one LoRA on one task folder and save it as an ordinary PEFT adapter in OUT/TASK.

    After an interruption, run it again to continue. Example:
    `dlp-lora train-adapter data/gsm8k --out adapters/ --epochs 2`
    """
    task = task.absolute()  # "." has no name
    args = options.training_args()
    _train_adapters(task.parent, [task.name], out, model, args, hub_options, overwrite=overwrite, as_json=as_json)


@with_options
def train_adapters(
    data: DataOption,
    out: OutOption,
    options: AdapterOptions,
    hub_options: ModelHubOptions,
    model: ModelOption = None,
    tasks: TasksOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one LoRA per task folder and save each as an ordinary PEFT adapter in OUT/TASK.

    After an interruption, run it again to continue; finished adapters are not trained again. Example:
    `dlp-lora train-adapters --data data/ --out adapters/ --model Qwen/Qwen2-1.5B`
    """
    args, names = options.training_args(), words(tasks) if tasks else None
    _train_adapters(data, names, out, model, args, hub_options, overwrite=overwrite, as_json=as_json)


def _train_adapters(
    data: str | Path,
    names: Sequence[str] | None,
    out: Path,
    model: str | None,
    args: AdapterTrainingArgs,
    hub_options: ModelHubOptions,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    from dlp_lora.bank.adapter_files import check_adapter_name
    from dlp_lora.tasks.hub import read_data
    from dlp_lora.training import adapters
    from dlp_lora.training.base import load_base

    tasks = read_data(data, names=names)
    for task in tasks:
        check_adapter_name(task.name, out / task.name)
    base, tokenizer = load_base(base_model(model), cpu_tricks=args.cpu_tricks, **hub_options.given())
    adapters.check_lengths(base, tokenizer, tasks, args)
    with progress([task.name for task in tasks]) as show:
        for adapter in adapters.train_adapters(
            base, tokenizer, tasks, out, args, overwrite=overwrite, on_progress=show
        ):
            note = "there already" if adapter.was_there else f"{adapter.seconds:.0f} s, loss {adapter.final_loss:.3f}"
            show(Progress(adapter.name, 1, 1, note))
            if as_json:
                print_json({**adapter.__dict__, "path": str(adapter.path)})
