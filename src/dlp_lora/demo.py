"""The demo: the main job from beginning to end on a small real model, with nothing to download.

It trains an adapter for each of a few procedural tasks and a router, writes a bundle, and answers held-out prompts
with the base model, each task's own adapter, and DLP-LoRA. Every step is kept on disk, so an interrupted demo goes
on where it was.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

from dlp_lora.bank.adapter_files import content_hash
from dlp_lora.engine.engine import Engine
from dlp_lora.engine.loading import load
from dlp_lora.engine.trace import Sentence
from dlp_lora.files import write_json
from dlp_lora.kept import Kept
from dlp_lora.lab.evals import methods
from dlp_lora.lab.evals.metrics import contains
from dlp_lora.lab.records.environment import environment
from dlp_lora.policy import TopP
from dlp_lora.progress import OnProgress, Progress, unseen
from dlp_lora.router import MiniMLP, router_hash
from dlp_lora.tasks import Example, Task, compose, procedural_task, serial
from dlp_lora.training.adapters import TrainedAdapter, train_adapter
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.base import load_base
from dlp_lora.training.contexts import MIX
from dlp_lora.training.router import REPORT_FILE, RouterTrainingArgs, load_tokenizer, train_router_into

METHODS = {"base": "base", "base_chat": "base", "own_adapter": "oracle", "dlp": "dlp"}
"""The methods by the names that they have in an evaluation."""

# How the context of the second question is encoded: under the first one's adapter, under its own, or without the first.
WAYS: Mapping[str, dict[str, Any]] = {
    "keep": {"kv_policy": "keep", "prompt_routing": "questions"},
    "keep, prompt by sentence": {"kv_policy": "keep", "prompt_routing": "sentences"},
    "recompute": {"kv_policy": "recompute", "prompt_routing": "questions"},
    "apart": {"kv_policy": "recompute", "prompt_routing": "apart"},
}


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """How large the demo is."""

    tasks: tuple[str, ...] = ("unit_conversion", "sequence", "letter_order", "code_word")
    num_train: int = 1120  # examples of one question a task
    num_serial: int = 320  # examples of one half of a two-question prompt a task
    num_test: int = 16
    batch_size: int = 16  # of evaluation
    max_new_tokens: int = 32
    num_pairs: int = 2  # two-question prompts of each ordered pair of tasks; the first prompt is shown
    router_epochs: int = 7
    seed: int = 0  # of the training: weights, order and draws
    data_seed: int = 0  # of the questions, and of which are held out
    training: AdapterTrainingArgs = field(
        default_factory=lambda: AdapterTrainingArgs(prompt_format="plain", batch_size=16, target_modules="all-linear")
    )


@dataclass(frozen=True, kw_only=True)
class TwoQuestions:
    """A two-question prompt and how it was answered."""

    prompt: str
    base: str
    dlp: str
    trace: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured, and answers to look at.

    `accuracy[task][method]` is for prompts of one question. `pairs[way]` is for prompts of two, in each of WAYS: the
    share whose first and second question went to the right adapter, and was answered right.
    """

    accuracy: dict[str, dict[str, float]]
    router: dict[str, Any]
    answers: list[dict[str, Any]]
    serial: TwoQuestions
    pairs: dict[str, dict[str, float]]
    adapters: list[dict[str, Any]]
    environment: dict[str, Any]
    bundle: Path


def run_demo(
    model: str | Path, out: str | Path, args: DemoArgs | None = None, *, on_progress: OnProgress = unseen
) -> DemoResult:
    """Runs the demo into the folder `out`, or goes on with it."""
    args, out = args or DemoArgs(), Path(out)
    tasks = [
        procedural_task(name, num_train=args.num_train + args.num_serial, num_test=args.num_test, seed=args.data_seed)
        for name in args.tasks
    ]
    training = replace(args.training, seed=args.seed)
    base, tokenizer = load_base(model)
    adapters: dict[str, TrainedAdapter] = {}
    for task in with_serial(tasks, args):
        adapters[task.name] = trained = train_adapter(
            base, tokenizer, task, out / "adapters" / task.name, training, on_progress=on_progress
        )
        on_progress(Progress(task.name, 1, 1, f"{trained.seconds:.0f} s, loss {trained.final_loss:.3f}"))
    report = _router(model, out / "router", tasks, args, on_progress)
    paths = {name: adapter.path for name, adapter in adapters.items()}
    engine = load(
        base, tokenizer=tokenizer, adapters=paths, router=out / "router", policy=TopP(0.6), kv_policy="recompute"
    )
    engine.save_pretrained(out / "bundle")
    answers = _evaluate(engine, tasks, out / "answers.json", args, on_progress)
    example = _two_questions(engine, tasks, args)
    pairs = _pairs(engine, tasks, out / "pairs.json", args, on_progress)
    engine.detach()
    accuracy: dict[str, dict[str, float]] = {
        task.name: {method: _share(a["right"][method] for a in answers if a["task"] == task.name) for method in METHODS}
        for task in tasks
    }
    result = DemoResult(
        accuracy=accuracy,
        router=report,
        answers=answers,
        serial=example,
        pairs=pairs,
        adapters=[{"name": a.name, "seconds": a.seconds, "final_loss": a.final_loss} for a in adapters.values()],
        environment=environment(),
        bundle=out / "bundle",
    )
    write_json(out / "demo.json", {**asdict(result), "bundle": "bundle"}, indent=2)
    return result


def with_serial(tasks: Sequence[Task], args: DemoArgs) -> list[Task]:
    """Adds to each task its halves of two-question prompts, so that an adapter knows how to begin after another's
    sentence, and to leave the next one to another."""
    rng = random.Random(args.seed)
    extended = []
    for task in tasks:
        singles, spare = task.train[: args.num_train], task.train[args.num_train :]
        halves: list[Example] = []
        others = [other for other in tasks if other.name != task.name]
        for i, example in enumerate(spare):
            other = rng.choice(rng.choice(others).train)
            halves.append(serial(example, other)[0] if i % 2 else serial(other, example)[1])
        extended.append(Task(name=task.name, train=(*singles, *halves), test=task.test))
    return extended


def _router(
    model: str | Path, folder: Path, tasks: Sequence[Task], args: DemoArgs, on_progress: OnProgress
) -> dict[str, Any]:
    sizes = {"num_train": args.num_train + args.num_serial, "num_test": args.num_test, "epochs": args.router_epochs}
    identity = {"tasks": list(args.tasks), **sizes, "seed": args.seed, "data_seed": args.data_seed}
    kept = Kept(folder / REPORT_FILE, identity)
    if kept.values:
        MiniMLP.from_pretrained(folder)
        on_progress(Progress("router", 1, 1, "there already"))
        return kept.values
    training = RouterTrainingArgs(epochs=args.router_epochs, mix={**MIX, "serial": 12.0}, seed=args.seed)
    about = {"identity": kept.identity}
    report = train_router_into(
        folder, tasks, load_tokenizer(str(model)), training, about=about, on_progress=on_progress
    )
    return report.to_dict()


def _evaluate(
    engine: Engine, tasks: Sequence[Task], file: Path, args: DemoArgs, on_progress: OnProgress
) -> list[dict[str, Any]]:
    kept = Kept(file, _identity(engine, args))
    records: list[dict[str, Any]] = kept.values.get("answers", [])
    # The tasks are pooled, so that rows of one batch need different adapters and nobody says which.
    pooled = [(task.name, task.test[i]) for i in range(args.num_test) for task in tasks]
    on_progress(Progress("answers", len(records), len(pooled)))
    while len(records) < len(pooled):
        batch = pooled[len(records) : len(records) + args.batch_size]
        texts = {method: _answers(engine, method, batch, args) for method in METHODS}
        for i, (name, example) in enumerate(batch):
            answers = {method: texts[method][i] for method in METHODS}
            right = {method: contains(answers[method], example.accepted) for method in METHODS}
            records.append(
                {"task": name, "prompt": example.prompt, "answer": example.answer, "said": answers, "right": right}
            )
        kept.put(answers=records)
        on_progress(Progress("answers", len(records), len(pooled)))
    return records


def _identity(engine: Engine, args: DemoArgs) -> dict[str, Any]:
    hashes = {name: content_hash(adapter.path) for name, adapter in engine.bank.adapters.items()}
    router = engine.router and router_hash(engine.router)
    return {"adapters": hashes, "router": router, "args": asdict(args)}


def _answers(engine: Engine, method: str, batch: Sequence[tuple[str, Example]], args: DemoArgs) -> list[str]:
    prompts: list[Any] = [example.prompt for _, example in batch]
    if method == "base_chat" and engine.tokenizer.chat_template:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    with methods.METHODS[METHODS[method]].on(engine, [(name, i) for i, (name, _) in enumerate(batch)]):
        answers = engine.generate(prompts, max_new_tokens=args.max_new_tokens, do_sample=False)
    return [answer.text.strip() for answer in answers]


def _two_questions(engine: Engine, tasks: Sequence[Task], args: DemoArgs) -> TwoQuestions:
    _, _, one, two = _asked(tasks, args)[0]
    prompt = compose([one, two]).prompt
    options: dict[str, Any] = {"max_new_tokens": 2 * args.max_new_tokens, "do_sample": False}
    answer = engine.generate(prompt, **options)
    with engine.disabled():
        base = engine.generate(prompt, **options)
    trace = [sentence.to_dict() for sentence in answer.trace]
    return TwoQuestions(prompt=prompt, base=base.text.strip(), dlp=answer.text.strip(), trace=trace)


def _asked(tasks: Sequence[Task], args: DemoArgs) -> list[tuple[Task, Task, Example, Example]]:
    """Two tasks and a test question of each, for every prompt of two questions."""
    return [
        (first, second, first.test[i % args.num_test], second.test[(i + 1) % args.num_test])
        for i in range(args.num_pairs)
        for first, second in permutations(tasks, 2)
    ]


def _pairs(
    engine: Engine, tasks: Sequence[Task], file: Path, args: DemoArgs, on_progress: OnProgress
) -> dict[str, dict[str, float]]:
    kept = Kept(file, _identity(engine, args))
    shares: dict[str, dict[str, float]] = kept.values.get("shares", {})
    asked = _asked(tasks, args)
    prompts = [compose([q1, q2]).prompt for _, _, q1, q2 in asked]
    on_progress(Progress("two questions", len(shares), len(WAYS)))
    for way in list(WAYS)[len(shares) :]:
        with engine.using(**WAYS[way]):
            answers = engine.generate(prompts, max_new_tokens=2 * args.max_new_tokens, do_sample=False)
        rows = [_scored(answer.trace, *pair) for answer, pair in zip(answers, asked, strict=True)]
        shares[way] = {key: _share(row[key] for row in rows) for key in rows[0]}
        kept.put(shares=shares)
        on_progress(Progress("two questions", len(shares), len(WAYS)))
    return shares


def _scored(trace: Sequence[Sentence], first: Task, second: Task, q1: Example, q2: Example) -> dict[str, bool]:
    one, two = trace[0], (trace[1] if len(trace) > 1 else None)
    return {
        "first_routed": next(iter(one.mixture), None) == first.name,
        "first_right": contains(one.text, q1.accepted),
        "second_routed": two is not None and next(iter(two.mixture), None) == second.name,
        "second_right": two is not None and contains(two.text, q2.accepted),
    }


def _share(right: Iterable[bool]) -> float:
    values = list(right)
    return sum(values) / len(values)
