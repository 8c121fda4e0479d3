"""The training benchmark: our adapter training and the plain transformers Trainer with PEFT, on the same samples.

The Trainer is set up as its documentation has it: mixed precision where the base is in bfloat16, a collator that pads
each batch, and labels of -100 over the prompts. Both start from the same LoRA and save what they have trained.

Each has its own order of batches, which the times include. To compare the losses, the Trainer then learns once more,
untimed, from our batches.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dlp_lora.errors import DLPLoRAError, TaskError
from dlp_lora.lab.bench.case import BenchArgs, Rounds, Row, begin, record
from dlp_lora.lab.bench.memory import Memory, bandwidth_gb_s, counted
from dlp_lora.lab.bench.timing import Run, interleave, synchronise
from dlp_lora.progress import OnProgress, unseen
from dlp_lora.tasks.formats import encode_example
from dlp_lora.tasks.task import Task
from dlp_lora.training.adapters import lora_config, train_adapter
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.base import load_base
from dlp_lora.training.batches import answer_loss, micro_batches, num_shared
from dlp_lora.training.loop import MAX_TOKENS, batch_at, num_steps

TRAINER = "transformers Trainer + PEFT"
OURS = "dlp-lora"
TOLERANCE = 0.02  # of the decrease of the loss, for rounding

# The two count the steps of a warm-up differently, which would show in the loss after few samples.
RECIPE = AdapterTrainingArgs(warmup=0.0, schedule="constant", learning_rate=1e-3)

Encoded = Sequence[tuple[list[int], list[int]]]
"""Examples as token lists: the tokens to read, and those to learn."""


@dataclass(frozen=True, kw_only=True)
class TrainArgs(BenchArgs):
    """The settings: training with the same recipe on `num_samples` examples of each task."""

    rounds: Rounds = 3
    num_samples: Annotated[int, "Training examples of each task."] = 48
    training: AdapterTrainingArgs = RECIPE


def bench_train(
    model: str | Path, tasks: Sequence[Task], args: TrainArgs | None = None, *, on_progress: OnProgress = unseen
) -> dict[str, Any]:
    """Trains the same LoRA on the same samples both ways, in turns; gives the record as JSON data.

    Raises:
        DLPLoRAError: if the two do not end at the same loss.
    """
    args = args or TrainArgs()
    device = begin(args)
    loaded, tokenizer = load_base(model)
    base: Any = loaded
    plain: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=base.dtype, trust_remote_code=False)
    base, plain = base.to(device), plain.to(device)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = [row for task in tasks for row in _measure(base, plain, tokenizer, task, args, on_progress)]
    found = record(
        "train",
        model,
        args,
        rows,
        bandwidth=bandwidth_gb_s(device),
        does_not_measure="held-out answers of the adapters",
    )
    return {**found, "dtype": str(base.dtype).removeprefix("torch.")}


def _measure(
    base: Any, plain: Any, tokenizer: PreTrainedTokenizerBase, task: Task, args: TrainArgs, on_progress: OnProgress
) -> list[Row]:
    few, encoded = _short_enough(task, tokenizer, args)
    with tempfile.TemporaryDirectory() as folder:
        out = {name: Path(folder) / name for name in (TRAINER, OURS)}
        theirs = partial(_train_with_trainer, plain, tokenizer, encoded, args.training, out[TRAINER])

        def ours() -> None:
            shutil.rmtree(out[OURS], ignore_errors=True)  # a finished adapter would not be trained again
            train_adapter(base, tokenizer, few, out[OURS], args.training)

        memory: dict[str, Memory] = {}
        runs = {
            TRAINER: counted(TRAINER, plain, _timed(theirs, base.device), memory, base.device),
            OURS: counted(OURS, base, _timed(ours, base.device), memory, base.device),
        }
        times = interleave(runs, rounds=args.rounds, scenario=f"train, {task.name}", on_progress=on_progress)
        before = _loss(base, encoded)
        steps = range(num_steps(len(encoded), args.training))
        theirs(batches=[batch_at(step, encoded, args.training) for step in steps])
        losses = {name: _loss(base, encoded, path) for name, path in out.items()}
    _check_losses(losses, before, task.name)
    num_tokens = sum(len(read) + len(learned) for read, learned in encoded)
    rows = []
    for name in (TRAINER, OURS):
        seconds, speedup = times.median(name, "ms") / 1e3, times.ratio(TRAINER, "ms", over=name)
        rows.append(
            {
                "name": name,
                "task": task.name,
                "num_samples": len(encoded),
                "samples_per_s": round(len(encoded) / seconds, 3),
                "tokens_per_s": round(num_tokens / seconds, 1),
                **{key.replace("ratio", "speedup"): value for key, value in speedup.items()},
                **memory[name].columns(memory[TRAINER]),
                "shared": round(_shared(encoded, args.training), 4) if name == OURS else 0.0,
                "loss": round(losses[name], 4),
                "loss_before": round(before, 4),
            }
        )
    return rows


def _shared(encoded: Encoded, args: AdapterTrainingArgs) -> float:
    """The share of the first epoch's tokens that are not encoded, as other examples of their batch begin with them."""
    saved = 0
    for step in range(math.ceil(len(encoded) / args.batch_size)):
        batch = batch_at(step, encoded, args)
        for part in micro_batches([encoded[i] for i in batch], MAX_TOKENS):
            saved += num_shared(part) * (len(part) - 1)
    return saved / sum(len(read) + len(learned) for read, learned in encoded)


def _check_losses(losses: Mapping[str, float], before: float, task: str) -> None:
    """Compares the losses over all samples, before and after training on the same batches.

    Raises:
        DLPLoRAError: if they differ by more than rounding explains.
    """
    theirs, ours = losses[TRAINER], losses[OURS]
    if not abs(ours - theirs) <= TOLERANCE * abs(before - theirs):
        raise DLPLoRAError(f"{task}: we end at a loss of {ours:.4f}, the Trainer at {theirs:.4f}; no figures are given")


def _short_enough(task: Task, tokenizer: PreTrainedTokenizerBase, args: TrainArgs) -> tuple[Task, Encoded]:
    """The first examples that fit, as a task and as tokens."""
    options = args.training.prompt_format, args.training.chat_template_kwargs
    pairs = [(example, encode_example(tokenizer, example, *options)) for example in task.train]
    limit = args.training.max_length
    kept = [(e, tokens) for e, tokens in pairs if sum(map(len, tokens)) <= limit][: args.num_samples]
    if not kept:
        raise TaskError(f"{task.name} has no example of at most {limit} tokens; leave it out")
    return replace(task, train=tuple(e for e, _ in kept)), [tokens for _, tokens in kept]


def _timed(train: Callable[[], object], device: torch.device) -> Run:
    """Times one training a round."""

    def run(i: int) -> dict[str, float]:
        start = time.perf_counter()
        train()
        synchronise(device)
        return {"ms": (time.perf_counter() - start) * 1e3}

    return run


@torch.no_grad()
def _loss(base: Any, encoded: Encoded, adapter: Path | None = None) -> float:
    """The mean loss a learned token over all samples."""
    model = base if adapter is None else PeftModel.from_pretrained(base, str(adapter)).eval()
    total = 0.0
    for batch in micro_batches(encoded, MAX_TOKENS):
        total += float(answer_loss(model, batch)) * sum(len(learned) for _, learned in batch)
    if adapter is not None:
        model.unload()
    return total / sum(len(learned) for _, learned in encoded)


def _train_with_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    args: AdapterTrainingArgs,
    out: Path,
    *,
    batches: Sequence[list[int]] | None = None,
) -> None:
    """Trains in the Trainer's batches, or in `batches`: lists of places in `encoded`."""
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments  # slow to import

    class InOrder(Trainer):
        """Learns from the given batches."""

        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(features, batch_sampler=batches, collate_fn=self.data_collator)  # type: ignore[arg-type]

    torch.manual_seed(args.seed)
    peft_model: Any = get_peft_model(model, lora_config(args))
    settings = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=args.epochs if batches is None else 1,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup,  # below 1, a share of the steps
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=model.device.type == "cpu",
        seed=args.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type != "cpu",
        disable_tqdm=True,
    )
    features = [
        {
            "input_ids": read + learned,
            "attention_mask": [1] * len(read + learned),
            "labels": [-100] * len(read) + learned,
        }
        for read, learned in encoded
    ]
    trainer = (Trainer if batches is None else InOrder)(
        model=peft_model,
        args=settings,
        train_dataset=features,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
        trainer.save_model()
    finally:
        peft_model.unload()
