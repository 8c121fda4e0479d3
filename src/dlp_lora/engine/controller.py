"""The controller: before each forward pass of the model, it decides the mixture of each row (Fig. 1).

It reads the tokens that go into the model. A pass that starts a KV cache is a prompt: the router reads it for the
beginning of the answer, and with `prompt_routing="sentences"` also each of its sentences. One more token on a cache is
a decoding step. If the token begins a new sentence, the router reads the history and this token, and the pass that
encodes the token already runs under the new mixture.

The KV cache object has the state of each row (`dlp_lora.engine.cache`). The context has the settings of a call
(`dlp_lora.engine.overrides`). Several threads may run the model at once: their passes take turns. A pass holds the
bank's lock from its routing to its end, and then leaves nothing fused.
"""

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache as cached
from functools import partial, wraps
from types import MethodType
from typing import Any, SupportsIndex
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase

from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.group import Reads
from dlp_lora.engine.cache import (
    CachedRows,
    as_wide_as,
    bind,
    cache_argument,
    cache_of,
    check_rewritable,
    empty_like,
    rows_of,
    write_rows,
)
from dlp_lora.engine.calls import Call, Generating, call_setting, kept_tokens
from dlp_lora.engine.overrides import (
    EngineKey,
    Mark,
    Override,
    current_call,
    is_in_force,
    latest_mark,
    mark_pass,
    overriding,
)
from dlp_lora.engine.passes import (
    PassArguments,
    check_generate,
    check_is_kept,
    check_not_packed,
    check_text_is_known,
    has_like_images,
    lengthened,
    other_inputs,
)
from dlp_lora.engine.prompts import check_embedded
from dlp_lora.engine.routing import Prompt, Routing, RowRouter, push_tokens
from dlp_lora.engine.starting import RowStarter
from dlp_lora.errors import ModelError, PromptError
from dlp_lora.policy import Mixture

CONTROLLER = "_dlp_lora_controller"
NOT_COMPILED = (
    "a model that an engine is attached to is not compiled by torch.compile(model): which adapters a pass uses follows "
    "from its tokens; engine.compile() compiles its decoding steps"
)
NOT_BATCHED = (
    "continuous batching packs the tokens of all requests into one row, which cannot be routed; pass the prompts to "
    "engine.generate as a list, or serve them with a backend of dlp_lora.serve"
)


class Controller:
    """Routes the rows of a model's forward passes; the engine installs it around the model's `forward`."""

    def __init__(self, bank: AdapterBank, tokenizer: PreTrainedTokenizerBase, defaults: Call) -> None:
        self.bank = bank
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.key = EngineKey()
        self.merged: Override | None = None  # the block that has merged a mixture into the base weights
        self._passes: WeakKeyDictionary[Mark, tuple[RowRouter, ...]] = WeakKeyDictionary()
        self._fused: tuple[Sequence[Mixture], Tensor | None, Reads | None] = [], None, None  # by the running pass
        self._compiled: Callable[..., Any] | None = None  # runs decoding steps over a static cache
        self.starter = RowStarter(tokenizer, bank.adapters.keys())
        self.is_installed = False

    @property
    def call(self) -> Call:
        """The settings of a call in this context."""
        return current_call(self.defaults, self.key)

    @property
    def latest(self) -> tuple[RowRouter, ...] | None:
        """The rows of the latest forward pass in this context."""
        mark = latest_mark(self.key)
        return None if mark is None else self._passes.get(mark)

    def note_pass(self, rows: Sequence[RowRouter] | None) -> None:
        """Stores the rows of a pass as the latest in this context; None for a pass without a trace."""
        mark = mark_pass(self.key)
        if rows is not None:
            self._passes[mark] = tuple(rows)

    def routing(self, call: Call) -> Routing:
        """The decisions of a call among the bank's adapters."""
        return self.starter.routing(call)

    def install(self, model: nn.Module) -> None:
        """Wraps the controller around a model's `forward`."""
        self._model = model
        kind: Any = type(model)
        # Offloading puts a `forward` into the instance, which would hide that of the class.
        self._instance_forward = vars(model).pop("forward", None)
        self._plain = self._instance_forward or MethodType(kind.forward, model)
        parameters = inspect.signature(self._plain).parameters.values()
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        vars(model)[CONTROLLER] = self
        model.__class__ = routed(kind)
        self.is_installed = True

    def uninstall(self, model: nn.Module) -> None:
        """Restores the model's class and `forward`."""
        self.is_installed = False
        model.__class__ = type(model).__mro__[1]
        del vars(model)[CONTROLLER]
        if self._instance_forward is not None:
            vars(model)["forward"] = self._instance_forward

    def check_installed(self) -> None:
        """Checks that the model still routes.

        Raises:
            ValueError: if the engine was detached.
        """
        if not self.is_installed:
            raise ValueError("the engine was detached from its model; make another one with dlp_lora.load")

    @property
    def is_compiled(self) -> bool:
        """Whether `torch.compile` runs decoding steps over a static cache."""
        return self._compiled is not None

    def compile(self, **kwargs: Any) -> None:
        """Lets `torch.compile` compile the decoding steps whose fusing is padded."""
        self._compiled = torch.compile(self._plain, **kwargs)

    def generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the model's `generate`, with arguments that the router can follow.

        It turns on the cache that routing needs, and adds the tokenizer for stop strings, whatever the base model's
        generation config says.

        Raises:
            ValueError: if an argument cannot be routed.
        """
        names = [*inspect.signature(generate).parameters]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        config = self._model.generation_config
        if self.call.mixtures is None:
            check_generate(kwargs, config)
            if call_setting("use_cache", {}, kwargs.get("generation_config") or config) is False:
                kwargs["use_cache"] = True
        if call_setting("stop_strings", kwargs, config):
            kwargs.setdefault("tokenizer", self.tokenizer)
        ids = kwargs.get("inputs", kwargs.get("input_ids"))
        generating = Generating(num_prompt=ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 else None)
        lease = self.bank.lease(())
        with overriding(Override(key=self.key, changes={"generating": generating}, lease=lease)):
            return generate(**kwargs)

    @torch.compiler.disable(reason=NOT_COMPILED)  # type: ignore[untyped-decorator]
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one forward pass, routed."""
        # By name, so that a positional mask or cache is recognised; wrong combinations fail below.
        if len(args) <= len(self._names) and not kwargs.keys() & self._names[: len(args)]:
            args, kwargs = (), {**dict(zip(self._names, args, strict=False)), **kwargs}
        with self.bank.lock:
            try:
                # If the arguments have no names, the first are the token ids.
                arguments = PassArguments.of({"input_ids": args[0], **kwargs} if args else kwargs)
                rows = self._prepare(arguments)
                run = self._plain if self._compiled is None or not self.bank.is_padded else self._compiled
                with self._keeping_mixtures():
                    output = run(*args, **kwargs)
            finally:
                self.bank.clear()
            if rows is not None and arguments.num_cached == 0:
                self._keep_rows(rows, arguments, cache_of(output))
        return output

    @contextmanager
    def under(
        self, mixtures: Sequence[Mixture], tokens: Tensor | None = None, *, reuse: bool = False
    ) -> Iterator[Callable[..., Any]]:
        """Returns the base model's forward, with arguments by name, under fixed mixtures in the block.

        Nothing is routed. A model gets `position_ids` and `logits_to_keep` only if it knows them.
        """
        optional = {"position_ids", "logits_to_keep"} - {*self._names}

        def run(**kwargs: Any) -> Any:
            return self._plain(**{name: value for name, value in kwargs.items() if name not in optional})

        with self.bank.lock:
            if self.bank.is_merged:
                raise ValueError("the base weights hold a mixture; leave engine.merged() first")
            try:
                with torch.inference_mode(False), torch.no_grad():
                    self.bank.fuse(mixtures, tokens, reuse=reuse)
                yield run
            finally:
                self.bank.clear()

    def start_row(
        self, tokens: Sequence[int], call: Call, *, prompt: Prompt | None = None, among: Collection[str] | None = None
    ) -> RowRouter:
        """Routes a prompt, as `RowStarter.start_row` does, if the model has an embedding of each token."""
        if prompt is None:
            check_embedded(self._model, self.tokenizer, tokens)
        return self.starter.start_row(tokens, call, prompt=prompt, among=among)

    def replay(self, inputs: Mapping[str, Tensor], answers: Sequence[Sequence[int]]) -> list[RowRouter]:
        """Routes finished answers without the model: the same decisions, because they depend only on the tokens."""
        copies = len(answers) // inputs["input_ids"].shape[0]
        ids, mask = (inputs[key].repeat_interleave(copies, dim=0) for key in ("input_ids", "attention_mask"))
        call = replace(self.call, routing_log=None)  # its decisions were logged when they were made
        with self.bank.lock:  # a router may run the base model
            rows = self._start_rows(ids, kept_tokens(ids, mask), call)
            for row, tokens in zip(rows, answers, strict=True):
                for token in tokens[:-1]:
                    row.push(token)
        return rows

    @torch.inference_mode(False)  # buffers outlive the call, and the next call may need gradients
    @torch.no_grad()
    def _prepare(self, arguments: PassArguments) -> CachedRows | None:
        """Routes the rows of a pass and fuses their mixtures; returns the rows, if they are known."""
        self.note_pass(None)  # in case of an error, nothing stays fused
        if self.merged is not None and not is_in_force(self.merged):
            raise ValueError(
                "the base weights hold a mixture while another context is inside engine.merged(); wait until it is left"
            )
        call = self.call
        if arguments.ids is None:
            self._fuse_embeddings(arguments, call)
            return None
        known = rows_of(arguments.cache)
        if call.mixtures is None:
            check_text_is_known(arguments, known, call)
        match arguments.kind(known, call.generating):
            case "step":
                assert known is not None
                rows, switched = known, self._step(known, arguments, call)
            case "more":
                assert known is not None
                rows, switched = self._read_on(known, arguments, call)
            case _:
                rows, switched = self._start(arguments, call), []
        self.note_pass(rows.rows)
        if rows.lease is None or switched:
            rows.lease = self.bank.lease([mixture for row in rows.rows for mixture in row.mixtures])
        if arguments.cache is not None:
            bind(arguments.cache, rows)
        encode_ms = 0.0
        if switched and call.settings.kv_policy == "recompute":
            encode_ms = self._encode_again(rows, switched, arguments)
        fuse_ms = self._fuse(rows, arguments, call)
        for i, row in enumerate(rows.rows):
            row.charge(fuse_ms=fuse_ms, encode_ms=encode_ms if i in switched else 0.0)
        return rows

    def _start(self, arguments: PassArguments, call: Call) -> CachedRows:
        """Routes the prompts of a pass that starts rows."""
        assert arguments.ids is not None
        kept = arguments.kept(call)
        if call.mixtures is None:
            check_not_packed(arguments, kept)
            if call.settings.kv_policy == "recompute":
                check_rewritable(arguments.cache)
        if call.generating is not None:
            call.generating.has_begun = True
        return CachedRows(
            self._start_rows(arguments.ids, kept, call), arguments.ids, kept, others=other_inputs(arguments)
        )

    def _keep_rows(self, rows: CachedRows, arguments: PassArguments, cache: Cache | None) -> None:
        """Ties rows to the KV cache that their first pass has made."""
        call = self.call
        if call.mixtures is None:
            check_is_kept(cache, arguments, call, self._model)
            if call.settings.kv_policy == "recompute" and arguments.cache is None:
                check_rewritable(cache)
        if cache is not None and rows_of(cache) is None:
            bind(cache, rows)

    def _fuse_embeddings(self, arguments: PassArguments, call: Call) -> None:
        if call.mixtures is None:
            raise PromptError("routing reads token ids, but got inputs_embeds; pass input_ids or use engine.fixed()")
        batch, num_tokens = arguments.kwargs["inputs_embeds"].shape[:2]
        self._fused = call.mixtures_of(batch), None, Reads(num_tokens)
        self.bank.fuse(*self._fused)

    def _step(self, known: CachedRows, arguments: PassArguments, call: Call) -> list[int]:
        """Adds one token to each row; returns the numbers of the rows whose mixture changed."""
        assert arguments.ids is not None
        known.append(arguments.ids, torch.ones_like(arguments.ids, dtype=torch.bool))
        routing, fixed = self.routing(call), call.mixtures_of(len(known.rows))
        changed = [False] * len(known.rows)
        for i, row in enumerate(known.rows):
            row.routing, row.is_fixed = routing, bool(fixed)
            changed[i] = bool(fixed) and row.fix(fixed[i])
        pushed = push_tokens(known.rows, arguments.ids[:, 0].tolist())
        return [i for i, (a, b) in enumerate(zip(changed, pushed, strict=True)) if a or b]

    def _read_on(self, known: CachedRows, arguments: PassArguments, call: Call) -> tuple[CachedRows, list[int]]:
        """Routes the whole text with its new part; returns the rows, and those whose mixtures changed."""
        assert arguments.ids is not None
        ids = torch.cat([known.ids[:, : arguments.num_cached], arguments.ids], dim=1)
        kept = torch.cat([known.kept[:, : arguments.num_cached], arguments.kept(call)], dim=1)
        if call.mixtures is None:
            check_not_packed(arguments, kept[:, arguments.num_cached :])
        others = known.others
        if more := other_inputs(arguments):
            others = more if others == {} and arguments.num_cached == 0 else None  # with both, the order is unknown
        rows = CachedRows(self._start_rows(ids, kept, call), ids, kept, others=others)
        switched = [
            i
            for i, (row, before) in enumerate(zip(rows.rows, known.rows, strict=True))
            # With the text, the sentences of the cached tokens have changed.
            if row.prompt_trace or row.mixture != before.mixture
        ]
        return rows, switched

    def _start_rows(self, ids: Tensor, kept: Bool[Tensor, "batch seq"], call: Call) -> list[RowRouter]:
        prompts = [row[columns].tolist() for row, columns in zip(ids, kept, strict=True)]
        for tokens in prompts:
            check_embedded(self._model, self.tokenizer, tokens)
        return self.starter.start([self.starter.prompt(tokens, call) for tokens in prompts], call)

    def _encode_again(self, rows: CachedRows, switched: Sequence[int], arguments: PassArguments) -> float:
        """Encodes the cached tokens of some rows under their new mixtures, in place; returns milliseconds.

        This uses a separate cache, so that the next pass has its ordinary shape: the same for rows alone and in a
        batch, compiled or not, with the hidden states of its tokens.
        """
        assert arguments.cache is not None
        start = time.perf_counter()
        check_rewritable(arguments.cache)
        if rows.others is None:
            raise ModelError(
                "a row switches whose prompt held images, and beams or later images have changed their order, so it "
                "cannot be encoded again; use kv_policy='keep' for this call"
            )
        # The row of an image is unknown: with images all rows are encoded again, but only those that switch are stored.
        numbers = list(range(len(rows.rows))) if rows.others else list(switched)
        some = CachedRows(
            [rows.rows[i] for i in numbers],
            rows.ids[numbers, : arguments.num_cached],
            rows.kept[numbers, : arguments.num_cached],
        )
        mask = some.kept.long()
        apart = empty_like(arguments.cache)
        inputs = {
            "input_ids": some.ids,
            "attention_mask": as_wide_as(apart, mask),
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "use_cache": True,
            "logits_to_keep": 1,
            **lengthened(rows.others, batch=len(numbers), num_tokens=arguments.num_cached),
        }
        positions = arguments.kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.ndim > 2:
            del inputs["position_ids"]  # of places in images, which the model computes itself
        self._fuse_rows(some, num_tokens=arguments.num_cached, num_kept=1)
        optional = {"position_ids", "logits_to_keep"} - {*self._names}  # some models do not know it
        self._plain(**{name: inputs[name] for name in inputs.keys() - optional}, **cache_argument(apart))
        write_rows(arguments.cache, switched, apart, source_rows=[numbers.index(i) for i in switched])
        return (time.perf_counter() - start) * 1e3

    def _fuse(self, rows: CachedRows, arguments: PassArguments, call: Call) -> float:
        """Fuses for a pass; returns milliseconds."""
        assert arguments.ids is not None
        start = time.perf_counter()
        num_tokens = arguments.ids.shape[1]
        if num_tokens > 1 and isinstance(arguments.kwargs.get("logits_to_keep"), Tensor) and _has_sentences(rows.rows):
            raise ValueError("with prompt_routing='sentences', logits_to_keep must be a number, not positions")
        # A disabled pass is the base bit for bit, and a compiled pass is not.
        is_compiled = self.is_compiled and num_tokens == 1 and not call.is_base
        is_static = arguments.cache is not None and bool(arguments.cache.is_compileable)
        self._fuse_rows(rows, num_tokens=num_tokens, num_kept=arguments.num_kept, padded=is_compiled and is_static)
        return (time.perf_counter() - start) * 1e3

    @contextmanager
    def _keeping_mixtures(self) -> Iterator[None]:
        """Fuses the pass's mixtures again when gradient checkpointing computes its layers after the pass."""
        layers: list[Any] = [
            module
            for module in (self._model.modules() if torch.is_grad_enabled() and self._model.training else ())
            if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
        ]
        if not layers:
            yield
            return
        fused, is_running = self._fused, True

        def under_mixtures(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if is_running:
                return function(*args, **kwargs)
            with self.bank.lock:
                self.bank.fuse(*fused)
                try:
                    return function(*args, **kwargs)
                finally:
                    self.bank.clear()

        originals = [layer._gradient_checkpointing_func for layer in layers]
        for layer, original in zip(layers, originals, strict=True):
            layer._gradient_checkpointing_func = lambda function, *args, original=original, **kwargs: original(
                partial(under_mixtures, function), *args, **kwargs
            )
        try:
            yield
        finally:
            is_running = False
            for layer, original in zip(layers, originals, strict=True):
                layer._gradient_checkpointing_func = original

    def _fuse_rows(self, cached: CachedRows, *, num_tokens: int, num_kept: int | None, padded: bool = False) -> None:
        """Fuses for a pass over the last `num_tokens` tokens of rows."""
        rows = cached.rows
        has_images = num_tokens > 1 and has_like_images(self._model, cached.ids[:, -num_tokens:])
        reads = Reads(num_tokens, has_images, num_kept)
        # The last token of a prompt belongs to the answer, so a pass over one token has no sentence of a prompt.
        if num_tokens > 1 and _has_sentences(rows):
            self._fused = *mixtures_by_token(rows, cached.kept, num_tokens=num_tokens), reads
        else:
            self._fused = [row.mixture for row in rows], None, reads
        self.bank.fuse(*self._fused, reuse=num_tokens == 1, padded=padded)


@cached
def routed(kind: Any) -> Any:
    """Returns a model class whose instances route by themselves; otherwise it is the same class.

    A copy or a pickle of an instance is the plain base model, with separate weights.
    """

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[CONTROLLER].run(*args, **kwargs)

    @wraps(kind.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[CONTROLLER].generate(super(routed_kind, self).generate, *args, **kwargs)

    def batch_continuously(self: Any, *_: Any, **__: Any) -> None:
        raise ModelError(NOT_BATCHED)

    def compile_(self: Any, *_: Any, **__: Any) -> None:
        raise ModelError(NOT_COMPILED)

    def get_compiled_call(self: Any, _: Any) -> Callable[..., Any]:
        """`generate` over a static cache on a GPU would compile the controller, too."""
        call: Callable[..., Any] = self.__call__
        return call

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        plain = kind.__new__(kind)
        memo[id(self)] = plain
        state = {name: value for name, value in vars(self).items() if name != CONTROLLER}
        plain.__dict__.update(deepcopy(state, memo))
        return plain

    def pickled(self: Any, _: SupportsIndex) -> Any:
        state = {name: value for name, value in vars(self).items() if name != CONTROLLER}
        return object.__new__, (kind,), state

    def peft_config(_: Any) -> None:
        # PEFT calls this before it changes a model.
        raise ModelError(
            "an engine is attached to the model: adapters of PEFT would lie under its layers, which do not call them; "
            "add them with engine.add_adapter(folder), or call engine.detach() and train on the plain model"
        )

    namespace = {
        "forward": forward,
        "generate": generate,
        "generate_batch": batch_continuously,
        "init_continuous_batching": batch_continuously,
        "compile": compile_,
        "get_compiled_call": get_compiled_call,
        "__deepcopy__": copied,
        "__reduce_ex__": pickled,
        "peft_config": property(peft_config),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    routed_kind: Any = type(kind.__name__, (kind,), namespace)
    return routed_kind


def _has_sentences(rows: Sequence[RowRouter]) -> bool:
    """Whether sentences of a prompt have different mixtures."""
    return any(row.prompt_trace and not row.is_fixed for row in rows)


def mixtures_by_token(
    rows: Sequence[RowRouter], kept: Bool[Tensor, "batch seq"], *, num_tokens: int
) -> tuple[list[Mixture], Int[Tensor, "batch tokens"]]:
    """The mixtures of the last `num_tokens` tokens, and the number of each token's mixture.

    A sentence of the prompt has its mixture; all later tokens have the current one.
    """
    mixtures = [row.mixture for row in rows]
    numbers = torch.arange(len(rows))[:, None].repeat(1, kept.shape[1])
    for row, row_numbers, columns in zip(rows, numbers, kept.cpu(), strict=True):
        places = columns.nonzero()[:, 0]
        for sentence in row.prompt_trace:
            row_numbers[places[sentence.start : sentence.end]] = len(mixtures)
            mixtures.append(sentence.mixture)
    used, tokens = numbers[:, -num_tokens:].unique(return_inverse=True)
    return [mixtures[i] for i in used.tolist()], tokens
