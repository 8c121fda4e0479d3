"""What holds for a call belongs to the call: contexts, threads and tasks do not see each other's."""

import asyncio
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, StoppingCriteria, TextIteratorStreamer, pipeline

import dlp_lora
from conftest import EveryK, HashRouter, byte_tokenizer, lively_model
from dlp_lora import AdapterError, Engine, Mixture, RoutingSettings, Threshold, TopK, TopP, Uniform
from dlp_lora.engine.cache import cache_argument, cache_of

MakeEngine = Callable[..., Engine]
GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False}
PROMPT = "Tell me a tale"
NAMES = ("math", "units", "poems")
MATH, UNITS = Mixture({"math": 1.0}), Mixture({"units": 1.0})


def mixtures_of(answer: Any) -> set[Mixture]:
    return {sentence.mixture for sentence in answer.trace}


# One way each to call an engine: its mixture, policy or settings.
CALLS: list[dict[str, Any]] = [
    {"mixture": {"math": 1.0}},
    {"mixture": {"units": 0.5, "poems": 0.5}},
    {"mixture": {}},
    {"settings": RoutingSettings(policy=TopK(k=1))},
    {"settings": RoutingSettings(policy=TopP(0.9), kv_policy="keep")},
    {"settings": RoutingSettings(policy=Uniform())},
    {"settings": RoutingSettings(policy=Threshold(p=0.2), prompt_routing="whole")},
    {"settings": RoutingSettings(prompt_routing="sentences")},
]


def ask(engine: Engine, call: dict[str, Any]) -> tuple[Any, ...]:
    answer = engine.generate(PROMPT, **call, **GREEDY)
    return answer.tokens, tuple((s.mixture, s.switched, s.start) for s in answer.trace)


def ask_in_blocks(engine: Engine, call: dict[str, Any]) -> tuple[Any, ...]:
    """The same by `with` blocks."""
    with engine.fixed(call["mixture"]) if "mixture" in call else engine.using(settings=call["settings"]):
        answer = engine.generate(PROMPT, **GREEDY)
        assert engine.last_trace is not None
    return answer.tokens, tuple((s.mixture, s.switched, s.start) for s in answer.trace)


@pytest.mark.parametrize("way", [ask, ask_in_blocks])
class TestAtOnce:
    def test_threads_with_calls_of_their_own_equal_quiet_runs(
        self, make_engine: MakeEngine, way: Callable[..., Any]
    ) -> None:
        engine, quiet = make_engine(), make_engine()
        wanted = [ask(quiet, call) for call in CALLS]
        assert len(set(wanted)) > 4
        barrier, found = threading.Barrier(len(CALLS)), dict[int, Any]()

        def run(i: int) -> None:
            barrier.wait()
            found[i] = [way(engine, CALLS[i]) for _ in range(2)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(CALLS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[i] for i in range(len(CALLS))] == [[answer] * 2 for answer in wanted]

    def test_asyncio_tasks_with_calls_of_their_own_equal_quiet_runs(
        self, make_engine: MakeEngine, way: Callable[..., Any]
    ) -> None:
        engine, quiet = make_engine(), make_engine()
        wanted = [ask(quiet, call) for call in CALLS]

        async def main() -> list[Any]:
            return await asyncio.gather(*(asyncio.to_thread(way, engine, call) for call in CALLS))

        assert asyncio.run(main()) == wanted


class TestBlocks:
    def test_blocks_may_be_left_in_any_order(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        quiet = mixtures_of(engine.generate(PROMPT, **GREEDY))
        a, b = engine.fixed({"math": 1.0}), engine.fixed({"units": 1.0})
        a.__enter__()
        b.__enter__()
        a.__exit__(None, None, None)
        assert mixtures_of(engine.generate(PROMPT, **GREEDY)) == {UNITS}
        b.__exit__(None, None, None)
        assert engine.call.mixtures is None
        assert mixtures_of(engine.generate(PROMPT, **GREEDY)) == quiet

    def test_a_block_may_be_left_in_another_context(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        a, b = engine.fixed({"math": 1.0}), engine.using(policy=TopK(k=1))
        a.__enter__()
        b.__enter__()
        copied = copy_context()
        copied.run(a.__exit__, None, None, None)
        assert copied.run(lambda: engine.call.mixtures) is None
        assert copied.run(lambda: engine.settings.policy) == TopK(k=1)
        assert engine.call.mixtures == (MATH,)  # that context did not leave it
        b.__exit__(None, None, None)
        assert engine.settings.policy == TopP()

    def test_an_exception_leaves_nothing_behind(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        before = engine.call

        class Broken(HashRouter):
            names = NAMES

            def probabilities(self, contexts: Any) -> Any:
                raise KeyError("broken")

        with pytest.raises(KeyError, match="broken"), engine.using(router=Broken(), kv_policy="keep"):
            engine.generate(PROMPT, **GREEDY)
        with pytest.raises(AdapterError, match="no adapter maths"), engine.fixed({"math": 1.0}):
            engine.generate(PROMPT, mixture={"maths": 1.0}, **GREEDY)
        assert engine.call == before
        assert all(group.active is None for group in engine.bank.groups)

    def test_a_setting_changed_inside_a_block_stays_the_default(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with engine.using(policy=TopK(k=1)):
            engine.policy = TopP(0.9)
            assert engine.policy == TopK(k=1)
        assert engine.policy == TopP(0.9)

    def test_two_engines_do_not_see_each_others_blocks(self, make_engine: MakeEngine) -> None:
        one, two = make_engine(), make_engine()
        with one.fixed({"math": 1.0}), two.using(policy=TopK(k=1)):
            assert one.call.mixtures == (MATH,)
            assert two.call.mixtures is None
            assert one.settings.policy == TopP()

    def test_what_is_given_to_a_call_wins_over_blocks_around_it(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with engine.fixed({"math": 1.0}):
            assert mixtures_of(engine.generate(PROMPT, mixture={"units": 1.0}, **GREEDY)) == {UNITS}
            assert mixtures_of(engine.generate(PROMPT, **GREEDY)) == {MATH}

    def test_a_plain_thread_starts_with_the_defaults_and_a_copied_context_carries_blocks_over(
        self, make_engine: MakeEngine
    ) -> None:
        engine = make_engine()
        found: list[Any] = []

        def run() -> None:
            found.append(engine.call.mixtures)

        with engine.fixed({"math": 1.0}):
            for target in (run, partial(copy_context().run, run)):
                thread = threading.Thread(target=target)
                thread.start()
                thread.join()
        assert found == [None, (MATH,)]

    def test_a_text_iterator_streamer_reads_from_a_copied_context(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        inputs = engine.tokenizer(PROMPT, return_tensors="pt")
        streamer = TextIteratorStreamer(engine.tokenizer, skip_prompt=True)
        with engine.fixed({"math": 1.0}):
            wanted = engine.generate(PROMPT, **GREEDY).text
            options = {**inputs, **GREEDY, "streamer": streamer}
            thread = threading.Thread(target=copy_context().run, args=(engine.model.generate,), kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert text == wanted

    def test_no_context_keeps_a_model_alive(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        block = engine.fixed({"math": 1.0})
        block.__enter__()
        engine.generate(PROMPT, **GREEDY)
        kept = copy_context()  # as an asyncio handle does
        model, bank = weakref.ref(engine.model), weakref.ref(engine.bank)
        block.__exit__(None, None, None)
        del engine, block
        gc.collect()
        assert (model(), bank()) == (None, None)
        assert kept is not None


class TestMerged:
    def test_passes_of_other_contexts_are_refused_meanwhile(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(engine.generate(PROMPT, **GREEDY))
            except ValueError as error:
                found.append(str(error))

        with engine.merged({"math": 1.0}):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            inside = engine.generate(PROMPT, **GREEDY)
            carried = copy_context().run(engine.generate, PROMPT, **GREEDY)
        run()
        assert "the base weights hold a mixture while another context is inside engine.merged()" in found[0]
        assert mixtures_of(inside) == mixtures_of(carried) == {MATH}
        assert found[1].tokens

    def test_a_second_one_is_refused_even_if_it_began_before_the_first_was_merged(
        self, make_engine: MakeEngine
    ) -> None:
        engine = make_engine()
        with engine.fixed({"math": 1.0}):
            wanted = engine.generate(PROMPT, **GREEDY).tokens
        found: list[Any] = []

        def run() -> None:
            try:
                with engine.merged({"units": 1.0}):
                    found.append(engine.generate(PROMPT, **GREEDY))
            except ValueError as error:
                found.append(str(error))

        thread = threading.Thread(target=run)
        with ExitStack() as first:
            with engine.bank.lock:
                thread.start()
                while not engine.bank.lock.is_awaited:
                    assert thread.is_alive()
                first.enter_context(engine.merged({"math": 1.0}))
            thread.join()
            assert found == ["the base weights hold another mixture; leave engine.merged() first"]
            assert engine.generate(PROMPT, **GREEDY).tokens == wanted
        run()
        assert mixtures_of(found[1]) == {UNITS}


class TestStream:
    def test_a_stream_made_inside_a_block_and_read_outside_it(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        with engine.fixed({"math": 1.0}):
            stream = engine.stream(PROMPT, **GREEDY)
            wanted = engine.generate(PROMPT, **GREEDY)
        assert "".join(stream) == wanted.text
        assert stream.generation.tokens == wanted.tokens
        assert mixtures_of(stream.generation) == {MATH}

    def test_its_generation_is_what_generate_gives(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        stream, wanted = engine.stream(PROMPT, **GREEDY), engine.generate(PROMPT, **GREEDY)
        pieces = list(stream)
        found = stream.generation
        assert ("".join(pieces), found.text, found.tokens) == (wanted.text, wanted.text, wanted.tokens)
        assert [(s.text, s.mixture) for s in found.trace] == [(s.text, s.mixture) for s in wanted.trace]
        assert [s.mixture for s in engine.last_trace or ()] == [s.mixture for s in wanted.trace]
        engine.generate(PROMPT, mixture={"math": 1.0}, **GREEDY)
        assert stream.generation == found
        assert {s.mixture for s in engine.last_trace or ()} == {MATH}  # to ask the stream again is no pass

    def test_one_that_was_left_early_has_what_was_written_by_then(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        wanted = engine.generate(PROMPT, max_new_tokens=200, do_sample=False)
        stream = engine.stream(PROMPT, max_new_tokens=200, do_sample=False)
        read = "".join(piece for _, piece in zip(range(3), stream, strict=False))
        found = stream.generation
        assert found.text.startswith(read)
        assert 0 < len(found.tokens) < len(wanted.tokens)
        assert wanted.text.startswith(found.text)
        assert list(stream) == []

    def test_one_that_never_began_has_no_answer(self, make_engine: MakeEngine) -> None:
        stream = make_engine().stream(PROMPT, **GREEDY)
        stream.close()
        with pytest.raises(ValueError, match="closed before its first token"):
            stream.generation  # noqa: B018

    def test_leaving_it_stops_the_model(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        threads = threading.active_count()
        with engine.stream(PROMPT, max_new_tokens=400, do_sample=False) as stream:
            next(stream)
        assert threading.active_count() == threads
        stream = engine.stream(PROMPT, max_new_tokens=400, do_sample=False)
        next(stream)
        running = stream._thread
        del stream
        running.join(timeout=60)
        assert threading.active_count() == threads

    def test_the_collector_may_delete_it_in_a_thread_that_the_model_waits_for(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        stream = engine.stream(PROMPT, max_new_tokens=400, do_sample=False)
        next(stream)
        running = stream._thread
        with engine.bank.lock:
            del stream  # it must not wait for the model, which waits for this lock
        running.join(timeout=60)
        assert not running.is_alive()

    def test_it_ends_with_an_error_if_its_engine_is_detached(self, make_engine: MakeEngine) -> None:
        with make_engine() as engine:
            unread = engine.stream(PROMPT, **GREEDY)
            begun = engine.stream(PROMPT, max_new_tokens=400, do_sample=False)
            next(begun)
        for stream in (unread, begun):
            with pytest.raises(ValueError, match="the engine was detached from its model"):
                "".join(stream)

    def test_one_that_failed_keeps_no_adapter(self, make_engine: MakeEngine, lively_adapters: Path) -> None:
        class Failing(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                if input_ids.shape[1] > len(PROMPT) + 5:
                    raise RuntimeError("out of memory")
                return torch.zeros(len(input_ids), dtype=torch.bool)

        engine = make_engine()
        with pytest.raises(RuntimeError, match="out of memory"):
            "".join(engine.stream(PROMPT, mixture={"math": 1.0}, stopping_criteria=[Failing()], **GREEDY))
        engine.remove_adapter("math")
        engine.add_adapter(lively_adapters / "math")


class TestLastTrace:
    def test_it_is_there_after_the_models_own_generate_and_a_pipeline(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        assert engine.last_trace is None
        inputs = engine.tokenizer(PROMPT, return_tensors="pt")
        engine.model.generate(**inputs, **GREEDY)
        wanted = engine.generate(PROMPT, **GREEDY).trace
        assert [s.mixture for s in engine.last_trace or ()] == [s.mixture for s in wanted]
        text = pipeline("text-generation", model=engine.model, tokenizer=engine.tokenizer)
        with engine.fixed({"math": 1.0}):
            text(PROMPT, **GREEDY)
        assert {s.mixture for s in engine.last_trace or ()} == {MATH}

    def test_it_is_never_that_of_another_pass_or_context(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.generate(PROMPT, **GREEDY)
        assert engine.last_trace
        seen: list[Any] = []
        for target in (seen.append, copy_context().run):
            args = (engine.last_trace,) if target is seen.append else (lambda: seen.append(engine.last_trace),)
            thread = threading.Thread(target=target, args=args)
            thread.start()
            thread.join()
        assert seen[1] is None  # a copy of this context ran no pass

        async def task() -> Any:
            return engine.last_trace

        assert asyncio.run(task()) is None
        embeddings = engine.model.get_input_embeddings()(torch.tensor([[40, 41]]))
        with engine.fixed({"math": 1.0}):
            engine.model(inputs_embeds=embeddings)
        assert engine.last_trace is None  # of a pass that cannot be traced

    def test_a_batch_has_one_a_row(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        answers = engine.generate([PROMPT, "Why?"], **GREEDY)
        with pytest.raises(ValueError, match=r"the last pass had 2 rows; engine\.last_traces has"):
            engine.last_trace  # noqa: B018
        assert [t[0].mixture for t in engine.last_traces or ()] == [a.trace[0].mixture for a in answers]


class TestCopies:
    def test_a_copy_of_the_model_computes_with_its_own_weights(self, make_engine: MakeEngine) -> None:
        engine, ids = make_engine(), torch.arange(40, 48)[None]
        with torch.no_grad(), engine.disabled():
            wanted = engine.model(ids).logits
            copied = copy.deepcopy(engine.model)
            assert type(copied) is type(lively_model())
            assert copied.state_dict().keys() == lively_model().state_dict().keys()
            torch.testing.assert_close(copied(ids).logits, wanted)
            for parameter in copied.parameters():
                parameter.data.zero_()
            assert not copied(ids).logits.any()
            assert torch.equal(engine.model(ids).logits, wanted)

    def test_the_decoder_alone_is_the_base_after_a_pass(self, make_engine: MakeEngine) -> None:
        engine, ids = make_engine(), torch.arange(40, 48)[None]
        with torch.no_grad():
            wanted = lively_model().model(ids).last_hidden_state
            with engine.fixed({"math": 1.0}):
                engine.model(ids)
            assert torch.equal(engine.model.model(ids).last_hidden_state, wanted)


def test_an_engine_says_what_it_is(make_engine: MakeEngine) -> None:
    shown = repr(make_engine(kv_policy="keep"))
    for part in (
        "LlamaForCausalLM",
        "on cpu",
        "3 adapters: math, poems, units",
        "HashRouter",
        "kv_policy='keep'",
        "paths: ",
    ):
        assert part in shown


def test_settings_are_taken_whole_or_by_name(make_engine: MakeEngine) -> None:
    settings = RoutingSettings(policy=TopK(k=2), kv_policy="keep")
    assert make_engine(settings=settings, switching=dlp_lora.Switching()).settings == settings
    by_name = make_engine(policy=TopK(k=2), kv_policy="keep", switching=dlp_lora.Switching())
    assert by_name.settings == settings
    assert RoutingSettings.from_dict(settings.to_dict()) == settings
    whole = dlp_lora.load(
        lively_model(),
        tokenizer=byte_tokenizer(),
        adapters={name: adapter.path for name, adapter in by_name.bank.adapters.items()},
        settings=settings,
        kv_policy="recompute",
        segmenter=partial(EveryK, 6),
    )
    assert whole.settings == RoutingSettings(policy=TopK(k=2))


def test_a_forward_that_names_no_arguments_is_routed_too(make_engine: MakeEngine, lively_adapters: Path) -> None:
    class Unnamed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model: Any = lively_model()
    model.__class__ = Unnamed
    named = make_engine()
    unnamed = dlp_lora.load(
        model,
        tokenizer=named.tokenizer,
        adapters=lively_adapters,
        router=named.router,
        segmenter=named.call.segmenter,
        settings=named.settings,
    )
    ids = torch.tensor([named.tokenizer(PROMPT)["input_ids"]])
    found = []
    with torch.no_grad():
        for engine in (named, unnamed):
            cache = cache_of(engine.model(ids, use_cache=True))
            logits = [engine.model(ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(12)]
            assert any(sentence.switched for sentence in engine.last_trace or ())
            found.append(torch.cat(logits))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_for_gradients_is_computed_under_the_mixture_of_its_pass(
    make_engine: MakeEngine, reentrant: bool
) -> None:
    ids = torch.arange(40, 56).reshape(2, 8)
    gradients = []
    for checkpointing in (False, True):
        engine = make_engine()
        engine.model.train()
        if checkpointing:
            engine.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            engine.model.enable_input_require_grads()
        weight = engine.model.get_input_embeddings().weight.requires_grad_()
        with engine.fixed([{"math": 1.0}, {"units": 0.5, "poems": 0.5}]):
            loss = engine.model(ids, labels=ids, use_cache=False).loss
        if checkpointing:
            with engine.fixed({"poems": 3.0}), torch.no_grad():
                engine.model(ids)  # another pass between
        thread = threading.Thread(target=loss.backward)  # as on a GPU
        thread.start()
        thread.join()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
