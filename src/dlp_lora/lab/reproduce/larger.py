"""Another model without adapters, to compare with (Table 5)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.engine.engine import Engine
from dlp_lora.lab.evals.answers import answer_all, batches, data_hash, seconds_of
from dlp_lora.lab.evals.methods import METHODS
from dlp_lora.lab.evals.scores import pooled, scores, tabulate
from dlp_lora.lab.records.run import Larger
from dlp_lora.lab.reproduce.args import LARGER, ReproduceArgs
from dlp_lora.progress import OnProgress
from dlp_lora.tasks import Task
from dlp_lora.training.base import load_base, model_hash


def answer_plainly(
    model: str | Path,
    dtype: torch.dtype,
    tasks: Sequence[Task],
    kinds: Mapping[str, str],
    folder: Path,
    args: ReproduceArgs,
    on_progress: OnProgress,
) -> Larger:
    """What a model without adapters answers."""
    name = Path(str(model)).name
    base, tokenizer = load_base(model, dtype=dtype)
    engine = Engine(base, tokenizer, AdapterBank(linear_layers(base), device=base.device))
    questions, left_out = batches(base, tokenizer, tasks, args.answers)
    rows = answer_all(
        engine,
        METHODS["base"],
        questions,
        args.answers,
        folder / f"{name}.jsonl",
        identity={"model": name, "model_hash": model_hash(base), "data": data_hash(tasks)},
        on_progress=lambda now: on_progress(replace(now, stage=LARGER, note=name)),
    )
    table = tabulate(rows, {task.name: task for task in tasks}, kinds)
    pools = [pooled(table, [task for task in table if kinds[task] == kind])[1] for kind in ("mcq", "qa")]
    return Larger(
        model=name,
        seconds=seconds_of(rows),
        left_out=left_out,
        scores=scores(table),
        pooled_intervals={metric: interval for pool in pools for metric, interval in pool.items()},
    )
