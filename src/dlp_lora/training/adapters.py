"""Trains one LoRA on one task through PEFT and saves it as an ordinary PEFT folder.

One plain loop. What makes it fast on a small machine: the loss and the language-model head on answer tokens only,
batches of like lengths, what all examples of a batch begin with encoded once, a bfloat16 base under float32 LoRA
weights where the hardware is fast at it, passes through PEFT's layers, attention and norms that copy little (`lora.py`,
`passes.py`), and freed memory that is kept for the next step (`memory.py`).
"""

import hashlib
import json
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.errors import ModelError, TaskError, TrainingError
from dlp_lora.folders import recover_folder, replace_folder, write_text
from dlp_lora.fused import siblings
from dlp_lora.peft_format import CONFIG_FILE
from dlp_lora.prompts import context_of
from dlp_lora.tasks.formats import encode_example
from dlp_lora.tasks.task import Task
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.batches import answer_loss, bucketed, has_dropout, micro_batches
from dlp_lora.training.lora import compute_together
from dlp_lora.training.memory import kept_memory
from dlp_lora.training.passes import lean_passes

TRAINING_FILE = "training.json"
LOSS_FILE = "loss.csv"
MAX_TOKENS = 2048  # of one pass; larger batches are summed up part by part

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a training run is: `step` of `num_steps`, and the last batch's mean loss a token."""

    task: str
    step: int
    num_steps: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """A finished adapter: where it is, how long it took and what its last losses were."""

    name: str
    path: Path
    seconds: float
    num_examples: int
    num_left_out: int
    final_loss: float
    was_there: bool = False


def load_base(
    model: str | Path, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a base model for training, in the dtype of `training_dtype` unless one is given.

    Raises:
        ModelError: if it cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or training_dtype(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the base model {str(model)!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return loaded.to(device).eval(), tokenizer


@cache
def training_dtype(device: str) -> torch.dtype:
    """Gives the dtype to train a frozen base in: bfloat16 where the hardware multiplies it, and no slower than float32.

    CPUs with instructions for bfloat16 but without AMX may take twice as long as in float32 (docs/log.md); a product
    in each tells, timed once on one thread.
    """
    if device == "cuda":
        return torch.bfloat16
    if not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    narrow, wide = _seconds_of_products(torch.bfloat16, torch.float32)
    return torch.float32 if narrow > 1.2 * wide else torch.bfloat16


def _seconds_of_products(*dtypes: torch.dtype) -> list[float]:
    """How long the tokens of a small batch times a layer's weight take on the CPU in each dtype, at best."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where the machine is busy
    try:
        seconds: list[list[float]] = [[] for _ in dtypes]
        for _ in range(16):  # in turns, so that a busy moment hits all
            for dtype, own in zip(dtypes, seconds, strict=True):
                x, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                own.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(num_threads)
    return [min(own) for own in seconds]


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    out: str | Path,
    args: AdapterTrainingArgs | None = None,
    *,
    overwrite: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> TrainedAdapter:
    """Trains one LoRA on a task and writes it to the folder `out`; goes on where an interrupted run stopped.

    A finished adapter of the same settings and examples is left as it is. The model comes back as it was given.

    Raises:
        TrainingError: if `out` was trained with other settings or examples and `overwrite` is false, it holds
            something else, the model lacks the target modules, or the loss is not finite.
        TaskError: if no example is short enough.
    """
    args, out = args or AdapterTrainingArgs(), Path(out)
    recover_folder(out)
    examples, num_left_out = _encode(tokenizer, task, args, context=context_of(model))
    identity = {
        "base_model": Path(model.config._name_or_path).name,
        "examples": _hash(examples),
        "args": json.loads(json.dumps(asdict(args))),
    }
    if (out / CONFIG_FILE).is_file() and not overwrite:
        return _finished(task.name, out, identity)
    if out.exists() and not (out / CONFIG_FILE).is_file() and (out.is_file() or any(out.iterdir())):
        raise TrainingError(f"{out} is there and is no adapter, and would be lost; write somewhere else")
    work = out.with_name(f".{out.name}.training")
    with _lora_on(model, args) as peft_model:
        run = _Run(peft_model, examples, args)
        run.resume(work, identity)
        _fit(run, task.name, work, identity, on_step)
        record = {
            **identity,
            "seconds": round(run.seconds, 2),
            "num_examples": len(examples),
            "num_left_out": num_left_out,
            "final_loss": round(sum(run.losses[-20:]) / len(run.losses[-20:]), 5),
        }
        with replace_folder(out) as folder:
            run.model.save_pretrained(str(folder))
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            (folder / LOSS_FILE).write_text(_loss_table(run))
            (folder / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(work, ignore_errors=True)
    return _trained(task.name, out, record)


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], args: AdapterTrainingArgs
) -> None:
    """Checks that each task has a training example that is short enough.

    Raises:
        TaskError: naming the first that has none.
    """
    context = context_of(model)
    for task in tasks:
        encoded = (encode_example(tokenizer, example, args.prompt_format) for example in task.train)
        if not any(len(read) + len(learned) <= min(args.max_length, context) for read, learned in encoded):
            raise _too_long(task, args, context)


def train_adapters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    out: str | Path,
    args: AdapterTrainingArgs | None = None,
    *,
    overwrite: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[TrainedAdapter]:
    """Trains one LoRA a task into folders of the tasks' names inside `out`, yielding each as it is finished."""
    for task in tasks:
        yield train_adapter(model, tokenizer, task, Path(out) / task.name, args, overwrite=overwrite, on_step=on_step)


class _Run:
    """The state of one training run, which a checkpoint holds in full."""

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
        self.num_steps = max(1, round(math.ceil(len(examples) / args.batch_size) * args.epochs))
        self.share = not has_dropout(model)
        self.losses: list[float] = []
        self.seconds = 0.0

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.losses)

    def save(self, work: Path, identity: dict[str, Any]) -> None:
        """Writes a checkpoint, weights and optimiser moments as safetensors."""
        tensors = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        with replace_folder(work) as folder:
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "state.safetensors")
            state = {"identity": identity, "losses": self.losses, "seconds": self.seconds}
            write_text(folder / "state.json", json.dumps(state))

    def resume(self, work: Path, identity: dict[str, Any]) -> None:
        """Reads the checkpoint of the same run, if there is one."""
        recover_folder(work)
        if not (work / "state.json").is_file():
            return
        state = json.loads((work / "state.json").read_text())
        if state["identity"] != identity:
            logger.warning("%s holds a run with other settings or examples; it starts anew", work)
            return
        tensors = load_file(work / "state.safetensors")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight/{name}"])
                self.optimizer.state[parameter] = {
                    key: tensors[f"{key}/{name}"].to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.losses, self.seconds = state["losses"], state["seconds"]

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        warm = max(1, round(self.args.warmup * self.num_steps))
        if self.step < warm:
            return self.args.learning_rate * (self.step + 1) / warm
        if self.args.schedule == "constant":
            return self.args.learning_rate
        done = (self.step - warm) / max(1, self.num_steps - warm)
        return self.args.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def batch(self) -> list[tuple[list[int], list[int]]]:
        """The examples of the next step: a function of seed and step alone, so a resumed run sees the same ones."""
        per_epoch = math.ceil(len(self.examples) / self.args.batch_size)
        epoch, index = divmod(self.step, per_epoch)
        batches = bucketed(self.examples, self.args.batch_size, random.Random(f"{self.args.seed} {epoch}"))
        return [self.examples[i] for i in batches[index]]


def _fit(run: _Run, task: str, work: Path, identity: dict[str, Any], on_step: Callable[[Progress], None]) -> None:
    run.model.train()
    start = time.perf_counter() - run.seconds
    with kept_memory() as give_back:
        while run.step < run.num_steps:
            loss = _step(run)
            if not math.isfinite(loss):
                raise TrainingError(f"{task}: the loss is {loss} at step {run.step}; lower the learning rate")
            run.losses.append(loss)
            run.seconds = time.perf_counter() - start
            on_step(Progress(task=task, step=run.step, num_steps=run.num_steps, loss=loss))
            if run.step % run.args.checkpoint_every == 0 and run.step < run.num_steps:
                run.save(work, identity)
                give_back()


def _step(run: _Run) -> float:
    """Learns the next batch, unless its loss is not finite; gives the loss."""
    torch.manual_seed(run.args.seed * 1_000_003 + run.step)  # dropout, too, is the same after a resumption
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate()
    loss = _backward(run.model, run.batch(), share=run.share)
    if math.isfinite(loss):
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), run.args.max_grad_norm)
        run.optimizer.step()
    run.optimizer.zero_grad()
    return loss


def _backward(model: torch.nn.Module, batch: Sequence[tuple[list[int], list[int]]], *, share: bool) -> float:
    """Adds the gradients of the batch's mean loss a token, part by part; gives the loss."""
    num_tokens = sum(len(learned) for _, learned in batch)
    total = 0.0
    for part in micro_batches(batch, MAX_TOKENS):
        loss = answer_loss(model, part, share=share) * (sum(len(learned) for _, learned in part) / num_tokens)
        loss.backward()
        total += loss.item()
    return total


def _encode(
    tokenizer: PreTrainedTokenizerBase, task: Task, args: AdapterTrainingArgs, *, context: int
) -> tuple[list[tuple[list[int], list[int]]], int]:
    longest = min(args.max_length, context)  # tokens
    encoded = [encode_example(tokenizer, example, args.prompt_format) for example in task.train]
    kept = [pair for pair in encoded if len(pair[0]) + len(pair[1]) <= longest]
    left_out = len(encoded) - len(kept)
    if left_out:
        logger.warning("%s: %d examples are longer than %d tokens and left out", task.name, left_out, longest)
    if not kept:
        raise _too_long(task, args, context)
    return kept, left_out


def _too_long(task: Task, args: AdapterTrainingArgs, context: int) -> TaskError:
    longest = min(args.max_length, context)
    remedy = "raise max_length" if longest < context else "that is the model's context: shorten the examples"
    return TaskError(f"{task.name} has no example of at most {longest} tokens; {remedy}")


@contextmanager
def _lora_on(model: PreTrainedModel, args: AdapterTrainingArgs) -> Iterator[PeftModel]:
    """Puts a LoRA on the model; afterwards the model is as it was given, whatever went wrong."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    peft_model = None
    try:
        peft_model = _with_lora(model, args)
        with _eager_attention(model), lean_passes(model):
            yield peft_model
    finally:
        if peft_model is not None:
            peft_model.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        model.train(was_training)


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Trains without fused attention on CPUs, where its backward pass is slow (`passes.py` has the exception)."""
    config: Any = model.config
    if model.device.type != "cpu" or config._attn_implementation != "sdpa":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def lora_config(args: AdapterTrainingArgs) -> LoraConfig:
    """PEFT's settings of the LoRA that is trained."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        target_modules=args.target_modules if isinstance(args.target_modules, str) else list(args.target_modules),
    )


def _with_lora(model: PreTrainedModel, args: AdapterTrainingArgs) -> PeftModel:
    torch.manual_seed(args.seed)
    together = siblings(model)
    try:
        peft_model = cast(PeftModel, get_peft_model(model, lora_config(args)))
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise TrainingError(
            f"{type(model).__name__} has no modules {list(args.target_modules)}; its linear layers are "
            f"{', '.join(linear)}: pass target_modules"
        ) from error
    compute_together(model, together)
    return peft_model


def _finished(name: str, out: Path, identity: dict[str, Any]) -> TrainedAdapter:
    try:
        record = json.loads((out / TRAINING_FILE).read_text())
        known = {key: record[key] for key in identity}
    except (OSError, ValueError, KeyError):
        raise TrainingError(
            f"{out} holds an adapter that was not trained here; pass overwrite or another out"
        ) from None
    if known != identity:
        changed = [k for k in ("base_model", "examples") if known[k] != identity[k]]
        changed += [
            f"{k} ({known['args'].get(k)!r}, now {v!r})"
            for k, v in identity["args"].items()
            if known["args"].get(k) != v
        ]
        raise TrainingError(
            f"{out} was trained with other settings: {', '.join(changed)}; pass overwrite, or write somewhere else"
        )
    return replace(_trained(name, out, record), was_there=True)


def _trained(name: str, out: Path, record: dict[str, Any]) -> TrainedAdapter:
    keys = ("seconds", "num_examples", "num_left_out", "final_loss")
    return TrainedAdapter(name=name, path=out, **{key: record[key] for key in keys})


def _loss_table(run: _Run) -> str:
    return "step,loss\n" + "".join(f"{i},{loss:.5f}\n" for i, loss in enumerate(run.losses, start=1))


def _hash(examples: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16]
