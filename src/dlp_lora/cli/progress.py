"""Progress: how far the steps of a command are in, bars on a terminal out, or lines in a log file."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dlp_lora.cli.common import say, stderr

SILENCE_S = 60.0  # after which a log file gets a line


class Shown(Protocol):
    """Takes in how far a step is: `done` of `total`, with a note."""

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def progress(steps: Sequence[str] = (), *, output: Console = stderr) -> Iterator[Shown]:
    """Shows the progress of steps on standard error; those that are known beforehand have a bar from the start."""
    if not output.is_terminal:
        yield Lines(output)
        return
    with bars(output) as shown:
        tasks = {step: shown.add_task(step, total=None, start=False, note="") for step in steps}

        def show(step: str, done: int, total: int, note: str = "") -> None:
            if step not in tasks:
                tasks[step] = shown.add_task(step, total=total, note="")
            shown.start_task(tasks[step])
            shown.update(tasks[step], completed=done, total=total, note=note)

        yield show


def bars(output: Console = stderr) -> RichProgress:
    """Bars with a count, the time that is left, and a note."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return RichProgress(*columns, TextColumn("{task.fields[note]}"), console=output)


def working(text: str) -> AbstractContextManager[Any]:
    """Shows a step that has no count."""
    if stderr.is_terminal:
        return stderr.status(text)
    say(text)
    return nullcontext()


class Lines:
    """A line for each step that is done, and one a minute in between, for a log file or a pipe."""

    def __init__(self, output: Console = stderr) -> None:
        self._output = output
        self._began: dict[str, float] = {}
        self._ended: set[str] = set()
        self._told_at = time.monotonic()

    def __call__(self, step: str, done: int, total: int, note: str = "") -> None:
        """Takes in how far a step is."""
        now = time.monotonic()
        began = self._began.setdefault(step, now)
        if step in self._ended:
            return
        if done >= total:
            self._ended.add(step)
            self.say(f"{step}: done", note, f"{now - began:.0f} s" if now - began >= 1 else "")
        elif now - self._told_at > SILENCE_S:
            self.say(f"{step}: {done} of {total}", note)

    def say(self, *parts: Any) -> None:
        """Writes a line of the parts that are not empty."""
        self._told_at = time.monotonic()
        line = ", ".join(filter(None, parts))
        self._output.print(line, highlight=False, markup=False, soft_wrap=True)
