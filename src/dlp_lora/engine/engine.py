"""The engine: a causal LM, a bank of adapters, a router and a policy as one model (Fig. 1).

`engine.model` stays an ordinary Hugging Face model that routes in every forward pass. `generate` and `stream` call the
model's `generate`, and add a trace: which sentence used which adapters.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, cast, overload

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlp_lora.bank.adapter_files import FILES
from dlp_lora.bank.attach import attach, detach, merged
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.device import computing_device
from dlp_lora.bank.paths import Paths, Setting
from dlp_lora.bank.peft_format import Adapter, check_base_name, read_adapter
from dlp_lora.chat import Chat, Message
from dlp_lora.engine.apart import MAX_PARTS, joined
from dlp_lora.engine.base import PROBE_TEXT, PROBE_TOKENS, Base, Probe
from dlp_lora.engine.bundle import check_names, upload_bundle, write_bundle
from dlp_lora.engine.calls import Call, Endings, call_setting, check_call, is_one_row, num_new_tokens, seeded
from dlp_lora.engine.controller import Controller
from dlp_lora.engine.overrides import Override, overriding
from dlp_lora.engine.passes import check_keeps_cache
from dlp_lora.engine.prompts import EncodedPrompt, as_batch, contexts_of, encode_prompts, padded
from dlp_lora.engine.routing import Prompt, RowRouter
from dlp_lora.engine.routing_log import RoutingLog
from dlp_lora.engine.streaming import Stream
from dlp_lora.engine.trace import Generation, Sentence
from dlp_lora.errors import AdapterError, ModelError
from dlp_lora.files import name_of
from dlp_lora.hub import Hub
from dlp_lora.policy import FusionPolicy, KVPolicy, Mixture, PromptRouting, RoutingSettings, Switching
from dlp_lora.router import Context, Router, listed
from dlp_lora.sentences import Segmenter, SentenceSegmenter

Mixtures = Mapping[str, float] | Sequence[Mapping[str, float]]
"""Weights by adapter name, or a list of these, one per row."""


class Engine:
    """A model with many adapters that chooses among them, sentence by sentence.

    Make one with `dlp_lora.load`. `detach` returns the plain model.

    The engine has the defaults. Settings for one call are arguments of `generate`, or come from the blocks `using`,
    `fixed`, `disabled` and `merged`. A block applies to its context: other threads and asyncio tasks do not see it.
    Several threads may generate at once; their forward passes take turns. With a `seed`, only one may sample at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bank: AdapterBank,
        *,
        router: Router | None = None,
        settings: RoutingSettings | None = None,
        segmenter: Callable[[], Segmenter] = SentenceSegmenter,
        prepack: bool = False,
        paths: Setting | Paths | None = None,
        routing_log: RoutingLog | None = None,
    ) -> None:
        if router is not None:
            check_names(router.names, bank.names)
        check_keeps_cache(model)
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank
        defaults = Call(
            settings=settings or RoutingSettings(),
            router=router,
            segmenter=segmenter,
            endings=Endings.of_model(model.generation_config, tokenizer),
            routing_log=routing_log,
        )
        self._controller = Controller(bank, tokenizer, defaults)
        self.paths = attach(model, bank, paths="prepacked" if prepack else paths)
        self._controller.install(model)

    @classmethod
    def from_pretrained(cls, model: str | Path | PreTrainedModel, **kwargs: Any) -> "Engine":
        """Makes an engine: the same as `dlp_lora.load`, with the same arguments."""
        from dlp_lora.engine.loading import load  # loading imports this module

        return load(model, **kwargs)

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return computing_device(self.model)

    @property
    def call(self) -> Call:
        """The settings of a call in this context: the defaults with the changes of the blocks around it."""
        return self._controller.call

    @property
    def settings(self) -> RoutingSettings:
        """The routing settings in this context. An assignment changes the engine's default."""
        return self.call.settings

    @settings.setter
    def settings(self, settings: RoutingSettings) -> None:
        self._controller.defaults = replace(self._controller.defaults, settings=settings)

    @property
    def router(self) -> Router | None:
        """The router in this context; None if there is none, and only `fixed` and `disabled` work."""
        return self.call.router

    @property
    def policy(self) -> FusionPolicy:
        """The policy of `settings`, which turns probabilities into a mixture; it may be assigned."""
        return self.settings.policy

    @policy.setter
    def policy(self, policy: FusionPolicy) -> None:
        self.settings = replace(self._controller.defaults.settings, policy=policy)

    @property
    def switching(self) -> Switching:
        """When a new sentence may change the mixture: `settings.switching`."""
        return self.settings.switching

    @property
    def kv_policy(self) -> KVPolicy:
        """What a switch does to the KV cache: `settings.kv_policy`."""
        return self.settings.kv_policy

    @property
    def prompt_routing(self) -> PromptRouting:
        """How prompts of several questions are routed: `settings.prompt_routing`."""
        return self.settings.prompt_routing

    @property
    def last_trace(self) -> tuple[Sentence, ...] | None:
        """The trace of the latest forward pass in this context, as after `engine.model.generate` or a pipeline.

        It ends with the last encoded token; the last sampled one is not encoded. None if no pass ran here, or if the
        latest pass has no trace.

        Raises:
            ValueError: if the pass had several rows; `last_traces` has one trace per row.
        """
        traces = self.last_traces
        if traces is not None and len(traces) != 1:
            raise ValueError(f"the last pass had {len(traces)} rows; engine.last_traces has the trace of each")
        return None if traces is None else traces[0]

    @property
    def last_traces(self) -> tuple[tuple[Sentence, ...], ...] | None:
        """As `last_trace`, for each row of a batch; in beam search, rows are beams."""
        rows = self._controller.latest
        return None if rows is None else tuple(row.sentences() for row in rows)

    @torch.inference_mode(False)  # the buffers made here outlive the call
    def add_adapter(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> str:
        """Adds a PEFT adapter from a folder or hub id, even while answers are generated; returns its name.

        By default it gets the name of its folder or repository. Running answers do not change. `fixed` may use the
        adapter from the next pass on. The router chooses it only after it has learned it.

        Raises:
            AdapterError: if it cannot be read or does not fit the base, its name is taken, or running answers still
                use a removed adapter of its name.
        """
        hub = Hub(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        folder = hub.folder(path, files=FILES, error=AdapterError, revision=revision, subfolder=subfolder)
        name = name_of(subfolder or path) if name is None else name
        self._put({name: folder}, replace=False)
        return name

    @torch.inference_mode(False)
    def put_adapters(self, folders: Mapping[str, str | Path]) -> None:
        """Adds PEFT adapters by name, or replaces those of their names, even while answers are generated.

        All of them change at once, or none if one cannot be used. Running answers do not change.

        Raises:
            AdapterError: if one cannot be read or does not fit the base, or running answers use another one of its name
                and their KV cache has been given out.
        """
        self._put(folders, replace=True)

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter, even while answers are generated.

        Running answers keep it until they end or switch; its weights stay in memory until then. Its probability then
        counts as the probability that no adapter fits.

        Raises:
            AdapterError: if there is none of this name.
        """
        self.bank.remove(name)

    @property
    def is_compiled(self) -> bool:
        """Whether decoding steps over a static cache are compiled."""
        return self._controller.is_compiled

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self.call.endings.eos_ids

    @overload
    def generate(
        self,
        prompts: str | Chat | Sequence[Message] | Sequence[str | Chat] | Sequence[Sequence[Message]],
        *,
        mixture: Mixtures | None = None,
        settings: RoutingSettings | None = None,
        seed: int | None = None,
        tools: Sequence[Any] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        num_return_sequences: int,
        **kwargs: Any,
    ) -> list[Generation]: ...

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self,
        prompts: str | Chat | Sequence[Message],
        *,
        mixture: Mixtures | None = None,
        settings: RoutingSettings | None = None,
        seed: int | None = None,
        tools: Sequence[Any] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        **kwargs: Any,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str | Chat] | Sequence[Sequence[Message]],
        *,
        mixture: Mixtures | None = None,
        settings: RoutingSettings | None = None,
        seed: int | None = None,
        tools: Sequence[Any] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        **kwargs: Any,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | Chat | Sequence[str | Chat] | Sequence[Message] | Sequence[Sequence[Message]],
        *,
        mixture: Mixtures | None = None,
        settings: RoutingSettings | None = None,
        seed: int | None = None,
        tools: Sequence[Any] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        **kwargs: Any,
    ) -> Generation | list[Generation]:
        """Answers a prompt and returns a Generation, or answers a list of prompts and returns a list of Generations.
        With `num_return_sequences` it always returns a list. A prompt of several questions may be answered apart
        (`prompt_routing`): then the Generation has `parts`, and limits, stop strings and penalties hold for each.

        A string is raw text, as in `model.generate`. A list of messages with role and content is one chat, which goes
        through the tokenizer's chat template. A Chat also has tools and arguments of the template. The arguments of
        Hugging Face's `generate` work. Unless you pass `do_sample`, the model's generation config decides whether
        answers are sampled.

        Args:
            mixture: for this call instead of the router, as by `fixed`.
            settings: routing settings of this call instead of the engine's.
            seed: of sampling.
            tools: JSON schemas or functions, for chat templates that read them.
            chat_template_kwargs: arguments of the chat template, such as `{"enable_thinking": False}`.
            continue_final_message: whether the model continues the last message; by default, if it is the assistant's.

        Raises:
            PromptError: if a prompt is neither text nor messages, is empty, too long for the model's context with its
                `max_new_tokens`, or refused by the chat template.
            ValueError: if the router cannot follow an argument sentence by sentence, or the engine was detached.
        """
        chats, single = as_batch(
            prompts,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            continue_final_message=continue_final_message,
        )
        with self._calling(mixture, settings, kwargs) as call:
            apart = self._apart(encode_prompts(self.tokenizer, chats), call, kwargs)
            encoded = [question for questions in apart for question in questions]
            inputs = self._inputs(encoded, call, kwargs)
            with self._overriding({"contexts": contexts_of(encoded)}):
                with seeded(seed, self.device), torch.no_grad():
                    output = cast(Any, self.model).generate(**inputs, **{**kwargs, "return_dict_in_generate": False})
                length = inputs["input_ids"].shape[1]
                answers = call.endings.trim(output[:, length:].tolist(), self.tokenizer.all_special_ids)
                generations = self._generations(inputs, self._controller.latest or (), answers, call, kwargs)
        if any(len(questions) > 1 for questions in apart):
            following = iter(generations)
            generations = [joined(list(islice(following, len(questions)))) for questions in apart]
        is_one = single and len(generations) == 1 and "num_return_sequences" not in kwargs
        return generations[0] if is_one else generations

    def stream(
        self,
        prompt: str | Chat | Sequence[Message],
        *,
        mixture: Mapping[str, float] | None = None,
        settings: RoutingSettings | None = None,
        seed: int | None = None,
        tools: Sequence[Any] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
        **kwargs: Any,
    ) -> Stream:
        """Answers one prompt piece by piece; together, the pieces are the text of `generate`.

        Each Piece is a str with its `mixture`. The stream's `generation` is the result of `generate`. If you leave the
        loop early, the model stops. The model runs in a thread, in a copy of the context of this call. So the blocks
        around this call apply to the whole stream.

        Raises:
            PromptError, ValueError: as `generate`.
        """
        chats, single = as_batch(
            prompt,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            continue_final_message=continue_final_message,
        )
        if not single:
            raise ValueError("engine.stream takes one prompt; use engine.generate for several")
        with self._calling(mixture, settings, kwargs) as call:
            (encoded,) = self._apart(encode_prompts(self.tokenizer, chats), call, kwargs)
            inputs = self._inputs(encoded, call, kwargs, is_stream=True)

            def run(**more: Any) -> None:
                self._controller.check_installed()
                with seeded(seed, self.device), torch.no_grad():
                    cast(Any, self.model).generate(**inputs, **{**kwargs, "return_dict_in_generate": False, **more})

            def finish(rows: Sequence[RowRouter], answers: Sequence[list[int]]) -> Generation:
                return joined(self._generations(inputs, rows, answers, call, kwargs))

            stopping = kwargs.get("stopping_criteria") or ()
            with self._overriding({"contexts": contexts_of(encoded)}):
                return Stream(run, finish, self._controller, call.endings, stopping, num_rows=len(encoded))

    def _put(self, folders: Mapping[str, str | Path], *, replace: bool) -> None:
        """Adds adapters, all of them or none."""
        in_memory = self.bank.store.budget_mb is None
        adapters: list[Adapter] = []
        for name, folder in folders.items():
            adapters.append(read_adapter(folder, name, weights=in_memory, layout=self.bank.base, stacklevel=4))
            check_base_name(adapters[-1], self.model.config._name_or_path, stacklevel=4)
        with self.bank.lock:
            if self.bank.is_merged:
                raise ValueError("the base weights hold a mixture; leave engine.merged() first")
            entries = [self.bank.store.entry_for(adapter, replace=replace) for adapter in adapters]
            attach(self.model, self.bank, paths=self.paths, new=entries)
            self.bank.put(entries)

    @contextmanager
    def _calling(
        self, mixture: Mixtures | None, settings: RoutingSettings | None, kwargs: Mapping[str, Any]
    ) -> Iterator[Call]:
        """Applies the settings of one call in the block."""
        with (
            self.fixed(mixture) if mixture is not None else nullcontext(),
            self._overriding({} if settings is None else {"settings": settings}),
            self._overriding({"endings": Endings.of_call(kwargs, self.model.generation_config), "known": {}}),
        ):
            yield self.call

    def _apart(
        self, prompts: Sequence[EncodedPrompt], call: Call, kwargs: Mapping[str, Any]
    ) -> list[list[EncodedPrompt]]:
        """Returns the prompts to answer instead of each prompt: its questions, if they are answered apart."""
        if is_one_row(kwargs, self.model.generation_config):
            return [[prompt] for prompt in prompts]
        parts = [self.apart(prompt, call=call) for prompt in prompts]
        return [own if len(own) <= MAX_PARTS else [prompt] for prompt, own in zip(prompts, parts, strict=True)]

    def _generations(
        self,
        inputs: Mapping[str, torch.Tensor],
        rows: Sequence[RowRouter],
        answers: Sequence[list[int]],
        call: Call,
        kwargs: Mapping[str, Any],
    ) -> list[Generation]:
        """Returns the answers of the latest pass's rows with their traces.

        Raises:
            ModelError: if the passes have not followed the answers, so that their mixtures are unknown.
        """
        if not (len(rows) == len(answers) and all(map(RowRouter.has_read, rows, answers))):
            # Beams end in other rows than they began, and a row that stops without eos has read padding.
            has_beams = (call_setting("num_beams", kwargs, self.model.generation_config) or 1) > 1
            has_read_on = len(rows) == len(answers) and all(map(RowRouter.has_read_past, rows, answers))
            if not (has_beams or has_read_on or call.mixtures is not None):
                raise ModelError(
                    f"the passes of {type(self.model).__name__} did not follow its answer token by token, so there is "
                    "no trace of it; leave out the option that decodes in another way, or use engine.fixed()"
                )
            rows = tuple(self._controller.replay(inputs, answers))
        masked = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
        read = [tuple(token for token, is_kept in zip(*row, strict=True) if is_kept) for row in masked]
        copies = len(answers) // len(read)
        return [
            replace(row.generation(tokens), prompt_tokens=read[i // copies])
            for i, (row, tokens) in enumerate(zip(rows, answers, strict=True))
        ]

    def _inputs(
        self, prompts: Sequence[EncodedPrompt], call: Call, kwargs: Mapping[str, Any], *, is_stream: bool = False
    ) -> dict[str, torch.Tensor]:
        """Checks a call of `generate`; returns its prompts as the model reads them."""
        self._controller.check_installed()
        check_call(kwargs, self.model.generation_config, is_stream=is_stream)
        fixed = call.mixtures or ()
        if len(fixed) > 1 and len(fixed) != len(prompts):
            raise ValueError(f"{len(fixed)} mixtures were fixed for {len(prompts)} prompts; give one, or one a prompt")
        longest = max(len(prompt.tokens) for prompt in prompts)
        num_new = num_new_tokens(longest, kwargs, self.model.generation_config)
        return padded(prompts, self.model, num_new=num_new)

    def route(self, prompt: str | Context) -> tuple[dict[str, float], Mixture]:
        """Routes a prompt without running the model: returns each adapter's probability, and the mixture.

        If the prompt asks several questions, these are of the question that the answer has reached: without an answer,
        of the first.

        Raises:
            RouterError: if there is no router.
        """
        context = Context(prompt) if isinstance(prompt, str) else prompt
        with self.bank.lock:  # a router may run the base model
            return self._controller.routing(self.call).route(context)

    def apart(
        self, prompt: EncodedPrompt, *, call: Call | None = None, among: Collection[str] | None = None
    ) -> list[EncodedPrompt]:
        """Returns the prompts to answer instead of one, for `start_row`: the questions of a prompt that is answered
        apart, or the prompt itself.
        """
        with self.bank.lock:  # a router may run the base model
            return self._controller.starter.apart(prompt, call or self.call, among=among)

    def start_row(
        self,
        tokens: Sequence[int],
        *,
        call: Call | None = None,
        prompt: Prompt | None = None,
        among: Collection[str] | None = None,
    ) -> RowRouter:
        """Routes a prompt of token ids, for programs that decode token by token; then call `RowRouter.push`.

        Args:
            call: instead of the call of this context.
            prompt: the router's context, instead of the text of the tokens.
            among: the adapters that may be chosen; the probability of others counts as "no adapter fits".

        Raises:
            RouterError: if there is no router.
        """
        with self.bank.lock:  # a router may run the base model
            return self._controller.start_row(tokens, call or self.call, prompt=prompt, among=among)

    @contextmanager
    def under(
        self, mixtures: Sequence[Mixture], tokens: torch.Tensor | None = None, *, reuse: bool = False
    ) -> Iterator[Callable[..., Any]]:
        """Returns the model's forward, with arguments by name, under fixed mixtures in the block.

        It is for programs that route rows with `start_row` and batch them. The arguments are those of
        `AdapterBank.fuse`. The bank is locked in the block.

        Raises:
            ValueError: if a mixture is merged into the base weights, or the engine was detached.
        """
        self._controller.check_installed()
        with self._controller.under(mixtures, tokens, reuse=reuse) as forward:
            yield forward

    @contextmanager
    def fixed(self, mixture: Mixtures) -> Iterator["Engine"]:
        """Uses a mixture instead of the router; a list has one mixture per row.

        It applies to this context: the block, and asyncio tasks and `asyncio.to_thread` calls that start in it. A plain
        `threading.Thread` starts with the engine's defaults; pass the context with `contextvars.copy_context().run`.

        Raises:
            AdapterError: if the bank has no adapter of a name.
        """
        with self._overriding({"mixtures": self._checked(mixture)}):
            yield self

    @contextmanager
    def merged(self, mixture: Mapping[str, float]) -> Iterator["Engine"]:
        """As `fixed`, with the mixture added to the base weights: a token costs as much as with the base model.

        In the block there is a second copy of the changed weights, from which they are restored bit for bit. The
        weights change for all contexts, so passes of other contexts are refused until the block ends.

        Raises:
            ModelError: if a layer has no separate ordinary weight, such as a quantised or tied layer.
            ValueError: if the base weights hold another mixture already.
        """
        mixtures = self._checked(mixture)
        merging = ExitStack()
        with self._overriding({"mixtures": mixtures}) as override:
            with self.bank.lock:
                merging.enter_context(merged(self.model, self.bank, mixtures[0]))
                self._controller.merged = override
            try:
                yield self
            finally:
                with self.bank.lock:
                    merging.close()
                    self._controller.merged = None

    @contextmanager
    def disabled(self) -> Iterator["Engine"]:
        """Uses the base model, bit for bit, in this context, as `fixed` does."""
        with self.fixed({}):
            yield self

    @contextmanager
    def using(self, **changes: Any) -> Iterator["Engine"]:
        """Changes routing settings in this context, as `fixed` does.

        Args:
            changes: `settings`, or single settings by name (`policy`, `switching`, `kv_policy`, `prompt_routing`);
                `router`, `segmenter`, `routing_log`.
        """
        names = (*RoutingSettings.names(), "settings", "router", "segmenter", "routing_log")
        if unknown := set(changes) - set(names):
            raise ValueError(f"engine.using takes {', '.join(names)}, not {', '.join(sorted(unknown))}")
        if changes.get("router") is not None:
            check_names(changes["router"].names, self.bank.names)
        self.call.changed(changes)  # checks them
        with self._overriding(changes):
            yield self

    @contextmanager
    def _overriding(self, changes: Mapping[str, Any]) -> Iterator[Override]:
        mixtures = changes.get("mixtures", ())
        override = Override(key=self._controller.key, changes=changes, lease=self.bank.lease(mixtures))
        with overriding(override):
            yield override

    def _checked(self, mixture: Mixtures) -> tuple[Mixture, ...]:
        """Checks the mixtures of a caller; returns them as a tuple."""
        mixtures = [mixture] if isinstance(mixture, Mapping | str) else list(mixture)
        if strange := [m for m in mixtures if not isinstance(m, Mapping)]:
            raise ValueError(
                f"a mixture is weights by name, got {strange[0]!r}; give for example {{{str(strange[0])!r}: 1.0}}"
            )
        if self.bank.is_merged:
            raise ValueError("the base weights hold another mixture; leave engine.merged() first")
        if not mixtures:
            raise ValueError("engine.fixed needs a mixture, or a list of one a row")
        unknown = {name for m in mixtures for name in m} - set(self.bank.names)
        if unknown:
            raise AdapterError(
                f"no adapter {', '.join(sorted(unknown))}; there are {', '.join(sorted(self.bank.names))}"
            )
        return tuple(Mixture(m) for m in mixtures)

    @torch.inference_mode(False)
    def compile(self, *, max_rank: int = 64, **kwargs: Any) -> None:
        """Compiles decoding steps over a static cache, once for each batch size and length of the cache.

        A step then computes with `max_rank` in each adapted layer for every mixture, so that no switch compiles again.
        The buffers do not move, as CUDA graphs need. Prompts, mixtures of a higher rank, other caches and `disabled`
        run uncompiled.

            engine.compile(mode="reduce-overhead")
            engine.generate(prompt, cache_implementation="static", max_cache_len=4096)

        Args:
            max_rank: the largest rank of a mixture in one layer, all its adapters together.
            kwargs: go to `torch.compile`.
        """
        if max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, got {max_rank}")
        with self.bank.lock:
            self.bank.pad(max_rank)
            self._controller.compile(**{"dynamic": False, **kwargs})

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a bundle: adapters, router, policy, a model card, and a fingerprint of the base model.

        An old bundle is replaced at the end.

        Raises:
            RouterError: if router and adapters have different names, because adapters were added or removed.
            AdapterError: if an adapter's folder has changed.
            ValueError: if the policy is not of this package, because only these can be saved by name.
        """
        self._write_bundle(Path(path))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a bundle of dlp-lora",
    ) -> str:
        """Uploads the bundle to the Hugging Face hub, in one commit; returns the commit's address.

        The repository then has only the adapters of this bundle. Its README.md stays if its owner wrote it.

        Args:
            private: whether a new repository is private; an existing one does not change.
            token: by default the one that `hf auth login` saved.
            revision: the branch, which is made if it does not exist; "main" by default.
            commit_message: of the commit.

        Raises:
            BundleError: if the hub refuses it.
            RouterError, AdapterError, ValueError: as `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._write_bundle(Path(folder) / "bundle", repo_id=repo_id)
            return upload_bundle(
                Path(folder) / "bundle",
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
            )

    def _write_bundle(self, path: Path, *, repo_id: str | None = None) -> None:
        if self.router is not None:
            check_names(self.router.names, self.bank.names)
        for name in self.bank.names:
            self.bank.store.check_files(name)
        config = self.model.config
        commit = getattr(config, "_commit_hash", None)
        base = Base.of(
            config._name_or_path,
            bundle=None if repo_id else path,
            revision=self.bank.base.revision,
            subfolder=self.bank.base.subfolder,
            commit=commit,
        )
        write_bundle(
            path,
            base=replace(base, probe=self.probe()),
            adapters={name: adapter.path for name, adapter in self.bank.adapters.items()},
            router=self.router,
            settings=self.settings,
            repo_id=repo_id,
        )

    @torch.no_grad()
    def probe(self) -> Probe | None:
        """The base model's log-probabilities of the probe's text; None if it cannot run it."""
        if not self._controller.is_installed or self.bank.is_merged:
            return None
        tokens = self.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"][:PROBE_TOKENS]
        ids = torch.tensor([tokens], device=self.device)
        with self.under([Mixture()]) as forward:
            scores = forward(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
        return Probe(tokens=tuple(tokens), logprobs=tuple(scores.gather(1, ids[0, 1:, None])[:, 0].tolist()))

    @torch.inference_mode(False)
    def detach(self) -> PreTrainedModel:
        """Removes the adapters and returns the base model, bit for bit as it was."""
        with self.bank.lock:
            if self._controller.is_installed:
                self._controller.uninstall(self.model)
            detach(self.model)
        return self.model

    def __repr__(self) -> str:
        model = self.model
        return (
            f"Engine({type(model).__name__} {model.config._name_or_path!r} on {self.device}, {model.dtype}; "
            f"{listed(self.bank.names)}; router: {self.router or 'none'}; {self.settings}; {self.paths})"
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "an engine is neither copied nor pickled: save_pretrained writes a bundle, and a copy of engine.model is "
            "the plain base model"
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
