"""Scenarios that need the measured router alone: a Setting in, JSON data out.

One that the data cannot carry says so: `{"skipped": reason}`.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from dlp_lora.lab.evals.router import samples
from dlp_lora.lab.evals.router.disguises import DISGUISES, disguised
from dlp_lora.lab.evals.router.instructions import BEFORE, among_instructions
from dlp_lora.lab.evals.router.measures import (
    Reading,
    abstention,
    accuracy,
    auroc,
    confusion,
    delays,
    false_route_rate,
    held,
    pooled,
    rounded,
    summary,
)
from dlp_lora.lab.evals.router.samples import SMALL_TALK, Question, Sample, Walk, has_changed
from dlp_lora.lab.evals.router.setting import Setting
from dlp_lora.policy import Switching
from dlp_lora.progress import Progress
from dlp_lora.router import Context, Router
from dlp_lora.router.questions import in_turn, questions_of
from dlp_lora.sentences import split
from dlp_lora.training.calibration import calibration_error, reliability
from dlp_lora.training.contexts import first_word

Scenario = Callable[[Setting], dict[str, Any]]

SWITCHINGS = {
    "off": Switching(min_tokens=1, margin=0.0),
    "default": Switching(),
    "margin 0.5": Switching(min_tokens=1, margin=0.5),
    "4 tokens, margin 0.05": Switching(min_tokens=4, margin=0.05),
    "16 tokens": Switching(min_tokens=16, margin=0.0),
}
INSTRUCTED = ("instructions around", "German around", "Spanish around", "Chinese around")  # disguises
NUM_FOREIGN = 1000  # prompts that are put among instructions
NUM_TIMED = 200  # prompts


def prompts(setting: Setting) -> dict[str, Any]:
    """Whole prompts, first sentences, random ones and beginnings; confusions, calibration and abstention on them."""
    asked, seed = setting.asked, setting.args.seed
    readings = {
        "whole": setting.whole,
        "first sentence": setting.read(samples.first_sentence(asked)),
        "random sentence": setting.read(samples.random_sentence(asked, seed=seed)),
        **{f"{n} tokens": setting.read(samples.cut(asked, n, setting.tokenizer)) for n in setting.args.cuts},
    }
    return {
        **{name: summary(reading) for name, reading in readings.items()},
        "confusion": {name: confusion(readings[name]) for name in ("whole", "random sentence")},
        "reliability": {
            "whole": _bins([readings["whole"]]),
            "random sentence": _bins([readings["random sentence"]]),
            "all of these": _bins(list(readings.values())),
        },
        "abstention": {name: abstention(readings[name]) for name in ("whole", "random sentence")},
    }


def answers(setting: Setting) -> dict[str, Any]:
    """Later sentences of real answers, as they open, after their prompt."""
    asked, seed = setting.asked, setting.args.seed
    later = {
        "2nd": samples.answer_sentence(asked, 2, seed=seed),
        "3rd": samples.answer_sentence(asked, 3, seed=seed),
        "4th or later": samples.answer_sentence(asked, 4, seed=seed, or_later=True),
    }
    found = {name: summary(setting.read(own)) for name, own in later.items() if own}
    return found or skipped("no answer has two sentences")


def conversations(setting: Setting) -> dict[str, Any]:
    """The newest question of a conversation of several tasks."""
    found: dict[str, Any] = {}
    for n in setting.args.conversations:
        for with_answers, kind in ((False, "questions"), (True, "questions and answers")):
            if n <= setting.num_tasks:
                asked = samples.conversations(setting.asked, n, answers=with_answers, seed=setting.args.seed)
                found.setdefault(kind, {})[str(n)] = summary(setting.read(asked))
    return found or skipped(f"{setting.num_tasks} tasks are too few for a conversation")


def serial(setting: Setting) -> dict[str, Any]:
    """Every sentence of prompts that ask questions of several tasks, with and without hysteresis."""
    found: dict[str, Any] = {}
    for n in setting.args.serial:
        if n <= setting.num_tasks:
            found[str(n)] = _serial(setting, samples.serial(setting.asked, n, seed=setting.args.seed))
    return found or skipped(f"{setting.num_tasks} tasks are too few for a serial prompt")


def questions(setting: Setting) -> dict[str, Any]:
    """Prompts of one question, of the extra tasks and of several questions: which are cut, and is it into those."""
    if setting.num_tasks < 2:
        return skipped("questions of several tasks need a second task")
    found = {"1": _cut(setting, [sample.context for sample in samples.whole(setting.asked)])}
    if setting.asked_outside:
        found["extra tasks"] = _cut(setting, [sample.context for sample in samples.whole(setting.asked_outside)])
    for n in (2, *setting.args.serial):
        if n <= setting.num_tasks:
            walks = samples.serial(setting.asked, n, seed=setting.args.seed)
            texts = [Context(f"{walk[-1].context.history}{walk[-1].context.prompt}") for walk in walks]
            found[str(n)] = _cut(setting, texts, [[task for task, _ in groupby(s.task for s in w)] for w in walks])
    return found


def junctions(setting: Setting) -> dict[str, Any]:
    """Changes of task in the middle of a sentence: the loss of one decision per sentence against one per word.

    `sentence` decides at the sentence's first word and keeps to it, `word` decides again at each; both are accuracies
    per word. `delay_words` is how many words of the second task pass before the latter names it. `next` are the
    sentences that follow, `next_apart` the same ones had the change come between two sentences.
    """
    found = samples.junctions(setting.asked, seed=setting.args.seed)
    if not found:
        return skipped("too few sentences are long enough to be cut in half")
    by_word, by_sentence, delay = [], [], []
    for words, right, chosen in _each(setting, [junction.words for junction in found]):
        by_word.append(right)
        by_sentence.append([chosen[0] == sample.task for sample in words])
        delay += delays(right, has_changed(words))
    groups = np.repeat(np.arange(len(found)), [len(own) for own in by_word])
    others = _each(setting, [junction.others for junction in found])
    apart = _each(setting, [junction.apart for junction in found])
    return {
        "sentence": accuracy(np.concatenate(by_sentence), groups),
        "word": accuracy(np.concatenate(by_word), groups),
        "delay_words": rounded(np.mean(delay)),
        "next": [accuracy(np.array(own)) for own in _by_position([right for _, right, _ in others])],
        "next_apart": [accuracy(np.array(own)) for own in _by_position([right for _, right, _ in apart])],
    }


def outside(setting: Setting) -> dict[str, Any]:
    """The extra tasks, for which no adapter was trained: does the router recognise them as foreign."""
    if not setting.asked_outside:
        return skipped("no extra tasks were given (--extra)")
    return outside_of(setting.whole, setting.read(samples.whole(setting.asked_outside)), setting.asked_outside)


def outside_of(inside: Reading, found: Reading, asked: Sequence[Question]) -> dict[str, Any]:
    """How well scores separate the tasks' texts from foreign ones: for all foreign tasks, and for each."""
    names = np.array([q.task for q in asked])
    return {
        **_parted(inside.scores, found.scores),
        "num": len(asked),
        "own_threshold": _as_it_abstains(inside, found),
        "by_task": {
            name: _parted(inside.scores, found.scores[names == name]) for name in dict.fromkeys(names.tolist())
        },
        "abstention": abstention(inside, found.scores),
    }


def robustness(setting: Setting) -> dict[str, Any]:
    """The whole prompts as other people would write them, wrapped in other text, after misleading text or a chat."""
    if setting.num_tasks < 2:
        return skipped("misleading texts need a second task")
    found = {"as it is": {**summary(setting.whole), "lost": 0.0}}
    asked = {name: disguised(setting.asked, own, seed=setting.args.seed) for name, own in DISGUISES.items()}
    asked |= {f"after {name}": samples.after(setting.asked, text) for name, text in SMALL_TALK.items()}
    for name, own in asked.items():
        reading = setting.read(own)
        lost = rounded(setting.whole.right.mean() - reading.right.mean())
        found[name] = {**summary(reading), "lost": lost}
    return found


def instructions(setting: Setting) -> dict[str, Any]:
    """Questions among instructions in many languages, as an engine decides: where the whole prompt is not sure to fit,
    it looks for the question in it. Foreign prompts among the same instructions still are to fit none.
    """
    if setting.num_tasks < 2:
        return skipped("instructions are measured on questions of several tasks")
    around: dict[str, Callable[[Sequence[Question]], list[Sample]]] = {"none": samples.whole}
    around |= {name: partial(among_instructions, language=name, seed=setting.args.seed) for name in BEFORE}
    around |= {name: partial(disguised, disguise=DISGUISES[name], seed=setting.args.seed) for name in INSTRUCTED}
    foreign = samples.evenly(setting.asked_outside, NUM_FOREIGN)
    found: dict[str, Any] = {}
    for name, put in around.items():
        reading = setting.decide(put(setting.asked))
        found[name] = summary(reading)
        if foreign:
            outside = setting.decide(put(foreign))
            own_threshold = _as_it_abstains(reading, outside)
            found[name]["outside"] = {**_parted(reading.scores, outside.scores), "own_threshold": own_threshold}
    return found


def timing(setting: Setting) -> dict[str, Any]:
    """Milliseconds to route one sentence of a growing answer; the first time, at the prompt, apart."""
    return sentence_ms(setting.main.router, setting.asked)


def sentence_ms(router: Router, asked: Sequence[Question]) -> dict[str, Any]:
    """Times a router on one thread, warm: prompts as they come, then the sentences of their answers one by one.

    An answer of one or two sentences is repeated, so that each timed sentence follows others.
    """
    step = max(2, len(asked) // NUM_TIMED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _timed(router, asked[1::step] or asked)  # other texts: weights are in memory, no text is in a cache
        at_prompt, at_sentence = _timed(router, asked[::step])
    finally:
        torch.set_num_threads(threads)
    return {
        "sentence_ms": rounded(statistics.median(at_sentence)),
        "sentence_ms_p95": rounded(np.quantile(at_sentence, 0.95)),
        "prompt_ms": rounded(statistics.median(at_prompt)),
        "num": len(at_sentence),
    }


def _timed(router: Router, asked: Sequence[Question]) -> tuple[list[float], list[float]]:
    at_prompt: list[float] = []
    at_sentence: list[float] = []
    for q in asked:
        sentences = split(q.example.answer)
        if len(sentences) < 3:
            sentences = split(f"{q.example.answer.strip()}\n\n" * 3)
        at_prompt.append(_ms(router, Context(q.example.prompt)))
        at_sentence += [
            _ms(router, Context(q.example.prompt, "".join(sentences[:k]), first_word(sentences[k])))
            for k in range(1, len(sentences))
        ]
    return at_prompt, at_sentence


def skipped(reason: str) -> dict[str, Any]:
    """The entry of the record for a scenario that was not measured."""
    return {"skipped": reason}


def _serial(setting: Setting, walks: Sequence[Walk]) -> dict[str, Any]:
    reading = setting.read([sample for walk in walks for sample in walk])
    parts = np.split(np.arange(len(reading.labels)), np.cumsum([len(walk) for walk in walks])[:-1])
    groups = np.repeat(np.arange(len(walks)), [len(walk) for walk in walks])
    changed = np.concatenate([has_changed(walk) for walk in walks])
    late = [d for part in parts for d in delays(reading.right[part].tolist(), changed[part].tolist())]
    lengths = [len(setting.tokenizer.encode(s.context.prompt).ids) for walk in walks for s in walk]
    hysteresis = {}
    for name, switching in SWITCHINGS.items():
        used = [held(reading.probabilities[p], [lengths[i] for i in p], switching) for p in parts]
        right = np.concatenate(used) == reading.labels
        hysteresis[name] = {
            "min_tokens": switching.min_tokens,
            "margin": switching.margin,
            **accuracy(right, groups),
            "first_after_change": rounded(right[changed].mean()),
            "switches": rounded(np.mean([np.count_nonzero(np.diff(own)) for own in used])),
        }
    return {
        **summary(reading),
        **accuracy(reading.right, groups),
        "first_after_change": accuracy(reading.right[changed], np.unique(groups[changed], return_inverse=True)[1]),
        "delay_sentences": rounded(np.mean(late)),
        "changes": rounded(changed.sum() / len(walks)),
        "hysteresis": hysteresis,
    }


def _cut(setting: Setting, contexts: Sequence[Context], tasks: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """`exact` are the prompts whose questions all go to their tasks, in order."""
    router = setting.main.router

    def read(asked: Sequence[Context]) -> list[dict[str, float]]:
        return [dict(zip(router.names, row, strict=True)) for row in router.probabilities(asked).tolist()]

    fits, found = [], []
    for i, context in enumerate(contexts):
        (row,) = read([context])
        questions = questions_of(read, context, row)
        asked = [in_turn(context, (question,)) for question in questions if len(questions) > 1]
        fits.append(sum(row.values()))
        found.append([max(own, key=own.__getitem__) for own in (read(asked) if asked else [])])
        setting.on_progress(Progress("cut", i + 1, len(contexts)))
    shares = {"routed_whole": np.mean(np.array(fits) > 0.5), "cut": np.mean([bool(own) for own in found])}
    if tasks:
        shares["exact"] = np.mean([own == list(truth) for own, truth in zip(found, tasks, strict=True)])
    return {**{key: rounded(share) for key, share in shares.items()}, "num": len(contexts)}


def _parted(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> dict[str, float]:
    return {"auroc": rounded(auroc(inside, outside)), "false_routes": rounded(false_route_rate(inside, outside))}


def _as_it_abstains(inside: Reading, found: Reading) -> dict[str, float]:
    """The routed samples, by the router's own decision whether any adapter fits."""
    return {"coverage": rounded((inside.fits > 0.5).mean()), "false_routes": rounded((found.fits > 0.5).mean())}


def _each(setting: Setting, walks: Sequence[Walk]) -> list[tuple[Walk, list[bool], list[str]]]:
    """The samples of each walk, whether the router is right, and its choices."""
    reading = setting.read([sample for walk in walks for sample in walk])
    right, chosen = reading.right.tolist(), [reading.names[i] for i in reading.chosen]
    found, start = [], 0
    for walk in walks:
        found.append((walk, right[start : start + len(walk)], chosen[start : start + len(walk)]))
        start += len(walk)
    return found


def _by_position(rows: Sequence[Sequence[bool]]) -> list[list[bool]]:
    columns: dict[int, list[bool]] = defaultdict(list)
    for row in rows:
        for i, value in enumerate(row):
            columns[i].append(value)
    return list(columns.values())


def _bins(readings: Sequence[Reading]) -> dict[str, Any]:
    reading = pooled(readings)
    bins = reliability(reading.confidence, reading.right)
    return {
        "ece": rounded(calibration_error(reading.confidence, reading.right)),
        "bins": [{key: rounded(value) for key, value in b.items()} for b in bins],
    }


def _ms(router: Router, context: Context) -> float:
    start = time.perf_counter()
    router.probabilities([context])
    return (time.perf_counter() - start) * 1e3
