"""The paper's experiments as one run: a base model and task data in, adapters, router, answers and a record out.

Every step is kept on disk and none is done twice: a run that was interrupted, at any moment, goes on to the same
results. Methods, seeds, lengths of serial prompts and a larger model may be added to a run; one with other settings
is refused, and the difference is named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlp_lora.errors import TaskError
from dlp_lora.files import write_lines
from dlp_lora.kept import read_rows
from dlp_lora.lab.evals.answers import batches
from dlp_lora.lab.evals.metrics import check_scoring
from dlp_lora.lab.evals.record import merged
from dlp_lora.lab.records.run import RECORD_FILE, Larger, read_run, write_run
from dlp_lora.lab.reproduce.args import LARGER, ReproduceArgs
from dlp_lora.lab.reproduce.environments import Environments
from dlp_lora.lab.reproduce.larger import answer_plainly
from dlp_lora.lab.reproduce.seed import Seed, Shared
from dlp_lora.lab.reproduce.settings import check_settings, grown, keep_settings, kept_dtype, settings_of
from dlp_lora.progress import OnProgress, Progress, unseen
from dlp_lora.tasks import Task
from dlp_lora.tasks.manifest import TaskInfo, kind_of
from dlp_lora.tasks.task import same_prompt
from dlp_lora.training.adapters import check_lengths
from dlp_lora.training.base import dtype_of, load_base, model_hash

OUTPUTS_FILE = "outputs.jsonl.gz"


def reproduce(
    model: str | Path,
    tasks: Sequence[Task],
    out: str | Path,
    args: ReproduceArgs | None = None,
    *,
    infos: dict[str, TaskInfo] | None = None,
    larger: str | Path | None = None,
    on_progress: OnProgress = unseen,
) -> Path:
    """Runs everything into the folder `out`, or goes on with it; gives the record's path.

    What can be known to fail is checked before anything is trained.

    Args:
        args: with methods, seeds and lengths of serial prompts that are added to those of a run in `out`.
        larger: another model, which answers without adapters (Table 5); it may be given to a finished run, too.

    Raises:
        RecordError: if `out` holds a run with other settings.
        TaskError: if there are fewer than two tasks, one has no training example that is short enough or none a test
            question that fits the model's context, or a test example is also a training example.
    """
    out, infos = Path(out), infos or {}
    args = grown(out, args or ReproduceArgs())
    tasks = [replace(t, train=t.train[: args.limit], test=t.test[: args.limit]) for t in tasks]
    if len(tasks) < 2:
        raise TaskError(f"a router chooses between tasks, but there are {len(tasks)}; give at least two task folders")
    check_apart(tasks)
    kinds = {task.name: kind_of(task, infos) for task in tasks}
    check_scoring(kinds.values())
    settings = settings_of(model, tasks, args)
    check_settings(out, settings, ReproduceArgs())
    base, tokenizer = load_base(model, dtype=kept_dtype(out))
    settings |= {"model_hash": model_hash(base), "dtype": dtype_of(base)}
    check_settings(out, settings, ReproduceArgs())
    check_lengths(base, tokenizer, tasks, args.training)
    questions, left_out = batches(base, tokenizer, tasks, args.answers)
    keep_settings(out, settings)
    environments = Environments(out)

    def tell(now: Progress) -> None:
        environments.keep()
        on_progress(now)

    if larger is None:  # what one gave when the run was finished before is kept
        plain = read_run(out).larger if (out / RECORD_FILE).is_file() else None
    else:
        plain = answer_plainly(larger, base.dtype, tasks, kinds, out / LARGER, args, tell)
    shared = Shared(
        model=model,
        base=base,
        tokenizer=tokenizer,
        tasks=tuple(tasks),
        infos=infos,
        args=args,
        questions=questions,
        left_out=left_out,
        on_progress=tell,
    )
    runs = [Seed(shared, out / f"seed-{seed}", seed) for seed in args.seeds]
    records = [run.run() for run in runs]
    record = replace(
        merged(records, args.seeds),
        **{key: settings[key] for key in ("model", "model_hash", "dtype", "args")},
        **environments.summary(),
        name=out.name,
        seeds=args.seeds,
        larger=plain,
        outputs=OUTPUTS_FILE,
    )
    sources = (*(run.outputs() for run in runs), _outputs_of(plain, out / LARGER))
    write_lines(out / OUTPUTS_FILE, (row for source in sources for row in source))
    write_run(out / RECORD_FILE, record)
    return out / RECORD_FILE


def check_apart(tasks: Sequence[Task]) -> None:
    """Checks that no test prompt was learned, with other white space neither.

    Raises:
        TaskError: naming the first test example that is among the training examples of any task.
    """
    learned = {same_prompt(example.prompt): task.name for task in tasks for example in task.train}
    for task in tasks:
        for i, example in enumerate(task.test):
            if same_prompt(example.prompt) in learned:
                raise TaskError(
                    f"test example {i} of {task.name} is also a training example of "
                    f"{learned[same_prompt(example.prompt)]}; "
                    f"remove one of the two: a score on learned prompts says nothing"
                )


def _outputs_of(plain: Larger | None, folder: Path) -> Iterator[dict[str, Any]]:
    if plain is not None:
        for row in read_rows(folder / f"{plain.model}.jsonl"):
            yield {"part": LARGER, "model": plain.model, **row}
