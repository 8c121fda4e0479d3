import json
import random
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import dlp_lora
from conftest import ARCHITECTURES, byte_tokenizer, lively_model
from dlp_lora import TaskError
from dlp_lora.errors import DLPLoRAError, RecordError, TrainingError
from dlp_lora.lab.evals.answers import AnswerArgs
from dlp_lora.lab.evals.methods import METHODS as METHODS_BY_NAME
from dlp_lora.lab.evals.metrics import exact_match
from dlp_lora.lab.evals.serial import SerialPrompt, generate_serial, serial_methods
from dlp_lora.lab.report import write_report
from dlp_lora.lab.reproduce import ReproduceArgs, reproduce, stages
from dlp_lora.lab.reproduce.recipe import read_recipe, recipes
from dlp_lora.progress import OnProgress, Progress
from dlp_lora.router import load_tokenizer, router_hash
from dlp_lora.tasks import Example
from dlp_lora.tasks.manifest import TaskInfo
from dlp_lora.tasks.sources import write_task
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.router import RouterTrainingArgs, train_router
from runs import outputs, read, tasks

METHODS = (
    "base",
    "oracle",
    "lora-r64",
    "dlp",
    "top1",
    "uniform",
    "random",
    "prompt-only",
    "whole-prompt",
    "paper-weights",
    "recompute",
)
SMALL = ReproduceArgs(
    training=AdapterTrainingArgs(prompt_format="plain", batch_size=2, checkpoint_seconds=0),
    single_r=4,
    router=RouterTrainingArgs(epochs=1),
    answers=AnswerArgs(batch_size=4, max_new_tokens=4, prompt_format="plain"),
    methods=METHODS,
    serial=(2,),
    serial_prompts=2,
)
INFOS = {"colours": TaskInfo(kind="mcq", chance=0.5), "story": TaskInfo(kind="qa")}


class KilledError(Exception):
    pass


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(lively_model(), tmp_path_factory.mktemp("reproduce") / "model")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Progress]]:
    events: list[Progress] = []
    out = tmp_path_factory.mktemp("whole")
    return reproduce(model, tasks(), out, SMALL, infos=INFOS, on_progress=events.append), events


Whole = tuple[Path, list[Progress]]


def test_the_record_holds_every_method_task_and_metric(whole: Whole) -> None:
    record = read(whole[0])
    assert set(record["scores"]) == set(METHODS)
    for own in record["scores"].values():
        assert {task: set(metrics) for task, metrics in own.items()} == {
            "colours": {"accuracy", "accuracy_loglik"},
            "sides": {"accuracy", "accuracy_loglik"},
            "story": {"bleu", "rouge1", "rougeL"},
        }
    assert set(record["composites"]) == {"composite-2", "composite-1"}
    main = {"base", "oracle", "dlp", "lora-r64"}
    assert set(record["differences"]) == {
        *(f"dlp - {name}" for name in main - {"dlp"}),
        *(f"{name} - dlp" for name in set(METHODS) - main),
    }
    assert set(record["teacher_forced"]) == main
    assert record["metrics"]["bleu"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert set(record["serial"]["serial-2"]) >= {"base", "oracle", "dlp", "prompt-only", "recompute"}
    assert record["data"]["tasks"]["colours"]["chance"] == 0.5
    assert sum(n for row in record["router"]["confusion"].values() for n in row.values()) == 7


def test_scores_are_those_of_the_answers_on_record(whole: Whole) -> None:
    record, by_name = read(whole[0]), {task.name: task for task in tasks()}
    rows = [row for row in outputs(whole[0]) if row["part"] == "answers"]
    assert len(rows) == 7 * len(METHODS)
    for method in METHODS:
        for task in ("colours", "sides"):
            own = [row for row in rows if row["method"] == method and row["task"] == task]
            examples = [by_name[task].test[row["index"]] for row in own]
            right = [exact_match(row["text"], e.accepted) for row, e in zip(own, examples, strict=True)]
            likely = [
                (e.choices or ())[int(np.argmax(r["likelihoods"]))] == e.answer
                for r, e in zip(own, examples, strict=True)
            ]
            found = record["scores"][method][task]
            assert found["accuracy"] == pytest.approx(np.mean(right), abs=1e-5)
            assert found["accuracy_loglik"] == pytest.approx(np.mean(likely), abs=1e-5)
        pool = np.mean([record["scores"][method][task]["accuracy"] for task in ("colours", "sides")])
        assert record["composites"]["composite-2"][method]["accuracy"] == pytest.approx(pool, abs=1e-5)


def test_the_single_lora_differs_from_the_others_in_its_rank_alone(whole: Whole) -> None:
    folder = whole[0].parent / "seed-0"
    single, own = (json.loads((folder / p / "training.json").read_text()) for p in ("lora-r64", "adapters/sides"))
    assert single["args"] == {**own["args"], "r": SMALL.single_r}
    assert single["num_examples"] == sum(len(task.train) for task in tasks())


def test_each_method_fused_what_it_says(whole: Whole) -> None:
    for row in outputs(whole[0]):
        if row["part"] != "answers":
            continue
        mixture, method = row["mixture"], row["method"]
        if method == "base":
            assert mixture == {}
        elif method == "oracle":
            assert mixture == {row["task"]: 1.0}
        elif method == "lora-r64":
            assert mixture == {"lora-r64": 1.0}
        elif method == "uniform":
            assert mixture == pytest.approx(dict.fromkeys(("colours", "sides", "story"), 1 / 3), abs=1e-3)
        elif method in ("random", "top1"):
            assert list(mixture.values()) == [1.0]
        if method == "prompt-only":
            assert row["num_switches"] == 0


def test_answers_are_those_that_the_bundle_gives(model: Path, whole: Whole) -> None:
    rows = {(r["method"], r["task"], r["index"]): r["text"] for r in outputs(whole[0]) if r["part"] == "answers"}
    engine = dlp_lora.load(whole[0].parent / "seed-0" / "bundle", base_model=model, dtype=read(whole[0])["dtype"])
    prompt = tasks()[0].test[0].prompt
    assert engine.generate(prompt, max_new_tokens=4, do_sample=False).text == rows["dlp", "colours", 0]
    with engine.disabled():
        assert engine.generate(prompt, max_new_tokens=4, do_sample=False).text == rows["base", "colours", 0]


def kill_at(number: int) -> OnProgress:
    seen: list[Progress] = []

    def on_progress(event: Progress) -> None:
        seen.append(event)
        if len(seen) == number:
            raise KilledError

    return on_progress


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_random_moments_ends_in_the_same_results(
    model: Path, whole: Whole, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    out = tmp_path / "run"
    for _ in range(3):
        try:
            reproduce(model, tasks(), out, SMALL, infos=INFOS, on_progress=kill_at(rng.randrange(1, len(whole[1]))))
        except KilledError:
            for file in (*out.rglob("answers/*.jsonl"), *out.rglob("teacher_forced/*.jsonl")):
                # A kill may cut a line short.
                text = file.read_text(encoding="utf-8")
                file.write_text(text[: len(text) - rng.randrange(min(40, len(text)))], encoding="utf-8")
    record = reproduce(model, tasks(), out, SMALL, infos=INFOS)
    assert read(record) == read(whole[0])
    assert outputs(record) == outputs(whole[0])


def test_a_finished_run_computes_nothing_again(model: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(whole[0])
    monkeypatch.setattr("dlp_lora.lab.evals.answers._answer", None)
    monkeypatch.setattr("dlp_lora.training.loop.answer_loss", None)
    assert read(reproduce(model, tasks(), whole[0].parent, SMALL, infos=INFOS)) == before


def test_a_run_that_two_machines_made_names_both_and_the_most_memory(model: Path, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[0].parent, out)
    (here,) = json.loads((out / "environments.json").read_text())
    other = {"environment": {**here["environment"], "cpu": "Abacus 7"}, "peak_memory_mb": 10**6}
    (out / "environments.json").write_text(json.dumps([other]))
    reproduce(model, tasks(), out, SMALL, infos=INFOS)
    record = json.loads((out / "record.json").read_text())
    assert record["environment"] == here["environment"]
    assert record["environments"] == [here["environment"], other["environment"]]
    assert record["peak_memory_mb"] == 10**6
    assert f"{here['environment']['cpu']}, " in (page := write_report(out).markdown.read_text())
    assert "; before: Abacus 7, " in page


def test_another_setting_is_noticed_and_named(model: Path, whole: Whole) -> None:
    other = replace(SMALL, training=replace(SMALL.training, learning_rate=0.5))
    with pytest.raises(
        RecordError, match=r"args\.training\.learning_rate was 0\.002 and is 0\.5; choose another --out"
    ):
        reproduce(model, tasks(), whole[0].parent, other, infos=INFOS)
    with pytest.raises(RecordError, match="data was"):
        reproduce(model, tasks()[:2], whole[0].parent, SMALL, infos=INFOS)


def test_answers_of_another_router_are_not_taken_for_those_of_this_one(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    shutil.copytree(whole[0].parent, tmp_path / "run")
    seed = tmp_path / "run" / "seed-0"
    other = train_router(tasks(), load_tokenizer(str(model)), replace(SMALL.router, seed=1))[0]
    other.save_pretrained(seed / "router")
    (seed / "router" / "report.json").write_text((whole[0].parent / "seed-0" / "router" / "report.json").read_text())
    with pytest.raises(RecordError, match=r"dlp.jsonl holds answers .*: routing.router was .*; remove"):
        reproduce(model, tasks(), tmp_path / "run", SMALL, infos=INFOS)
    routed = [name for name in METHODS if METHODS_BY_NAME[name].mixture is None]
    for name in routed:
        (seed / "answers" / f"{name}.jsonl").unlink()
    with pytest.raises(RecordError, match=r"serial-2/base.jsonl holds answers .*: routing.router was"):
        reproduce(model, tasks(), tmp_path / "run", SMALL, infos=INFOS)
    shutil.rmtree(seed / "serial-2")
    reproduce(model, tasks(), tmp_path / "run", SMALL, infos=INFOS)
    kept = [json.loads((seed / f"answers/{name}.jsonl").read_text().split("\n")[0]) for name in routed]
    kept.append(json.loads((seed / "teacher_forced/dlp.jsonl").read_text().split("\n")[0]))
    kept.append(json.loads((seed / "serial-2/dlp.jsonl").read_text().split("\n")[0]))
    assert {own["identity"]["routing"]["router"] for own in kept} == {router_hash(other)}


def test_a_test_example_that_was_learned_is_an_error(model: Path, tmp_path: Path) -> None:
    first, second, *_ = tasks()
    leak = replace(second, train=(*second.train, first.test[1]))
    with pytest.raises(TaskError, match="test example 1 of colours is also a training example of sides"):
        reproduce(model, [first, leak], tmp_path, SMALL)


def test_seeds_are_averaged_and_kept_apart(model: Path, tmp_path: Path) -> None:
    args = replace(SMALL, seeds=(0, 1), methods=("oracle", "dlp"), single_r=0, serial=(), teacher_forced=False, limit=2)
    record = read(reproduce(model, tasks(), tmp_path, args, infos=INFOS))
    assert record["seeds"] == [0, 1]
    for task, metrics in record["scores"]["oracle"].items():
        for metric, value in metrics.items():
            assert value == pytest.approx(
                np.mean([s["oracle"][task][metric] for s in record["by_seed"].values()]), abs=1e-4
            )
    assert {row["seed"] for row in outputs(tmp_path / "record.json")} == {0, 1}
    assert record["data"]["tasks"]["colours"]["num_test"] == 2


def test_the_steps_are_those_that_report_progress(whole: Whole) -> None:
    assert {event.stage for event in whole[1]} == {stage.name for stage in stages(tasks(), SMALL)}


def test_the_single_lora_needs_no_other_adapter_and_no_router(model: Path, tmp_path: Path, whole: Whole) -> None:
    alone, events = replace(SMALL, methods=("lora-r64",), serial=()), list[Progress]()
    record = reproduce(model, tasks(), tmp_path / "run", alone, infos=INFOS, on_progress=events.append)
    assert {event.stage for event in events} == {stage.name for stage in stages(tasks(), alone)}
    assert {folder.name for folder in (tmp_path / "run/seed-0").iterdir()} == {"lora-r64", "answers", "teacher_forced"}
    found, expected = read(record), read(whole[0])
    assert (found["router"], found["conversation"], found["training"]["adapters"]) == (None, None, {})
    assert found["scores"] == {"lora-r64": expected["scores"]["lora-r64"]}
    assert "lora-r64" in write_report(record.parent).markdown.read_text()
    grown = reproduce(model, tasks(), tmp_path / "run", SMALL, infos=INFOS)
    assert read(grown)["scores"] == expected["scores"]


def test_runs_are_joined_into_what_one_run_of_all_methods_says(model: Path, tmp_path: Path, whole: Whole) -> None:
    for task in tasks():
        write_task(tmp_path / "data" / task.name, task)
    joined = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "join_runs.py"))["joined"]
    first = replace(SMALL, methods=("base", "oracle", "dlp"), single_r=0, serial=())
    single = replace(first, methods=("lora-r64",), single_r=SMALL.single_r)
    runs = [
        reproduce(model, tasks(), tmp_path / name, args, infos=INFOS).parent
        for name, args in {"a": first, "b": single}.items()
    ]
    found = json.loads(json.dumps(joined(runs, tmp_path / "data")))
    expected = json.loads(whole[0].read_text())
    for part in ("scores", "intervals", "teacher_forced", "teacher_forced_intervals"):
        names = expected[part].keys() & {"base", "oracle", "dlp", "lora-r64"}
        assert found[part] == {name: expected[part][name] for name in names}
    assert found["differences"] == {
        f"dlp - {o}": expected["differences"][f"dlp - {o}"] for o in ("oracle", "base", "lora-r64")
    }
    with pytest.raises(ValueError, match="answers by base, dlp, oracle, as a run before it does"):
        joined([runs[0], runs[0]], tmp_path / "data")
    write_task(tmp_path / "data" / "sides", replace(tasks()[1], test=tasks()[1].test[:1]))
    with pytest.raises(ValueError, match="was made from other data than"):
        joined(runs, tmp_path / "data")


def test_a_run_goes_on_in_the_dtype_that_it_was_begun_in(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = replace(SMALL, methods=("oracle",), single_r=0, serial=(), teacher_forced=False)
    monkeypatch.setattr("dlp_lora.training.base.training_dtype", lambda *on: torch.float32)
    before = reproduce(model, tasks(), tmp_path, args, infos=INFOS).read_text()
    assert json.loads(before)["dtype"] == "float32"
    monkeypatch.setattr("dlp_lora.training.base.training_dtype", lambda *on: torch.bfloat16)
    record = reproduce(model, tasks(), tmp_path, replace(args, methods=("base",)), infos=INFOS)
    assert read(record)["dtype"] == "float32"
    assert read(record)["scores"]["oracle"] == json.loads(before)["scores"]["oracle"]


def test_a_larger_model_joins_a_finished_run_and_answers_without_adapters(
    whole: Whole, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / whole[0].parent.name
    shutil.copytree(whole[0].parent, out)
    events: list[Progress] = []
    record = read(reproduce(model, tasks(), out, SMALL, infos=INFOS, larger=model, on_progress=events.append))
    assert record["larger"]["model"] == "model"
    assert record["larger"]["scores"] == record["scores"]["base"]  # the base itself was given
    assert {event.stage for event in events if event.done < event.total} == {"larger"}
    assert {key: record[key] for key in ("scores", "serial")} == {
        key: read(whole[0])[key] for key in ("scores", "serial")
    }
    assert read(whole[0])["larger"] is None


def test_outputs_hold_the_runs_own_answers_serial_and_teacher_forced_ones_too(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / whole[0].parent.name
    shutil.copytree(whole[0].parent, out)
    shutil.copy(out / "seed-0/answers/top1.jsonl", out / "seed-0/answers/p0.3.jsonl")  # of no method of this run
    rows = outputs(reproduce(model, tasks(), out, SMALL, infos=INFOS, larger=model))
    assert {row["method"] for row in rows if row["part"] == "answers"} == set(METHODS)
    forced = [row for row in rows if row["part"] == "teacher-forced"]
    assert {row["method"] for row in forced} == {"base", "oracle", "dlp", "lora-r64"}
    assert len(forced) == 4 * 7
    record = read(out / "record.json")
    for method in ("base", "lora-r64"):
        by_index = {row["index"]: row for row in forced if row["method"] == method and row["task"] == "colours"}
        right = [exact_match(by_index[i]["text"], e.accepted) for i, e in enumerate(tasks()[0].test)]
        mean = record["teacher_forced"][method]["colours"]["accuracy"]
        assert mean == pytest.approx(np.mean(right), abs=1e-5)
        low, high = record["teacher_forced_intervals"][method]["colours"]["accuracy"]
        assert low <= mean <= high
    serial = [row for row in rows if row["part"] == "serial-2" and row["method"] == "dlp"]
    scores = record["serial"]["serial-2"]
    assert scores["dlp"]["accuracy"] == np.mean([row["right"] for row in serial])
    for name, own in scores.items():
        if name == "alone":
            assert own["difference"] is None
        else:
            less = own["accuracy"] - scores["alone"]["accuracy"]
            assert own["difference"]["value"] == pytest.approx(less, abs=2e-5)
            low, high = own["difference"]["interval"]
            assert low <= own["difference"]["value"] <= high
    assert len([row for row in rows if row["part"] == "larger" and row["model"] == "model"]) == 7
    assert read(reproduce(model, tasks(), out, SMALL, infos=INFOS))["larger"] == record["larger"]  # kept, once given


def test_the_conversation_is_decoded_as_serial_prompts_are(model: Path, whole: Whole) -> None:
    said = read(whole[0])["conversation"]
    engine = dlp_lora.load(whole[0].parent / "seed-0" / "bundle", base_model=model, dtype=read(whole[0])["dtype"])
    examples = {e.prompt: (task.name, e) for task in tasks() for e in task.test}
    asked = [examples[prompt] for prompt in said["prompt"].split("\n\n")]
    prompt = SerialPrompt(tasks=tuple(name for name, _ in asked), examples=tuple(e for _, e in asked))
    method = next(m for m in serial_methods(engine.bank.names, [prompt]) if m.name == "dlp")
    (answer,) = generate_serial(engine, method, [prompt], AnswerArgs(max_new_tokens=48, prompt_format="plain"))
    assert said["text"] == answer.text


SLIGHT = replace(SMALL, methods=("base",), single_r=0, serial=(), limit=2)


def test_a_run_grows_into_the_one_that_was_asked_for_at_once(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    grown, whole = tmp_path / "a" / "run", tmp_path / "b" / "run"
    reproduce(model, tasks(), grown, SLIGHT, infos=INFOS)
    assert not (grown / "seed-0" / "lora-r64").exists()
    reproduce(model, tasks(), grown, replace(SLIGHT, methods=("dlp",), serial=(2,)), infos=INFOS)
    reproduce(model, tasks(), grown, replace(SLIGHT, seeds=(1,)), infos=INFOS)
    args = replace(SLIGHT, methods=("base", "dlp"), serial=(2,), seeds=(0, 1))
    reproduce(model, tasks(), whole, args, infos=INFOS)
    assert read(grown / "record.json") == read(whole / "record.json")
    assert outputs(grown / "record.json") == outputs(whole / "record.json")


def test_the_single_lora_is_trained_for_its_method_only() -> None:
    assert "lora-r64" in {stage.name for stage in stages(tasks(), SMALL)}
    assert "lora-r64" not in {stage.name for stage in stages(tasks(), replace(SMALL, methods=("base", "dlp")))}


def test_another_model_of_the_same_name_is_refused_and_a_run_without_its_hash_goes_on(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / whole[0].parent.name
    shutil.copytree(whole[0].parent, out)
    other = save(lively_model(seed=1), tmp_path / "model")
    with pytest.raises(RecordError, match=r"model_hash was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        reproduce(other, tasks(), out, SMALL, infos=INFOS)
    settings = json.loads((out / "settings.json").read_text())
    known = settings.pop("model_hash")
    (out / "settings.json").write_text(json.dumps(settings))
    assert read(reproduce(model, tasks(), out, SMALL, infos=INFOS)) == read(whole[0])
    assert json.loads((out / "settings.json").read_text())["model_hash"] == known


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / whole[0].parent.name
    shutil.copytree(whole[0].parent, out)
    written = (out / "settings.json").read_text()
    settings = json.loads(written)
    del settings["args"]["training"]["chat_template_kwargs"], settings["args"]["router"]["coverage"]
    del settings["args"]["limit"]
    (out / "settings.json").write_text(json.dumps(settings))
    args = replace(SMALL, training=replace(SMALL.training, chat_template_kwargs={"enable_thinking": False}))
    with pytest.raises(
        RecordError, match=r"args\.training\.chat_template_kwargs\.enable_thinking was None and is False;"
    ):
        reproduce(model, tasks(), out, args, infos=INFOS)
    assert read(reproduce(model, tasks(), out, SMALL, infos=INFOS)) == read(whole[0])
    assert (out / "settings.json").read_text() == written


@pytest.mark.parametrize("what", ["one task", "no test", "no model", "too long"])
def test_what_cannot_work_is_said_before_anything_is_written(model: Path, tmp_path: Path, what: str) -> None:
    long = tuple(replace(e, prompt=e.prompt + "?" * 510) for e in tasks()[1].train)
    found = {
        "one task": tasks()[:1],
        "no test": [replace(t, test=()) for t in tasks()],
        "too long": [tasks()[0], replace(tasks()[1], train=long)],
    }.get(what, tasks())
    message = {
        "one task": "at least two task folders",
        "no test": "no task has a test question",
        "no model": "no-model",
        "too long": "sides has no example of at most 512 tokens",
    }[what]
    with pytest.raises(DLPLoRAError, match=message):
        reproduce(tmp_path / "no-model" if what == "no model" else model, found, tmp_path / "run", SMALL, infos=INFOS)
    assert not (tmp_path / "run").exists()


def test_what_is_longer_than_the_context_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    short = lively_model()
    short.config.max_position_embeddings = 64
    colours, sides, story = tasks()
    long = Example(prompt="Which colour is " + "very " * 20 + "red?", answer="red", choices=("red", "blue"))
    colours = replace(colours, train=(*colours.train, replace(long, answer="blue")), test=(*colours.test, long))
    colours = replace(colours, train=(*colours.train[:-1], replace(long, prompt=long.prompt + " Say.")))
    untested = replace(sides, name="untested", test=())
    args = replace(SLIGHT, limit=None, methods=("base", "dlp"), serial=(2,), serial_prompts=6)
    record = read(
        reproduce(
            save(short, tmp_path / "model"), [colours, sides, story, untested], tmp_path / "run", args, infos=INFOS
        )
    )
    assert record["left_out"] == {"colours": 1}
    assert set(record["cut_short"]) == set(record["scores"])
    assert record["training"]["adapters"]["colours"]["num_left_out"] == 1
    assert record["serial_left_out"] == {"serial-2": 6}  # 48 tokens to write after two questions
    assert record["conversation"] is None
    assert "untested" not in record["scores"]["dlp"]
    assert set(record["composites"]) == {"composite-2", "composite-1"}


# Recipes


ARCHITECTURE = {
    "qwen2-1.5b": "qwen2",
    "qwen2-7b": "qwen2",
    "llama2-7b": "llama",
    "llama2-13b": "llama",
    "llama3-8b": "llama",
}


def test_every_backbone_of_the_paper_has_a_recipe() -> None:
    assert set(recipes()) == {*ARCHITECTURE, "smollm2-135m"}


@pytest.mark.parametrize("name", ARCHITECTURE)
def test_a_recipe_runs_on_a_tiny_model_of_its_architecture(name: str, tmp_path: Path) -> None:
    named, args = read_recipe(name)
    assert "/" in named
    small = replace(
        args,
        router=RouterTrainingArgs(epochs=1),
        answers=replace(args.answers, max_new_tokens=2),
        methods=("base", "dlp"),
        serial=(),
        teacher_forced=False,
        single_r=0,
        limit=2,
    )
    folder = save(ARCHITECTURES[ARCHITECTURE[name]](), tmp_path / "model")
    record = read(reproduce(folder, tasks(), tmp_path / "run", small, infos=INFOS))
    assert set(record["scores"]) == {"base", "dlp"}


def test_a_recipe_file_may_set_anything_and_what_it_means_nothing_by_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('model = "me/mine"\npreset = "paper"\nserial = [2]\n[training]\nr = 4\n[answers]\nbatch_size = 3\n')
    model, args = read_recipe(file)
    assert (model, args.serial, args.training.r, args.training.learning_rate) == ("me/mine", (2,), 4, 5e-5)
    assert args.answers.batch_size == 3
    file.write_text('model = "me/mine"\n[training]\nrank = 4\n')
    with pytest.raises(TrainingError, match=r"\[training\] has no setting 'rank'; there are r, lora_alpha"):
        read_recipe(file)
    with pytest.raises(TrainingError, match="no recipe nothing; give a TOML file, or one of llama2-13b"):
        read_recipe("nothing")


def test_a_preset_that_is_given_wins_where_it_sets_something(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('model = "m"\nlimit = 7\nseeds = [3]\n[training]\nr = 4\nlearning_rate = 1e-3\nmax_length = 99\n')
    args = read_recipe(file, preset="paper")[1]
    assert (args.training.learning_rate, args.training.batch_size) == (5e-5, 1)  # as the preset sets them
    assert (args.training.r, args.training.max_length, args.limit, args.seeds) == (4, 99, 7, (3,))
    file.write_text('model = "m"\npreset = "paper"\n[training]\nr = 4\n')
    args = read_recipe(file, preset="default")[1]
    assert (args.training.learning_rate, args.training.r) == (AdapterTrainingArgs().learning_rate, 4)
