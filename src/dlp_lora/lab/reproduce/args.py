"""What a run is asked to do, and the stages in which it does that."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dlp_lora.lab.evals.answers import FREE, AnswerArgs
from dlp_lora.lab.evals.forced import FORCED
from dlp_lora.lab.evals.methods import MAIN, METHODS, SINGLE, Method, methods_named
from dlp_lora.tasks import Task
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.router import RouterTrainingArgs

LARGER = "larger"


@dataclass(frozen=True, kw_only=True)
class ReproduceArgs:
    """What is run. `limit` takes so many training and test examples of each task."""

    training: AdapterTrainingArgs = field(default_factory=AdapterTrainingArgs)
    single_r: int = 64  # the rank of the one LoRA on all tasks, trained for the method lora-r64; 0 leaves both out
    router: RouterTrainingArgs = field(default_factory=RouterTrainingArgs)
    answers: AnswerArgs = field(default_factory=AnswerArgs)
    methods: tuple[str, ...] = MAIN
    teacher_forced: bool = True
    serial: tuple[int, ...] = (3, 5, 10)
    serial_prompts: int = 300  # at each of these lengths
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name, kind in (("methods", str), ("seeds", int), ("serial", int)):
            found = getattr(self, name)
            if not isinstance(found, tuple) or not all(isinstance(value, kind) for value in found):
                raise ValueError(f"ReproduceArgs.{name} is a list of {kind.__name__}, got {found!r}")
        if self.single_r < 0:
            raise ValueError(f"ReproduceArgs.single_r is a rank, or 0 for none, got {self.single_r}")
        methods_named(self.methods)
        if any(n < 2 for n in self.serial):
            raise ValueError(f"ReproduceArgs.serial asks at least 2 questions at once, got {self.serial}")
        if self.serial_prompts < 1:
            raise ValueError(f"ReproduceArgs.serial_prompts must be at least 1, got {self.serial_prompts}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"ReproduceArgs.limit must be at least 1, got {self.limit}")
        if not self.seeds:
            raise ValueError("ReproduceArgs.seeds is empty; give at least one")


@dataclass(frozen=True)
class Stage:
    """A part of a run by the name in its progress: so much of a kind of work."""

    name: str
    kind: str
    size: float = 1.0


def stages(tasks: Sequence[Task], args: ReproduceArgs, *, larger: bool = False) -> list[Stage]:
    """The stages of a run, in order; those of its seeds bear their numbers if there are several."""
    methods = methods_of(args)
    each = []
    if needs_adapters(args):
        each += [Stage(task.name, "adapter") for task in tasks]
    if METHODS[SINGLE] in methods:
        each.append(Stage(SINGLE, "adapter", len(tasks)))
    if needs_adapters(args):
        each.append(Stage("router", "router"))
    each += [Stage(f"{FREE.name}: {m.name}", FREE.name) for m in methods]
    each += [Stage(f"{FORCED.name}: {m.name}", FORCED.name) for m in methods if args.teacher_forced and m.name in MAIN]
    each += [Stage(f"serial-{n}", "serial") for n in args.serial]
    seeds = [replace(stage, name=stage_name(args, seed, stage.name)) for seed in args.seeds for stage in each]
    return [*([Stage(LARGER, LARGER)] if larger else []), *seeds]


def stage_name(args: ReproduceArgs, seed: int, name: str) -> str:
    """What a stage of a seed is called."""
    return name if len(args.seeds) == 1 else f"{seed}: {name}"


def needs_adapters(args: ReproduceArgs) -> bool:
    """Whether anything is asked for that takes the tasks' own adapters and the router."""
    return bool(args.serial) or any(not method.adapter for method in methods_of(args))


def methods_of(args: ReproduceArgs) -> list[Method]:
    """The methods to compare; without the single LoRA where none is trained."""
    return [m for m in methods_named(args.methods) if m.name != SINGLE or args.single_r]
