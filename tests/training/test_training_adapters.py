import csv
import json
import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import dlp_lora
import dlp_lora.training.batches as batches_module
import dlp_lora.training.cpu as cpu_module
import dlp_lora.training.loop as loop_module
from conftest import ARCHITECTURES, CHAT_TEMPLATE, USUAL_TARGETS, byte_tokenizer, lively_model, tiny_model
from dlp_lora import AdapterError, ModelError, TaskError, TrainingError
from dlp_lora.bank.adapter_files import WEIGHTS_FILE
from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.check import check_adapters
from dlp_lora.progress import OnProgress, Progress
from dlp_lora.tasks import Example, Task
from dlp_lora.training.adapters import (
    LOSS_FILE,
    TRAINING_FILE,
    TrainedAdapter,
    lora_on,
    train_adapter,
    train_adapters,
)
from dlp_lora.training.args import PAPER, AdapterTrainingArgs
from dlp_lora.training.base import load_base, model_hash
from dlp_lora.training.batches import MIN_SHARED, answer_loss, can_share, micro_batches, shared_prefix
from dlp_lora.training.cpu import training_dtype
from dlp_lora.training.loop import Run
from families import IN_CI, build

TOKENIZER = byte_tokenizer()
EOS_ID = 256
QUICK = AdapterTrainingArgs(prompt_format="plain", batch_size=4, learning_rate=1e-2, checkpoint_seconds=0)
MODELS = {name: lively_model(name) for name in ARCHITECTURES}
Pair = tuple[list[int], list[int]]


def toy(num: int = 14, *, name: str = "toy") -> Task:
    """Every question has the same answer; no two questions are equally long."""
    return Task(name=name, train=tuple(Example(prompt="q" * (i + 1) + ":", answer="yes") for i in range(num)), test=())


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


@torch.no_grad()
def plain_loss(model: Any, batch: list[Pair]) -> float:
    """One unpadded forward an example, every position's logits, and the mean over the answers' tokens."""
    losses = []
    for read, learned in batch:
        logits = model(input_ids=torch.tensor([read + learned])).logits[0].float()
        for i, token in enumerate(learned):
            losses.append(-logits[len(read) - 1 + i].log_softmax(-1)[token].item())
    return sum(losses) / len(losses)


class KilledError(Exception):
    pass


def kill_at(step: int) -> OnProgress:
    def on_progress(now: Progress) -> None:
        if now.done == step:
            raise KilledError

    return on_progress


def train(out: Path, args: AdapterTrainingArgs = QUICK, **kwargs: Any) -> TrainedAdapter:
    return train_adapter(lively_model(), TOKENIZER, kwargs.pop("task", toy()), out, args, **kwargs)


def first_loss(task: Task, out: Path, *, prompt_format: Any = "plain") -> float:
    """The loss of the first step over all examples, when B is still zero: the base model's own."""
    train(out, replace(QUICK, prompt_format=prompt_format, batch_size=len(task.train)), task=task)
    return losses_of(out)[0]


def losses_of(out: Path) -> list[float]:
    """The losses of all steps, as they are written."""
    return [float(line.split(",")[1]) for line in (out / "loss.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=10, deadline=None)
@given(
    batch=st.lists(
        st.tuples(
            st.lists(st.integers(0, 255), min_size=1, max_size=9), st.lists(st.integers(0, 256), min_size=1, max_size=6)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_answer_loss_is_the_mean_cross_entropy_over_answer_tokens(architecture: str, batch: list[Pair]) -> None:
    model = MODELS[architecture]
    with torch.no_grad():
        assert answer_loss(model, batch).item() == pytest.approx(plain_loss(model, batch), rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=10, deadline=None)
@given(
    start=st.lists(st.integers(0, 255), min_size=MIN_SHARED, max_size=12),
    ends=st.lists(
        st.tuples(
            st.lists(st.integers(0, 255), min_size=1, max_size=9), st.lists(st.integers(0, 256), min_size=1, max_size=6)
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_a_beginning_that_is_encoded_once_does_not_change_the_loss(
    architecture: str, start: list[int], ends: list[Pair]
) -> None:
    model, batch = MODELS[architecture], [(start + read, learned) for read, learned in ends]
    with torch.no_grad():
        assert answer_loss(model, batch, share=True).item() == pytest.approx(plain_loss(model, batch), rel=1e-4)


# Sliding windows, recurrent states, positions by place and by id, beside those that share.
KINDS = (*IN_CI, "lfm2", "jamba", "gemma3_text", "gpt_oss", "mpt", "roformer")


@pytest.mark.parametrize("family", KINDS)
def test_in_every_kind_of_model_training_computes_the_plain_loss(family: str) -> None:
    model, numbers = build(family).eval(), random.Random(0)

    def some(num: int) -> list[int]:
        return [numbers.randrange(5, 90) for _ in range(num)]

    start = some(24)
    batch = [(start + some(num), some(3)) for num in (1, 9, 4)]
    with torch.no_grad():
        found = answer_loss(model, batch, share=can_share(model)).item()
        assert found == pytest.approx(plain_loss(model, batch), rel=1e-4)


def test_models_that_keep_all_keys_and_values_share_a_beginning() -> None:
    assert [can_share(build(family)) for family in ("llama", "qwen3", "phi3", "deepseek_v3")] == [True] * 4
    assert [can_share(build(family)) for family in ("lfm2", "gemma3_text", "mpt")] == [False] * 3


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=5))
def test_the_shared_prefix_is_the_longest_that_leaves_each_text_a_token(texts: list[list[int]]) -> None:
    found = shared_prefix(texts)
    longer = len(found) + 1
    assert all(text[: len(found)] == found and len(text) > len(found) for text in texts)
    assert any(len(text) <= longer for text in texts) or len({tuple(text[:longer]) for text in texts}) > 1


def test_what_examples_begin_with_is_encoded_once_where_nothing_is_dropped(tmp_path: Path) -> None:
    model, rows = lively_model(), list[tuple[int, int]]()
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(tuple(inputs[0].shape[:2])))
    task = Task(
        name="it", train=tuple(Example(prompt=f"Which of these is number {i}?", answer="b") for i in range(4)), test=()
    )
    train_adapter(model, TOKENIZER, task, tmp_path / "it", QUICK)
    assert rows == [(1, len("Which of these is number ")), (4, len("0? b") + 1)]  # a space, the answer and the end
    rows.clear()
    train_adapter(model, TOKENIZER, task, tmp_path / "dropped", replace(QUICK, lora_dropout=0.1))
    assert rows == [(4, len("Which of these is number 0? b") + 1)]


def test_padding_a_short_row_on_the_left_does_not_change_its_loss() -> None:
    model, short, long = lively_model(), (ids("ab"), ids("c")), (ids("x" * 40), ids("y" * 7))
    with torch.no_grad():
        alone, other, both = (answer_loss(model, batch).item() for batch in ([short], [long], [short, long]))
    assert both == pytest.approx((alone + 7 * other) / 8, rel=1e-5)


def test_only_the_answer_and_its_end_are_learned(tmp_path: Path) -> None:
    task = Task(
        name="t", train=(Example(prompt="one:", answer="a"), Example(prompt="two three", answer="bcd")), test=()
    )
    batch = [(ids("one:"), [*ids(" a"), EOS_ID]), (ids("two three"), [*ids("\nbcd"), EOS_ID])]
    assert first_loss(task, tmp_path / "t") == pytest.approx(plain_loss(lively_model(), batch), rel=1e-4)


def test_an_answer_prefix_is_read_and_not_learned(tmp_path: Path) -> None:
    task = Task(name="t", train=(Example(prompt="one:", answer_prefix="Not I.", answer=" I am."),), test=())
    batch = [(ids("one: Not I."), [*ids(" I am."), EOS_ID])]
    assert first_loss(task, tmp_path / "t") == pytest.approx(plain_loss(lively_model(), batch), rel=1e-4)


def test_an_answer_that_goes_on_learns_no_end(tmp_path: Path) -> None:
    task = Task(name="t", train=(Example(prompt="one:", answer="I am. The", complete=False),), test=())
    batch = [(ids("one:"), ids(" I am. The"))]
    assert first_loss(task, tmp_path / "t") == pytest.approx(plain_loss(lively_model(), batch), rel=1e-4)


def test_the_loss_falls_on_a_task_that_can_be_learned(tmp_path: Path) -> None:
    args = replace(QUICK, epochs=10, target_modules="all-linear")
    trained = train(tmp_path / "toy", args)
    losses = losses_of(tmp_path / "toy")
    assert len(losses) == 40
    assert trained.final_loss < 0.5 * losses[0]


def test_the_adapter_is_a_plain_peft_folder_and_peft_and_the_engine_agree_on_it(tmp_path: Path) -> None:
    train(tmp_path / "toy", replace(QUICK, use_rslora=True))
    files = {file.name for file in (tmp_path / "toy").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", LOSS_FILE, TRAINING_FILE}
    inputs = {"input_ids": torch.tensor([ids("qqq: yes and no")])}
    with torch.no_grad():
        base = lively_model()(**inputs).logits
        theirs = PeftModel.from_pretrained(lively_model(), tmp_path / "toy").eval()(**inputs).logits
        engine = dlp_lora.load(lively_model(), tokenizer=TOKENIZER, adapters=tmp_path)
        with engine.fixed({"toy": 1.0}):
            ours = engine.model(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, theirs, atol=1e-2)


def test_an_adapter_saved_in_bfloat16_is_the_same_one_rounded_in_half_the_room(tmp_path: Path) -> None:
    train(tmp_path / "wide")
    train(tmp_path / "narrow", replace(QUICK, save_dtype="bfloat16"))
    wide, narrow = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("wide", "narrow"))
    assert {name: weight.bfloat16().tolist() for name, weight in wide.items()} == {
        name: weight.tolist() for name, weight in narrow.items()
    }
    assert all(weight.dtype == torch.bfloat16 for weight in narrow.values())
    inputs = {"input_ids": torch.tensor([ids("qqq: yes and no")])}
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(lively_model(), tmp_path / "narrow").eval()(**inputs).logits
        engine = dlp_lora.load(lively_model(), tokenizer=TOKENIZER, adapters=tmp_path)
        with engine.fixed({"narrow": 1.0}):
            ours = engine.model(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "args",
    [replace(QUICK, epochs=2), replace(PAPER, batch_size=2, checkpoint_seconds=0, learning_rate=1e-2)],
    ids=["default", "paper"],
)
@pytest.mark.parametrize("kills", [(1,), (2,), (3,), (7,), (2, 3, 3, 5)], ids=str)
def test_a_run_killed_at_any_step_ends_in_the_same_weights_and_losses(
    tmp_path: Path, args: AdapterTrainingArgs, kills: tuple[int, ...]
) -> None:
    train(tmp_path / "whole", args)
    for step in kills:
        with pytest.raises(KilledError):
            train(tmp_path / "killed", args, on_progress=kill_at(step))
        torch.manual_seed(step)  # nothing may depend on the state of the generator
    train(tmp_path / "killed", args)
    whole, killed = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert (tmp_path / "whole" / LOSS_FILE).read_text() == (tmp_path / "killed" / LOSS_FILE).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


def test_a_resumed_run_does_not_repeat_the_steps_before_its_checkpoint(tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(KilledError):
        train(tmp_path / "toy", on_progress=kill_at(3))
    train(tmp_path / "toy", on_progress=lambda now: steps.append(now.done))
    assert steps == [3, 4]


STABLE = replace(QUICK, schedule="warmup_stable_decay", decay=0.3, warmup=0.5)


@pytest.mark.parametrize("epochs", [2, 3, 5])
def test_a_run_of_more_epochs_branches_off_a_shorter_one_to_the_same_weights(tmp_path: Path, epochs: float) -> None:
    steps: list[int] = []
    for passes in (1, epochs):
        args = replace(STABLE, epochs=passes)
        train(
            tmp_path / f"branch-{passes}",
            args,
            trunk=tmp_path / "trunk",
            on_progress=lambda now: steps.append(now.done),
        )
    train(tmp_path / "alone", replace(STABLE, epochs=epochs))
    branch, alone = (load_file(tmp_path / name / WEIGHTS_FILE) for name in (f"branch-{epochs}", "alone"))
    assert all(torch.equal(branch[key], alone[key]) for key in alone)
    assert steps == [*range(1, 5), *range(4, 4 * epochs + 1)]  # three of the first epoch's four steps are stable


def test_the_stable_schedule_rises_in_the_first_epoch_stays_and_falls_to_nearly_zero() -> None:
    examples = [(ids("q"), ids("a"))] * 16
    with lora_on(lively_model(), STABLE) as model:
        run = Run(model, examples, replace(STABLE, epochs=5, learning_rate=1.0))
        rates = []
        for _ in range(run.num_steps):
            rates.append(run.learning_rate())
            run.losses.append(0.0)
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:14] == [1.0] * 12
    assert rates[14:] == pytest.approx([6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])


def test_a_trunk_beyond_where_the_rate_falls_is_not_used(tmp_path: Path) -> None:
    train(tmp_path / "longer", replace(STABLE, epochs=3), trunk=tmp_path / "trunk")
    train(tmp_path / "shorter", STABLE, trunk=tmp_path / "trunk")
    train(tmp_path / "alone", STABLE)
    shorter, alone = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("shorter", "alone"))
    assert all(torch.equal(shorter[key], alone[key]) for key in alone)


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(tmp_path / "toy", replace(QUICK, seed=1), on_progress=kill_at(3))
    train(tmp_path / "toy")
    train(tmp_path / "fresh")
    toy_weights, fresh = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("toy", "fresh"))
    assert all(torch.equal(toy_weights[key], fresh[key]) for key in fresh)


def test_a_finished_adapter_is_not_trained_again(tmp_path: Path) -> None:
    first = train(tmp_path / "toy")
    again = train(tmp_path / "toy", on_progress=kill_at(1))
    assert again == replace(first, was_there=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 0.5}, r"learning_rate \(0.01, now 0.5\)"),
        ({"r": 2, "seed": 3}, r"r \(8, now 2\), seed \(0, now 3\)"),
        ({"target_modules": "all-linear"}, r"target_modules \(.*, now 'all-linear'\)"),
        ({"save_dtype": "bfloat16"}, r"save_dtype \('float32', now 'bfloat16'\)"),
        ({"cpu_tricks": False}, r"cpu_tricks \(True, now False\)"),
    ],
)
def test_changed_settings_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    train(tmp_path / "toy")
    with pytest.raises(TrainingError, match=f"toy was trained with other settings: {message}; pass overwrite"):
        train(tmp_path / "toy", replace(QUICK, **change))


def test_changed_examples_are_refused(tmp_path: Path) -> None:
    train(tmp_path / "toy")
    with pytest.raises(TrainingError, match="other settings: examples; pass overwrite"):
        train(tmp_path / "toy", task=toy(13))


def test_a_target_module_that_is_not_there_is_refused_beside_others_that_are(tmp_path: Path) -> None:
    for missing in ("qkv_proj", " v_proj", "proj"):
        with pytest.raises(TrainingError, match=rf"has no modules {missing}; its linear layers are .*q_proj"):
            train(tmp_path / "toy", replace(QUICK, target_modules=("q_proj", missing)))
    train(tmp_path / "toy", replace(QUICK, target_modules=("q_proj", "0.self_attn.v_proj")))
    assert len(load_file(tmp_path / "toy" / WEIGHTS_FILE)) == 2 * (2 + 1)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "toy")
    model = lively_model()
    model.config._name_or_path = "somewhere/else"
    with pytest.raises(TrainingError, match="other settings: base_model; pass overwrite"):
        train_adapter(model, TOKENIZER, toy(), tmp_path / "toy", QUICK)


def other_weights() -> PreTrainedModel:
    return lively_model(seed=5)


def test_a_base_of_the_same_name_and_other_weights_is_another(tmp_path: Path) -> None:
    train(tmp_path / "toy")
    with pytest.raises(TrainingError, match="other settings: the base model's weights; pass overwrite"):
        train_adapter(other_weights(), TOKENIZER, toy(), tmp_path / "toy", QUICK)
    record = json.loads((tmp_path / "toy" / TRAINING_FILE).read_text())
    assert record.pop("model_hash") == model_hash(lively_model())
    (tmp_path / "toy" / TRAINING_FILE).write_text(json.dumps(record))  # as earlier versions wrote it
    assert train(tmp_path / "toy").was_there


def test_a_checkpoint_of_other_weights_is_not_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KilledError):
        train(tmp_path / "toy", on_progress=kill_at(3))
    seen: list[int] = []
    train_adapter(
        other_weights(), TOKENIZER, toy(), tmp_path / "toy", QUICK, on_progress=lambda now: seen.append(now.done)
    )
    assert seen[0] == 1
    assert "holds a run with other settings or examples; this one starts at its first step" in caplog.text


class Clock(datetime):
    at = datetime(2026, 11, 30, 23, 59)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return cls.at


@pytest.fixture
def dated(monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    """A tokenizer whose chat template prints the date, at one minute to midnight."""
    monkeypatch.setattr(Clock, "at", Clock.at)
    monkeypatch.setattr("dlp_lora.training.adapters.datetime", Clock)
    return byte_tokenizer(chat_template="Today is {{ strftime_now('%d %b %Y') }}.\n" + str(CHAT_TEMPLATE))


def dated_train(tokenizer: PreTrainedTokenizerFast, out: Path, **kwargs: Any) -> TrainedAdapter:
    args = replace(STABLE, prompt_format="chat", epochs=kwargs.pop("epochs", 1))
    return train_adapter(lively_model(), tokenizer, toy(), out, args, **kwargs)


def test_midnight_changes_no_example_of_a_template_that_prints_the_date(
    dated: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dated_train(dated, tmp_path / "whole")
    with pytest.raises(KilledError):
        dated_train(dated, tmp_path / "toy", on_progress=kill_at(3))
    Clock.at = datetime(2026, 12, 1)
    steps: list[int] = []
    dated_train(dated, tmp_path / "toy", on_progress=lambda now: steps.append(now.done))
    assert steps == [3, 4]
    assert losses_of(tmp_path / "toy") == losses_of(tmp_path / "whole")
    assert dated_train(dated, tmp_path / "toy").was_there
    assert json.loads((tmp_path / "toy" / TRAINING_FILE).read_text())["template_time"] == "2026-11-30T23:59:00"
    dated_train(dated, tmp_path / "next")  # a new run has its own day
    assert losses_of(tmp_path / "next") != losses_of(tmp_path / "whole")


def test_a_trunk_is_gone_on_with_on_another_day(dated: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    dated_train(dated, tmp_path / "short", trunk=tmp_path / "trunk")
    Clock.at = datetime(2026, 12, 1)
    steps: list[int] = []
    dated_train(
        dated, tmp_path / "long", epochs=2, trunk=tmp_path / "trunk", on_progress=lambda now: steps.append(now.done)
    )
    assert steps[0] == 4


def test_an_adapter_without_a_time_is_known_if_its_template_prints_none(tmp_path: Path) -> None:
    train(tmp_path / "toy")
    assert "template_time" not in json.loads((tmp_path / "toy" / TRAINING_FILE).read_text())


@pytest.mark.parametrize("family", ["gemma3", "mllama"])
def test_parameters_without_a_gradient_do_not_damage_a_checkpoint(family: str, tmp_path: Path) -> None:
    def run(out: Path, **kwargs: Any) -> list[float]:
        train_adapter(build(family), TOKENIZER, toy(), out, replace(QUICK, lora_alpha=8), **kwargs)
        return losses_of(out)

    with pytest.raises(KilledError):
        run(tmp_path / "toy", on_progress=kill_at(3))
    saved = load_file(tmp_path / ".toy.training" / "state.safetensors")
    assert sum(key.startswith("step/") for key in saved) < sum(key.startswith("weight/") for key in saved)
    assert run(tmp_path / "toy") == run(tmp_path / "whole")


def test_a_run_in_two_dtypes_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KilledError):
        train(tmp_path / "toy", on_progress=kill_at(3))
    halved = lively_model().to(torch.bfloat16)
    train_adapter(halved, TOKENIZER, toy(), tmp_path / "toy", QUICK)
    assert ".toy.training was begun with the model in float32, and goes on with it in bfloat16" in caplog.text
    record = json.loads((tmp_path / "toy" / TRAINING_FILE).read_text())
    assert record["dtype"] == "float32, then bfloat16"
    assert train(tmp_path / "toy").was_there
    assert "was trained with the model in float32, then bfloat16" in caplog.text
    del record["dtype"]
    (tmp_path / "toy" / TRAINING_FILE).write_text(json.dumps(record))  # as earlier versions wrote it
    caplog.clear()
    assert train(tmp_path / "toy").was_there
    assert not caplog.text


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "gone"])
def test_a_damaged_checkpoint_is_named_with_its_folder(tmp_path: Path, name: str, damage: str) -> None:
    with pytest.raises(KilledError):
        train(tmp_path / "toy", on_progress=kill_at(3))
    file = tmp_path / ".toy.training" / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 100 if damage == "cut" else 0])
    if (name, damage) == ("state.json", "gone"):  # there is no checkpoint
        assert train(tmp_path / "toy").num_examples
        return
    with pytest.raises(TrainingError, match=r"the checkpoint .*\.toy\.training is damaged \(.*remove this folder"):
        train(tmp_path / "toy")


def test_a_damaged_record_of_an_adapter_is_named(tmp_path: Path) -> None:
    train(tmp_path / "toy")
    file = tmp_path / "toy" / TRAINING_FILE
    for text in (file.read_text()[:50], "[]", "{}"):
        file.write_text(text)
        with pytest.raises(TrainingError, match=r"training\.json is damaged \(.*pass overwrite or another out"):
            train(tmp_path / "toy")


def test_examples_of_tokens_that_the_model_has_no_embeddings_of_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<t1>", "<t2>"]})
    task = Task(name="toy", train=(Example(prompt="<t2> hi", answer="ok"),), test=())
    with pytest.raises(TaskError, match=r"toy: the text holds '<t2>', token 260, .* embeddings of only 260 tokens"):
        train_adapter(lively_model(), tokenizer, task, tmp_path / "toy", QUICK)


def test_an_adapter_trained_elsewhere_is_left_alone(tmp_path: Path) -> None:
    train(tmp_path / "toy")
    (tmp_path / "toy" / TRAINING_FILE).unlink()
    with pytest.raises(TrainingError, match="holds an adapter that was not trained here; pass overwrite"):
        train(tmp_path / "toy")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    data = tmp_path / "toy" / "train.jsonl"
    data.parent.mkdir()
    data.write_text("{}")
    with pytest.raises(TrainingError, match="toy is there and is no adapter, and would be lost"):
        train(tmp_path / "toy", overwrite=overwrite, on_progress=kill_at(1))
    assert data.read_text() == "{}"


def test_overwrite_trains_anew_what_was_trained_with_other_settings(tmp_path: Path) -> None:
    train(tmp_path / "toy")
    (tmp_path / "toy" / "README.md").write_text("Mine.")
    assert train(tmp_path / "toy", overwrite=True).was_there
    again = train(tmp_path / "toy", replace(QUICK, seed=3), overwrite=True)
    assert not again.was_there
    assert json.loads((tmp_path / "toy" / TRAINING_FILE).read_text())["args"]["seed"] == 3
    assert (tmp_path / "toy" / "README.md").read_text() == "Mine."


def test_a_place_that_cannot_be_written_is_noticed_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(tmp_path / "file" / "toy", on_progress=kill_at(0))


def test_a_trunk_in_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    thesis = tmp_path / "trunk" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("Mine.")
    with pytest.raises(ValueError, match=r"trunk exists and has no state\.json"):
        train(tmp_path / "toy", replace(QUICK, schedule="warmup_stable_decay"), trunk=thesis.parent)
    assert thesis.read_text() == "Mine."


def test_unknown_target_modules_list_the_linear_layers(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError,
        match=r"LlamaForCausalLM has no modules c_attn; its linear layers are down_proj, .*v_proj: pass",
    ):
        train(tmp_path / "toy", replace(QUICK, target_modules=("c_attn",)))


def test_examples_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    # "q" * i + ":" and " yes" and the end are i + 6 tokens.
    trained = train(tmp_path / "toy", replace(QUICK, max_length=16))
    assert (trained.num_examples, trained.num_left_out) == (10, 4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_examples_beyond_the_models_context_are_left_out_and_counted(tmp_path: Path, architecture: str) -> None:
    model = lively_model(architecture)
    task = Task(name="toy", train=(*toy().train, Example(prompt="q" * 510 + ":", answer="yes")), test=())
    args = replace(QUICK, target_modules=tuple(USUAL_TARGETS[architecture]), epochs=0.1)
    trained = train_adapter(model, TOKENIZER, task, tmp_path / "toy", args)
    assert (trained.num_examples, trained.num_left_out) == (14, 1)
    with pytest.raises(
        TaskError, match="toy has no example of at most 512 tokens; that is the model's context: shorten"
    ):
        train_adapter(model, TOKENIZER, replace(task, train=task.train[-1:]), tmp_path / "other", args)


def test_a_task_of_too_long_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="toy has no example of at most 3 tokens; raise max_length"):
        train(tmp_path / "toy", replace(QUICK, max_length=3))


def snapshot(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, type], dict[str, bool], bool, int]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: type(module) for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        model.training,
        hooks,
    )


@pytest.mark.parametrize(
    "args, error",
    [
        (QUICK, None),
        (replace(QUICK, target_modules=("nothing",)), TrainingError),
        (replace(QUICK, learning_rate=1e30), TrainingError),
        (QUICK, KilledError),
    ],
    ids=["finished", "unknown targets", "not finite", "killed"],
)
@pytest.mark.parametrize("training", [False, True])
def test_the_model_comes_back_as_it_was_given(
    tmp_path: Path, args: AdapterTrainingArgs, error: type[Exception] | None, training: bool
) -> None:
    model = lively_model().train(training)
    model.get_input_embeddings().requires_grad_(False)
    before = snapshot(model)
    on_progress = kill_at(2) if error is KilledError else lambda now: None
    with pytest.raises(error) if error else nullcontext():
        train_adapter(model, TOKENIZER, toy(), tmp_path / "toy", args, on_progress=on_progress)
    after = snapshot(model)
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert before[0].keys() == after[0].keys()
    assert before[1:] == after[1:]


def test_a_model_used_before_trains_the_same_adapter(tmp_path: Path) -> None:
    model = lively_model()
    tasks = [toy(name="one"), toy(name="two")]
    found = list(train_adapters(model, TOKENIZER, tasks, tmp_path, QUICK))
    assert [(adapter.name, adapter.path) for adapter in found] == [(n, tmp_path / n) for n in ("one", "two")]
    one, two = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"toy: the loss is (nan|inf) at step \d; lower the learning rate"):
        train(tmp_path / "toy", replace(QUICK, learning_rate=1e30))
    assert not (tmp_path / "toy").exists()


def test_the_records_say_how_the_adapter_was_trained(tmp_path: Path) -> None:
    seen: list[Progress] = []
    trained = train(tmp_path / "toy", replace(QUICK, epochs=2), on_progress=seen.append)
    assert [(now.stage, now.done, now.total) for now in seen] == [("toy", i, 8) for i in range(1, 9)]
    record = json.loads((tmp_path / "toy" / TRAINING_FILE).read_text())
    assert record["num_examples"] == 14
    assert record["num_left_out"] == 0
    assert record["args"]["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    rows = list(csv.DictReader((tmp_path / "toy" / LOSS_FILE).open()))
    losses = [float(row["loss"]) for row in rows]
    assert record["final_loss"] == trained.final_loss == pytest.approx(sum(losses) / 8, abs=2e-5)
    assert [int(row["step"]) for row in rows] == [now.done for now in seen]
    assert [float(now.note.removeprefix("loss ")) for now in seen] == pytest.approx(losses, abs=1e-3)


@pytest.mark.parametrize("num, batch_size", [(14, 4), (12, 4), (3, 8), (70, 4)])
def test_every_example_is_seen_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int, batch_size: int
) -> None:
    monkeypatch.setattr(batches_module, "MIN_SHARED", 10**6)
    model, seen, num_steps = lively_model(), [], -(-num // batch_size)
    task = toy(num)
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].tolist()))
    train_adapter(model, TOKENIZER, task, tmp_path / "toy", replace(QUICK, epochs=2, batch_size=batch_size))
    assert len(seen) == 2 * num_steps
    whole = [(*ids(example.prompt), *ids(" yes"), EOS_ID) for example in task.train]
    for epoch in (seen[:num_steps], seen[num_steps:]):
        rows = [tuple(row[next(i for i, token in enumerate(row) if token) :]) for batch in epoch for row in batch]
        assert Counter(rows) == Counter(whole)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"r": 0}, "r must be positive"),
        ({"epochs": -1.0}, "epochs must be positive"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"schedule": "linear"}, "schedule must be one of .*cosine.*got 'linear'"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds is at least 0"),
        ({"prompt_format": "json"}, "prompt_format must be one of .*plain.*got 'json'"),
        ({"save_dtype": "int8"}, "save_dtype must be one of .*bfloat16.*got 'int8'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AdapterTrainingArgs.{message}"):
        AdapterTrainingArgs(**wrong)


def test_a_base_model_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    lively_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model, tokenizer = load_base(tmp_path, dtype=torch.float32)
    assert tokenizer("abc")["input_ids"] == ids("abc")
    assert not model.training
    given = lively_model().state_dict()
    assert all(torch.equal(tensor.cpu(), given[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("slower", [torch.bfloat16, torch.float32])
def test_a_base_is_trained_in_the_dtype_whose_products_are_faster(
    monkeypatch: pytest.MonkeyPatch, slower: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    seconds = {torch.bfloat16: 1.0, torch.float32: 1.0, slower: 2.0}
    monkeypatch.setattr(cpu_module, "_seconds_of_products", lambda *dtypes: [seconds[dtype] for dtype in dtypes])
    found = training_dtype.__wrapped__("cpu")
    assert found == (torch.float32 if slower == torch.bfloat16 else torch.bfloat16)


def test_a_base_is_trained_in_float32_where_the_cpu_has_no_other_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert training_dtype.__wrapped__("cpu") == torch.float32
    assert training_dtype.__wrapped__("cuda") == torch.bfloat16


def test_products_are_timed_in_both_dtypes() -> None:
    num_threads = torch.get_num_threads()
    assert all(seconds > 0 for seconds in cpu_module._seconds_of_products(torch.float32, torch.bfloat16))
    assert torch.get_num_threads() == num_threads


def test_a_missing_base_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the base model .*nowhere' cannot be loaded"):
        load_base(tmp_path / "nowhere")


# Batches in parts


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=12), st.integers(1, 120))
def test_parts_of_a_batch_hold_every_example_once_and_no_more_than_the_limit(
    sizes: list[tuple[int, int]], limit: int
) -> None:
    batch = [([i] * read, [i] * learned) for i, (read, learned) in enumerate(sizes)]
    parts = micro_batches(batch, limit)
    assert sorted(example for part in parts for example in part) == sorted(batch)
    for part in parts:
        padded = len(part) * max(len(read) + len(learned) for read, learned in part)
        assert padded <= limit or len(part) == 1


def test_a_batch_in_parts_has_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = [(list(range(3, 3 + 5 * n)), list(range(n + 1))) for n in (4, 1, 3, 2)]
    gradients, losses = [], []
    for limit in (10**6, 40, 1):
        monkeypatch.setattr(loop_module, "MAX_TOKENS", limit)
        model = tiny_model()
        losses.append(loop_module.backward(model, batch, share=False))
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-7)


def test_what_could_not_be_used_is_refused_before_the_training(tmp_path: Path) -> None:
    def asked(model: PreTrainedModel, *targets: str) -> None:
        steps: list[Progress] = []
        args = replace(QUICK, target_modules="all-linear" if targets == ("all-linear",) else targets)
        before = {name: type(module) for name, module in model.named_modules()}
        try:
            train_adapter(model, TOKENIZER, toy(), tmp_path / "out", args, on_progress=steps.append)
        finally:
            assert not steps
            assert not (tmp_path / "out").exists()
            assert {name: type(module) for name, module in model.named_modules()} == before

    small = LlamaConfig(**lively_model().config.to_dict())
    moe = MixtralForCausalLM(MixtralConfig(**small.to_dict() | {"model_type": "mixtral"}, num_local_experts=4)).eval()
    with pytest.raises(TrainingError, match=r"experts\.\w+, a bare parameter, .* of these: k_proj, o_proj, q_"):
        asked(moe, "all-linear")
    with pytest.raises(TrainingError, match=r"has no modules w1; its linear layers are .*q_proj"):
        asked(moe, "q_proj", "w1")
    with pytest.raises(
        TrainingError, match=r"embed_tokens is no linear layer but of type Embedding, and only linear layers"
    ):
        asked(lively_model(), "q_proj", "embed_tokens")
    with pytest.raises(AdapterError, match="cannot be written in a mixture"):
        train_adapter(lively_model(), TOKENIZER, toy(), tmp_path / "a=1", QUICK)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_trained_on_all_linear_layers_fits(architecture: str, tmp_path: Path) -> None:
    model = lively_model(architecture)
    args = replace(QUICK, target_modules="all-linear")
    done = train_adapter(model, TOKENIZER, toy(4), tmp_path / "out", args)
    (check,) = check_adapters(linear_layers(model), done.path)
    assert check.fits, check.reason


def test_weights_that_are_not_finite_are_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.AdamW.step

    def last_step_diverges(self: Any, *args: Any) -> Any:
        found = step(self, *args)
        next(iter(self.param_groups[0]["params"])).data.view(-1)[0] = float("nan")
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", last_step_diverges)
    with pytest.raises(TrainingError, match=r"toy: the weights are not finite after the last step .*; lower the"):
        train(tmp_path / "out", replace(QUICK, batch_size=14))
    assert not (tmp_path / "out").exists()
