"""Adapters that join a trained router, and leave it."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dlp_lora
from conftest import byte_tokenizer, lively_model
from dlp_lora import BundleError, Context, MiniMLP, RouterError, TrainingError
from dlp_lora.cli.app import app
from dlp_lora.engine.loading import load_router
from dlp_lora.tasks import Example, Task, write_task
from dlp_lora.training.extend import MAX_EXAMPLES, add_tasks, add_to_bundle, remove_from_bundle, remove_tasks
from dlp_lora.training.router import RouterTrainingArgs, _report, train_router

TOKENIZER = byte_tokenizer().backend_tokenizer
ASKED = {
    "sums": "What is {i} plus {i}?",
    "tales": "Tell a tale about king number {i}.",
    "codes": "print(x[{i}]) # {i}",
    "units": "Convert {i} kilometres to miles!",
}


def task(name: str, num: int = 80) -> Task:
    examples = [Example(prompt=ASKED[name].format(i=i), answer=f"{name} {i}") for i in range(num + 20)]
    return Task(name=name, train=tuple(examples[:num]), test=tuple(examples[num:]))


@pytest.fixture(scope="module")
def router() -> MiniMLP:
    args = RouterTrainingArgs(epochs=12, batch_size=32)
    found, _ = train_router([task("sums"), task("tales")], TOKENIZER, args)
    assert isinstance(found, MiniMLP)
    return found


def right(router: MiniMLP, name: str) -> float:
    found = router.probabilities([Context(example.prompt) for example in task(name).test]).argmax(dim=-1)
    return sum(router.names[i] == name for i in found) / len(found)


class TestAdding:
    def test_new_tasks_are_learned_and_old_ones_kept(self, router: MiniMLP) -> None:
        found = add_tasks(router, [task("codes", 32), task("units", 32)])
        assert found.names == ("sums", "tales", "codes", "units")
        assert min(right(found, name) for name in found.names) >= 0.9

    def test_prompts_of_the_others_stay_with_them(self, router: MiniMLP) -> None:
        found = add_tasks(router, [task("codes", 32), task("units", 32)])
        own = [Context(example.prompt, example.answer) for name in ("sums", "tales") for example in task(name).test]
        torch.testing.assert_close(found.probabilities(own)[:, :2], router.probabilities(own), rtol=0, atol=0.01)

    def test_trained_ones_joined_ones_and_none_share_by_their_log_odds(self, router: MiniMLP) -> None:
        found = add_tasks(router, [task("codes", 32), task("units", 32)])
        contexts = [Context(example.prompt) for name in ASKED for example in task(name).test]
        trained = router.calibration.log_odds(router.scores(contexts))
        assert found.neighbours is not None
        joined = found.neighbours.logits(found.prompts([context.prompt for context in contexts])).amax(dim=1)
        shares = torch.stack([trained, joined, torch.zeros_like(joined)], dim=1).softmax(dim=1)
        rows = found.probabilities(contexts)
        torch.testing.assert_close(rows[:, :2].sum(dim=1), shares[:, 0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(rows[:, 2:].sum(dim=1), shares[:, 1], rtol=1e-3, atol=1e-5)

    def test_the_router_that_was_there_is_left_as_it_is(self, router: MiniMLP) -> None:
        before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
        add_tasks(router, [task("codes", 8)])
        assert router.names == ("sums", "tales")
        assert all(torch.equal(tensor, before[name]) for name, tensor in router.state_dict().items())

    def test_more_can_join_what_joined(self, router: MiniMLP) -> None:
        found = add_tasks(add_tasks(router, [task("codes", 32)]), [task("units", 32)])
        assert min(right(found, name) for name in found.names) >= 0.9

    def test_what_joined_reaches_as_far_as_its_own_prompts_and_lets_in_no_other_text(self, router: MiniMLP) -> None:
        found = add_tasks(router, [task("codes", 32)])
        assert found.calibration == router.calibration
        own, other = ([Context(example.prompt) for example in task(name).test] for name in ("codes", "units"))
        assert (found.probabilities(own).sum(dim=1) > 0.5).all()
        before, after = (own.probabilities(other).sum(dim=1).mean().item() for own in (router, found))
        assert after < before + 0.1

    def test_one_example_is_enough_to_join(self, router: MiniMLP) -> None:
        assert add_tasks(router, [task("codes", 1)]).names[-1] == "codes"

    def test_of_many_examples_the_seed_draws_those_that_are_kept(self, router: MiniMLP) -> None:
        one, same, other = (add_tasks(router, [task("codes", 200)], seed=seed).state_dict() for seed in (3, 3, 4))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert len(one["neighbours.examples.0.units"]) == MAX_EXAMPLES
        assert not torch.equal(one["neighbours.examples.0.units"], other["neighbours.examples.0.units"])

    @pytest.mark.parametrize("answered", ["", "codes 7", "A longer answer. It has two sentences."])
    def test_what_was_said_and_answered_changes_nothing_for_what_joined(self, router: MiniMLP, answered: str) -> None:
        found = add_tasks(router, [task("codes", 32)])
        contexts = [Context(e.prompt, answered, history="Tell a tale about king number 1.") for e in task("codes").test]
        assert (found.probabilities(contexts).argmax(dim=1) == 2).float().mean() > 0.9

    def test_a_router_with_what_joined_is_saved_and_read_again(self, router: MiniMLP, tmp_path: Path) -> None:
        found = add_tasks(router, [task("codes", 32), task("units", 8)])
        found.save_pretrained(tmp_path / "router")
        again = load_router(tmp_path / "router")
        contexts = [Context(example.prompt) for name in ASKED for example in task(name).test]
        assert again.names == ("sums", "tales", "codes", "units")
        # Products of weights that begin elsewhere may differ in the last bit.
        assert all(tensor.data_ptr() % 64 == 0 for tensor in again.state_dict().values())
        parts = [replace(context, is_part=True) for context in contexts]
        assert torch.equal(again.probabilities([*contexts, *parts]), found.probabilities([*contexts, *parts]))
        assert right(add_tasks(again, [replace(task("codes"), name="more")]), "units") > 0.9

    def test_a_part_of_a_prompt_is_a_question_if_it_is_like_its_adapters_prompts(self, router: MiniMLP) -> None:
        found = add_tasks(router, [task("codes", 32)])
        questions = [Context(e.prompt) for name in ("sums", "tales", "codes") for e in task(name).test]
        parts = [replace(context, is_part=True) for context in questions]
        assert (found.probabilities(parts).sum(dim=1) > 0.5).float().mean() >= 0.95
        assert torch.equal(found.probabilities(parts)[:, 2:], found.probabilities(questions)[:, 2:])
        short = [Context("Tell me more.", is_part=is_part) for is_part in (False, True)]
        whole, part = found.probabilities(short).sum(dim=1).tolist()
        assert part < 0.1 < 0.5 < whole

    def test_a_part_is_no_question_if_the_longer_prompt_is_more_like_its_adapters_prompts(
        self, router: MiniMLP
    ) -> None:
        questions = [example.prompt for example in task("sums").test]
        longer = [Context(text, is_part=True, whole=f"Tell a tale about king number 7. {text}") for text in questions]
        assert (router.probabilities(longer).sum(dim=1) > 0.5).float().mean() >= 0.95
        halves = [Context(text.partition("plus")[0], is_part=True, whole=text) for text in questions]
        assert (router.probabilities(halves).sum(dim=1) < 0.1).float().mean() >= 0.95
        both = [*longer, *(replace(context, whole="") for context in longer), *halves]
        alone = torch.cat([router.probabilities([context]) for context in both])
        torch.testing.assert_close(router.probabilities(both), alone)

    def test_the_report_counts_what_joined(self, router: MiniMLP) -> None:
        found = add_tasks(router, [task("codes", 32)])
        report = _report(found, [task("sums"), task("codes")], [], seconds=0.0, losses=[])
        assert report.accuracy_by_task["codes"] == right(found, "codes")
        assert report.ece <= 1

    def test_a_known_name_is_refused(self, router: MiniMLP) -> None:
        with pytest.raises(TrainingError, match="the router knows 'sums' already; remove it first"):
            add_tasks(router, [task("sums")])

    def test_a_task_without_examples_is_refused(self, router: MiniMLP) -> None:
        with pytest.raises(TrainingError, match="the task 'codes' has no whole examples"):
            add_tasks(router, [replace(task("codes"), train=())])

    def test_parts_of_answers_are_not_read_and_not_enough(
        self, router: MiniMLP, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = task("codes", 32)
        parts = tuple(
            replace(example, prompt=f"{example.prompt} {ASKED['sums'].format(i=i)}", complete=False)
            for i, example in enumerate(whole.train)
        )
        found = add_tasks(router, [replace(whole, train=(*whole.train, *parts))])
        assert "codes: the router does not read 32 examples that are parts of longer answers" in caplog.text
        expected = add_tasks(router, [whole]).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
        with pytest.raises(TrainingError, match=r"'codes' has no whole examples .* give some, 32 are often enough"):
            add_tasks(router, [replace(whole, train=parts)])

    def test_a_router_that_was_not_trained_is_refused(self) -> None:
        with pytest.raises(RouterError, match=r"no adapter can join this router: .* train it again"):
            add_tasks(MiniMLP(["a", "b"], TOKENIZER), [task("codes")])


class TestRemoving:
    def test_between_the_others_it_decides_as_before(self, router: MiniMLP) -> None:
        wide = add_tasks(router, [task("codes", 32)])
        narrow = remove_tasks(wide, ["codes"])
        contexts = [Context(example.prompt) for name in ASKED for example in task(name).test]
        before, after, first = (r.probabilities(contexts) for r in (wide, narrow, router))
        assert torch.equal(after, first)
        torch.testing.assert_close(
            after / after.sum(1, keepdim=True), before[:, :2] / before[:, :2].sum(1, keepdim=True)
        )

    def test_what_joined_may_stay_alone(self, router: MiniMLP) -> None:
        found = remove_tasks(add_tasks(router, [task("codes", 32)]), ["sums", "tales"])
        assert found.names == ("codes",)
        own, other = ([Context(example.prompt) for example in task(name).test] for name in ("codes", "units"))
        assert (found.probabilities(own).sum(dim=1) > 0.5).all()
        assert (found.scores(own) > found.scores(other).max()).all()

    def test_an_unknown_name_is_refused(self, router: MiniMLP) -> None:
        with pytest.raises(RouterError, match="does not know 'codes'; it knows sums, tales"):
            remove_tasks(router, ["codes"])

    def test_the_last_one_cannot_go(self, router: MiniMLP) -> None:
        with pytest.raises(RouterError, match="at least one adapter name"):
            remove_tasks(router, ["sums", "tales"])


class TestBundles:
    """`lively_adapters` are named math, poems and units; here math answers sums, poems tales."""

    @pytest.fixture
    def bundle(self, router: MiniMLP, lively_adapters: Path, tmp_path: Path) -> Path:
        named = MiniMLP(
            ["math", "poems"],
            router.tokenizer,
            router.config,
            calibration=router.calibration,
            near=deepcopy(router.near),
            neighbours=deepcopy(router.neighbours),
            recall=deepcopy(router.recall),
        )
        named.load_state_dict(router.state_dict())
        model = lively_model()
        model.save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        adapters = {name: lively_adapters / name for name in named.names}
        dlp_lora.load(tmp_path / "base", adapters=adapters, router=named).save_pretrained(tmp_path / "bundle")
        return tmp_path / "bundle"

    def test_an_adapter_that_joined_answers_its_task(self, bundle: Path, lively_adapters: Path) -> None:
        done = add_to_bundle(bundle, replace(task("units", 32), name="units"), lively_adapters / "units")
        assert (done.names, done.num_examples, done.accuracy) == (("math", "poems", "units"), 32, 1.0)
        engine = dlp_lora.load(bundle)
        assert engine.bank.names == ("math", "poems", "units")
        asked = [example.prompt for example in task("units").test]
        assert sum(next(iter(engine.route(prompt)[1]), "") == "units" for prompt in asked) / len(asked) > 0.9

    def test_one_that_left_is_gone_from_bank_and_router(self, bundle: Path, lively_adapters: Path) -> None:
        before = dlp_lora.load(bundle).route("What is 3 plus 3?")[0]
        add_to_bundle(bundle, task("units", 32), lively_adapters / "units")
        assert remove_from_bundle(bundle, "units") == ("math", "poems")
        engine = dlp_lora.load(bundle)
        assert engine.bank.names == ("math", "poems")
        assert engine.route("What is 3 plus 3?")[0] == before

    def test_a_bundle_without_a_router_is_refused(self, lively_adapters: Path, tmp_path: Path) -> None:
        engine = dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters)
        engine.save_pretrained(tmp_path / "bundle")
        with pytest.raises(BundleError, match="has no router to teach"):
            remove_from_bundle(tmp_path / "bundle", "math")

    def test_the_commands_add_and_remove(self, bundle: Path, lively_adapters: Path, tmp_path: Path) -> None:
        write_task(tmp_path / "units", task("units", 32))
        run = CliRunner().invoke
        options = ["--adapter", str(lively_adapters / "units"), "--examples", str(tmp_path / "units" / "train.jsonl")]
        added = run(app, ["add-task", "--bundle", str(bundle), *options, "--json"])
        assert added.exit_code == 0, added.output
        assert json.loads(added.stdout)["names"] == ["math", "poems", "units"]
        removed = run(app, ["remove-task", "math", "--bundle", str(bundle)])
        assert removed.exit_code == 0, removed.output
        assert dlp_lora.load(bundle).bank.names == ("poems", "units")

    def test_an_adapter_for_another_base_is_refused_and_the_bundle_kept(self, bundle: Path, tmp_path: Path) -> None:
        write_task(tmp_path / "units", task("units", 32))
        (tmp_path / "none").mkdir()
        options = ["--adapter", str(tmp_path / "none"), "--examples", str(tmp_path / "units" / "train.jsonl")]
        failed = CliRunner().invoke(app, ["add-task", "--bundle", str(bundle), *options])
        assert failed.exit_code == 1
        assert dlp_lora.load(bundle).bank.names == ("math", "poems")
