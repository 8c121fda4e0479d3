"""Trains one LoRA on one task with PEFT and saves it as an ordinary PEFT folder.

The loop is in `loop.py`. Training is fast on a small machine for these reasons: the loss and the language-model head
are computed only for answer tokens; examples of a batch have similar lengths; their common beginning is encoded once;
the base is in bfloat16 if the hardware is fast at it; PEFT's layers, attention and norms copy little (`lora.py`,
`cpu.py`); and freed memory is kept for the next step.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear, ParamWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.bank.adapter_files import CONFIG_FILE, WEIGHTS_FILE, check_adapter_name
from dlp_lora.bank.attach import linear_layers, siblings
from dlp_lora.bank.base_layers import BaseLayers
from dlp_lora.bank.peft_names import lora_layers, placement
from dlp_lora.chat import prints_time
from dlp_lora.engine.prompts import check_embedded, context_of
from dlp_lora.errors import PromptError, TaskError, TrainingError
from dlp_lora.files import (
    as_json,
    check_replaceable,
    check_writable,
    hash_json,
    name_of,
    recover_folder,
    replace_folder,
    write_json,
)
from dlp_lora.progress import OnProgress, unseen
from dlp_lora.tasks.formats import encode_example
from dlp_lora.tasks.task import Task
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.base import dtype_of, model_hash
from dlp_lora.training.cpu import fast_on_cpu
from dlp_lora.training.loop import STATE_FILE, Run, fit
from dlp_lora.training.lora import compute_together

TRAINING_FILE = "training.json"
LOSS_FILE = "loss.csv"
# Earlier versions recorded none of them; only a chat template that prints the time has a time.
_NOT_RECORDED = ("model_hash", "template_time")
# Names that PEFT takes for experts of a mixture, if a model has experts.
_PEFT_EXPERTS = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "lm_head"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """A finished adapter: its folder, its training time and its last loss."""

    name: str
    path: Path
    seconds: float
    num_examples: int
    num_left_out: int
    final_loss: float
    was_there: bool = False


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    out: str | Path,
    args: AdapterTrainingArgs | None = None,
    *,
    overwrite: bool = False,
    trunk: str | Path | None = None,
    on_progress: OnProgress = unseen,
) -> TrainedAdapter:
    """Trains one LoRA on a task and writes it to the folder `out`; continues an interrupted run.

    A finished adapter with the same settings and examples does not change. Afterwards the model is as before.

    Args:
        trunk: with the schedule warmup_stable_decay, a folder for the state before the learning rate falls. A run of
            more epochs starts from this state, with the same result.

    Raises:
        AdapterError: if the folder's name cannot name an adapter.
        TrainingError: if `out` was trained with other settings or examples and `overwrite` is false, `out` has other
            files, the model lacks the target modules or an engine could not fuse them, or the loss or the weights are
            not finite.
        TaskError: if no example is short enough, or one has a token without an embedding in the model.
    """
    args, out = args or AdapterTrainingArgs(), Path(out)
    check_adapter_name(name_of(out), out)
    recover_folder(out)
    work = out.with_name(f".{out.name}.training")
    begun = [out / TRAINING_FILE, work / STATE_FILE, *([] if trunk is None else [Path(trunk) / STATE_FILE])]
    now = _time_of(begun) if prints_time(tokenizer) else None
    examples, num_left_out = _encode(model, tokenizer, task, args, now)
    identity: dict[str, Any] = {
        "base_model": Path(model.config._name_or_path).name,
        "model_hash": model_hash(model),
        "examples": hash_json(examples),
        "args": args.identity(),
        **({} if now is None else {"template_time": now.isoformat()}),
    }
    if (out / CONFIG_FILE).is_file():
        try:
            return _finished(task.name, out, identity, dtype_of(model))
        except TrainingError:
            if not overwrite:
                raise
    if out.exists() and not (out / CONFIG_FILE).is_file() and (out.is_file() or any(out.iterdir())):
        raise TrainingError(f"{out} is there and is no adapter, and would be lost; write somewhere else")
    check_writable(out.parent)
    if trunk is not None:
        check_replaceable(trunk, STATE_FILE)
    with lora_on(model, args) as peft_model:
        run = Run(peft_model, examples, args)
        run.resume(work, identity)
        if trunk is None:
            fit(run, task.name, work, identity, on_progress)
        else:
            shared = {**identity, "args": {**identity["args"], "epochs": None}}
            if run.step == 0:
                run.resume(Path(trunk), shared, at_most=run.num_stable)
            fit(run, task.name, work, identity, on_progress, on_stable=partial(run.save, Path(trunk), shared))
        if strange := [name for name, parameter in run.parameters.items() if not parameter.isfinite().all()]:
            raise TrainingError(
                f"{task.name}: the weights are not finite after the last step ({strange[0]}); lower the learning rate"
            )
        record = {
            **identity,
            "dtype": run.dtype,
            "seconds": round(run.seconds, 2),
            "num_examples": len(examples),
            "num_left_out": num_left_out,
            "final_loss": round(sum(run.losses[-20:]) / len(run.losses[-20:]), 5),
        }
        run.round(getattr(torch, args.save_dtype))
        with replace_folder(out, own=(CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE, LOSS_FILE)) as folder:
            run.model.save_pretrained(str(folder))
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            (folder / LOSS_FILE).write_text(_loss_table(run))
            write_json(folder / TRAINING_FILE, record, indent=2)
        shutil.rmtree(work, ignore_errors=True)
    return _trained(task.name, out, record)


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], args: AdapterTrainingArgs
) -> None:
    """Checks that each task has a training example that is short enough.

    Raises:
        TaskError: naming the first task without one.
    """
    context = context_of(model)
    for task in tasks:
        encoded = _encoded(tokenizer, task, args)
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
    on_progress: OnProgress = unseen,
) -> Iterator[TrainedAdapter]:
    """Trains one LoRA per task, into folders with the tasks' names inside `out`; yields each when it is finished."""
    for task in tasks:
        yield train_adapter(
            model, tokenizer, task, Path(out) / task.name, args, overwrite=overwrite, on_progress=on_progress
        )


def _encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    args: AdapterTrainingArgs,
    now: datetime | None,
) -> tuple[list[tuple[list[int], list[int]]], int]:
    context = context_of(model)
    longest = min(args.max_length, context)  # tokens
    encoded = list(_encoded(tokenizer, task, args, now))
    kept = [pair for pair in encoded if len(pair[0]) + len(pair[1]) <= longest]
    left_out = len(encoded) - len(kept)
    if left_out:
        logger.warning("%s: %d examples are longer than %d tokens and left out", task.name, left_out, longest)
    if not kept:
        raise _too_long(task, args, context)
    try:
        check_embedded(model, tokenizer, {token for read, learned in kept for token in (*read, *learned)})
    except PromptError as error:
        raise TaskError(f"{task.name}: {error}") from error
    return kept, left_out


def _encoded(
    tokenizer: PreTrainedTokenizerBase, task: Task, args: AdapterTrainingArgs, now: datetime | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    for example in task.train:
        yield encode_example(tokenizer, example, args.prompt_format, args.chat_template_kwargs, now=now)


def _time_of(files: Sequence[Path]) -> datetime:
    """The time that a run to continue was begun at, so that its examples are the same on another day; else the present.

    A damaged file is named where the run is continued.
    """
    for file in files:
        recover_folder(file.parent)
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found = json.loads(file.read_text(encoding="utf-8"))
            return datetime.fromisoformat(found.get("identity", found)["template_time"])
    return datetime.now().replace(microsecond=0)


def _too_long(task: Task, args: AdapterTrainingArgs, context: int) -> TaskError:
    longest = min(args.max_length, context)
    remedy = "raise max_length" if longest < context else "that is the model's context: shorten the examples"
    return TaskError(f"{task.name} has no example of at most {longest} tokens; {remedy}")


@contextmanager
def lora_on(model: PreTrainedModel, args: AdapterTrainingArgs) -> Iterator[PeftModel]:
    """Puts a LoRA on the model in the block; afterwards the model is as before, even after an error."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    peft_model = None
    try:
        peft_model = _with_lora(model, args)
        with fast_on_cpu(model) if args.cpu_tricks else nullcontext():
            yield peft_model
    finally:
        if peft_model is not None:
            peft_model.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        model.train(was_training)


def lora_config(args: AdapterTrainingArgs) -> LoraConfig:
    """PEFT's settings of the LoRA."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        target_modules=args.target_modules if isinstance(args.target_modules, str) else list(args.target_modules),
    )


def _with_lora(model: PreTrainedModel, args: AdapterTrainingArgs) -> PeftModel:
    names = [name for name, _ in model.named_modules()]
    asked = () if isinstance(args.target_modules, str) else args.target_modules
    # PEFT uses those that exist.
    if missing := [target for target in asked if not any(f".{name}".endswith(f".{target}") for name in names)]:
        raise _no_modules(model, missing)
    torch.manual_seed(args.seed)
    together, layout = siblings(model), linear_layers(model)
    _check_usable(model, args, layout)
    try:
        peft_model = cast(PeftModel, get_peft_model(model, lora_config(args)))
    except ValueError as error:
        raise TrainingError(f"{type(model).__name__}: PEFT cannot train such a LoRA: {error}") from error
    if args.cpu_tricks:
        compute_together(model, together)
    return peft_model


def _check_usable(model: PreTrainedModel, args: AdapterTrainingArgs, layout: BaseLayers) -> None:
    """Checks that an adapter with these settings can be fused.

    Raises:
        TrainingError: if an engine would refuse it.
    """
    assert layout.skeleton is not None
    start = f"{type(model).__name__}: a LoRA on {_asked(args)} could not be used"
    try:
        layers = lora_layers(lora_config(args).to_dict(), layout.skeleton)
    except ValueError as error:
        raise TrainingError(f"{start}: {error}") from error
    linear = sorted({name.rsplit(".", 1)[-1] for name in layout if "lora" not in name} - _PEFT_EXPERTS)
    others = [pair for pair in layers.items() if pair[0] not in layout or not isinstance(pair[1], Linear)]
    for name, layer in sorted(others, key=lambda pair: ".experts" not in pair[0]):
        what = (
            f"PEFT adapts {name}.{layer.parameter_name}, a bare parameter, as it does with experts"
            if isinstance(layer, ParamWrapper)
            else f"{name} is no linear layer but of type {layout.modules.get(name, type(layer).__name__)}"
        )
        raise TrainingError(
            f"{start}: {what}, and only linear layers can be fused; pass target_modules of these: {', '.join(linear)}"
        )
    shapes = {name: ((args.r, d_in), (d_out, args.r)) for name, (d_in, d_out) in layout.items() if name in layers}
    placed = placement(Path("the adapter"), lora_config(args).to_dict(), shapes, layout.skeleton).placed
    if lost := [name for name in shapes if placed.get(name) != name]:
        raise TrainingError(
            f"{start}: PEFT would not find {lost[0]} again in what it saves; pass other target_modules than that"
        )


def _asked(args: AdapterTrainingArgs) -> str:
    return args.target_modules if isinstance(args.target_modules, str) else ", ".join(args.target_modules)


def _no_modules(model: PreTrainedModel, missing: Sequence[str]) -> TrainingError:
    linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    return TrainingError(
        f"{type(model).__name__} has no modules {', '.join(missing)}; its linear layers are {', '.join(linear)}: pass "
        "target_modules"
    )


def _finished(name: str, out: Path, identity: dict[str, Any], dtype: str) -> TrainedAdapter:
    try:
        record = json.loads((out / TRAINING_FILE).read_text(encoding="utf-8"))
        known = {key: record[key] for key in identity if key not in _NOT_RECORDED or key in record}
        known["args"] = {**AdapterTrainingArgs().identity(), **known["args"]}
        known["args"].pop("checkpoint_every", None)  # a setting of earlier versions, and none of the result
        found = _trained(name, out, record)
    except FileNotFoundError:
        raise TrainingError(
            f"{out} holds an adapter that was not trained here; pass overwrite or another out"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{out / TRAINING_FILE} is damaged ({error!r}), so the adapter's settings are unknown; pass "
            "overwrite or another out"
        ) from error
    if {**identity, **known} != identity:
        words = {"base_model": "base_model", "model_hash": "the base model's weights", "examples": "examples"}
        changed = [word for key, word in words.items() if known.get(key, identity[key]) != identity[key]]
        # An identity leaves out some settings that have their default.
        before, now = ({**as_json(asdict(AdapterTrainingArgs())), **args} for args in (known["args"], identity["args"]))
        changed += [f"{k} ({before.get(k)!r}, now {now[k]!r})" for k in now if before.get(k) != now[k]]
        changed += [f"{k} ({before[k]!r}, now gone)" for k in before.keys() - now.keys()]
        raise TrainingError(
            f"{out} was trained with other settings: {', '.join(changed)}; pass overwrite, or write somewhere else"
        )
    if (before := record.get("dtype", dtype)) != dtype:
        logger.warning(
            "%s was trained with the model in %s, and stays as it is; the model is in %s", out, before, dtype
        )
    return replace(found, was_there=True)


def _trained(name: str, out: Path, record: dict[str, Any]) -> TrainedAdapter:
    keys = ("seconds", "num_examples", "num_left_out", "final_loss")
    return TrainedAdapter(name=name, path=out, **{key: record[key] for key in keys})


def _loss_table(run: Run) -> str:
    return "step,loss\n" + "".join(f"{i},{loss:.5f}\n" for i, loss in enumerate(run.losses, start=1))
