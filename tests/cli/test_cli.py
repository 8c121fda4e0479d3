import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from rich.console import Console
from transformers import StoppingCriteria, StoppingCriteriaList
from typer.main import get_command

import dlp_lora
from commands import json_lines, ok, run, visible
from conftest import CHAT_TEMPLATE, byte_tokenizer, lively_model, make_adapter
from dlp_lora.chat import Chat
from dlp_lora.cli.answerer import AnswererOptions, open_answerer
from dlp_lora.cli.app import app
from dlp_lora.cli.bench import COLUMNS, LABELS, cell, table_of_record
from dlp_lora.cli.common import EngineOptions, HubOptions, console
from dlp_lora.cli.generate import _fitting, routing_table, say_answer
from dlp_lora.cli.tables import show_table, tables
from dlp_lora.engine.prompts import encode_prompt
from dlp_lora.engine.streaming import Piece
from dlp_lora.lab.bench.suite import PRESETS
from dlp_lora.tasks import Example, Task, write_task

QUICK = ("--max-new-tokens", "8")
TASKS = ("days", "sums")


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    command = command or get_command(app)
    children = command.list_commands(None) if hasattr(command, "list_commands") else []
    if not children:
        yield path
    for name in children:
        yield from commands(command.get_command(None, name), (*path, name))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, task data, and what the commands made of them."""
    root = tmp_path_factory.mktemp("cli")
    lively_model().save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    for name, question in (("sums", "What is {} plus 1?"), ("days", "Which day follows day {}?")):
        examples = [Example(prompt=question.format(i), answer=f"The {name[:-1]} is {i + 1}.") for i in range(20)]
        task = Task(name=name, train=tuple(examples[:16]), test=tuple(examples[16:]))
        write_task(root / "data" / name, task)
    trained = ok(
        *("train-adapters", "--data", root / "data", "--out", root / "adapters", "--model", root / "model"),
        *("--batch-size", "8", "--r", "2", "--target-modules", "q_proj,v_proj", "--learning-rate", "0.05", "--json"),
    )
    assert [(row["name"], row["num_examples"]) for row in json_lines(trained)] == [("days", 16), ("sums", 16)]
    (report,) = json_lines(
        ok(
            *("train-router", "--data", root / "data", "--out", root / "router", "--model", root / "model"),
            *("--epochs", "8", "--json"),
        )
    )
    assert report["names"] == ["days", "sums"]
    ok("bundle", "--model", root / "model", "-a", root / "adapters", "-r", root / "router", "-o", root / "bundle")
    return root


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_the_help_of_every_command_has_an_example(command: tuple[str, ...]) -> None:
    assert f"dlp-lora {' '.join(command)}" in " ".join(ok(*command, "--help").replace("│", " ").split())
    assert "Example" in ok(*command, "--help")


HELPS = [(*command, "--help") for command in commands() if command[0] != "bench"]


@pytest.mark.parametrize("args", [("--help",), ("tasks",), *HELPS], ids=" ".join)
def test_help_needs_none_of_the_large_libraries(args: tuple[str, ...]) -> None:
    imported = imported_by(*args)
    assert "dlp_lora" in imported
    assert not imported & {"torch", "transformers", "peft", "jaxtyping", "numpy"}


def test_every_command_is_there() -> None:
    names = {" ".join(command) for command in commands()}
    assert names >= {"generate", "chat", "route", "bundle", "check", "export", "demo"}
    assert names >= {
        "train-adapter",
        "train-adapters",
        "train-router",
        "router-from-adapters",
        "bench decode",
        "bench switch",
        "bench suite",
    }


def test_generating_by_command_is_generating_by_engine(work: Path) -> None:
    engine = dlp_lora.load(work / "bundle")
    expected = engine.generate("What is 3 plus 1?", max_new_tokens=8, do_sample=False)
    (found,) = json_lines(ok("generate", "What is 3 plus 1?", "--bundle", work / "bundle", *QUICK, "--json"))
    assert found["prompt"] == "What is 3 plus 1?"
    assert found["text"] == expected.text
    assert [s["mixture"] for s in found["trace"]] == [dict(s.mixture) for s in expected.trace]


def test_an_answer_is_printed_as_it_is(work: Path) -> None:
    ask = ("generate", "A table:", "--bundle", work / "bundle", *QUICK, "--fixed", "")
    (found,) = json_lines(ok(*ask, "--json"))
    assert "\t" in found["text"].strip()  # a model of random weights says anything
    assert ok(*ask) == found["text"].strip() + "\n"


def test_the_parts_of_a_bundle_answer_as_the_bundle_does(work: Path) -> None:
    parts = ("--model", work / "model", "--adapters", work / "adapters", "--router", work / "router")
    assert ok("generate", "Hello", *parts, *QUICK) == ok("generate", "Hello", "--bundle", work / "bundle", *QUICK)


def test_prepacked_weights_give_the_same_answer(work: Path) -> None:
    ask = ("generate", "What is 3 plus 1?", "--bundle", work / "bundle", *QUICK)
    assert ok(*ask, "--prepack") == ok(*ask)


def test_json_lines_from_standard_input_are_answered_line_by_line(work: Path) -> None:
    lines = [
        {"prompt": "What is 3 plus 1?", "id": 7},
        {"messages": [{"role": "user", "content": "Hello"}]},
    ]
    stdin = "\n\n".join(map(json.dumps, lines)) + "\n"
    first, second = json_lines(ok("generate", "--bundle", work / "bundle", *QUICK, stdin=stdin))
    assert first["id"] == 7
    (alone,) = json_lines(ok("generate", "What is 3 plus 1?", "--bundle", work / "bundle", *QUICK, "--json"))
    assert first["text"] == alone["text"]
    (chat,) = json_lines(ok("generate", "Hello", "--chat", "--bundle", work / "bundle", *QUICK, "--json"))
    assert second["text"] == chat["text"]
    assert second["messages"] == lines[1]["messages"]


def test_json_lines_hand_the_chat_template_all_that_it_reads(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "bundle", tmp_path / "bundle")
    shutil.copytree(work / "model", tmp_path / "model")
    template = "{% if tools %}{{ 'TOOLS' }}{% endif %}{% if shouts %}{{ 'LOUD' }}{% endif %}" + str(CHAT_TEMPLATE)
    byte_tokenizer(chat_template=template).save_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "Hello"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    lines: list[dict[str, Any]] = [
        {"messages": chat},
        {"messages": parts},
        {"messages": chat, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": chat, "chat_template_kwargs": {"shouts": True}},
        {"messages": [*chat, {"role": "assistant", "content": "I am"}]},
        {"messages": [*chat, {"role": "assistant", "content": "I am"}], "continue_final_message": False},
    ]
    ask = ("generate", "--bundle", tmp_path / "bundle", "--model", tmp_path / "model", *QUICK)
    plain, in_parts, *others = json_lines(ok(*ask, stdin="\n".join(map(json.dumps, lines))))
    assert plain["text"] == in_parts["text"]
    assert len({plain["text"], *(other["text"] for other in others)}) == 5
    kwargs = ("--chat-template-kwargs", '{"shouts": true}')
    (shouted,) = json_lines(ok(*ask, *kwargs, stdin=json.dumps(lines[0])))
    assert shouted["text"] == others[1]["text"]
    assert ok(*ask, *kwargs, "--chat", "Hello") == shouted["text"].strip() + "\n"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "Hello", "tools": [{}]}, "line 1: tools: only chats have them"),
        ({"messages": [{"role": "user", "content": "Hi"}], "tools": {}}, "line 1: tools must be a list"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 1: the content of a message must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "line 1: a message holds a part of type"),
    ],
)
def test_a_line_that_no_template_reads_is_named(work: Path, line: dict[str, Any], reason: str) -> None:
    assert reason in " ".join(run("generate", "-b", work / "bundle", *QUICK, stdin=json.dumps(line)).stderr.split())


def test_the_routing_shows_the_adapters_of_each_sentence(work: Path) -> None:
    shown = ok(
        "generate", "Which day follows day 3?", "--bundle", work / "bundle", *QUICK, "--show-routing", "--p", "1"
    )
    assert "sentence" in shown
    assert "days" in shown
    assert "%" in shown


def test_each_sentence_of_a_prompt_may_have_its_own_adapters(work: Path) -> None:
    ask = ("generate", "Which day follows day 3? What is 3 plus 1?", "--bundle", work / "bundle", *QUICK)
    (found,) = json_lines(ok(*ask, "--prompt-routing", "sentences", "--json"))
    assert [s["text"] for s in found["prompt_trace"]] == ["Which day follows day 3? ", "What is 3 plus 1?"]
    shown = ok(*ask, "--prompt-routing", "sentences", "--show-routing")
    assert "prompt's sentence" in shown
    assert "Which day follows day 3?" in " ".join(shown.split())
    assert "prompt's sentence" not in ok(*ask, "--show-routing")


def test_paths_and_answers_are_printed_as_they_are(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "[bold]mixed[/x]"
    done = run("export", "sums=0.5,days", "--bundle", work / "bundle", "--out", out)
    assert (done.exit_code, str(out) in done.stderr.replace("\n", "")) == (0, True)
    sentence = dlp_lora.Sentence(
        text="fe80:a:b", start=0, end=1, probabilities={}, mixture=dlp_lora.Mixture(), switched=False, abstained=False
    )
    with console.capture() as shown:
        show_table(routing_table((sentence,)))
    assert "fe80:a:b" in shown.get()


@pytest.mark.parametrize("text", ["\\", "\\[ x \\]", "\\\\", "[red] \\[red]", "a[/]"])
def test_backslashes_and_brackets_of_an_answer_are_printed_as_they_are(text: str) -> None:
    class Said(list[Piece]):
        def __enter__(self) -> "Said":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    sentence = dlp_lora.Sentence(
        text=text, start=0, end=1, probabilities={}, mixture=dlp_lora.Mixture(), switched=False, abstained=False
    )
    with console.capture() as shown:
        say_answer(cast(Any, Said([Piece.of(text, dlp_lora.Mixture(), 0)])), {})
    assert shown.get() == f"{text}\n"
    with console.capture() as shown:
        show_table(routing_table((sentence,)))
    assert text in [line.split("  ")[0] for line in shown.get().splitlines()]


def test_spaces_between_words_of_an_option_are_none_of_them(work: Path, tmp_path: Path) -> None:
    where = ("--data", work / "data", "--tasks", "sums, days", "--out", tmp_path, "--model", work / "model")
    ok("train-adapters", *where, "--batch-size", "16", "--target-modules", "q_proj, v_proj")
    for name in ("sums", "days"):
        assert set(json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"]) == {
            "q_proj",
            "v_proj",
        }


@pytest.mark.parametrize(
    "command, goes_on", [(("generate", "Hi"), False), (("reproduce", "--data", "d", "--out", "o"), True)]
)
def test_an_interrupt_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], goes_on: bool
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dlp_lora.cli.answerer.open_engine", interrupted)
    monkeypatch.setattr("dlp_lora.tasks.hub.read_data", interrupted)
    done = run(*command)
    assert done.exit_code == 130
    assert ("run it again to continue" in done.stderr) is goes_on


def test_a_bundle_of_a_nameless_base_takes_a_task_with_its_model_named(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "bundle", tmp_path / "bundle")
    file = tmp_path / "bundle" / "bundle.json"
    file.write_text(
        json.dumps(
            {
                **json.loads(file.read_text()),
                "base_model": {"name": "", "origin": "memory", "path": None, "fingerprint": None},
            }
        )
    )
    shutil.copytree(work / "adapters" / "sums", tmp_path / "more")
    task = (
        "add-task",
        "-b",
        tmp_path / "bundle",
        "-a",
        tmp_path / "more",
        "--examples",
        work / "data/sums/train.jsonl",
    )
    assert "was made for a model without a name; give --model" in run(*task).stderr
    ok(*task, "--model", work / "model")
    assert (tmp_path / "bundle" / "adapters" / "more").is_dir()


def test_a_fixed_mixture_needs_no_router(work: Path) -> None:
    parts = ("--model", work / "model", "--adapters", work / "adapters")
    (found,) = json_lines(ok("generate", "Hi", *parts, "--fixed", "sums=0.25,days", *QUICK, "--json"))
    assert found["trace"][0]["mixture"] == {"sums": 0.25, "days": 1.0}
    (base,) = json_lines(ok("generate", "Hi", *parts, "--fixed", "", *QUICK, "--json"))
    assert base["trace"][0]["mixture"] == {}


def test_a_seed_samples_the_same_answer_again(work: Path) -> None:
    ask = ("generate", "Hi", "--bundle", work / "bundle", "--max-new-tokens", "16", "--json", "--seed")
    one, again, other = (json_lines(ok(*ask, seed))[0]["text"] for seed in ("1", "1", "2"))
    assert one == again != other


@pytest.mark.parametrize("source", ["router", "bundle"])
def test_routing_says_which_adapters_a_prompt_would_use(work: Path, source: str) -> None:
    lines: list[dict[str, str]] = [{"prompt": "What is 18 plus 1?"}, {"prompt": "Which day follows day 18?"}]
    lines.append({**lines[0], "answer": "The sum is 19. "})
    found = json_lines(ok("route", f"--{source}", work / source, stdin="\n".join(map(json.dumps, lines))))
    assert len(found) == 3
    for row in found:
        assert set(row) == {"probs", "mixture", "confidence", "fits", "abstained"}
        assert set(row["probs"]) == set(TASKS)
        assert sum(row["probs"].values()) == pytest.approx(1, abs=1e-5)
        assert 0.5 < row["fits"] < 1 + 1e-5
        assert row["confidence"] == max(row["probs"].values())
        assert row["abstained"] is False
        assert sum(row["mixture"].values()) == pytest.approx(1)
    assert [max(row["probs"], key=row["probs"].get) for row in found[:2]] == ["sums", "days"]
    assert found[2]["probs"] != found[0]["probs"]


def imported_by(*args: str | Path) -> set[str]:
    command = [sys.executable, "-X", "importtime", "-m", "dlp_lora", *map(str, args)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {line.rsplit("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}


@pytest.mark.parametrize("source", ["router", "bundle"])
def test_routing_by_a_mini_mlp_imports_no_model_library(work: Path, source: str) -> None:
    imported = imported_by("route", "Hi", f"--{source}", work / source)
    assert "torch" in imported
    assert not imported & {"transformers", "peft"}


def test_a_check_against_a_model_in_a_folder_imports_no_torch(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(work / "model", tmp_path / "SmolLM2-135M-Instruct")
    monkeypatch.setenv("DLP_LORA_CACHE", str(tmp_path))  # of the default model
    for model in ((), ("--model", work / "model")):
        imported = imported_by("check", work / "adapters", *model)
        assert "dlp_lora" in imported
        assert not imported & {"torch", "transformers", "peft"}


def test_routing_one_prompt_is_what_the_engine_does_first(work: Path) -> None:
    (found,) = json_lines(ok("route", "What is 18 plus 1?", "--bundle", work / "bundle", "--p", "0.99999"))
    engine = dlp_lora.load(work / "bundle", policy=dlp_lora.TopP(0.99999))
    first = engine.generate("What is 18 plus 1?", max_new_tokens=2, do_sample=False).trace[0]
    assert found["probs"] == pytest.approx(first.probabilities)
    assert found["mixture"] == pytest.approx(dict(first.mixture))


def test_a_bundle_keeps_its_policy(work: Path, tmp_path: Path) -> None:
    ok(
        *("bundle", "--model", work / "model", "-a", work / "adapters", "-r", work / "router", "-o", tmp_path / "b"),
        *("--p", "0.9", "--min-confidence", "1", "--weighting", "paper", "--unsure", "keep", "--margin", "0.3"),
        *("--min-tokens", "5", "--kv-policy", "recompute", "--prompt-routing", "sentences"),
    )
    engine = dlp_lora.load(tmp_path / "b")
    assert engine.policy == dlp_lora.TopP(0.9, min_confidence=1.0, weighting="paper")
    assert engine.switching == dlp_lora.Switching(min_tokens=5, margin=0.3, unsure="keep")
    assert (engine.kv_policy, engine.prompt_routing) == ("recompute", "sentences")
    for more in ((), ("--p", "0.5")):  # another p changes nothing else
        (found,) = json_lines(ok("route", "What is 18 plus 1?", "--bundle", tmp_path / "b", *more))
        assert found["abstained"] is True
        assert found["mixture"] == {}
        (said,) = json_lines(ok("generate", "What is 18 plus 1?", "-b", tmp_path / "b", *QUICK, "--json", *more))
        assert said["trace"][0]["mixture"] == {}


@pytest.mark.usefixtures("unchecked")
def test_a_bundle_of_an_unknown_setting_is_not_made(work: Path, tmp_path: Path) -> None:
    parts = ("--model", work / "model", "-a", work / "adapters", "-o", tmp_path / "b")
    assert "kv_policy must be 'keep' or 'recompute'" in run("bundle", *parts, "--kv-policy", "forget").stderr
    assert not (tmp_path / "b").exists()


def test_a_last_message_of_the_assistant_is_the_answer_so_far(work: Path) -> None:
    chat = [{"role": "user", "content": "What is 18 plus 1?"}, {"role": "assistant", "content": "The sum is 19. "}]
    lines: list[dict[str, Any]] = [{"messages": chat}, {"prompt": chat[0]["content"], "answer": chat[1]["content"]}]
    one, other = json_lines(ok("route", "--router", work / "router", stdin="\n".join(map(json.dumps, lines))))
    assert one == other


def test_an_answer_so_far_is_read_as_while_it_is_written(work: Path) -> None:
    line = {"prompt": "What is 18 plus 1?", "answer": "It is 19.\nSo"}
    (found,) = json_lines(ok("route", "--router", work / "router", stdin=json.dumps(line)))
    router = dlp_lora.MiniMLP.from_pretrained(work / "router")
    (row,) = router.probabilities([dlp_lora.Context(line["prompt"], "It is 19.\n", "So")]).tolist()
    assert found["fits"] == pytest.approx(sum(row))
    assert list(found["probs"].values()) == pytest.approx([p / sum(row) for p in row])


def test_routing_with_a_bundle_asks_for_a_router_of_its_adapters(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "bundle", tmp_path / "bundle")
    file = tmp_path / "bundle" / "bundle.json"
    config = json.loads(file.read_text())
    del config["adapters"]["days"]
    file.write_text(json.dumps(config))
    assert "the router knows days, which no adapter is named" in run("route", "Hi", "-b", tmp_path / "bundle").stderr


def test_checking_adapters_that_fit_ends_well(work: Path) -> None:
    shown = ok("check", work / "adapters", "--model", work / "model")
    assert shown.count("fits") == 2
    rows = json.loads(ok("check", work / "adapters", "--model", work / "model", "--json"))
    assert [(row["name"], row["fits"], row["rank"], row["targets"]) for row in rows] == [
        (name, True, 2, ["q_proj", "v_proj"]) for name in TASKS
    ]


def test_checking_an_adapter_that_does_not_fit_ends_with_code_one(work: Path, tmp_path: Path) -> None:
    make_adapter(lively_model(), tmp_path / "good", seed=1)
    make_adapter(lively_model(), tmp_path / "bad", seed=1, use_dora=True)
    result = run("check", tmp_path, "--model", work / "model", "--json")
    assert result.exit_code == 1
    assert [(row["name"], row["fits"]) for row in json.loads(result.stdout)] == [("bad", False), ("good", True)]
    assert "refused" in run("check", tmp_path, "--model", work / "model").stdout


def test_an_exported_mixture_is_loaded_by_peft(work: Path, tmp_path: Path) -> None:
    ok("export", "sums=0.6,days=0.4", "--bundle", work / "bundle", "--out", tmp_path / "mixed")
    inputs = {"input_ids": torch.tensor([[5, 77, 12, 200]])}
    engine = dlp_lora.load(work / "bundle")
    with torch.no_grad(), engine.fixed({"sums": 0.6, "days": 0.4}):
        ours = engine.model(**inputs).logits
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(lively_model(), tmp_path / "mixed").eval()(**inputs).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("route", "Hi", "--bundle", "{bundle}", "--adapter-revision", "v1"), "route reads no adapters"),
        (
            ("chat", "--bundle", "{bundle}", "--raw", "--chat-template-kwargs", '{"x": 1}'),
            "--raw uses no chat template",
        ),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(work: Path, words: tuple[str, ...], message: str) -> None:
    result = run(*(word.replace("{bundle}", str(work / "bundle")) for word in words))
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("raw", [(), ("--raw",)], ids=["template", "raw"])
def test_chatting_answers_each_line_until_an_empty_one(work: Path, raw: tuple[str, ...]) -> None:
    shown = ok("chat", "--bundle", work / "bundle", *QUICK, *raw, stdin="Hello\nAgain\n\nnever read\n")
    assert shown.startswith("■ days  ■ sums  ■ base model")
    engine = dlp_lora.load(work / "bundle")
    prompt: Any = "Hello" if raw else [{"role": "user", "content": "Hello"}]
    assert visible(engine.generate(prompt, max_new_tokens=8).text) in visible(shown)


def test_a_chat_goes_on_in_a_full_context(work: Path) -> None:
    lines = "".join(f"red green blue cyan pink grey gold lime {i} please tell me more of it\n" for i in range(9))
    done = run("chat", "--bundle", work / "bundle", "--max-new-tokens", "40", stdin=lines)
    assert done.exit_code == 0
    assert "context of 512 tokens is full: the 2 oldest messages are left out" in " ".join(done.stderr.split())


def test_answers_that_may_fill_the_context_make_a_chat_forget_nothing_before(work: Path) -> None:
    with open_answerer(EngineOptions(bundle=str(work / "bundle")), HubOptions(), AnswererOptions()) as answerer:
        turns = Chat(messages=[{"role": role, "content": "Hello"} for role in ("user", "assistant", "user")])
        for max_new_tokens in (40, 511, 4096):
            kept, room = _fitting(answerer, turns, max_new_tokens)
            assert len(kept.messages) == 3
            assert room == min(max_new_tokens, 512 - len(encode_prompt(answerer.tokenizer, turns).tokens))


@pytest.mark.parametrize(
    "error, is_shown",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (RuntimeError("a fault of ours"), False),
    ],
    ids=["Python", "GPU", "CPU", "other"],
)
def test_a_machine_that_is_too_small_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_shown: bool
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("dlp_lora.cli.answerer.open_engine", fails)
    done = run("generate", "Hi")
    assert done.exit_code == 1
    assert (done.exception is error) is not is_shown
    assert done.stderr.startswith("error: out of memory: ") is is_shown


def test_a_question_that_cannot_be_answered_ends_neither_the_chat_nor_what_was_said(work: Path) -> None:
    done = run("chat", "--bundle", work / "bundle", *QUICK, stdin=f"Hello\n{'long ' * 200}\nAgain\n")
    assert done.exit_code == 0
    assert done.stderr.count("error: the question alone fills the model's context") == 1
    engine = dlp_lora.load(work / "bundle")
    said = engine.generate([{"role": "user", "content": "Hello"}], max_new_tokens=8).text
    chat = [("user", "Hello"), ("assistant", said), ("user", "Again")]
    answer = engine.generate([{"role": role, "content": text} for role, text in chat], max_new_tokens=8)
    assert visible(answer.text) in visible(done.stdout)


def test_ctrl_c_stops_an_answer_and_not_the_chat(work: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
    engine = dlp_lora.load(work / "bundle")

    class Interrupting(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if input_ids.shape[1] == num_tokens + 4:
                os.kill(os.getpid(), signal.SIGINT)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    num_tokens = len(engine.tokenizer("Hello")["input_ids"])
    stopping = StoppingCriteriaList([Interrupting()])
    text = say_answer(engine.stream("Hello", max_new_tokens=400, do_sample=False, stopping_criteria=stopping), {})
    whole = engine.generate("Hello", max_new_tokens=400, do_sample=False).text
    signal.signal(signal.SIGINT, before)
    assert text != whole
    assert whole.startswith(text)


def test_chatting_ends_with_its_input(work: Path) -> None:
    assert ok("chat", "--bundle", work / "bundle", *QUICK, "--raw", stdin="").count("\n") == 1


def test_training_again_finds_the_adapters_there(work: Path) -> None:
    before = (work / "adapters" / "sums" / "adapter_model.safetensors").stat().st_mtime_ns
    rows = json_lines(
        ok(
            *("train-adapter", work / "data" / "sums", "--out", work / "adapters", "--model", work / "model"),
            *("--batch-size", "8", "--r", "2", "--target-modules", "q_proj,v_proj", "--learning-rate", "0.05"),
            "--json",
        )
    )
    assert [(row["name"], row["was_there"]) for row in rows] == [("sums", True)]
    assert (work / "adapters" / "sums" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_names_and_lengths_of_all_tasks_are_checked_before_one_is_trained(work: Path, tmp_path: Path) -> None:
    for name, prompt in (("z=b", "Why?"), ("zeta", "long " * 400)):
        shutil.copytree(work / "data" / "sums", tmp_path / name / "sums")
        (tmp_path / name / name).mkdir()
        (tmp_path / name / name / "train.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "Yes."}) + "\n")
        out = tmp_path / f"{name} out"
        done = run("train-adapters", "--data", tmp_path / name, "--out", out, "--model", work / "model")
        assert done.exit_code == 1
        assert name in done.stderr
        assert not list(tmp_path.rglob("*.safetensors"))


def test_a_task_folder_can_be_the_one_one_is_in(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work / "data" / "days")
    ok("train-adapter", ".", "--out", tmp_path, "--model", work / "model", "--batch-size", "16")
    assert (tmp_path / "days" / "adapter_config.json").is_file()


def test_decisions_are_logged_and_corrected_ones_are_learned(work: Path, tmp_path: Path) -> None:
    log, prompt = tmp_path / "routing.jsonl", "The day after the sum of days, please"
    ask = ("generate", prompt, "--bundle", work / "bundle", *QUICK, "--json")
    (answer,) = json_lines(ok(*ask, "--log-routing", log))
    lines = json_lines(log.read_text())
    assert [line["mixture"] for line in lines] == [sentence["mixture"] for sentence in answer["trace"]]
    assert not any("text" in line for line in lines)
    log.unlink()
    ok(*ask, "--log-routing", log, "--log-text")
    first = json_lines(log.read_text())[0]
    assert first["text"] == {"prompt": prompt, "answer": "", "sentence": "", "history": ""}
    other = "sums" if first["adapter"] == "days" else "days"
    log.write_text(json.dumps({**first, "adapter": other}) + "\n")
    train = ("train-router", "--data", work / "data", "--out", tmp_path / "router", "--model", work / "model")
    ok(*train, "--epochs", "8", "--routed", log)
    (routed,) = json_lines(ok("route", prompt, "--router", tmp_path / "router"))
    assert next(iter(routed["mixture"])) == other


def test_a_chat_is_logged(work: Path, tmp_path: Path) -> None:
    log = tmp_path / "routing.jsonl"
    ok("chat", "--bundle", work / "bundle", *QUICK, "--log-routing", log, stdin="Hello\n")
    assert [line["sentence"] for line in json_lines(log.read_text())][:1] == [0]


def test_the_router_is_reported_for_people_too(work: Path, tmp_path: Path) -> None:
    args = ("train-router", "--data", work / "data", "--out", tmp_path / "router", "--tokenizer", work / "model")
    shown = ok(*args, "--epochs", "2")
    assert "held-out accuracy" in shown
    assert "calibration error" in shown
    assert json.loads((tmp_path / "router" / "report.json").read_text())["num_test"] == 8


ERRORS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "text without a log": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--log-text"),
        "",
        "--log-text writes into the file of --log-routing",
    ),
    "a log in no folder": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--log-routing", "{work}/no/log"),
        "",
        "no/log cannot be written: No such file",
    ),
    "a log that is none": (
        ("train-router", "--data", "{work}/data", "--out", "{work}/out", "--routed", "{work}/none"),
        "",
        "none cannot be read: No such file",
    ),
    "the revision of a folder": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--revision", "v1"),
        "",
        "bundle is a folder, which has no revision 'v1'",
    ),
    "no bundle": (("generate", "Hi", "--bundle", "{work}/nothing"), "", "nothing is not a folder"),
    "no bundle to route": (("route", "Hi", "--bundle", "{work}/nothing"), "", "nothing is not a folder"),
    "not a bundle": (("generate", "Hi", "--bundle", "{work}/data"), "", "data is not a bundle"),
    "nothing to load": (("generate", "Hi"), "", "give --bundle, or --adapters and --router"),
    "bundle and adapters": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--adapters", "{work}/adapters"),
        "",
        "leave --adapters and --router out",
    ),
    "not JSON": (("generate", "--bundle", "{work}/bundle"), "\n{{oops\n", "standard input, line 2: not JSON"),
    "no prompt": (("generate", "--bundle", "{work}/bundle"), '{{"text": 1}}\n', "standard input, line 1: expected"),
    "a number": (("generate", "--bundle", "{work}/bundle"), '{{"prompt": 1}}\n', "standard input, line 1: expected"),
    "a list": (
        ("generate", "--bundle", "{work}/bundle"),
        '{{"prompt": ["a"]}}\n',
        "standard input, line 1: expected",
    ),
    "bad messages": (
        ("generate", "--bundle", "{work}/bundle"),
        '{{"messages": [{{"role": "user"}}]}}\n',
        "standard input, line 1: the content of a message must be a string or parts of text",
    ),
    "bad answer": (
        ("route", "--router", "{work}/router"),
        '{{"prompt": "a", "answer": 1}}\n',
        "standard input, line 1: expected",
    ),
    "half a character": (
        ("route", "--router", "{work}/router"),
        '{{"prompt": "a \\ud800 b"}}\n',
        "must be Unicode, got half a character in 'a \\ud800 b'",
    ),
    "half a character to answer": (
        ("generate", "--bundle", "{work}/bundle"),
        '\n\n{{"prompt": "a \\ud800 b"}}\n',
        "standard input, line 3: a prompt must be Unicode, got half a character in 'a \\ud800 b'",
    ),
    "adapter twice": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--fixed", "sums=0.5,days,sums=0.5"),
        "",
        "'sums' is in the mixture twice; give each adapter one weight",
    ),
    "tokenizer beside an encoder": (
        (
            *("train-router", "--data", "{work}/data", "--out", "{work}/out", "--router-kind", "encoder"),
            *("--encoder", "{work}/model", "--tokenizer", "{work}/model"),
        ),
        "",
        "an encoder has its own tokenizer; leave --tokenizer or --encoder out",
    ),
    "empty prompt": (("generate", " ", "--bundle", "{work}/bundle"), "", "the prompt is empty"),
    "unknown adapter": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--fixed", "maths=1"),
        "",
        "no adapter maths; there are days, sums",
    ),
    "bad mixture": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--fixed", "sums=much"),
        "",
        "'sums=much' is not NAME=WEIGHT",
    ),
    "unknown adapter to export": (
        ("export", "maths", "--bundle", "{work}/bundle", "--out", "{work}/out"),
        "",
        "no adapter maths",
    ),
    "no data": (
        ("train-adapters", "--data", "{work}/nothing", "--out", "{work}/out", "--model", "{work}/model"),
        "",
        "no folder",
    ),
    "no data for a router": (
        ("train-router", "--data", "{work}/nothing", "--out", "{work}/out", "--model", "{work}/model"),
        "",
        "no folder",
    ),
    "one task for a router": (
        (
            *("train-router", "--data", "{work}/data", "--out", "{work}/out"),
            *("--tokenizer", "{work}/model", "--tasks", "sums"),
        ),
        "",
        "give at least two task folders",
    ),
    "unknown preset": (
        ("train-adapters", "--data", "{work}/data", "--out", "{work}/out", "--preset", "mine"),
        "",
        "no preset 'mine'; choose default or paper",
    ),
    "unknown format": (
        ("train-adapters", "--data", "{work}/data", "--out", "{work}/out", "--prompt-format", "mine"),
        "",
        "prompt_format must be one of",
    ),
    "other settings": (
        ("train-adapter", "{work}/data/sums", "--out", "{work}/adapters", "--model", "{work}/model", "--seed", "5"),
        "",
        "was trained with other settings",
    ),
    "no model": (("check", "{work}/adapters", "--model", "{work}/nothing"), "", "cannot be read"),
    "no adapters": (("check", "{work}/data", "--model", "{work}/model"), "", "holds no adapter"),
    "unknown weighting": (
        ("bundle", "--model", "{work}/model", "-a", "{work}/adapters", "-o", "{work}/out", "--weighting", "mine"),
        "",
        "weighting must be one of",
    ),
    "router and bundle": (
        ("route", "Hi", "--router", "{work}/router", "--bundle", "{work}/bundle"),
        "",
        "give --router or --bundle, and not both",
    ),
    "data in the way": (
        ("train-adapters", "--data", "{work}/data", "--out", "{work}/data", "--model", "{work}/model"),
        "",
        "is no adapter, and would be lost",
    ),
    "a router over a bundle": (
        ("train-router", "--data", "{work}/data", "--out", "{work}/bundle", "--model", "{work}/model"),
        "",
        "has no router_config.json, so it is something else",
    ),
    "a bundle over adapters": (
        ("bundle", "--model", "{work}/model", "-a", "{work}/adapters", "-o", "{work}/adapters"),
        "",
        "has no bundle.json, so it is something else",
    ),
    "an export over adapters": (
        ("export", "sums", "--bundle", "{work}/bundle", "--out", "{work}/adapters"),
        "",
        "has no adapter_config.json, so it is something else",
    ),
    "unknown device": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--device", "abacus"),
        "",
        "there is no device 'abacus' here",
    ),
    "missing device": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--device", "cuda:99"),
        "",
        "there is no device 'cuda:99' here",
    ),
    "unknown dtype": (("bench", "decode", "--model", "{work}/model", "--dtypes", "int3"), "", "no dtype 'int3'"),
    "sizes in words": (
        ("bench", "bank", "--sizes", "1,two"),
        "",
        "--sizes takes whole numbers with commas between them",
    ),
    "unknown preset of the suite": (
        ("bench", "suite", "--out", "{work}/suite", "--preset", "tpu"),
        "",
        "choose cpu or gpu",
    ),
    "unknown benchmark": (
        ("bench", "suite", "--model", "{work}/model", "--out", "{work}/suite", "--only", "speed"),
        "",
        "no benchmark 'speed'; there are decode, decode_batch8",
    ),
    "a mixture without a weight": (
        ("generate", "Hi", "--bundle", "{work}/bundle", "--fixed", "sums="),
        "",
        "'sums=' is not NAME=WEIGHT",
    ),
    "a record in the place of a folder": (
        ("bench", "decode", "--model", "{work}/model", "--json", "{work}/data"),
        "",
        "data is a folder; name a file in it",
    ),
    "a record of a router in the place of a folder": (
        ("bench", "router", "--data", "{work}/data", "--json", "{work}/data"),
        "",
        "data is a folder; name a file in it",
    ),
    "a revision of a bundle's base beside a router": (
        ("route", "Hi", "--router", "{work}/router", "--base-revision", "v1"),
        "",
        "--base-revision is for a bundle; use --revision",
    ),
    "nothing to look at": (
        ("serve", "--adapters", "{work}/adapters", "--model", "{work}/model", "--port", "0", "--watch-s", "1"),
        "",
        "--watch-s looks at a bundle's folder; give one with --bundle",
    ),
    "unknown picture": (
        ("bench", "decode", "--model", "{work}/model", "--plot", "it.txt"),
        "",
        "--plot writes .png or .svg, not it.txt",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.usefixtures("unchecked")
def test_an_error_is_one_line_on_standard_error_and_code_one(work: Path, case: str) -> None:
    args, stdin, message = ERRORS[case]
    result = run(*(arg.format(work=work) for arg in args), stdin=stdin.format())
    assert result.exit_code == 1, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert result.stdout == ""
    # A progress bar may stand before it; nothing comes after.
    assert result.stderr.rstrip().endswith(lines[0].rstrip())


@pytest.mark.parametrize(
    "args, option",
    [
        (("--from-adapters", "a", "--tasks", "sums"), "--tasks"),
        (("--from-descriptions=d.json", "--seed", "0"), "--seed"),
    ],
    ids=["adapters", "descriptions"],
)
def test_options_of_a_router_that_would_not_be_read_are_refused(args: tuple[str, ...], option: str) -> None:
    result = run("train-router", *args, "--out", "r")
    assert result.exit_code == 2
    assert f"No such option: {option}" in result.stderr


def test_the_lines_before_a_bad_one_are_answered(work: Path) -> None:
    result = run("generate", "--bundle", work / "bundle", *QUICK, stdin='{"prompt": "Hi"}\nnot JSON\n')
    assert result.exit_code == 1
    assert len(json_lines(result.stdout)) == 1
    assert "line 2" in result.stderr


def test_a_benchmark_shows_a_table_and_writes_its_record_and_picture(work: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    settings = ("--dtypes", "float32", "--rounds", "1", "--num-adapters", "4", "--new-tokens", "3", "--r", "2")
    files = ("--json", tmp_path / "new" / "it.json", "--plot", tmp_path / "it.png")
    shown = ok("bench", "decode", "--model", work / "model", *settings, "--target-modules", "q_proj,o_proj", *files)
    assert "decode, model, batch 1" in shown
    record = json.loads((tmp_path / "new" / "it.json").read_text())
    assert record["settings"]["target_modules"] == ["q_proj", "o_proj"]
    assert (record["settings"]["r"], record["settings"]["rounds"]) == (2, 1)
    assert [row["name"] for row in record["rows"]][3:5] == ["dlp-lora, 3 of 4", "peft one adapter"]
    assert (tmp_path / "it.png").stat().st_size > 1000


@st.composite
def benchmark_records(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Rows of any numbers for all columns of a benchmark, some of them with their spread."""
    numbers = st.one_of(st.none(), st.integers(0, 10**9), st.floats(0, 1e6))
    keys = [key for key in COLUMNS[name].values() if key not in LABELS]
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        values = {key: draw(numbers) for key in keys}
        spreads = [key for key, value in values.items() if value is not None and draw(st.booleans())]
        spread = {f"{key}_{end}": values[key] for key in spreads for end in ("min", "max")}
        rows.append(
            {
                **values,
                **spread,
                "name": "dlp-lora, prepacked, 3 of 26 a sentence",
                "dtype": "bfloat16",
                "task": "t" * 36,
            }
        )
    return {"benchmark": name, "rows": rows}


@pytest.mark.parametrize("name", COLUMNS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_number_of_a_benchmark_is_cut_at_80_columns(name: str, data: st.DataObject) -> None:
    record = data.draw(benchmark_records(name))
    shown = Console(width=80, file=io.StringIO())
    shown.print(*tables(table_of_record(record), 80))
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for row in record["rows"]:
        for key in set(COLUMNS[name].values()) - set(LABELS):
            if all(other[key] is None for other in record["rows"]):
                continue
            assert f" {cell(row, key)} " in text.replace("\n", " ")


def test_all_columns_of_a_benchmark_are_in_one_table_where_there_is_room() -> None:
    rows = [dict.fromkeys(COLUMNS["decode"].values(), 1.5) | {"name": "base", "dtype": "float32"}]
    (table,) = tables(table_of_record({"benchmark": "decode", "rows": rows}), 200)
    assert [column.header for column in table.columns] == list(COLUMNS["decode"])


def test_a_column_without_a_value_is_left_out_and_a_claim_is_a_word() -> None:
    rows = [{"name": "start", "start_s": 2.5}, {"name": "load", "streams": 4, "metrics_agree": True}]
    table = table_of_record({"benchmark": "serve", "rows": rows})
    assert [column.name for column in table.columns] == ["variant", "streams", "metrics agree", "start, s"]
    assert [tuple(row) for row in table.rows] == [("start", "–", "–", "2.5"), ("load", "4", "yes", "–")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_suite_of_a_gpu_says_what_it_needs(work: Path, tmp_path: Path) -> None:
    result = run("bench", "suite", "--model", work / "model", "--out", tmp_path, "--preset", "gpu")
    assert result.exit_code == 1
    assert "the preset gpu needs a GPU, and a PyTorch that can use it: there is no device 'cuda'" in result.stderr


def test_a_missing_vllm_is_found_before_the_first_benchmark(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'dlp-lora[serve]'")
    on_cpu = replace(PRESETS["gpu"], device="cpu", dtypes=("float32",))
    monkeypatch.setitem(PRESETS, "gpu", on_cpu)
    suite = ("bench", "suite", "--model", work / "model", "--out", tmp_path, "--preset", "gpu")
    result = run(*suite, "--only", "decode,serve,serve_vllm", "--vllm-python", sys.executable)
    assert result.exit_code == 1
    line = " ".join(result.stderr.split())
    assert f"serve_vllm needs vLLM, which is not installed beside {sys.executable}: pip install vllm there" in line
    assert line.endswith("; to leave it out, choose --only decode,serve")
    assert not list(tmp_path.iterdir())


def test_the_suite_writes_a_record_of_each_benchmark(work: Path, tmp_path: Path) -> None:
    chosen = ("--only", "prefill_batch4", "--rounds", "1", "--threads", "1")
    shown = ok("bench", "suite", "--model", work / "model", "--out", tmp_path, *chosen)
    assert [path.name for path in tmp_path.iterdir()] == ["prefill_batch4.json"]
    record = json.loads((tmp_path / "prefill_batch4.json").read_text())
    assert (record["settings"]["batch"], record["settings"]["rounds"]) == (4, 1)
    assert "prefill, model, batch 4, length 512" in shown


def test_adapters_that_do_not_fit_make_no_bundle(work: Path, tmp_path: Path) -> None:
    make_adapter(lively_model(), tmp_path / "adapters" / "bad", seed=1, use_dora=True)
    args = ("bundle", "--model", work / "model", "-a", tmp_path / "adapters", "-o", tmp_path / "bundle")
    result = run(*args)
    assert result.exit_code == 1
    assert "use_dora=False" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_router_for_other_adapters_makes_no_bundle(work: Path, tmp_path: Path) -> None:
    make_adapter(lively_model(), tmp_path / "adapters" / "poems", seed=1)
    args = ("bundle", "--model", work / "model", "-a", tmp_path / "adapters", "-r", work / "router")
    result = run(*args, "-o", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "the router knows days, sums" in result.stderr
    assert not (tmp_path / "bundle").exists()
