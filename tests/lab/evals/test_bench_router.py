import json
import random
import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from conftest import byte_tokenizer, lively_model, make_adapter
from dlp_lora import Context, MiniMLP, Switching, TopK
from dlp_lora.cli.app import app
from dlp_lora.errors import AdapterError, RecordError, TaskError
from dlp_lora.lab.evals.router import (
    SCENARIOS,
    RouterBenchArgs,
    Setting,
    Trained,
    bench_router,
    run,
    samples,
    trainings,
)
from dlp_lora.lab.evals.router import measures as m
from dlp_lora.lab.evals.router.ceiling import ceiling, shared
from dlp_lora.lab.evals.router.disguises import DISGUISES, disguised
from dlp_lora.lab.evals.router.instructions import AFTER, BEFORE, among_instructions
from dlp_lora.lab.evals.router.peers import ARROW, OURS, PEERS, unread
from dlp_lora.lab.evals.router.samples import SMALL_TALK, Question, Sample
from dlp_lora.lab.evals.router.synthetic import ACTIONS, KINDS, MAX_TASKS, synthetic_tasks
from dlp_lora.lab.evals.router.targets import TARGETS, Target, judged
from dlp_lora.lab.evals.router.untrained import descriptions
from dlp_lora.lab.report import write_report
from dlp_lora.policy import Mixture
from dlp_lora.router import CONFIG_FILE, Calibration, TextEncoder, router_hash
from dlp_lora.router.encoder import albert_config
from dlp_lora.sentences import split
from dlp_lora.tasks import CATALOG, Example, Task, write_task
from dlp_lora.training.calibration import NUM_BINS, calibration_error, reliability
from dlp_lora.training.router import REPORT_FILE, RouterTrainingArgs

TOKENIZER = byte_tokenizer().backend_tokenizer
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def sums(i: int) -> Example:
    return Example(
        prompt=f"Add two sums that I have written down. What is {i} plus {3 * i}?",
        answer=f"It is {4 * i}. That was {i} and {3 * i}.",
    )


def days(i: int) -> Example:
    return Example(
        prompt=f"A week has seven days, from Monday to Sunday. Which day comes {i} days after {DAYS[i % 7]}?",
        answer=f"{DAYS[2 * i % 7]} comes then. Count {i} days. Seven make a week. So it is.",
    )


def tales(i: int) -> Example:
    return Example(
        prompt=f"Tell me a tale of long ago and far away. King number {i} must sleep in it. Make it a good one.",
        answer=f"Once upon a time king {i} slept and slept and slept and slept. He woke up in a far country.",
    )


def rhymes(i: int) -> Example:
    return Example(prompt=f"Find a rhyme for the word that I give. The word is wall{i}.", answer=f"It is ball{i}.")


def task(make: Any, *, num: int = 24) -> Task:
    return Task(name=make.__name__, train=tuple(map(make, range(num))), test=tuple(map(make, range(num, num + 8))))


TASKS = tuple(map(task, (sums, days, tales, rhymes)))
ASKED = samples.questions(TASKS)
EXTRA = tuple(
    Task(
        name=name,
        train=tuple(Example(prompt=f"{word} {i} {word}?", answer=f"{word}.") for i in range(12)),
        test=tuple(Example(prompt=f"{word} {i} {word}?", answer=f"{word}.") for i in range(12, 16)),
    )
    for name, word in (("foxes", "Qux"), ("herons", "Zyzzy"))
)
ARGS = RouterBenchArgs(
    per_task=6,
    cuts=(8, 40),
    conversations=(2, 3, 9),
    serial=(3,),
    added=(1, 9),
    examples=(4, None),
    tries=2,
    shares=(0.2,),
    synthetic=5,
    left_out=1,
    draws=2,
    training=RouterTrainingArgs(epochs=2, batch_size=32),
)


class Marks:
    """A router that knows each task by a word; it is sure of what it sees last, and counts what it is asked."""

    names = ("sums", "days", "tales", "rhymes")
    marks = ("sum", "day", "king", "rhyme")
    num_asked = 0

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        self.num_asked += len(contexts)
        places = [[context.prompt.lower().rfind(mark) + 1 for mark in self.marks] for context in contexts]
        return torch.tensor(places).float().add(0.1).log().mul(8).softmax(dim=-1)

    def save_pretrained(self, path: str | Path) -> None:
        Path(path).mkdir()
        (Path(path) / CONFIG_FILE).write_text(" ".join(self.marks))


def setting(router: Any = None, **changes: Any) -> Setting:
    given = Trained(router=router, seconds=1.5) if router else None
    return Setting(TASKS, TOKENIZER, replace(ARGS, **changes), router=given, extra=EXTRA)


def write_encoder(folder: Path) -> None:
    """Writes a tiny sentence encoder of random weights."""
    sizes = {"embedding_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = albert_config(TOKENIZER)
    config.update({**sizes, "num_hidden_layers": 1})
    TextEncoder.from_config(config, TOKENIZER).model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


# Samples


def test_a_task_gives_at_most_so_many_questions_evenly_spaced() -> None:
    found = samples.questions([TASKS[0]], limit=4)
    assert [q.example for q in found] == [TASKS[0].test[i] for i in (0, 2, 4, 6)]
    assert [q.example for q in samples.questions([TASKS[0]], limit=100)] == list(TASKS[0].test)
    assert [q.example for q in samples.questions([TASKS[0]], train=True)] == list(TASKS[0].train)


def test_parts_of_a_longer_answer_are_no_questions() -> None:
    part = Example(prompt="Two questions?", answer=" Second.", answer_prefix="First.")
    begun = Example(prompt="Two others?", answer="First. The", complete=False)
    assert samples.questions([replace(TASKS[0], test=(part, sums(1), begun))]) == [Question("sums", sums(1))]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_sentences_are_those_of_the_prompt_and_the_same_for_the_same_seed(seed: int) -> None:
    found = samples.random_sentence(ASKED, seed=seed)
    assert found == samples.random_sentence(ASKED, seed=seed)
    for q, first, any_one in zip(ASKED, samples.first_sentence(ASKED), found, strict=True):
        sentences = [sentence.strip() for sentence in split(q.example.prompt)]
        assert first == Sample(Context(sentences[0]), q.task)
        assert any_one.context.prompt in sentences
        assert any_one.task == q.task


@pytest.mark.parametrize("num_tokens", [1, 8, 10_000])
def test_a_cut_prompt_is_its_first_tokens(num_tokens: int) -> None:
    for q, sample in zip(ASKED, samples.cut(ASKED, num_tokens, TOKENIZER), strict=True):
        assert sample.context == Context(q.example.prompt[:num_tokens])  # a token is a byte


def test_a_later_sentence_of_an_answer_comes_with_what_was_answered_before() -> None:
    found = samples.answer_sentence(ASKED, 3, seed=0)
    assert [sample.task for sample in found] == ["days"] * 8
    assert found[0].context == Context(days(24).prompt, "Sunday comes then. Count 24 days. ", "Seven")
    later = samples.answer_sentence(ASKED, 2, seed=0, or_later=True)
    assert {sample.context.sentence for sample in later if sample.task == "days"} == {"Count", "Seven", "So"}


@pytest.mark.parametrize("answers", [False, True])
@settings(max_examples=10, deadline=None)
@given(n=st.integers(2, 4), seed=st.integers(0, 1000))
def test_a_conversation_asks_of_different_tasks_and_the_newest_is_the_prompt(n: int, seed: int, answers: bool) -> None:
    for q, sample in zip(ASKED, samples.conversations(ASKED, n, answers=answers, seed=seed), strict=True):
        assert (sample.context.prompt, sample.task) == (q.example.prompt, q.task)
        earlier = [other for other in ASKED if other.example.prompt in sample.context.history]
        assert len(earlier) == len({other.task for other in earlier} - {q.task}) == n - 1
        assert all((other.example.answer in sample.context.history) == answers for other in earlier)


@settings(max_examples=10, deadline=None)
@given(n=st.integers(2, 4), seed=st.integers(0, 1000))
def test_a_serial_prompt_is_its_sentences_each_after_those_before_it(n: int, seed: int) -> None:
    walks = samples.serial(ASKED, n, seed=seed)
    assert len(walks) == -(-len(ASKED) // n)
    for walk in walks:
        asked = {q.example.prompt: q.task for q in ASKED}
        text = walk[-1].context.history + walk[-1].context.prompt
        parts = text.split("\n\n")
        assert [sample.context.prompt for sample in walk] == [s.strip() for s in split(text)]
        assert [s.task for s in walk] == [asked[part] for part in parts for _ in split(part)]
        assert all(text.startswith(s.context.history + s.context.prompt) for s in walk)
        assert sum(samples.has_changed(walk)) == n - 1


def test_a_junction_goes_over_into_another_task_at_the_middle_of_a_sentence() -> None:
    found = samples.junctions(ASKED, seed=0)
    assert len(found) > len(ASKED) / 2
    prompts = {q.example.prompt: q.task for q in ASKED}
    for junction in found:
        words = junction.words
        first, second = words[0].task, words[-1].task
        assert [s.task for s in words] == sorted((s.task for s in words), key=[first, second].index)
        assert first != second
        assert sum(samples.has_changed(words)) == 1
        assert [len(s.context.prompt.split()) for s in words] == list(range(1, len(words) + 1))
        assert words[-1].context.prompt.startswith(words[0].context.prompt)
        following = [s.context.prompt for s in junction.others]
        assert 1 <= len(following) <= 2
        assert following == [s.context.prompt for s in junction.apart]
        assert any(following[0] in prompt and name == second for prompt, name in prompts.items())
        assert words[-1].context.prompt in junction.others[0].context.history
        assert words[-1].context.prompt not in junction.apart[0].context.history


# Disguises


@pytest.mark.parametrize("name", DISGUISES)
def test_a_disguise_keeps_task_and_number_and_is_the_same_for_the_same_seed(name: str) -> None:
    found = disguised(ASKED, DISGUISES[name], seed=3)
    assert found == disguised(ASKED, DISGUISES[name], seed=3)
    assert [sample.task for sample in found] == [q.task for q in ASKED]
    assert all(sample.context.prompt.strip() for sample in found)


def test_what_is_put_around_a_prompt_leaves_it_whole() -> None:
    wrapped = ("chat labels", "instructions around", "German around", "Spanish around", "Chinese around")
    for name in (*wrapped, "names another task", "after another task's sentence", "after another task's prompt"):
        for q, sample in zip(ASKED, disguised(ASKED, DISGUISES[name], seed=0), strict=True):
            assert q.example.prompt in sample.context.prompt
            assert sample.context.prompt != q.example.prompt


def test_misleading_texts_are_those_of_other_tasks() -> None:
    names = {q.example.prompt: q.task for q in ASKED}
    for sample in disguised(ASKED, DISGUISES["after another task's prompt"], seed=0):
        assert names[sample.context.prompt.split("\n\nNever mind")[0]] != sample.task
    for sample in disguised(ASKED, DISGUISES["names another task"], seed=0):
        assert f"about {sample.task}." not in sample.context.prompt


def test_typos_hit_their_share_of_the_letters() -> None:
    text = string.ascii_lowercase * 200
    typed = DISGUISES["typos, 10 % of letters"](text, ASKED[0], random.Random(0))
    # One in four is left out, one in four doubled: the length stays about the same.
    assert len(typed) == pytest.approx(len(text), rel=0.02)
    same = (
        DISGUISES["upper case"](text, ASKED[0], random.Random(0)),
        DISGUISES["no punctuation"](text, ASKED[0], random),
    )
    assert same == (text.upper(), text)
    assert typed != text


@pytest.mark.parametrize("language", BEFORE)
def test_instructions_of_a_language_stand_before_and_after_the_whole_prompt(language: str) -> None:
    for q, sample in zip(ASKED, among_instructions(ASKED, language, seed=0), strict=True):
        before, prompt, after = sample.context.prompt.split("\n\n")
        assert (prompt, sample.task) == (q.example.prompt, q.task)
        assert before in BEFORE[language]
        assert after in AFTER[language]


# Measures


floats = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12).map(np.array)


@settings(deadline=None)
@given(inside=floats, outside=floats)
def test_the_auroc_is_the_share_of_pairs_in_the_right_order(inside: np.ndarray, outside: np.ndarray) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(inside, outside)]
    assert m.auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs))


def test_false_routes_are_counted_at_the_score_that_the_share_of_own_texts_reaches() -> None:
    inside = np.arange(1, 21) / 20  # 0.05 to 1: 95 % reach 0.1
    assert m.false_route_rate(inside, np.array([0.04, 0.09, 0.1, 0.5])) == 0.5
    assert m.false_route_rate(inside, np.array([0.04, 0.09, 0.1, 0.5]), coverage=1.0) == 0.75
    # All of one score are routed or none.
    assert m.false_route_rate(np.ones(20), np.array([1.0, 0.9])) == 0.5


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_the_calibration_error_is_the_mean_gap_of_the_bins(rows: list[tuple[float, bool]]) -> None:
    confidence, right = np.array([c for c, _ in rows]), np.array([r for _, r in rows])
    by_bin: dict[int, list[float]] = defaultdict(list)
    for c, r in rows:
        by_bin[min(int(c * NUM_BINS), NUM_BINS - 1)].append(c - r)
    expected = sum(abs(sum(gaps)) for gaps in by_bin.values()) / len(rows)
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert sum(b["share"] for b in reliability(confidence, right)) == pytest.approx(1)


def reading(rows: Sequence[tuple[int, Sequence[float]]]) -> m.Reading:
    probabilities = np.array([p for _, p in rows])
    return m.Reading(
        names=("a", "b"),
        labels=np.array([label for label, _ in rows]),
        probabilities=probabilities,
        fits=probabilities.sum(axis=1),
        scores=probabilities.max(axis=1),
    )


FOUR = reading([(0, (0.9, 0.1)), (0, (0.2, 0.8)), (1, (0.3, 0.7)), (1, (0.4, 0.6))])


def test_a_summary_counts_what_is_right_in_all_and_by_task() -> None:
    found = m.summary(FOUR)
    assert (found["accuracy"], found["num"], found["mean_over_tasks"]) == (0.75, 4, 0.75)
    assert found["by_task"] == {"a": 0.5, "b": 1.0}
    assert found["interval"][0] <= 0.75 <= found["interval"][1]
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.3 + 0.4) / 4)
    assert m.confusion(FOUR) == {"a": {"a": 1, "b": 1}, "b": {"b": 2}}
    assert m.summary(m.pooled([FOUR, FOUR]))["num"] == 8


def test_old_prompts_that_are_asked_after_each_try_are_no_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    guesses = MiniMLP(Marks.names, TOKENIZER)
    monkeypatch.setattr(trainings, "add_tasks", lambda router, tasks, seed: guesses)
    asked = setting(splits=0, added=(1,), examples=(4,))
    (row,) = bench_router(asked, only=["extension"])["scenarios"]["extension"]["add"]
    once = m.accuracy(asked.read(samples.whole(asked.asked), guesses).right, np.arange(24))
    assert (len(row["tasks"]), row["old"]["num"]) == (2, 48)
    assert row["old"]["interval"] == once["interval"]
    assert once["interval"][0] < once["interval"][1]


def test_an_interval_over_groups_draws_whole_groups() -> None:
    right = np.array([True] * 50 + [False] * 50)
    apart, together = m.accuracy(right), m.accuracy(right, np.arange(100) // 50)
    assert apart == m.accuracy(right, np.arange(100))
    assert together["interval"] == [0.0, 1.0]
    assert together["accuracy"] == apart["accuracy"] == 0.5


def test_the_abstention_curve_routes_the_surest_first() -> None:
    points = m.abstention(FOUR, outside=np.array([0.65, 0.95]))
    by_coverage = {point["coverage"]: (point["accuracy"], point["false_routes"]) for point in points}
    assert by_coverage == {0.25: (1, 0.5), 0.5: (0.5, 0.5), 0.75: (pytest.approx(2 / 3, abs=1e-4), 0.5), 1: (0.75, 1)}
    assert {point["false_routes"] for point in m.abstention(FOUR)} == {None}


def test_a_delay_is_the_number_of_sentences_until_the_first_right_one() -> None:
    right = [True, False, True, False, False, True, True]
    changed = [False, True, False, True, False, True, False]
    assert m.delays(right, changed) == [1, 2, 0]
    assert m.delays(right, [False] * 7) == []


def test_hysteresis_holds_an_adapter_through_short_sentences_and_small_margins() -> None:
    rows = np.array([(0.9, 0.1), (0.45, 0.55), (0.1, 0.9), (0.9, 0.1)])
    assert m.held(rows, [5, 5, 5, 5], Switching(min_tokens=1, margin=0.0)) == [0, 1, 1, 0]
    assert m.held(rows, [5, 5, 5, 5], Switching(min_tokens=1, margin=0.2)) == [0, 0, 1, 0]
    # The second sentence is too short to be left, so nothing is decided at the third.
    assert m.held(rows, [5, 2, 5, 5], Switching(min_tokens=4, margin=0.0)) == [0, 1, 1, 0]
    assert m.held(rows, [5, 5, 2, 5], Switching(min_tokens=4, margin=0.2)) == [0, 0, 1, 1]


def test_hysteresis_is_that_of_an_engine(make_engine: Any) -> None:
    for margin in (0.0, 0.1, 0.4):
        switching = Switching(min_tokens=1, margin=margin)
        trace = make_engine(policy=TopK(1), switching=switching).generate("Hello", max_new_tokens=60).trace
        names = list(trace[0].probabilities)
        used = m.held(
            np.array([[*s.probabilities.values()] for s in trace]), [s.end - s.start for s in trace], switching
        )
        assert [Mixture({names[i]: 1.0}) for i in used] == [s.mixture for s in trace]
        assert len(trace) > 5


# Synthetic tasks and the ceiling


def test_synthetic_tasks_share_their_words_so_that_only_pairs_tell_them_apart() -> None:
    tasks = synthetic_tasks(["Some text {here}."], num_train=3, num_test=2)
    assert len({task.name for task in tasks}) == len(tasks) == MAX_TASKS == 1000
    actions, kinds = zip(*(task.name.split(", ") for task in tasks), strict=True)
    assert Counter(actions) == dict.fromkeys(ACTIONS, len(KINDS))
    assert Counter(kinds) == dict.fromkeys(KINDS, len(ACTIONS))
    for one in tasks[:20]:
        action, kind = one.name.split(", ")
        for example in (*one.train, *one.test):
            assert action in example.prompt
            assert kind in example.prompt
            assert "Some text {here}." in example.prompt
    assert synthetic_tasks(["A"], num_tasks=3, seed=1) == synthetic_tasks(["A"], num_tasks=3, seed=1)


@pytest.mark.parametrize(
    "num_tasks, texts, message", [(0, ["A"], "1 to 1000"), (1001, ["A"], "1 to"), (2, [], "texts")]
)
def test_impossible_synthetic_tasks_are_refused(num_tasks: int, texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_tasks(texts, num_tasks=num_tasks)


def test_the_ceiling_learns_what_is_in_the_text_and_no_more() -> None:
    train = samples.whole(samples.questions(TASKS, train=True))
    assert ceiling(train, samples.whole(ASKED)).all()
    same = [Sample(Context("A:"), s.task) for s in train]
    assert ceiling(same, [Sample(Context("A:"), q.task) for q in ASKED]).mean() == 1 / len(TASKS)
    told = [Sample(Context("A:", history=s.context.prompt), s.task) for s in train]
    assert ceiling(told, [Sample(Context("A:", history=q.example.prompt), q.task) for q in ASKED]).all()


def test_shared_text_is_another_tasks_letter_for_letter() -> None:
    train = [Sample(Context("A:"), "a"), Sample(Context("A:"), "b"), Sample(Context("B:"), "b")]
    test = [
        Sample(Context("A:"), "a"),
        Sample(Context("B:"), "b"),
        Sample(Context("B:"), "a"),
        Sample(Context("C"), "a"),
    ]
    assert shared(train, test) == 0.5
    assert shared(train, [Sample(Context("A:", history="of b"), "b")]) == 0


# The run


def test_a_router_that_knows_its_marks_is_measured_as_it_answers() -> None:
    found = bench_router(setting(Marks()), only=["prompts", "conversations", "serial", "outside"])["scenarios"]
    assert found["prompts"]["whole"]["accuracy"] == 1
    assert found["prompts"]["whole"]["by_task"] == dict.fromkeys(Marks.names, 1.0)
    # The first sentence of a tale has no mark.
    assert found["prompts"]["first sentence"]["by_task"] == {"sums": 1, "days": 1, "tales": 0, "rhymes": 1}
    # It does not read what was said before, so conversations are no harder than prompts.
    assert {
        own["accuracy"]
        for kind in ("questions", "questions and answers")
        for own in found["conversations"][kind].values()
    } == {1}
    assert list(found["conversations"]["questions"]) == ["2", "3"]  # there are no nine tasks
    assert found["serial"]["3"]["changes"] == 2
    # Texts without any mark get even probabilities.
    assert found["outside"]["auroc"] == 1
    assert found["outside"]["false_routes"] == 0
    assert set(found["outside"]["by_task"]) == {"foxes", "herons"}


def test_prompts_are_cut_into_their_questions_and_no_others_are() -> None:
    class OneAtATime(Marks):
        def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
            num = torch.tensor([sum(mark in c.prompt.lower() for mark in self.marks) for c in contexts])
            return torch.where(num == 1, 0.95, 0.4)[:, None] * super().probabilities(contexts)

    found = bench_router(setting(OneAtATime()), only=["questions"])["scenarios"]["questions"]
    assert found["1"] == {"routed_whole": 1, "cut": 0, "num": 24}
    assert found["extra tasks"] == {"routed_whole": 0, "cut": 0, "num": 8}
    for n in ("2", "3"):
        assert (found[n]["routed_whole"], found[n]["cut"], found[n]["exact"]) == (0, 1, 1)
    never = bench_router(setting(Marks()), only=["questions"])["scenarios"]["questions"]
    assert (never["3"]["cut"], never["3"]["exact"]) == (0, 0)  # what always fits is never several


def test_a_question_among_instructions_is_decided_as_an_engine_does() -> None:
    class Exact(Marks):
        """Knows the prompts letter for letter."""

        def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
            fits = torch.tensor([any(q.example.prompt == context.prompt for q in ASKED) for context in contexts])
            return torch.where(fits, 1.0, 0.1)[:, None] * super().probabilities(contexts)

    found = bench_router(setting(Exact()), only=["instructions"])["scenarios"]["instructions"]
    assert {*BEFORE, "none", "German around"} < set(found)
    assert [found[name]["right_and_routed"] for name in ("none", *BEFORE)] == [1.0] * (1 + len(BEFORE))
    assert found["German"]["outside"]["own_threshold"] == {"coverage": 1.0, "false_routes": 0.0}


def test_a_router_that_scores_and_abstains_by_itself_is_judged_by_that() -> None:
    class Scored(Marks):
        def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
            found = super().probabilities(contexts)
            return torch.where(found.amax(dim=1, keepdim=True) < 0.9, 0.1 * found, found)

        def scores(self, contexts: Sequence[Context]) -> torch.Tensor:
            return -super().probabilities(contexts).amax(dim=1)

    found = bench_router(setting(Scored()), only=["outside"])["scenarios"]["outside"]
    assert found["auroc"] == 0
    assert found["own_threshold"] == {"coverage": 1.0, "false_routes": 0.0}


def test_what_a_record_has_is_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "some" / "router.json"
    first = bench_router(setting(Marks()), only=["answers"], file=file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(first))
    router = Marks()
    both = bench_router(setting(router), only=["answers", "conversations"], file=file)
    assert both["scenarios"]["answers"] == first["scenarios"]["answers"]
    few = len(setting(Marks()).asked)
    assert few * 4 <= router.num_asked <= few * 5  # the newest of 2 and 3 questions, twice, and a few for the key
    assert bench_router(setting(Marks()), only=["answers"], file=file, overwrite=True)["scenarios"].keys() == {
        "answers"
    }


@pytest.mark.parametrize("changes", [{"per_task": 3}, {"seed": 1}])
def test_a_record_of_another_run_is_not_mixed_with_this_one(changes: dict[str, int], tmp_path: Path) -> None:
    file = tmp_path / "router.json"
    bench_router(setting(Marks()), only=["answers"], file=file)
    with pytest.raises(RecordError, match=r"other data, settings or another router; name another file"):
        bench_router(setting(Marks(), **changes), only=["answers"], file=file)
    turned = Marks()
    turned.marks = tuple(reversed(Marks.marks))
    with pytest.raises(RecordError, match="another router"):
        bench_router(setting(turned), only=["answers"], file=file)


@pytest.mark.parametrize("text, message", [("{", "cannot be read"), ('{"benchmark": "decode"}', "no record of `bench")])
def test_another_file_is_not_overwritten(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RecordError, match=message):
        bench_router(setting(Marks()), file=tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == text


def test_wrong_requests_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no scenario 'prompt'; choose from prompts, answers"):
        bench_router(setting(Marks()), only=["prompt"])
    with pytest.raises(TaskError, match="does not know foxes, herons; leave --router out"):
        Setting(EXTRA, TOKENIZER, ARGS, router=Trained(router=Marks(), seconds=None))
    with pytest.raises(TaskError, match="no task has test examples"):
        Setting([replace(TASKS[0], test=())], TOKENIZER, ARGS)
    with pytest.raises(ValueError, match="serial must be 2 or more"):
        RouterBenchArgs(serial=(1,))
    with pytest.raises(ValueError, match="per_task must be at least 1"):
        RouterBenchArgs(per_task=0)


def test_a_scenario_that_ran_elsewhere_names_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "router.json"
    first = bench_router(setting(Marks()), only=["answers"], file=file)
    monkeypatch.setattr(run, "environment", lambda: {**first["environment"], "cpu": "Abacus 7"})
    found = bench_router(setting(Marks()), only=["answers", "timing"], file=file)
    assert found["environment"] == first["environment"]
    assert {name: own["cpu"] for name, own in found["elsewhere"].items()} == {"timing": "Abacus 7"}
    assert "| Those of timing | cpu Abacus 7, " in write_report(file).markdown.read_text()


def test_a_record_goes_on_only_with_the_router_that_it_trained(tmp_path: Path) -> None:
    file = tmp_path / "router.json"
    work = tmp_path / "work"

    def bench(scenario: str) -> None:
        bench_router(Setting(TASKS, TOKENIZER, ARGS, folder=work), only=[scenario], file=file)

    bench("answers")
    bench("timing")
    names = Setting(TASKS, TOKENIZER, ARGS, folder=work).main.router.names
    report = (work / "main" / REPORT_FILE).read_bytes()
    MiniMLP(names, TOKENIZER, calibration=Calibration(fit_threshold=1.0)).save_pretrained(work / "main")
    (work / "main" / REPORT_FILE).write_bytes(report)
    bench("timing")  # nothing is left to measure
    with pytest.raises(RecordError, match="trained again it came out differently"):
        bench("prompts")
    assert list(json.loads(file.read_text())["scenarios"]) == ["answers", "timing"]


def test_routers_without_training_are_measured_without_training_one(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder")
    found = bench_router(setting(encoder=str(tmp_path / "encoder")), only=["untrained"], file=tmp_path / "router.json")
    assert found["router"]["type"] is None
    markdown = write_report(tmp_path / "router.json").markdown.read_text()
    kept = found["scenarios"]["untrained"]["made_from"]["8"]["mean"]["kept"]
    assert f"| 8 examples | {100 * kept:.1f} |" in markdown


def test_a_trained_router_is_kept_and_read_again(tmp_path: Path) -> None:
    one = Setting(TASKS, TOKENIZER, ARGS, folder=tmp_path)
    steps: list[str] = []
    again = Setting(TASKS, TOKENIZER, ARGS, folder=tmp_path, on_progress=lambda now: steps.append(now.stage))
    assert again.key() == one.key()
    trained = one.main
    assert again.main.seconds == trained.seconds
    np.testing.assert_array_equal(again.whole.probabilities, one.whole.probabilities)
    assert set(steps) == {"route"}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of all scenarios with a router that is trained for it."""
    folder = tmp_path_factory.mktemp("record")
    write_encoder(folder / "encoder")
    file = folder / "router.json"
    bench_router(setting(encoder=str(folder / "encoder")), file=file)
    return file


def test_every_scenario_is_in_the_record(record: Path) -> None:
    found = json.loads(record.read_text())
    assert set(found["scenarios"]) == set(SCENARIOS)
    assert all("skipped" not in own for own in found["scenarios"].values())
    assert found["router"]["type"] == "MiniMLP"
    assert found["router"]["seconds"] > 0
    assert list(found["scenarios"]["scale"]) == ["4", "6", "seconds"]
    assert set(found["scenarios"]["left_out"]["splits"]) == {"without-0", "without-1"}
    assert list(found["scenarios"]["skew"]) == ["1", "0.2", "seconds"]
    assert list(found["scenarios"]["synthetic"]) == ["5", "seconds"]
    assert list(found["scenarios"]["untrained"]["made_from"]) == ["1", "8", "32"]
    assert set(found["scenarios"]["ceilings"]) >= {
        "whole",
        "first sentence",
        "random sentence",
        "serial 4",
        "whole, 6 tasks",
    }
    assert set(found["scenarios"]["robustness"]) == {
        "as it is",
        *DISGUISES,
        *(f"after {name}" for name in SMALL_TALK),
        "seconds",
    }
    assert found["data"]["extra"] == ["foxes", "herons"]


def test_peers_answer_the_same_prompts(record: Path) -> None:
    found = json.loads(record.read_text())["scenarios"]["peers"]
    measured = {name: own for name, own in found.items() if name in PEERS and "skipped" not in own}
    assert {OURS, "TF-IDF, logistic regression", "prototypes", "nearest examples"} <= set(measured)
    assert {(own["num"], own["num_foreign"]) for own in measured.values()} == {(24, 8)}
    assert found["TF-IDF, logistic regression"]["accuracy"] == 1.0
    assert all(own["prompt_ms"] > 0 and own["needs"] for own in measured.values())
    assert found[ARROW]["skipped"] == "needs adapters of the tasks; give --adapters"


def test_each_way_is_timed_on_texts_that_no_other_has_read() -> None:
    asked = [Question("sums", Example(prompt=" ".join(map(str, range(i, i + 20))), answer="0")) for i in range(9)]
    one, other = (unread(asked, name) for name in ("prototypes", "nearest examples"))
    assert one == unread(asked, "prototypes")
    assert len({*one, *other, *(q.example.prompt for q in asked)}) == 27
    assert sorted(sorted(text.split()) for text in one) == sorted(sorted(q.example.prompt.split()) for q in asked)


def test_arrow_chooses_among_the_adapters_that_there_are_and_the_router_among_the_same(tmp_path: Path) -> None:
    model = lively_model()
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for i, name in enumerate(("sums", "tales")):
        make_adapter(model, tmp_path / "adapters" / name, seed=i, scale=0.3)
    asked = setting(adapters=str(tmp_path / "adapters"), model=str(tmp_path / "base"), per_task=3)
    found = bench_router(asked, only=["peers"])["scenarios"]["peers"]
    for name in (ARROW, f"{OURS}, of these"):
        assert (found[name]["tasks"], found[name]["num"], found[name]["num_foreign"]) == (["sums", "tales"], 6, 6)
    for i, name in enumerate(("days", "rhymes")):
        make_adapter(model, tmp_path / "adapters" / name, seed=3 + i, scale=0.3)
    found = bench_router(asked, only=["peers"])["scenarios"]["peers"]
    assert found[ARROW]["tasks"] == found[OURS]["tasks"]
    assert f"{OURS}, of these" not in found
    make_adapter(model, tmp_path / "adapters" / "days", seed=3, scale=0.3, r=2)
    with pytest.raises(AdapterError, match=r"PEFT's Arrow does not take the adapters of .*: .*mismatch"):
        bench_router(asked, only=["peers"])


def test_tasks_are_added_and_removed(record: Path) -> None:
    found = json.loads(record.read_text())["scenarios"]["extension"]
    assert [(row["base"], row["added"], row["examples"]) for row in found["add"]] == [
        (base, 1, num) for base in ("without-0", "without-1", "extra") for num in (4, None)
    ]
    assert [len(row["tasks"]) for row in found["add"]] == [1, 1, 1, 1, 2, 2]
    assert [len(row["removed"]) for row in found["remove"]] == [1]
    assert all(0 <= row["new_fit"] <= 1 for row in found["add"])
    assert [len(row["false_routes_by_try"]) for row in found["add"]] == [1, 1, 1, 1, 2, 2]
    assert all(row["lost"] <= 0 for row in found["remove"])


def test_routers_without_training_are_counted_on_tasks_that_they_have_and_lack(record: Path) -> None:
    found = json.loads(record.read_text())["scenarios"]["untrained"]
    for made in found["made_from"].values():
        assert len(made["draws"]) == 2
        assert set(made["mean"]) == {"kept", "kept_and_right", "left_out_to_base", "everyday_to_base"}
        assert all(0 <= share <= 1 for share in made["mean"].values())
        assert made["mean"]["kept_and_right"] <= made["mean"]["kept"]


def test_each_task_of_the_paper_has_a_description() -> None:
    assert set(CATALOG) <= set(descriptions())


def test_left_out_tasks_are_not_among_those_that_are_learned() -> None:
    from dlp_lora.lab.evals.router.trainings import _splits

    splits = list(_splits(setting()).values())
    assert [len(left) for _, left in splits] == [1, 1]
    assert splits[0][1] != splits[1][1]
    for kept, left in splits:
        assert [t.name for t in kept] == [t.name for t in TASKS if t not in left]
    assert _splits(Setting(TASKS[:2], TOKENIZER, ARGS)) == {}


def test_what_the_data_cannot_carry_is_skipped_and_said() -> None:
    one = Setting(
        [replace(TASKS[3], train=TASKS[3].train[:4])], TOKENIZER, ARGS, router=Trained(router=Marks(), seconds=None)
    )
    cheap = [
        "answers",
        "conversations",
        "serial",
        "questions",
        "junctions",
        "outside",
        "robustness",
        "untrained",
        "left_out",
        "skew",
    ]
    found = bench_router(one, only=cheap)
    assert all("skipped" in own for own in found["scenarios"].values())
    assert all(target["met"] is None for target in found["targets"] if target["name"].startswith(("Newest", "Extra")))


# Targets and the page


def test_a_target_is_met_from_its_bound_on() -> None:
    view = {"a": {"accuracy": 0.9, "interval": [0.8, 1.0]}, "b": 0.5}
    assert Target(name="", bound=0.9, at=("a",)).judge(view)["met"] is True
    assert Target(name="", bound=0.91, at=("a",)).judge(view)["met"] is False
    assert Target(name="", bound=0.91, at=("a",)).judge(view)["interval"] == [0.8, 1.0]
    assert Target(name="", bound=0.5, at=("b",), at_least=False).judge(view)["met"] is True
    assert Target(name="", bound=0.4, at=("b",), at_least=False).judge(view)["met"] is False
    for missing in (("c",), ("a", "c"), ("b", "c")):
        assert Target(name="", bound=0.4, at=missing).judge(view)["met"] is None


def test_every_target_is_judged_and_the_largest_scale_is_the_last() -> None:
    whole = {"accuracy": 0.99, "interval": [0.98, 1.0]}
    new = {"base": "without-0", "added": 1, "examples": 32, "new": whole, "lost": 0.004, "add_seconds": 2.0}
    worse = {**new, "new": {**whole, "accuracy": 0.94}, "lost": 0.0, "add_seconds": 6.0}
    extra = {**worse, "base": "extra", "new": {**whole, "accuracy": 0.1}}
    ten = {**extra, "added": 10, "new_fit": 0.96, "false_routes": [0.05, 0.12]}
    scenarios = {"scale": {"26": whole, "67": whole, "seconds": 3}, "extension": {"add": [new, worse, extra, ten]}}
    found = judged({"router": {"seconds": 60.0, "num_parameters": 5}, "scenarios": scenarios})
    assert len(found) == len(TARGETS) + 1
    met = {target["name"]: target["met"] for target in found}
    assert met["Whole prompt of 67 tasks"] is met["A new task from 32 examples"] is met["Training takes"] is True
    assert met["Lost on the old tasks"] is met["Adding it takes"] is False
    assert {t["name"]: t["value"] for t in found}["A new task from 32 examples"] == 0.94
    assert met["Ten new tasks from 32 examples: their prompts fit"] is True
    assert met["Ten new tasks: false routes of others"] is False
    assert met["Whole prompt"] is None


def test_ten_tasks_of_the_data_are_no_extra_tasks_and_without_an_eleventh_there_are_no_false_routes() -> None:
    whole = {"accuracy": 0.99, "interval": [0.98, 1.0]}
    row = {"added": 10, "examples": 32, "new": whole, "lost": 0.0, "add_seconds": 2.0}
    own = {**row, "base": "without-0", "new_fit": 0.5, "false_routes": [0.05, 0.3]}
    extra = {**row, "base": "extra", "new_fit": 0.96, "false_routes": None}
    record: Any = {"router": {}, "scenarios": {"extension": {"add": [own, extra]}}}
    values = {target["name"]: target["value"] for target in judged(record)}
    assert values["Ten new tasks from 32 examples: their prompts fit"] == 0.96
    assert values["Ten new tasks: false routes of others"] is None


def test_the_page_has_every_section_and_picture(record: Path, tmp_path: Path) -> None:
    written = write_report(record, tmp_path)
    markdown = written.markdown.read_text()
    names = {picture.stem for picture in written.pictures}
    assert names == {
        "confusion-whole",
        "confusion-sentence",
        "lengths",
        "conversations",
        "reliability",
        "abstention",
        "false-routes",
    }
    assert all(f"({name}.svg)" in markdown for name in names)
    assert "Not measured" not in markdown.replace("## New tasks\n\nNot measured in this run.", "")
    for said in ("# The router on 4 tasks", "| Whole prompt of 6 tasks | at least 98.5 % |", "German around", "AUROC"):
        assert said in markdown
    assert written.html.read_text().count("<figure>") == len(names)
    again = write_report(record, tmp_path / "again")
    assert again.html.read_bytes() == written.html.read_bytes()


def test_a_page_of_one_scenario_says_what_was_not_measured(tmp_path: Path) -> None:
    bench_router(setting(Marks()), only=["timing"], file=tmp_path / "router.json")
    markdown = write_report(tmp_path / "router.json").markdown.read_text()
    assert markdown.count("Not measured in this run.") > 8
    assert "| A sentence, median |" in markdown


def test_a_record_of_a_later_format_is_refused(record: Path, tmp_path: Path) -> None:
    later = {**json.loads(record.read_text()), "format": 2}
    (tmp_path / "router.json").write_text(json.dumps(later))
    with pytest.raises(RecordError, match="record format 2"):
        write_report(tmp_path / "router.json")


def test_a_record_that_lacks_a_part_is_refused(record: Path, tmp_path: Path) -> None:
    cut = {key: value for key, value in json.loads(record.read_text()).items() if key not in ("data", "targets")}
    (tmp_path / "router.json").write_text(json.dumps(cut))
    with pytest.raises(RecordError, match="is damaged: it has no data, targets; measure the router again"):
        write_report(tmp_path / "router.json")


def test_the_command_trains_measures_and_writes(tmp_path: Path) -> None:
    for one in TASKS[:3]:
        write_task(tmp_path / "data" / one.name, one)
    for one in EXTRA:
        write_task(tmp_path / "extra" / one.name, one)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    call = ["bench", "router", "--data", "data", "--extra", "extra", "--tokenizer", "tokenizer", "--per-task", "4"]
    call += ["--only", "prompts,outside", "--json", "out/router.json", "--report", "page", "--work", "work"]
    call = [str(tmp_path / part) if part.split("/")[0] in PLACES else part for part in call]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "Random sentence" in result.stdout
    found = json.loads((tmp_path / "out" / "router.json").read_text())
    assert list(found["scenarios"]) == ["prompts", "outside"]
    assert (tmp_path / "page" / "report.html").is_file()
    again = CliRunner().invoke(app, [*call[:-2], "--router", str(tmp_path / "work" / "main"), "--overwrite"])
    assert again.exit_code == 0, (again.output, again.exception)
    measured = json.loads((tmp_path / "out" / "router.json").read_text())
    assert measured["router"]["given"] is True
    assert measured["router"]["seconds"] == found["router"]["seconds"]
    assert measured["scenarios"]["prompts"]["whole"] == found["scenarios"]["prompts"]["whole"]


def test_a_kept_router_is_used_for_the_same_tasks_and_settings_alone(tmp_path: Path) -> None:
    def trained(tasks: Sequence[Task], seed: int) -> tuple[Setting, str]:
        args = replace(ARGS, training=replace(ARGS.training, seed=seed))
        found = Setting(tasks, TOKENIZER, args, folder=tmp_path)
        return found, router_hash(found.main.router)

    _, kept = trained(TASKS[:2], 0)
    assert trained(TASKS[:2], 0)[1] == kept
    assert trained(TASKS[:2], 1)[1] != kept
    renamed, _ = trained([replace(task, name=f"{task.name}2") for task in TASKS[:2]], 1)
    assert renamed.main.router.names == ("sums2", "days2")


def test_another_router_or_tokenizer_makes_another_record() -> None:
    router = setting().main.router
    other = MiniMLP(router.names, TOKENIZER, calibration=Calibration(fit_threshold=1.0))
    byte = byte_tokenizer()
    byte.add_tokens(["ab"])
    settings = [
        Setting(TASKS, TOKENIZER, ARGS, router=Trained(router=router, seconds=None)),
        Setting(TASKS, TOKENIZER, ARGS, router=Trained(router=other, seconds=None)),
        Setting(TASKS, TOKENIZER, ARGS),
        Setting(TASKS, byte.backend_tokenizer, ARGS),
    ]
    assert len({setting.key() for setting in settings}) == len(settings)


def test_a_page_without_a_record_is_refused(tmp_path: Path) -> None:
    call = ["bench", "router", "--data", str(tmp_path), "--report", str(tmp_path / "page")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 1
    assert "give --json, too" in result.stderr


PLACES = ("data", "extra", "tokenizer", "out", "page", "work")
