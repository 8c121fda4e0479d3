"""Commands that evaluate: eval, reproduce."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlp_lora.cli.common import (
    DataOption,
    DeviceOption,
    EngineOptions,
    HubOptions,
    JsonOption,
    ModelOption,
    TemplateOption,
    base_model,
    open_engine,
    say,
    stderr,
    to_try,
)
from dlp_lora.cli.json_lines import print_json
from dlp_lora.cli.options import json_object, whole_numbers, with_options, words
from dlp_lora.cli.progress import SILENCE_S, bars, progress
from dlp_lora.cli.tables import show_table
from dlp_lora.files import check_target
from dlp_lora.lab.records.table import table_of
from dlp_lora.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from dlp_lora.lab.records.run import RunRecord
    from dlp_lora.lab.reproduce import Estimate

TasksOption = Annotated[str | None, typer.Option("--tasks", help="Task names or composite-n, comma-separated.")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Largest number of examples per task.")]
FormatOption = Annotated[str | None, typer.Option("--prompt-format", help="auto, chat or plain.")]


def reproduce(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    model: ModelOption = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe's name or TOML file; --model overrides its model.")
    ] = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    preset: Annotated[str | None, typer.Option(help="How adapters are trained: default or paper.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, comma-separated, or all.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Training seeds, comma-separated. [default: 0]")] = None,
    larger: Annotated[str | None, typer.Option(help="A larger model that answers without adapters (Table 5).")] = None,
    single: Annotated[
        bool | None, typer.Option(help="Also train one LoRA of rank 64 on all tasks together. [default: --single]")
    ] = None,
    serial: Annotated[str | None, typer.Option(help="Questions in one prompt, comma-separated; 0: none.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train adapters and router on the tasks, evaluate all methods and write the record and report.

    After an interruption, run it again to continue. Other methods, seeds or --serial are added to the run. Options
    override the recipe. Example:
    `dlp-lora reproduce --data data/ --out runs/first --limit 20 --tasks gsm8k,winowhy`
    """
    from dlp_lora.lab.evals.methods import METHODS
    from dlp_lora.lab.records.run import read_run, to_json
    from dlp_lora.lab.reproduce import GROWING, Estimate, ReproduceArgs, added, grown, stages
    from dlp_lora.lab.reproduce import reproduce as run
    from dlp_lora.lab.reproduce.recipe import read_recipe, with_preset
    from dlp_lora.tasks.hub import read_data
    from dlp_lora.tasks.manifest import read_manifest

    args = ReproduceArgs()
    if recipe is not None:
        named, args = read_recipe(recipe, preset=preset)
        model = model or (None if named == "default" else named)
    elif preset is not None:
        args = with_preset(args, preset)
    given: dict[str, Any] = {
        "methods": None if methods is None else tuple(METHODS) if methods == "all" else words(methods),
        "serial": None if serial is None else tuple(n for n in whole_numbers("serial", serial) if n),
        "seeds": None if seeds is None else whole_numbers("seeds", seeds),
        "limit": limit,
        "single_r": 0 if single is False else (args.single_r or ReproduceArgs().single_r) if single else None,
    }
    args = replace(args, **{name: value for name, value in given.items() if value is not None})
    default = ReproduceArgs()
    asked = [key for key in GROWING if given[key] is not None or getattr(args, key) != getattr(default, key)]
    args = grown(out, args, given=asked)
    if more := added(out, args):
        say(f"added to the run in {out}: {more}")
    examples = read_data(data, names=_names(tasks))
    infos = read_manifest(data)
    with bars() as shown_bars:
        shown = _Shown(shown_bars, Estimate(stages(examples, args, larger=larger is not None)))
        record = run(base_model(model), examples, out, args, infos=infos, larger=larger, on_progress=shown.show)
    result = read_run(record)
    _say_left_out(result)
    for step, count in result.serial_skipped.items():
        say(f"{step} skipped: it asks questions of as many tasks of choice, and there are {count}")
    if result.serial_left_out:
        say(f"prompts of several questions left out, too long: {result.serial_left_out}")
    if result.without_choices:
        say(f"questions without choices, not scored by likelihood: {result.without_choices}")
    say(f"wrote {record}; {_report(out)}")
    if as_json:
        print_json(to_json(result))
        return
    _show_composites(result)


@with_options
def evaluate(
    hub_options: HubOptions,
    bundle: Annotated[str, typer.Option("--bundle", "-b", help="Bundle: folder or hub id.")],
    data: DataOption,
    tasks: TasksOption = None,
    methods: Annotated[str, typer.Option(help="Methods, comma-separated.")] = "base,oracle,dlp",
    limit: LimitOption = None,
    prompt_format: FormatOption = None,
    chat_template_kwargs: TemplateOption = None,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens per answer.")] = 128,
    teacher_forced: Annotated[
        bool, typer.Option(help="Also score along the right answers, as the paper's code does.")
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder that keeps finished answers, so that you can continue.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to this file, and every answer to a file beside it.")
    ] = None,
) -> None:
    """Answer the tasks' test questions with several methods, free-running, and score them.

    Example: `dlp-lora eval --bundle b/ --data data/ --tasks composite-17 --methods base,oracle,dlp --json out.json`
    """
    from dlp_lora.lab.evals.answers import AnswerArgs
    from dlp_lora.lab.evals.methods import methods_named
    from dlp_lora.lab.reproduce import evaluate_bundle
    from dlp_lora.tasks.hub import read_data
    from dlp_lora.tasks.manifest import read_manifest

    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json: no folder {json_file.parent}; make it first, or write somewhere else")
    if json_file is not None:
        check_target(json_file)
    chosen = methods_named(words(methods))
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "limit": limit,
        "chat_template_kwargs": json_object("chat-template-kwargs", chat_template_kwargs),
    }
    if prompt_format is not None:
        settings["prompt_format"] = prompt_format
    args = AnswerArgs(**settings)
    examples, infos = read_data(data, names=_names(tasks)), read_manifest(data)
    engine = open_engine(EngineOptions(bundle=bundle, model=model, device=device), hub_options)
    with progress() as show:
        done = evaluate_bundle(
            engine,
            examples,
            chosen,
            args,
            name=Path(bundle).name,
            infos=infos,
            folder=out,
            teacher_forced=teacher_forced,
            on_progress=show,
        )
    _show_composites(done.record)
    _say_left_out(done.record)
    if json_file is not None:
        say(f"wrote {json_file}, and every answer to {done.write(json_file)}")


class _Shown:
    """What a run says: each step that is done as a line, the present one and all of them as bars.

    Where nobody watches, as in a log file, a line a minute takes the place of the bars.
    """

    def __init__(self, bars: "Bars", estimate: "Estimate") -> None:
        self.bars, self.estimate = bars, estimate
        self.everything = bars.add_task("all steps", total=len(estimate.stages), note="")
        self.bar = bars.add_task("", total=None, note="", visible=False)
        self.stage, self.done, self.told_at = "", set[str](), time.monotonic()

    def show(self, now: Progress) -> None:
        """Shows a message of the run."""
        self.estimate.note(now)
        if now.stage != self.stage:
            self.stage = now.stage
            self.bars.reset(self.bar, description=now.stage, visible=True, note="")
        self.bars.update(self.bar, completed=now.done, total=now.total, note=now.note)
        self.bars.update(self.everything, completed=self.estimate.num_done, note=str(self.estimate))
        if now.done >= now.total and now.stage not in self.done:
            self.done.add(now.stage)
            self._say(f"{now.stage}: done", now.note)
        elif not stderr.is_terminal and time.monotonic() - self.told_at > SILENCE_S:
            self._say(f"{now.stage}: {now.done} of {now.total}", now.note)

    def _say(self, text: str, note: str) -> None:
        self.told_at = time.monotonic()
        steps = f"{self.estimate.num_done} of {len(self.estimate.stages)} steps"
        line = ", ".join(filter(None, (text, note, steps, str(self.estimate))))
        self.bars.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _names(tasks: str | None) -> list[str] | None:
    from dlp_lora.tasks.catalog import expand_composites

    return list(expand_composites(tasks)) if tasks else None


def _say_left_out(record: "RunRecord") -> None:
    if record.left_out:
        say(f"questions left out, too long for the model or with an answer_prefix: {dict(record.left_out)}")
    if unscored := [task for task in record.data.tasks if not any(task in scores for scores in record.scores.values())]:
        say(f"not scored, for want of test questions: {', '.join(unscored)}")


def _report(out: Path) -> str:
    """Writes the report beside the record, if its extra is installed, and reports this."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return f'the report needs matplotlib: run `pip install "dlp-lora[report]"`, then `{to_try("report", out)}`'
    from dlp_lora.lab.report import write_report

    return f"the report is {write_report(out).html}"


def _show_composites(record: "RunRecord") -> None:
    for title, means in record.composites.items():
        metrics = list(dict.fromkeys(metric for scores in means.values() for metric in scores))

        def cell(method: str, metric: str, title: str = title) -> str | None:
            value = record.composites[title][method].get(metric)
            low, high = record.composite_intervals[title][method].get(metric, (0, 0))
            return None if value is None else f"{value:.3f} ({low:.3f}-{high:.3f})"

        rows = [(method, *(cell(method, metric) for metric in metrics)) for method in means]
        show_table(table_of(title, ("method", *metrics), rows))
