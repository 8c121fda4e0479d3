"""What a run says of the time that it still takes."""

from dlp_lora.lab.reproduce import Estimate, ReproduceArgs, stages
from dlp_lora.progress import Progress
from dlp_lora.tasks import Task

TASKS = [Task(name=name, train=(), test=()) for name in ("sums", "days")]
ARGS = ReproduceArgs(methods=("base", "lora-r64", "dlp"), teacher_forced=False, serial=(3,))
STAGES = [stage for stage in stages(TASKS, ARGS) if stage.name != "answers: lora-r64"]
STEPS = [stage.name for stage in STAGES]


def test_the_stages_of_a_run_are_named_and_those_of_several_seeds_numbered() -> None:
    each = ["sums", "days", "lora-r64", "router", "answers: base", "answers: lora-r64", "answers: dlp", "serial-3"]
    assert [stage.name for stage in stages(TASKS, ARGS)] == each
    two = stages(TASKS, ReproduceArgs(methods=("dlp",), teacher_forced=False, serial=(), seeds=(0, 1)), larger=True)
    few = ("sums", "days", "router", "answers: dlp")
    assert [stage.name for stage in two] == ["larger", *(f"{seed}: {name}" for seed in (0, 1) for name in few)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def told(estimate: Estimate, clock: Clock, step: str, done: int, total: int, *, after: float) -> None:
    clock.now += after
    estimate.note(Progress(step, done, total))


def make() -> tuple[Estimate, Clock]:
    clock = Clock()
    return Estimate(STAGES, clock=clock), clock


def test_steps_take_what_others_of_their_kind_took() -> None:
    estimate, clock = make()
    assert str(estimate) == ""
    told(estimate, clock, "sums", 1, 11, after=5)
    told(estimate, clock, "sums", 11, 11, after=600)  # ten of eleven parts, so 660 seconds an adapter
    # One adapter more, and one on both tasks together.
    assert estimate.seconds_left() == (660 + 2 * 660, False)
    assert str(estimate) == "at least 33 min left"
    assert estimate.num_done == 1
    told(estimate, clock, "days", 0, 10, after=0)
    told(estimate, clock, "days", 5, 10, after=330)
    assert estimate.seconds_left()[0] == 330 + 2 * 660


def test_what_was_done_before_takes_no_time_and_tells_of_none() -> None:
    estimate, clock = make()
    for step in STEPS[:4]:
        told(estimate, clock, step, 1, 1, after=1)
    assert str(estimate) == ""
    told(estimate, clock, "answers: base", 60, 100, after=1)
    told(estimate, clock, "answers: base", 80, 100, after=1800)
    seconds, whole = estimate.seconds_left()
    assert round(seconds) == (1800 + 9000)
    assert not whole
    told(estimate, clock, "serial-3", 0, 2, after=0)
    told(estimate, clock, "serial-3", 1, 2, after=60)
    assert str(estimate) == "about 3 h 1 min left"


def test_less_than_a_minute_is_told_only_where_all_is_known() -> None:
    estimate, clock = make()
    told(estimate, clock, "router", 0, 2, after=0)
    told(estimate, clock, "router", 1, 2, after=30)
    assert str(estimate) == ""  # at least half a minute says nothing
    for step in STEPS:
        if step != "router":
            told(estimate, clock, step, 1, 1, after=0)
    assert str(estimate) == "less than a minute left"


def test_at_the_end_nothing_is_left() -> None:
    estimate, clock = make()
    for step in STEPS:
        told(estimate, clock, step, 0, 1, after=1)
        told(estimate, clock, step, 1, 1, after=1)
    assert estimate.seconds_left() == (0.0, True)
    assert estimate.num_done == len(STEPS)
    assert str(estimate) == ""
