import io

import pytest
from rich.console import Console

from dlp_lora.cli.progress import SILENCE_S, Lines, progress
from dlp_lora.progress import Progress


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dlp_lora.cli.progress.time", clock)
    return clock


def test_a_log_file_gets_a_line_when_a_step_is_done_and_one_a_minute(clock: Clock) -> None:
    log = io.StringIO()
    with progress(["days", "sums"], output=Console(file=log)) as show:
        for step in range(1, 13):
            clock.now += 12
            show(Progress("days", step, 12, f"loss {1 / step:.2f}"))
        show(Progress("days", 1, 1, "12 s"))  # it said so already
        show(Progress("sums", 1, 1, "there already"))
    assert log.getvalue().splitlines() == [
        "days: 6 of 12, loss 0.17",
        "days: done, loss 0.08, 132 s",
        "sums: done, there already",
    ]


def test_no_minute_passes_in_silence_whatever_the_number_of_steps(clock: Clock) -> None:
    log = io.StringIO()
    show = Lines(Console(file=log))
    for i in range(40):
        clock.now += 20
        show(Progress(f"step {i % 3}", i, 1000))
    assert len(log.getvalue().splitlines()) == 40 * 20 // (SILENCE_S + 20)


def test_notes_and_names_are_printed_as_they_are() -> None:
    log = io.StringIO()
    Lines(Console(file=log, width=20, emoji=False))(Progress("[bold]a[/] :a: " + "long " * 10, 1, 1, "[red]"))
    assert log.getvalue() == "[bold]a[/] :a: " + "long " * 10 + ": done, [red]\n"


def test_a_terminal_gets_bars() -> None:
    shown = io.StringIO()
    with progress(["days"], output=Console(file=shown, force_terminal=True, width=100)) as show:
        show(Progress("days", 8, 16, "loss 0.50"))
        show(Progress("sums", 16, 16))
    assert "8/16" in shown.getvalue()
    assert "loss 0.50" in shown.getvalue()
    assert "sums" in shown.getvalue()


def test_what_is_printed_beside_bars_goes_to_a_redirected_output(capsys: pytest.CaptureFixture[str]) -> None:
    shown = io.StringIO()
    with progress(["days"], output=Console(file=shown, force_terminal=True, width=100)):
        print('{"name": "days"}')
    assert capsys.readouterr().out == '{"name": "days"}\n'
    assert "name" not in shown.getvalue()
