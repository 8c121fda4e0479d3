"""Trains a router, mini-MLP or encoder, on the tasks' texts (section 3.1), and measures it on held-out ones.

`dlp_lora.training.contexts` draws the texts. Held-out texts of the training part then set the temperature and the
threshold for "no adapter fits".
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor

from dlp_lora.errors import TrainingError
from dlp_lora.files import write_json
from dlp_lora.progress import OnProgress, Progress, unseen
from dlp_lora.router import Calibration, Context, Encoded, EncoderRouter, Measured, MiniMLP, MiniMLPConfig, TextEncoder
from dlp_lora.router import load_tokenizer as load_tokenizer  # for callers of this module
from dlp_lora.router.context import fit_temperature
from dlp_lora.router.encoder import albert_config
from dlp_lora.router.everyday import everyday_prompts
from dlp_lora.router.nearness import Nearness
from dlp_lora.router.neighbours import Neighbours
from dlp_lora.router.recall import Recall
from dlp_lora.tasks.task import Example, Task
from dlp_lora.training.calibration import calibration_error
from dlp_lora.training.contexts import CLOSINGS, GENERATION, KINDS, MIX, OPENINGS, Sample, draw_contexts, routable

REPORT_FILE = "report.json"
RATES = ("learning_rate", "embedding_learning_rate", "encoder_learning_rate")
MEDIAN_FIT = 0.999
MIN_ROOM = 2.0  # of the score, between the median and none
ROUTED_DRAWS = 4  # an epoch, of a text that is given with its task: the router may have got it wrong
COVERAGE_EACH = 0.9  # share of each task's held-out prompts that fit at least
CONTEXTS_EACH = 64  # of a task, from which a mini-MLP learns how near its texts lie to each other
PROMPTS_EACH = 200  # of a task, at most, from which it learns how the words of its prompts vary

Kind = Literal["mini-mlp", "encoder"]
TrainedRouter = MiniMLP | EncoderRouter


@dataclass(frozen=True, kw_only=True)
class RouterTrainingArgs:
    """The settings of a router's training, and its kind.

    `encoder` is the folder or hub id with the first weights and the tokenizer of an "encoder"; None is ALBERT-base with
    random weights and the `tokenizer` argument. Each epoch draws as many contexts as there are examples, equally many
    per task, but at least `draws` per task in all epochs together.
    """

    kind: Kind = "mini-mlp"
    encoder: str | None = None
    epochs: int = 6
    draws: int = 500  # contexts of each task, at least
    batch_size: int = 128
    learning_rate: float = 2e-3
    embedding_learning_rate: float = 5e-3  # of a mini-MLP's token embeddings
    encoder_learning_rate: float = 5e-5  # of an encoder below its head
    dropout: float = 0.2  # share of a text's tokens that a step leaves out
    label_smoothing: float = 0.1  # of a mini-MLP, which learns tasks of few examples by heart without
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))  # how often each kind of context is drawn
    held_out: float = 0.1  # share of the training texts that fits the temperature and what fits none
    coverage: float = 0.99  # share of held-out contexts that some adapter is to fit
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"RouterTrainingArgs.kind must be {' or '.join(get_args(Kind))}, got {self.kind!r}")
        if self.encoder is not None and self.kind != "encoder":
            raise ValueError(f"RouterTrainingArgs.encoder is for kind='encoder', got kind={self.kind!r}")
        for name in ("epochs", "draws", "batch_size", *RATES):
            if not getattr(self, name) > 0:
                raise ValueError(f"RouterTrainingArgs.{name} must be positive, got {getattr(self, name)}")
        for name in ("dropout", "label_smoothing", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"RouterTrainingArgs.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.coverage <= 1:
            raise ValueError(f"RouterTrainingArgs.coverage must be in (0, 1], got {self.coverage}")
        if set(self.mix) - set(KINDS) or not any(self.mix.get(kind) for kind in GENERATION):
            raise ValueError(
                f"RouterTrainingArgs.mix draws from {', '.join(KINDS)}, "
                f"and at least one of {', '.join(GENERATION)}; got {dict(self.mix)}"
            )


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """A router's results on the tasks' test prompts, or on held-out training prompts if there are no test prompts.

    `confusion[i][j]` counts prompts of task i that went to task j. The calibration error is the mean gap between
    confidence and accuracy over 15 bins of confidence (ECE), before and after the temperature.
    """

    names: tuple[str, ...]
    num_parameters: int
    seconds: float
    num_test: int
    accuracy: float
    accuracy_by_task: dict[str, float]
    confusion: list[list[int]]
    temperature: float
    ece_before: float
    ece: float
    measured_on: Literal["test", "held-out"] = "test"
    losses: list[float] = field(repr=False, default_factory=list)

    def mistakes(self) -> list[tuple[str, float, dict[str, int]]]:
        """Lists the tasks with wrong test prompts, worst first: name, accuracy, and the chosen tasks."""
        rows = []
        for i, name in enumerate(self.names):
            others = {o: n for o, n in zip(self.names, self.confusion[i], strict=True) if n and o != name}
            if others:
                rows.append((name, self.accuracy_by_task[name], dict(sorted(others.items(), key=lambda on: -on[1]))))
        return sorted(rows, key=lambda row: row[1])

    def to_dict(self) -> dict[str, Any]:
        """Gives the report as JSON data."""
        return dict(self.__dict__)


def train_router(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    args: RouterTrainingArgs | None = None,
    config: MiniMLPConfig | None = None,
    *,
    routed: Sequence[Sample] = (),
    on_progress: OnProgress = unseen,
) -> tuple[TrainedRouter, RouterReport]:
    """Trains a router for the tasks and measures it on their test prompts.

    If no task has test prompts, it is measured on the held-out training prompts. The router did not learn these, but
    they set its threshold. A task with a single example is measured on this example, which was learned.

    Args:
        tokenizer: for a mini-MLP, or for an encoder with random weights.
        config: of a mini-MLP.
        routed: texts with their tasks, from `read_routed`; each is learned unchanged, `ROUTED_DRAWS` times per epoch.

    Raises:
        RouterError: if the encoder cannot be loaded.
        TrainingError: with fewer than two tasks, or if one has no whole example.
    """
    args = args or RouterTrainingArgs()
    if len(tasks) < 2:
        raise TrainingError(f"a router chooses between tasks, but got {len(tasks)}; give at least two task folders")
    tasks = [routable(task) for task in tasks]
    start = time.perf_counter()
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    router = _router([task.name for task in tasks], tokenizer, args, config)
    if isinstance(router, EncoderRouter) and torch.cuda.is_available():  # a mini-MLP is trained faster on a CPU
        router.cuda()
    train, held_out = _split(tasks, args.held_out, rng)
    samples = draw_contexts(train, args.epochs, args.mix, rng, at_least=args.draws)
    if routed:
        samples += [*routed] * ROUTED_DRAWS * args.epochs
        rng.shuffle(samples)
    encoded = router.encode_all([sample.context for sample in samples])
    losses = _fit(router, encoded, [sample.label for sample in samples], args, rng, on_progress)
    router.eval()
    if isinstance(router, MiniMLP):
        router.near = _near(router, train, args.mix, rng)
        prompts = [[example.prompt for example in rng.sample(own, min(PROMPTS_EACH, len(own)))] for own in train]
        with torch.no_grad():
            read = [router.prompts(texts) for texts in prompts]
            router.neighbours = Neighbours.of(read)
            foreign = router.prompts([*everyday_prompts(), *OPENINGS, *CLOSINGS])
            router.recall = Recall.of([*map(router.neighbours.read, read)], router.neighbours.read(foreign))
    _calibrate(router, held_out, args, rng)
    seconds = time.perf_counter() - start
    report = _report(router, tasks, held_out, seconds=seconds, losses=losses)
    router.cpu()
    router.measured = Measured(accuracy=report.accuracy, num_prompts=report.num_test, measured_on=report.measured_on)
    return router, report


def train_router_into(
    folder: str | Path,
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    args: RouterTrainingArgs | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    routed: Sequence[Sample] = (),
    on_progress: OnProgress = unseen,
) -> RouterReport:
    """Trains a router as `train_router` does, and writes it into a folder with the report beside it.

    `about` are further entries of the report.
    """
    router, report = train_router(tasks, tokenizer, args, routed=routed, on_progress=on_progress)
    router.save_pretrained(folder)
    write_json(Path(folder) / REPORT_FILE, {**report.to_dict(), **(about or {})}, indent=2)
    return report


def _split(tasks: Sequence[Task], share: float, rng: random.Random) -> tuple[list[list[Example]], list[list[Example]]]:
    train, held_out = [], []
    for task in tasks:
        examples = list(task.train)
        rng.shuffle(examples)
        size = min(max(round(share * len(examples)), share > 0), len(examples) - 1)
        train.append(examples[size:])
        held_out.append(examples[:size] or examples)  # a single prompt must also be trained on
    return train, held_out


def _near(
    router: MiniMLP, tasks: Sequence[Sequence[Example]], mix: Mapping[str, float], rng: random.Random
) -> Nearness:
    some = [[rng.choice(examples) for _ in range(CONTEXTS_EACH)] for examples in tasks]
    samples = sorted(draw_contexts(some, 1, mix, rng), key=lambda sample: sample.label)
    return Nearness.of(_features(router, [sample.context for sample in samples]).view(len(tasks), CONTEXTS_EACH, -1))


def _fit(
    router: TrainedRouter,
    encoded: Sequence[Encoded],
    labels: Sequence[int],
    args: RouterTrainingArgs,
    rng: random.Random,
    on_progress: OnProgress,
) -> list[float]:
    optimizers = _optimizers(router, args)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    num_steps = (len(encoded) + args.batch_size - 1) // args.batch_size
    # An encoder recognises foreign texts by its logits, and smoothing would make these similar.
    smoothing = args.label_smoothing if isinstance(router, MiniMLP) else 0.0
    losses: list[float] = []
    router.train()
    for step in range(num_steps):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = (1 - step / num_steps) * rate
        batch = range(step * args.batch_size, min((step + 1) * args.batch_size, len(encoded)))
        logits = router([_dropped(encoded[i], args.dropout, rng) for i in batch])
        target = torch.tensor([labels[i] for i in batch], device=logits.device)
        loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        router.zero_grad()
        losses.append(loss.item())
        on_progress(Progress("router", step + 1, num_steps, f"loss {losses[-1]:.3f}"))
    return losses


def _router(
    names: Sequence[str], tokenizer: Tokenizer, args: RouterTrainingArgs, config: MiniMLPConfig | None
) -> TrainedRouter:
    if args.kind == "mini-mlp":
        return MiniMLP(names, tokenizer, config)
    if config is not None:
        raise ValueError("config is that of a mini-MLP, but args.kind is 'encoder'; leave it out")
    if args.encoder is None:
        return EncoderRouter(names, TextEncoder.from_config(albert_config(tokenizer), tokenizer))
    return EncoderRouter(names, TextEncoder.from_pretrained(args.encoder))


def _optimizers(router: TrainedRouter, args: RouterTrainingArgs) -> list[torch.optim.Optimizer]:
    if isinstance(router, MiniMLP):
        return [
            torch.optim.SparseAdam(router.embedding.parameters(), lr=args.embedding_learning_rate),
            torch.optim.AdamW(
                [*router.layers.parameters(), *router.head.parameters()], lr=args.learning_rate, weight_decay=0.01
            ),
        ]
    rates = ((router.encoder, args.encoder_learning_rate), (router.head, args.learning_rate))
    return [torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.01) for module, rate in rates]


def _dropped(context: Encoded, share: float, rng: random.Random) -> Encoded:
    prompt = context.prompt
    if share == 0:
        return context
    # Half of the time a stretch is left out instead of scattered tokens, because texts may be cut short.
    if len(prompt) > 8 and rng.random() < 0.5:
        size = rng.randrange(len(prompt) // 2)
        begin = rng.randrange(len(prompt) - size)
        prompt = [*prompt[:begin], *prompt[begin + size :]]
    keep = torch.rand(len(prompt)).ge(share).tolist()
    return context._replace(prompt=[t for t, k in zip(prompt, keep, strict=True) if k] or prompt)


def _calibrate(
    router: TrainedRouter, tasks: Sequence[Sequence[Example]], args: RouterTrainingArgs, rng: random.Random
) -> None:
    mix = {kind: args.mix.get(kind, 0.0) for kind in GENERATION}
    samples = draw_contexts(tasks, 2, mix, rng)
    contexts = [sample.context for sample in samples]
    logits = _logits(router, contexts)
    labels = torch.tensor([sample.label for sample in samples])
    temperature = fit_temperature(logits, labels, torch.logspace(-1, 1, 201))
    router.calibration = Calibration(temperature=temperature)  # the scores of an encoder depend on it
    router.calibration = _abstaining(router, contexts, temperature, args.coverage)
    if isinstance(router, MiniMLP) and router.near is not None:
        # Of all texts that are lost, most would be of the task with the most varied ones: that reaches further. Then
        # more texts fit than are to, which raises the threshold.
        prompts = [Context(example.prompt) for own in tasks for example in own]
        owners = torch.tensor([label for label, own in enumerate(tasks) for _ in own])
        least = (router.calibration.fit_threshold or 0.0) - _logits(router, prompts).logsumexp(dim=-1)
        router.near = router.near.reaching(_features(router, prompts), owners, least, coverage=COVERAGE_EACH)
        router.calibration = _abstaining(router, contexts, temperature, args.coverage)


def _abstaining(router: TrainedRouter, contexts: Sequence[Context], temperature: float, coverage: float) -> Calibration:
    """Fits the threshold of the score for foreign texts; confidence cannot distinguish them from texts of two tasks."""
    scores = torch.cat([router.scores(part) for part in _parts(contexts)])
    # Half of the texts are to fit with at least MEDIAN_FIT; few and like texts say little about others.
    median = scores.median().item()
    threshold = min(scores.quantile(1 - coverage).item(), median - MIN_ROOM)
    slope = math.log(MEDIAN_FIT / (1 - MEDIAN_FIT)) / (median - threshold)
    return Calibration(temperature=temperature, fit_threshold=threshold, fit_slope=slope)


def _parts(contexts: Sequence[Context]) -> list[Sequence[Context]]:
    return [contexts[i : i + 256] for i in range(0, len(contexts), 256)]


@torch.no_grad()
def _logits(router: TrainedRouter, contexts: Sequence[Context]) -> Float[Tensor, "n adapters"]:
    return torch.cat([router(router.encode_all(part)).float().cpu() for part in _parts(contexts)])


@torch.no_grad()
def _features(router: MiniMLP, contexts: Sequence[Context]) -> Float[Tensor, "n hidden"]:
    return torch.cat([router.features(router.encode_all(part)) for part in _parts(contexts)])


def _among(router: TrainedRouter, contexts: Sequence[Context]) -> Float[Tensor, "n adapters"]:
    """The probabilities of the adapters among themselves."""
    rows = torch.cat([router.probabilities(part) for part in _parts(contexts)])
    return rows / rows.sum(dim=-1, keepdim=True).clamp(min=1e-12)


def _report(
    router: TrainedRouter,
    tasks: Sequence[Task],
    held_out: Sequence[Sequence[Example]],
    *,
    seconds: float,
    losses: list[float],
) -> RouterReport:
    """Measures a router on the tasks' test prompts, and if there are none on the `held_out` ones of each."""
    is_tested = any(task.test for task in tasks)
    if not is_tested:
        tasks = [replace(task, test=tuple(own)) for task, own in zip(tasks, held_out, strict=True)]
    texts = [(router.names.index(task.name), example.prompt) for task in tasks for example in task.test]
    contexts = [Context(text) for _, text in texts]
    labels = np.array([label for label, _ in texts])
    rows = _among(router, contexts)
    chosen = rows.argmax(dim=-1).numpy()
    right = chosen == labels
    confusion = torch.zeros(len(router.names), len(router.names), dtype=torch.long)
    for label, choice in zip(labels.tolist(), chosen.tolist(), strict=True):
        confusion[label, choice] += 1
    calibration = router.calibration
    router.calibration = Calibration(temperature=1.0)
    before = _among(router, contexts)
    router.calibration = calibration
    return RouterReport(
        names=router.names,
        num_parameters=router.num_parameters,
        seconds=round(seconds, 2),
        num_test=len(texts),
        accuracy=float(right.mean()),
        accuracy_by_task={router.names[i]: float(right[labels == i].mean()) for i in sorted(set(labels.tolist()))},
        confusion=confusion.tolist(),
        temperature=calibration.temperature,
        ece_before=calibration_error(before.amax(dim=-1).numpy(), right),
        ece=calibration_error(rows.amax(dim=-1).numpy(), right),
        measured_on="test" if is_tested else "held-out",
        losses=losses,
    )
