"""Progress: the stages of a command in, bars on a terminal or lines in a log file out."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dlp_lora.cli.common import say, stderr
from dlp_lora.progress import OnProgress, Progress

SILENCE_S = 60.0  # after which a log file gets a line
LINE_WIDTH = 100  # of a line of another program that is shown


@contextmanager
def progress(stages: Sequence[str] = (), *, output: Console = stderr) -> Iterator[OnProgress]:
    """Shows the progress of stages on standard error; known stages have a bar from the start."""
    if not output.is_terminal:
        yield Lines(output)
        return
    with bars(output) as shown:
        tasks = {stage: shown.add_task(stage, total=None, start=False, note="") for stage in stages}

        def show(now: Progress) -> None:
            if now.stage not in tasks:
                tasks[now.stage] = shown.add_task(now.stage, total=now.total, note="")
            shown.start_task(tasks[now.stage])
            shown.update(tasks[now.stage], completed=now.done, total=now.total, note=now.note)

        yield show


def bars(output: Console = stderr) -> RichProgress:
    """Bars with a count, the remaining time, and a note; what goes to a redirected standard output stays there."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    columns_and_note = (*columns, TextColumn("{task.fields[note]}"))
    return RichProgress(*columns_and_note, console=output, redirect_stdout=sys.stdout.isatty())


def working(text: str) -> AbstractContextManager[Any]:
    """Shows a stage without a count."""
    if stderr.is_terminal:
        return stderr.status(text)
    say(text)
    return nullcontext()


@contextmanager
def starting(text: str) -> Iterator[Callable[[str], None]]:
    """Shows the start of another program, with its latest line."""
    if not stderr.is_terminal:
        say(text)
        yield lambda _: None
        return
    with stderr.status(escape(text)) as status:
        yield lambda line: status.update(f"{escape(text)}  [dim]{escape(line[-LINE_WIDTH:])}[/]")


class Lines:
    """A line for each finished stage, and one per minute in between, for a log file or a pipe."""

    def __init__(self, output: Console = stderr) -> None:
        self._output = output
        self._began: dict[str, float] = {}
        self._ended: set[str] = set()
        self._told_at = time.monotonic()

    def __call__(self, now: Progress) -> None:
        """Shows the progress of a stage."""
        at = time.monotonic()
        began = self._began.setdefault(now.stage, at)
        if now.stage in self._ended:
            return
        if now.done >= now.total:
            self._ended.add(now.stage)
            self.say(f"{now.stage}: done", now.note, f"{at - began:.0f} s" if at - began >= 1 else "")
        elif at - self._told_at > SILENCE_S:
            self.say(f"{now.stage}: {now.done} of {now.total}", now.note)

    def say(self, *parts: Any) -> None:
        """Writes a line of the parts that are not empty."""
        self._told_at = time.monotonic()
        line = ", ".join(filter(None, parts))
        self._output.print(line, highlight=False, markup=False, soft_wrap=True)
