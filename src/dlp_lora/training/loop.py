"""The training loop: a model with a LoRA and encoded examples in, its steps taken, resumable from checkpoints."""

import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dlp_lora.errors import TrainingError
from dlp_lora.files import recover_folder, replace_folder, write_json
from dlp_lora.progress import OnProgress, Progress
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.base import dtype_of
from dlp_lora.training.batches import answer_loss, bucketed, can_share, micro_batches
from dlp_lora.training.cpu import kept_memory

STATE_FILE = "state.json"
MAX_TOKENS = 2048  # of one pass; larger batches are computed in parts

logger = logging.getLogger(__name__)


class Run:
    """The complete state of one training run, for checkpoints."""

    def __init__(
        self, model: PeftModel, examples: Sequence[tuple[list[int], list[int]]], args: AdapterTrainingArgs
    ) -> None:
        self.model = model
        self.examples = examples
        self.args = args
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=args.learning_rate, weight_decay=args.weight_decay
        )
        per_epoch = math.ceil(len(examples) / args.batch_size)
        self.num_steps = num_steps(len(examples), args)
        stable = args.schedule == "warmup_stable_decay"  # a run of more epochs begins with the same steps
        self.num_warm = max(1, round(args.warmup * (per_epoch if stable else self.num_steps)))
        self.num_stable = self.num_steps - round(args.decay * self.num_steps) if stable else self.num_steps
        self.share = can_share(model)
        self.dtype = dtype_of(cast(PreTrainedModel, model.get_base_model()))
        self.losses: list[float] = []
        self.seconds = 0.0

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return len(self.losses)

    def round(self, dtype: torch.dtype) -> None:
        """Rounds the weights to a dtype, after the last step."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(dtype)

    def save(self, work: Path, identity: dict[str, Any]) -> None:
        """Writes a checkpoint, weights and optimiser moments as safetensors."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        with replace_folder(work) as folder:
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "state.safetensors")
            state = {"identity": identity, "dtype": self.dtype, "losses": self.losses, "seconds": self.seconds}
            write_json(folder / STATE_FILE, state)

    def resume(self, work: Path, identity: dict[str, Any], *, at_most: int | None = None) -> None:
        """Reads the checkpoint of the same run, if there is one with at most `at_most` steps.

        Raises:
            TrainingError: naming the checkpoint, if it is damaged.
        """
        recover_folder(work)
        if not (work / STATE_FILE).is_file():
            return
        try:
            state = json.loads((work / STATE_FILE).read_text(encoding="utf-8"))
            if {**identity, **state["identity"]} != identity:  # earlier versions kept no hash of the model
                logger.warning(
                    "%s holds a run with other settings or examples; this one starts at its first step", work
                )
                return
            losses, seconds = [float(loss) for loss in state["losses"]], float(state["seconds"])
            before = str(state.get("dtype", self.dtype))
            if at_most is not None and len(losses) > at_most:
                return
            tensors = load_file(work / "state.safetensors")
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(tensors[f"weight/{name}"])
                    if f"step/{name}" not in tensors:  # it has had no gradient, as in a part for images
                        continue
                    self.optimizer.state[parameter] = {
                        key: tensors[f"{key}/{name}"].to(parameter.device if key != "step" else "cpu")
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise TrainingError(
                f"the checkpoint {work} is damaged ({error!r}); remove this folder to train from the first step"
            ) from error
        self.losses, self.seconds = losses, seconds
        if before.split()[-1] != self.dtype:
            logger.warning("%s was begun with the model in %s, and goes on with it in %s", work, before, self.dtype)
            before += f", then {self.dtype}"
        self.dtype = before

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        peak = self.args.learning_rate
        if self.step < self.num_warm:
            return peak * (self.step + 1) / self.num_warm
        if self.args.schedule == "cosine":
            done = (self.step - self.num_warm) / max(1, self.num_steps - self.num_warm)
            return peak * 0.5 * (1 + math.cos(math.pi * done))
        return peak * min(1.0, (self.num_steps - self.step) / (self.num_steps - self.num_stable + 1))

    def batch(self) -> list[tuple[list[int], list[int]]]:
        """The examples of the next step: a function of seed and step alone, so a resumed run sees the same ones."""
        return [self.examples[i] for i in batch_at(self.step, self.examples, self.args)]


def batch_at(step: int, examples: Sequence[tuple[list[int], list[int]]], args: AdapterTrainingArgs) -> list[int]:
    """The places of the examples that a step learns from."""
    epoch, index = divmod(step, math.ceil(len(examples) / args.batch_size))
    return bucketed(examples, args.batch_size, random.Random(f"{args.seed} {epoch}"))[index]


def num_steps(num_examples: int, args: AdapterTrainingArgs) -> int:
    """How many steps a run takes."""
    return max(1, round(math.ceil(num_examples / args.batch_size) * args.epochs))


def fit(
    run: Run,
    task: str,
    work: Path,
    identity: dict[str, Any],
    on_progress: OnProgress,
    *,
    on_stable: Callable[[], None] = lambda: None,
) -> None:
    """Takes the remaining steps, with checkpoints in the folder `work`.

    Args:
        on_stable: called before the learning rate falls, with the schedule warmup_stable_decay.

    Raises:
        TrainingError: if the loss is not finite.
    """
    run.model.train()
    start = time.perf_counter() - run.seconds
    kept_at = time.monotonic()
    with kept_memory(is_on=run.args.cpu_tricks) as give_back:
        while run.step < run.num_steps:
            if run.step == run.num_stable:
                on_stable()
            loss = _step(run)
            if not math.isfinite(loss):
                raise TrainingError(f"{task}: the loss is {loss} at step {run.step}; lower the learning rate")
            run.losses.append(loss)
            run.seconds = time.perf_counter() - start
            on_progress(Progress(task, run.step, run.num_steps, f"loss {loss:.3f}"))
            if time.monotonic() - kept_at >= run.args.checkpoint_seconds and run.step < run.num_steps:
                run.save(work, identity)
                kept_at = time.monotonic()
                give_back()


def _step(run: Run) -> float:
    """Learns the next batch, unless its loss is not finite; returns the loss."""
    torch.manual_seed(run.args.seed * 1_000_003 + run.step)  # so that dropout is the same after a resumption
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate()
    loss = backward(run.model, run.batch(), share=run.share)
    if math.isfinite(loss):
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), run.args.max_grad_norm)
        run.optimizer.step()
    run.optimizer.zero_grad()
    return loss


def backward(model: torch.nn.Module, batch: Sequence[tuple[list[int], list[int]]], *, share: bool) -> float:
    """Adds the gradients of the batch's mean loss per token, part by part; returns the loss."""
    num_tokens = sum(len(learned) for _, learned in batch)
    total = 0.0
    for part in micro_batches(batch, MAX_TOKENS):
        loss = answer_loss(model, part, share=share) * (sum(len(learned) for _, learned in part) / num_tokens)
        loss.backward()
        total += loss.item()
    return total
