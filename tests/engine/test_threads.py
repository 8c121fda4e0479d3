"""Several threads at one engine: passes take turns, and adapters come and go between them."""

import copy
import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import reference
from conftest import EveryK, HashRouter, byte_tokenizer, lively_model, make_adapter, tiny_model
from dlp_lora import AdapterError, Context, Engine, RouterError, TopP
from dlp_lora.bank.attach import linear_layers, siblings
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import read_adapter
from dlp_lora.engine.streaming import Piece

MakeEngine = Callable[..., Engine]
IDS = torch.arange(40, 64).reshape(3, 8)
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
PROMPTS = ["Tell me a tale", "How far is it to the moon"]


class Together(LogitsProcessor):
    """Lets a thread go on only once the other one has come as far, or has ended."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with suppress(threading.BrokenBarrierError):  # the other one has ended
            self.barrier.wait(timeout=60)
        return scores


def together(*calls: Callable[[LogitsProcessorList], Any]) -> list[Any]:
    """Runs calls in a thread each, token by token side by side."""
    barrier = threading.Barrier(len(calls))
    found: dict[int, Any] = {}

    def run(i: int) -> None:
        try:
            found[i] = calls[i](LogitsProcessorList([Together(barrier)]))
        except BaseException as error:
            found[i] = error
        barrier.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found.values():
        if isinstance(result, BaseException):
            raise result
    return [found[i] for i in range(len(calls))]


def amid_a_pass(engine: Engine, action: Callable[[], Any]) -> threading.Thread:
    """Has another thread act while the next pass is between its layers; it is given the time that it needs."""
    thread = threading.Thread(target=action)

    def act(*_: Any) -> None:
        handle.remove()
        thread.start()
        thread.join(timeout=1)  # what has to wait for the pass does not end in it

    handle = engine.model.model.layers[1].register_forward_pre_hook(act)
    return thread


def answer(engine: Engine, prompt: str, processors: LogitsProcessorList | None = None, **settings: Any) -> Any:
    return engine.generate(prompt, logits_processor=processors, **{**GREEDY, **settings})


def pieces_of(engine: Engine, prompt: str, processors: LogitsProcessorList | None = None) -> list[Piece]:
    return list(engine.stream(prompt, logits_processor=processors, **GREEDY))


@torch.no_grad()
def logits(engine: Engine) -> Tensor:
    with engine.fixed([{"math": 1.0}, {"units": 0.5, "poems": 0.5}, {}]):
        found: Tensor = engine.model(IDS).logits
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of more rank than all others together."""
    return make_adapter(tiny_model(), tmp_path_factory.mktemp("wide") / "wide", seed=9, r=32, target_modules=["q_proj"])


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_pass_computes_what_it_began_whatever_another_thread_does(
    make_engine: MakeEngine, wide: Path, change: str
) -> None:
    engine = make_engine()
    wanted = logits(engine)
    actions = {"add": lambda: engine.bank.add(read_adapter(wide)), "remove": lambda: engine.bank.remove("math")}
    thread = amid_a_pass(engine, actions[change])
    assert torch.equal(logits(engine), wanted)
    thread.join()
    assert engine.bank.names == (("math", "poems", "units", "wide") if change == "add" else ("poems", "units"))


def test_the_router_runs_only_while_its_thread_holds_the_bank(make_engine: MakeEngine) -> None:
    class Noting(HashRouter):
        def probabilities(self, contexts: Sequence[Context]) -> Tensor:
            has_lock.append(engine.bank.lock._owner == threading.get_ident())
            return super().probabilities(contexts)

    has_lock: list[bool] = []
    engine = make_engine(router=Noting())
    first, second = (found.text for found in engine.generate(PROMPTS, **GREEDY))
    stop = next(letter for letter in first if letter.isascii() and letter not in second[:12])
    engine.generate(PROMPTS, stop_strings=[stop], **GREEDY)
    engine.generate(PROMPTS[0], num_beams=2, **GREEDY)
    with engine.stream(PROMPTS[0], **GREEDY) as stream:
        next(stream)
    assert stream.generation.tokens
    assert has_lock
    assert all(has_lock)


def test_two_threads_generate_at_once_as_each_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()
    alone = [answer(engine, prompt) for prompt in PROMPTS]
    found = together(*(partial(answer, engine, prompt) for prompt in PROMPTS))
    for one, other in zip(found, alone, strict=True):
        assert one.tokens == other.tokens
        assert [(s.text, s.mixture) for s in one.trace] == [(s.text, s.mixture) for s in other.trace]


def test_two_streams_at_once_are_each_their_own(make_engine: MakeEngine) -> None:
    engine = make_engine()
    alone = [pieces_of(engine, prompt) for prompt in PROMPTS]
    found = together(*(partial(pieces_of, engine, prompt) for prompt in PROMPTS))
    assert found == alone
    assert [[piece.mixture for piece in pieces] for pieces in found] == [
        [p.mixture for p in pieces] for pieces in alone
    ]


def test_each_call_ends_at_its_own_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    ends = [answer(engine, prompt).tokens[12] for prompt in PROMPTS]
    calls = [
        partial(answer, engine, p, eos_token_id=end, pad_token_id=258) for p, end in zip(PROMPTS, ends, strict=True)
    ]
    alone = [call() for call in calls]
    assert {len(g.tokens) for g in alone} != {24}
    assert [g.tokens for g in together(*calls)] == [g.tokens for g in alone]


def test_rows_keep_a_removed_adapter_while_two_caches_take_turns(make_engine: MakeEngine) -> None:
    def turns(engine: Engine, *, remove: bool) -> tuple[Tensor, Tensor]:
        with engine.fixed({"math": 1.0}), torch.no_grad():
            one = engine.model(IDS, use_cache=True).past_key_values
        with engine.fixed({"units": 1.0}), torch.no_grad():
            other = engine.model(IDS, use_cache=True).past_key_values
        if remove:
            engine.remove_adapter("math")
        with engine.using(segmenter=lambda: EveryK(99)), torch.no_grad():
            logits = [engine.model(IDS[:, :1], past_key_values=c).logits for c in (one, other, one, copy.deepcopy(one))]
        return torch.cat(logits[:3]), logits[3]

    engine = make_engine()
    wanted, found = turns(make_engine(), remove=False), turns(engine, remove=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert engine.bank.names == ("poems", "units")
    engine.generate("Why?", **GREEDY)  # the caches are gone, and with them the adapter
    assert set(engine.bank.store.loaded) == {"poems", "units"}


def test_an_adapter_comes_back_once_no_row_runs_with_its_old_self(
    make_engine: MakeEngine, lively_adapters: Path
) -> None:
    engine = make_engine()
    with engine.fixed({"math": 1.0}), torch.no_grad():
        cache = engine.model(IDS, use_cache=True).past_key_values
    engine.remove_adapter("math")
    with pytest.raises(AdapterError, match="rows still run with the removed adapter 'math'"):
        engine.add_adapter(lively_adapters / "units", "math")
    del cache
    assert engine.add_adapter(lively_adapters / "units", "math") == "math"
    with engine.fixed({"math": 1.0}):
        found = engine.generate("Why?", **GREEDY)
    with engine.fixed({"units": 1.0}):
        assert engine.generate("Why?", **GREEDY).tokens == found.tokens


def test_a_cache_is_freed_with_its_last_reference(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with torch.no_grad():
        cache = engine.model(IDS, use_cache=True).past_key_values
    cache = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    gc.disable()
    try:
        known = weakref.ref(cache)
        del cache
        assert known() is None
    finally:
        gc.enable()


def test_an_adapter_of_modules_that_none_had_is_added_while_rows_run(make_engine: MakeEngine, tmp_path: Path) -> None:
    late = make_adapter(lively_model(), tmp_path / "late", seed=9, scale=0.3, target_modules=["q_proj", "lm_head"])
    engine, quiet = make_engine(), make_engine()
    texts = [quiet.generate(PROMPTS[0], **GREEDY).text]
    stream = engine.stream(PROMPTS[0], **GREEDY)
    pieces = [next(stream)]
    assert engine.add_adapter(late) == "late"
    assert "".join([*pieces, *stream]) == texts[0]
    with engine.fixed({"late": 0.7, "math": 0.3}):
        found = engine.model(IDS).logits
    folders = {"late": late, "math": engine.bank.adapters["math"].path}
    wanted = reference.with_mixture(lively_model(), {"late": 0.7, "math": 0.3}, folders)(IDS).logits
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-3, atol=1e-3)
    with pytest.raises(RouterError, match="the router does not know the adapters late"):
        engine.save_pretrained(tmp_path / "bundle")
    with engine.merged({"math": 1.0}), pytest.raises(ValueError, match=r"leave engine\.merged\(\) first"):
        engine.add_adapter(late, "again")


def test_an_adapter_that_does_not_fit_leaves_nothing_behind_and_others_files_are_not_read(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    head = ["q_proj", "lm_head"]
    first = make_adapter(lively_model(), tmp_path / "first", seed=9, scale=0.3, target_modules=head)
    engine = make_engine()
    engine.add_adapter(first)
    shutil.rmtree(first)
    names = engine.bank.names
    foreign = make_adapter(lively_model(seed=5), tmp_path / "foreign", seed=9, target_modules=head)
    with pytest.raises(AdapterError, match=r"foreign holds a copy of the base model's lm_head\.weight that differs"):
        engine.add_adapter(foreign)
    assert engine.bank.names == names
    late = make_adapter(lively_model(), tmp_path / "late", seed=8, scale=0.3, target_modules=head)
    engine.add_adapter(late)
    with engine.fixed({"late": 1.0}):
        found = engine.model(IDS).logits
    wanted = reference.with_mixture(lively_model(), {"late": 1.0}, {"late": late})(IDS).logits
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-3, atol=1e-3)


def test_adapters_take_the_places_of_others_all_of_them_or_none(
    make_engine: MakeEngine, lively_adapters: Path, tmp_path: Path
) -> None:
    engine = make_engine()
    before = {name: engine.generate("Why?", mixture={name: 1.0}, **GREEDY).tokens for name in engine.bank.names}
    foreign = make_adapter(lively_model(seed=5), tmp_path / "foreign", seed=9, target_modules=["q_proj", "lm_head"])
    with pytest.raises(AdapterError, match="foreign holds a copy of the base model's lm_head"):
        engine.put_adapters({"math": lively_adapters / "units", "late": foreign})
    assert {name: engine.generate("Why?", mixture={name: 1.0}, **GREEDY).tokens for name in engine.bank.names} == before
    with engine.fixed({"math": 1.0}), pytest.raises(AdapterError, match="rows still run with the adapter 'math'"):
        engine.put_adapters({"math": lively_adapters / "units"})
    engine.put_adapters({"math": lively_adapters / "units", "late": lively_adapters / "math"})
    assert engine.bank.names == (*before, "late")
    for name, other in {"math": "units", "late": "math", "units": "units"}.items():
        assert engine.generate("Why?", mixture={name: 1.0}, **GREEDY).tokens == before[other]


def test_a_bank_is_compared_with_every_base_that_it_is_attached_to(tmp_path: Path) -> None:
    head = make_adapter(lively_model(), tmp_path / "head", seed=9, target_modules=["q_proj", "lm_head"])
    model = lively_model()
    bank = AdapterBank(linear_layers(model), [read_adapter(head)], siblings=siblings(model))
    Engine(model, byte_tokenizer(), bank).detach()
    with pytest.raises(AdapterError, match=r"head holds a copy of the base model's lm_head\.weight that differs"):
        Engine(lively_model(seed=5), byte_tokenizer(), bank)


def test_what_the_router_gives_a_removed_adapter_is_the_probability_that_none_fits(make_engine: MakeEngine) -> None:
    engine = make_engine(policy=TopP())
    probabilities = dict(
        zip(engine.router.names, engine.router.probabilities([Context("Why?")])[0].tolist(), strict=True)
    )
    for name in sorted(probabilities, key=probabilities.__getitem__):
        engine.remove_adapter(name)
        del probabilities[name]
        told, mixture = engine.route("Why?")
        assert set(told) == set(probabilities)
        assert bool(mixture) == (sum(probabilities.values()) > 0.5)
        assert engine.generate("Why?", **GREEDY).tokens
    with pytest.raises(AdapterError, match="no adapter 'math'; there are none"):
        engine.remove_adapter("math")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_pass_that_breaks_off_lets_other_threads_go_on(make_engine: MakeEngine, error: type[BaseException]) -> None:
    engine = make_engine()
    wanted = engine.generate(PROMPTS[0], **GREEDY).text

    def fail(*_: Any) -> None:
        raise error

    handle = engine.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        engine.generate(PROMPTS[0], **GREEDY)
    handle.remove()
    assert "".join(engine.stream(PROMPTS[0], **GREEDY)) == wanted  # in a thread of its own
