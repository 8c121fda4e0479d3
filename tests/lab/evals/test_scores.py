from typing import Any

import numpy as np
import pytest

from dlp_lora.lab.evals.metrics import bleu_of, bleu_statistics, rouge_each
from dlp_lora.lab.evals.record import compared, composites_of, merged, without_choices
from dlp_lora.lab.evals.scores import Values, ValuesByTask, difference, intervals, pooled, scores, tabulate
from dlp_lora.lab.records.run import Difference, Interval, RouterRecord, RunRecord, Serial, Trained, Training
from dlp_lora.tasks import Example, Task

REFERENCES = ["The cat sat on the mat today.", "A dog barked at the old postman.", "It rained all day in the north."]
TEXTS = ["The cat sat on a mat today.", "A dog barked at the old man.", "It snowed all day."]


def table(**tasks: list[float]) -> ValuesByTask:
    """A table of one metric, the mean of the given values."""
    return {
        name: {"accuracy": Values(np.array(each)[:, None] / len(each), lambda sums: sums[:, 0])}
        for name, each in tasks.items()
    }


def test_a_choice_task_is_scored_by_equality_and_by_the_likeliest_choice() -> None:
    example = Example(prompt="?", answer="a", choices=("a", "b"), references=("A!",))
    task = Task(name="t", train=(), test=(example,) * 4)
    texts = ["a.", " A!", "b", ""]
    likelihoods = [[-1.0, -2.0], [-3.0, -2.0], [-0.5, -0.6], [-2.0, -1.0]]
    rows = [
        {"task": "t", "index": i, "text": t, "likelihoods": own}
        for i, (t, own) in enumerate(zip(texts, likelihoods, strict=True))
    ]
    found = tabulate(reversed(rows), {"t": task}, {"t": "mcq"})
    assert scores(found) == {"t": {"accuracy": 0.5, "accuracy_loglik": 0.5}}
    for row in rows:
        del row["likelihoods"]
    assert scores(tabulate(rows, {"t": task}, {"t": "mcq"})) == {"t": {"accuracy": 0.5}}


def test_a_question_without_choices_is_counted_and_costs_the_others_nothing() -> None:
    chosen, free = Example(prompt="?", answer="a", choices=("a", "b")), Example(prompt="!", answer="a")
    task = Task(name="t", train=(), test=(chosen, free, chosen))
    rows: list[dict[str, Any]] = [{"task": "t", "index": i, "text": "a"} for i in range(3)]
    rows[0]["likelihoods"], rows[2]["likelihoods"] = [-1.0, -2.0], [-2.0, -1.0]
    assert scores(tabulate(rows, {"t": task}, {"t": "mcq"}))["t"] == {"accuracy": 1.0, "accuracy_loglik": 0.5}
    tasks = [task, Task(name="all", train=(), test=(chosen,)), Task(name="none", train=(), test=(free,))]
    assert without_choices(tasks, dict.fromkeys(("t", "all", "none"), "mcq")) == {"t": 1}
    assert without_choices(tasks, dict.fromkeys(("t", "all", "none"), "qa")) == {}


def test_a_free_task_is_scored_as_the_libraries_score_the_whole_of_it() -> None:
    task = Task(name="t", train=(), test=tuple(Example(prompt="?", answer=r) for r in REFERENCES))
    rows = [{"task": "t", "index": i, "text": text} for i, text in enumerate(TEXTS)]
    found = scores(tabulate(rows, {"t": task}, {"t": "qa"}))["t"]
    lists = [[r] for r in REFERENCES]
    assert found["bleu"] == pytest.approx(
        bleu_of(bleu_statistics(TEXTS, lists).sum(axis=0, keepdims=True))[0], abs=1e-4
    )
    assert found["rouge1"] == pytest.approx(np.mean([own.rouge1 for own in rouge_each(TEXTS, lists)]), abs=1e-4)
    assert found["rougeL"] == pytest.approx(np.mean([own.rougeL for own in rouge_each(TEXTS, lists)]), abs=1e-4)


def test_a_pool_is_the_mean_over_its_tasks_whatever_their_sizes() -> None:
    found = table(a=[1.0] * 2, b=[0.0] * 8)
    means, spread = pooled(found, ["a", "b"])
    assert means == {"accuracy": 0.5}
    assert spread == {"accuracy": (0.5, 0.5)}  # drawn again within each task


def test_a_task_without_answers_is_left_out_of_its_pool() -> None:
    found = table(a=[1.0] * 2, b=[0.0] * 8)
    assert pooled(found, ["a", "missing", "b"]) == pooled(found, ["a", "b"])
    assert pooled(found, ["missing"]) == ({}, {})
    other = table(a=[0.0] * 2, b=[0.0] * 8)
    assert difference(found, other, ["a", "missing", "b"])["accuracy"].value == 0.5


def test_a_pool_of_choice_and_a_free_one_of_the_same_size_are_both_kept() -> None:
    kinds = {"a": "mcq", "b": "mcq", "c": "qa", "d": "qa", "untested": "qa"}
    tables = {name: table(a=[score], b=[score], c=[0.5], d=[0.5]) for name, score in (("dlp", 1.0), ("oracle", 0.0))}
    found = compared(tables, kinds)
    for key in ("composites", "composite_intervals"):
        assert set(getattr(found, key)) == {"composite-2-mcq", "composite-2-qa"}
    assert found.composites["composite-2-mcq"] == {"dlp": {"accuracy": 1.0}, "oracle": {"accuracy": 0.0}}
    assert {name: own["accuracy"].value for name, own in found.differences["dlp - oracle"].items()} == {
        "composite-2-mcq": 1.0,
        "composite-2-qa": 0.0,
    }


def test_dlp_is_set_against_the_main_methods_and_all_others_against_dlp() -> None:
    scores_of = {"base": 0.0, "dlp": 0.75, "oracle": 1.0, "top1": 0.5}
    found = compared({name: table(a=[score]) for name, score in scores_of.items()}, {"a": "mcq"}).differences
    assert {pair: own["composite-1"]["accuracy"].value for pair, own in found.items()} == {
        "dlp - oracle": -0.25,
        "dlp - base": 0.75,
        "top1 - dlp": -0.25,
    }


def test_seeds_that_answered_no_serial_prompt_leave_the_mean_to_the_others() -> None:
    half = Serial(accuracy=0.5)
    records = [RunRecord(serial={"serial-2": own}) for own in ({"base": half}, {})]
    for order in (records, records[::-1]):
        assert merged(order, [0, 1]).serial == {"serial-2": {"base": half}}


def test_router_times_and_cut_answers_are_means_over_the_seeds() -> None:
    def of_seed(accuracy: float, seconds: float, cut: dict[str, float], wrong: dict[str, float]) -> RunRecord:
        trained = Trained(seconds=seconds, final_loss=0.5, num_examples=9)
        return RunRecord(
            cut_short={"dlp": cut},
            timings={"dlp": seconds},
            router=RouterRecord(accuracy=accuracy, seconds=seconds, confusion={"a": {"a": 3, **wrong}}),
            training=Training(adapters={"a": trained}),
            serial_left_out={"serial-3": 4} if wrong else {},
        )

    first, second = of_seed(0.5, 10.0, {"a": 3}, {"b": 1}), of_seed(1.0, 30.0, {"b": 2}, {})
    for records in ([first, second], [second, first]):
        found = merged(records, [0, 1])
        assert found.cut_short == {"dlp": {"a": 1.5, "b": 1.0}}
        assert found.timings == {"dlp": 20.0}
        assert found.router is not None
        assert (found.router.accuracy, found.router.ece, found.router.seconds) == (0.75, None, 20.0)
        assert found.router.confusion == {"a": {"a": 6, "b": 1}}
        assert found.training.adapters == {"a": Trained(seconds=20.0, final_loss=0.5, num_examples=9)}
        assert found.serial_left_out == {"serial-3": 2.0}
    assert merged([first], [0]) == first


def test_a_pool_is_called_after_its_size_where_that_says_which_it_is() -> None:
    tables = {"dlp": table(a=[1.0], b=[1.0], c=[0.5])}
    assert composites_of(tables, {"a": "mcq", "b": "mcq", "c": "qa"}) == {
        "composite-2": ["a", "b"],
        "composite-1": ["c"],
    }


def test_an_interval_holds_the_score_and_narrows_with_more_questions() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.integers(0, 2, 50).astype(float), rng.integers(0, 2, 5000).astype(float)
    found = intervals(table(few=list(few), many=list(many)))
    for name, each in (("few", few), ("many", many)):
        low, high = found[name]["accuracy"]
        assert low < each.mean() < high
        assert high - low == pytest.approx(2 * 1.96 * 0.5 / len(each) ** 0.5, rel=0.15)


def test_a_difference_takes_out_what_both_methods_share() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    ours, theirs = table(t=list(hard + 0.2 + 0.01 * rng.normal(size=200))), table(t=list(hard))
    found = difference(ours, theirs, ["t"])["accuracy"]
    assert found.interval is not None
    low, high = found.interval
    assert found.value == pytest.approx(0.2, abs=0.01)
    assert low < found.value < high
    assert high - low < 0.01
    assert difference(ours, ours, ["t"])["accuracy"] == Difference(value=0.0, interval=Interval(0.0, 0.0))
    assert difference(ours, table(t=[1.0, 2.0]), ["t"]) == {}
