"""Whatever comes, goes and switches meanwhile, each row is answered as by the engine alone."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from conftest import lively_model, make_adapter
from dlp_lora import Engine
from dlp_lora.engine.trace import Generation
from dlp_lora.errors import AdapterChangedError
from dlp_lora.serve.answer_builder import AnswerBuilder, resolved
from dlp_lora.serve.backend import BackendError, Request
from dlp_lora.serve.cache import SpareCache
from dlp_lora.serve.row import Row
from dlp_lora.serve.scheduler import Scheduler
from dlp_lora.serve.stream import EventStream
from serving import PROMPTS, alone, ask, double_engine, extra_adapters, read, timeless

MIXTURES: tuple[dict[str, float] | None, ...] = (
    None,
    None,
    {},
    {"math": 1.0},
    {"units": 0.7, "poems": 0.3},
    {"extra": 1.0},
    {"extra": 0.5, "math": 0.5},
)


def open_row(scheduler: Scheduler, request: Request) -> Row:
    stream = EventStream(lambda: scheduler.cancel(row))
    row = Row(AnswerBuilder(resolved(request), stream, request.sampling.max_tokens or 0))
    scheduler.add(row)
    return row


def finish(scheduler: Scheduler) -> None:
    """Has a scheduler work until nothing is left to do."""
    while scheduler.num_open:
        if not scheduler.turn():
            scheduler.wait(timeout_s=10)


class Serving(RuleBasedStateMachine):
    """Requests arrive, are cancelled and switch, and an adapter comes and goes, between any two turns."""

    engine: Engine
    extras: tuple[Path, ...]
    answers: ClassVar[dict[Any, Generation]]
    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(self.engine, max_batch=3, chunk_tokens=8, cache_mb=1.0)
        self.open: list[tuple[Row, Generation]] = []
        self.extra: Path | None = None

    @rule(
        target=rows,
        prompt=st.sampled_from(PROMPTS),
        mixture=st.sampled_from(MIXTURES),
        kv_policy=st.sampled_from(("recompute", "keep")),
        sampling=st.sampled_from(({}, {"max_tokens": 3}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.2})),
    )
    def arrive(self, prompt: str, mixture: dict[str, float] | None, kv_policy: str, sampling: dict[str, Any]) -> Row:
        if mixture and "extra" in mixture and self.extra is None:
            mixture = {"math": 1.0}
        request = ask(self.engine, prompt, mixture=mixture, settings={"kv_policy": kv_policy}, **sampling)
        key = prompt, repr(mixture), kv_policy, repr(sampling), self.extra
        if key not in self.answers:
            self.answers[key] = timeless(alone(self.engine, request))
        row = open_row(self.scheduler, request)
        if mixture and "extra" in mixture:
            self.scheduler.turn()  # it has its adapters from when its prompt is routed
            while row.state == "queued":
                self.scheduler.turn()
        self.open.append((row, self.answers[key]))
        return row

    @rule(num_turns=st.integers(1, 12))
    def work(self, num_turns: int) -> None:
        for _ in range(num_turns):
            self.scheduler.turn()

    @rule(row=consumes(rows))
    def leave(self, row: Row) -> None:
        row.answer.stream.cancel()

    @rule(i=st.integers(0, 1))
    @precondition(lambda self: self.extra is None)
    def add(self, i: int) -> None:
        self.engine.add_adapter(self.extras[i], "extra")
        self.extra = self.extras[i]

    @rule()
    @precondition(lambda self: self.extra is not None)
    def remove(self) -> None:
        self.engine.remove_adapter("extra")
        self.extra = None

    @invariant()
    def the_batch_holds_the_rows_that_decode(self) -> None:
        scheduler = self.scheduler
        stats = scheduler.stats()
        decoding = [row for row, _ in self.open if row.state == "decoding"]
        assert stats.decoding == len(decoding)
        assert stats.decoding + stats.reading <= scheduler.max_batch
        assert sorted(scheduler.batch_lengths) == sorted(len(row.tokens) - 1 for row in decoding)

    def teardown(self) -> None:
        finish(self.scheduler)
        for row, answer in self.open:
            done = read(row.answer.stream)
            if done.reason == "abort":
                assert answer.tokens[: len(done.generation.tokens)] == done.generation.tokens
            else:
                assert timeless(done.generation) == answer
            assert row.lease is None
            assert row.cache is None
        assert not self.scheduler.batch_lengths
        if self.extra is not None:
            self.engine.remove_adapter("extra")
        self.scheduler.close()


@pytest.fixture(scope="module")
def engine(lively_adapters: Path) -> Engine:
    return double_engine(lively_adapters)


@pytest.fixture
def make_scheduler(engine: Engine) -> Iterator[Callable[..., Scheduler]]:
    made: list[Scheduler] = []

    def make(**changes: Any) -> Scheduler:
        made.append(Scheduler(engine, **{"max_batch": 4, "chunk_tokens": 8, "cache_mb": 0.0, **changes}))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


@pytest.fixture(scope="module")
def extras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return extra_adapters(tmp_path_factory.mktemp("extras"))


@pytest.mark.parametrize("budget_mb", [None, 0.005], ids=["in memory", "on disk"])
def test_answers_do_not_depend_on_what_else_happens(
    lively_adapters: Path, extras: tuple[Path, ...], budget_mb: float | None
) -> None:
    class OfEngine(Serving):
        engine = double_engine(lively_adapters, budget_mb=budget_mb)
        answers: ClassVar[dict[Any, Generation]] = {}

    OfEngine.extras = extras
    run_state_machine_as_test(
        OfEngine,
        settings=settings(
            max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_while_a_prompt_is_read_each_row_gets_a_token_for_each_chunk(
    engine: Engine, make_scheduler: Callable[..., Scheduler]
) -> None:
    scheduler = make_scheduler()
    rows = [open_row(scheduler, ask(engine, PROMPTS[1], mixture={"math": 1.0}, max_tokens=60)) for _ in range(2)]
    work_until(scheduler, lambda: all(row.state == "decoding" for row in rows))
    long = open_row(scheduler, ask(engine, "x" * 100, mixture={"units": 1.0}))
    num_chunks = 0
    while long.state != "decoding":
        before, num_read = [row.answer.num_tokens for row in rows], scheduler.stats().num_read_tokens
        scheduler.turn()
        assert [row.answer.num_tokens for row in rows] == [n + 1 for n in before]
        num_chunks += scheduler.stats().num_read_tokens > num_read
        assert scheduler.stats().num_read_tokens - num_read <= 8
    assert num_chunks == 13
    finish(scheduler)


def test_contexts_are_read_again_before_new_prompts_but_every_fourth_chunk_is_one_of_these(
    engine: Engine, make_scheduler: Callable[..., Scheduler]
) -> None:
    scheduler = make_scheduler(max_batch=4, chunk_tokens=4)
    switching = [open_row(scheduler, ask(engine, PROMPTS[i], max_tokens=400)) for i in range(3)]
    work_until(scheduler, lambda: all(row.answer.num_tokens > 30 or row.has_ended for row in switching))
    new = open_row(scheduler, ask(engine, "x" * 80, mixture={"math": 1.0}))
    read = []
    while not new.has_answer:
        num_read, num_new = scheduler.stats().num_read_tokens, len(new.contents)
        scheduler.turn()
        if scheduler.stats().num_read_tokens > num_read:
            read.append(len(new.contents) > num_new)
    assert sum(not is_new for is_new in read) > 20  # contexts that were read again meanwhile
    gaps = "".join("n" if is_new else "." for is_new in read)
    assert "...." not in gaps.lstrip(".")
    for row in switching:
        row.answer.stream.cancel()
    finish(scheduler)


@pytest.mark.parametrize("state", ["queued", "waiting", "reading", "decoding"])
def test_a_reader_that_leaves_frees_its_row_in_the_next_turn(
    engine: Engine, make_scheduler: Callable[..., Scheduler], state: str
) -> None:
    scheduler = make_scheduler(max_batch=1)
    others = [open_row(scheduler, ask(engine, "x", mixture={}, max_tokens=3))] if state in ("queued", "waiting") else []
    row = open_row(scheduler, ask(engine, "x" * 40, mixture={"math": 1.0}))
    work_until(scheduler, lambda: row.state == state)
    row.answer.stream.cancel()
    row.answer.stream.cancel()
    scheduler.turn()
    assert row.has_ended
    assert row.lease is None
    assert scheduler.num_open == sum(not other.has_ended for other in others)
    assert read(row.answer.stream).reason == "abort"
    finish(scheduler)
    assert scheduler.stats().decoding == scheduler.stats().reading == scheduler.stats().waiting == 0


def test_a_row_whose_adapter_is_on_disk_waits_and_the_others_do_not(lively_adapters: Path) -> None:
    engine = double_engine(lively_adapters, budget_mb=1.0)
    scheduler = Scheduler(engine, max_batch=2, chunk_tokens=8, cache_mb=0.0)
    base = open_row(scheduler, ask(engine, "x", mixture={}, max_tokens=200, ignore_eos=True))
    work_until(scheduler, lambda: base.state == "decoding")
    with engine.bank.loading:  # as if the disk were slow
        row = open_row(scheduler, ask(engine, "x", mixture={"math": 1.0}))
        for _ in range(5):
            num_tokens = base.answer.num_tokens
            scheduler.turn()
            assert base.answer.num_tokens == num_tokens + 1
        assert row.state == "loading"
    work_until(scheduler, lambda: row.state == "decoding")
    assert engine.bank.store.num_misses == 1
    base.answer.stream.cancel()
    finish(scheduler)
    scheduler.close()


def test_a_row_whose_adapter_is_replaced_while_it_loads_fails_alone(lively_adapters: Path, tmp_path: Path) -> None:
    shelf = shutil.copytree(lively_adapters, tmp_path / "shelf")
    engine = double_engine(shelf, budget_mb=1.0)
    scheduler = Scheduler(engine, max_batch=2, chunk_tokens=8, cache_mb=1.0)
    base = open_row(scheduler, ask(engine, "x", mixture={}, max_tokens=200, ignore_eos=True))
    with engine.bank.loading:  # as if the disk were slow
        row = open_row(scheduler, ask(engine, "x", mixture={"math": 1.0}))
        work_until(scheduler, lambda: row.state == "loading")
        shutil.rmtree(shelf / "math")
        make_adapter(lively_model(), shelf / "math", seed=9, scale=0.5)
        engine.put_adapters({"math": shelf / "math"})
    work_until(scheduler, lambda: row.has_ended)
    with pytest.raises(AdapterChangedError):
        list(row.answer.stream)
    assert base.state == "decoding"
    finish(scheduler)
    scheduler.close()


@pytest.mark.parametrize("where", ["append", "remove", "take"])
def test_without_memory_for_a_row_that_joins_or_leaves_the_next_requests_are_answered(
    engine: Engine, make_scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    scheduler = make_scheduler(max_batch=3, cache_mb=1.0)
    requests = [
        ask(engine, prompt, mixture={"math": 1.0}, max_tokens=6 + 4 * i) for i, prompt in enumerate(PROMPTS[:3])
    ]
    waiting = [open_row(scheduler, request) for request in requests]
    work_until(scheduler, lambda: waiting[0].answer.num_tokens > 2)

    def fail(*_: Any, **__: Any) -> None:
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SpareCache, where, fail)
    waiting.append(open_row(scheduler, requests[0]))
    finish(scheduler)
    assert scheduler.failure is None
    failed = [row for row in waiting if row.state == "failed"]
    assert failed
    with pytest.raises(BackendError, match="out of memory"):
        list(failed[0].answer.stream)
    again = [open_row(scheduler, request) for request in requests]
    finish(scheduler)
    assert scheduler.num_open == 0
    for row, request in zip(again, requests, strict=True):
        assert timeless(read(row.answer.stream).generation) == timeless(alone(engine, request))


@pytest.mark.parametrize("kv_policy", ["recompute", "keep"])
def test_a_row_keeps_its_adapter_while_another_takes_its_name(
    engine: Engine, make_scheduler: Callable[..., Scheduler], extras: tuple[Path, ...], kv_policy: str
) -> None:
    scheduler = make_scheduler(cache_mb=1.0)
    rows, answers = [], []
    for path in extras:
        engine.add_adapter(path, "extra")
        request = ask(engine, PROMPTS[1], mixture={"extra": 1.0}, settings={"kv_policy": kv_policy})
        answers.append(timeless(alone(engine, request)))
        rows.append(open_row(scheduler, request))
        work_until(scheduler, lambda: rows[-1].answer.num_tokens > 2)
        engine.remove_adapter("extra")
    finish(scheduler)
    assert [timeless(read(row.answer.stream).generation) for row in rows] == answers
    assert answers[0].tokens != answers[1].tokens


def work_until(scheduler: Scheduler, holds: Callable[[], bool]) -> None:
    """Has a scheduler work until something holds."""
    while not holds():
        if not scheduler.turn():
            scheduler.wait(timeout_s=10)
