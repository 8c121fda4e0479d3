"""The routing log: what the router decided, line by line, and what it read if one asks for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import HashRouter
from dlp_lora import Context, Engine, RoutingLog

MakeEngine = Callable[..., Engine]
GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}


def lines_of(log: RoutingLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]


def test_a_log_has_a_line_for_each_sentence_of_the_trace_and_no_text(make_engine: MakeEngine, tmp_path: Path) -> None:
    log = RoutingLog(tmp_path / "routing.jsonl")
    answers = make_engine(routing_log=log).generate(["Tell me a tale", "Why?"], **GREEDY)
    lines = lines_of(log)
    assert len({line["answer"] for line in lines}) == 2
    for answer, first in zip(answers, lines, strict=False):
        own = [line for line in lines if line["answer"] == first["answer"]]
        assert [line["sentence"] for line in own] == list(range(len(answer.trace)))
        for line, sentence in zip(own, answer.trace, strict=True):
            assert line["mixture"] == dict(sentence.mixture)
            assert line["probabilities"] == sentence.probabilities
            assert line["adapter"] == next(iter(sentence.mixture))
            assert (line["switched"], line["abstained"], line["of"]) == (sentence.switched, False, "answer")
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    assert "tale" not in log.path.read_text(encoding="utf-8")


def test_with_text_a_line_has_what_the_router_read(make_engine: MakeEngine, tmp_path: Path) -> None:
    log, router = RoutingLog(tmp_path / "routing.jsonl", with_text=True), HashRouter()
    engine = make_engine(routing_log=log, router=router, prompt_routing="whole")
    engine.generate("Tell me a täle", **GREEDY)
    assert [Context(**line["text"]) for line in lines_of(log)] == router.asked


@pytest.mark.parametrize("ask", ["stream", "model.generate", "start_row"])
def test_whoever_routes_is_logged(make_engine: MakeEngine, tmp_path: Path, ask: str) -> None:
    log = RoutingLog(tmp_path / "routing.jsonl")
    engine = make_engine(routing_log=log)
    ids = engine.tokenizer("Why?", return_tensors="pt")["input_ids"]
    if ask == "stream":
        with engine.stream("Why?", **GREEDY) as stream:
            num_sentences = [*stream][-1].sentence + 1
    elif ask == "model.generate":
        engine.model.generate(ids, **GREEDY)
        assert engine.last_trace is not None
        num_sentences = len(engine.last_trace)
    else:
        row = engine.start_row(ids[0].tolist())
        for token in engine.tokenizer("One, two and three.")["input_ids"]:
            row.push(token)
        num_sentences = len(row.decisions)
    assert num_sentences > 2
    assert [line["sentence"] for line in lines_of(log)] == list(range(num_sentences))


def test_sentences_of_a_prompt_are_logged_as_such(make_engine: MakeEngine, tmp_path: Path) -> None:
    log = RoutingLog(tmp_path / "routing.jsonl")
    engine = make_engine(routing_log=log, prompt_routing="sentences")
    answer = engine.generate("Tell me a tale", max_new_tokens=2, do_sample=False)
    of_prompt = [line for line in lines_of(log) if line["of"] == "prompt"]
    assert [line["mixture"] for line in of_prompt] == [dict(s.mixture) for s in answer.prompt_trace]


def test_what_the_caller_fixes_is_no_decision(make_engine: MakeEngine, tmp_path: Path) -> None:
    log = RoutingLog(tmp_path / "routing.jsonl")
    engine = make_engine(routing_log=log)
    engine.generate("Why?", mixture={"math": 1.0}, **GREEDY)
    with engine.disabled():
        engine.generate("Why?", **GREEDY)
    with engine.using(routing_log=None):
        engine.generate("Why?", **GREEDY)
    assert lines_of(log) == []


def test_a_decision_is_logged_once_where_beams_are_replayed(make_engine: MakeEngine, tmp_path: Path) -> None:
    log = RoutingLog(tmp_path / "routing.jsonl")
    engine = make_engine(routing_log=log)
    engine.generate("Why?", num_beams=2, **GREEDY)
    lines = lines_of(log)
    assert len({(line["answer"], line["sentence"], str(line["probabilities"])) for line in lines}) == len(lines)


def test_a_log_is_continued(make_engine: MakeEngine, tmp_path: Path) -> None:
    for _ in range(2):
        make_engine(routing_log=RoutingLog(tmp_path / "routing.jsonl")).generate("Why?", **GREEDY)
    lines = lines_of(RoutingLog(tmp_path / "routing.jsonl"))
    assert len({line["answer"] for line in lines}) == 2


def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the routing log .*no/routing.jsonl cannot be written: No such file"):
        RoutingLog(tmp_path / "no" / "routing.jsonl")


def test_an_answer_does_not_fail_with_its_log(
    make_engine: MakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    engine = make_engine(routing_log=RoutingLog(folder / "routing.jsonl"))
    (folder / "routing.jsonl").unlink()
    folder.rmdir()
    assert engine.generate("Why?", **GREEDY).text
    assert "routing.jsonl cannot be written: No such file" in caplog.text
