"""The engine: a causal LM, a bank of adapters, a router and a policy, working as one model (Fig. 1).

`engine.model` stays an ordinary Hugging Face model that routes by itself in every forward pass; `generate` and
`stream` are its own `generate`, plus a trace of which sentence used which adapters.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from dlp_lora.bank.peft_format import check_base_name, read_adapter
from dlp_lora.chat import Chat, Message
from dlp_lora.engine.apart import joined
from dlp_lora.engine.base import PROBE_TEXT, PROBE_TOKENS, Base, Probe
from dlp_lora.engine.bundle import check_names, upload_bundle, write_bundle
from dlp_lora.engine.calls import Call, Endings, call_setting, check_call, seeded
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
"""Weights by adapter name, or a list of such, one a row."""


class Engine:
    """A model with many adapters that picks among them by itself, sentence by sentence.

    Make one with `dlp_lora.load`. `detach` gives the plain model back.

    The engine holds defaults alone; what holds for one call is given to `generate`, or by the blocks `using`, `fixed`,
    `disabled` and `merged`, which hold in their own context: threads and asyncio tasks do not see each other's. Several
    threads may generate at once; their forward passes take turns. With a `seed` only one may sample at a time.
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
        self._is_attached = True

    @classmethod
    def from_pretrained(cls, model: str | Path | PreTrainedModel, **kwargs: Any) -> "Engine":
        """Makes an engine: `dlp_lora.load`, under the name and with the arguments that it has there."""
        from dlp_lora.engine.loading import load  # which makes engines

        return load(model, **kwargs)

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return computing_device(self.model)

    @property
    def call(self) -> Call:
        """What holds for a call that is made here and now: the defaults, and what the blocks around it change."""
        return self._controller.call

    @property
    def settings(self) -> RoutingSettings:
        """How the router is asked and obeyed, here and now. Setting it changes the engine's default."""
        return self.call.settings

    @settings.setter
    def settings(self, settings: RoutingSettings) -> None:
        self._controller.defaults = replace(self._controller.defaults, settings=settings)

    @property
    def router(self) -> Router | None:
        """The router, here and now; None where only `fixed` and `disabled` choose."""
        return self.call.router

    @property
    def policy(self) -> FusionPolicy:
        """The policy that turns probabilities into a mixture: that of `settings`; may be set, as they may."""
        return self.settings.policy

    @policy.setter
    def policy(self, policy: FusionPolicy) -> None:
        self.settings = replace(self._controller.defaults.settings, policy=policy)

    @property
    def switching(self) -> Switching:
        """When a sentence start may switch: that of `settings`."""
        return self.settings.switching

    @property
    def kv_policy(self) -> KVPolicy:
        """What a switch does to the KV cache: that of `settings`."""
        return self.settings.kv_policy

    @property
    def prompt_routing(self) -> PromptRouting:
        """What of a prompt is routed: that of `settings`."""
        return self.settings.prompt_routing

    @property
    def last_trace(self) -> tuple[Sentence, ...] | None:
        """The trace of the latest forward pass in this context, as after `engine.model.generate` or a pipeline.

        It ends with the last token that was encoded: the very last one that was sampled is not. None if no pass ran
        here, or if the latest one could not be traced.

        Raises:
            ValueError: if the pass had several rows; `last_traces` has one trace a row.
        """
        traces = self.last_traces
        if traces is not None and len(traces) != 1:
            raise ValueError(f"the last pass had {len(traces)} rows; engine.last_traces has the trace of each")
        return None if traces is None else traces[0]

    @property
    def last_traces(self) -> tuple[tuple[Sentence, ...], ...] | None:
        """As `last_trace`, of each row of a batch; while beams are searched, rows are beams."""
        rows = self._controller.latest
        return None if rows is None else tuple(row.sentences() for row in rows)

    @torch.inference_mode(False)  # what is made here outlives the call
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
        """Adds a PEFT adapter from a folder or hub id, also while answers are generated; gives its name.

        Unless it is given one, it is named after its folder or repository. Rows that run are not disturbed. `fixed` may
        use the adapter from the next pass on; the router gives it nothing until one that knows it is used.

        Raises:
            AdapterError: if it cannot be read or does not fit the base, its name is taken, or rows still run with
                a removed adapter of its name.
        """
        hub = Hub(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        folder = hub.folder(path, files=FILES, error=AdapterError, revision=revision, subfolder=subfolder)
        name = name_of(subfolder or path) if name is None else name
        in_memory = self.bank.store.budget_mb is None
        adapter = read_adapter(folder, name, weights=in_memory, layout=self.bank.base, stacklevel=4)
        check_base_name(adapter, self.model.config._name_or_path, stacklevel=4)
        with self.bank.lock:
            if self.bank.is_merged:
                raise ValueError("the base weights hold a mixture; leave engine.merged() first")
            self.bank.add(adapter)
            try:
                attach(self.model, self.bank, paths=self.paths, added=[adapter.name])
            except BaseException:
                self.bank.remove(adapter.name)
                raise
        return adapter.name

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter, also while answers are generated.

        Rows that run with it keep it until they end or switch, and its weights stay in memory as long. What the router
        gives it is the probability that no adapter fits.

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
        """Answers a prompt (gives a Generation) or a list of prompts (gives a list of them), which several sequences
        of one prompt are, too: `num_return_sequences` always gives a list.

        A string is raw text, as in `model.generate`; a list of messages with role and content is one chat and goes
        through the tokenizer's chat template; so does a Chat, which also holds tools and arguments of the template. All
        arguments of Hugging Face's `generate` work, and answers are sampled or greedy as there: by the model's
        generation config unless `do_sample` is given.

        Args:
            mixture: used for this call instead of the router, as by `fixed`.
            settings: of this call, in the place of the engine's.
            seed: of sampling.
            tools: which the chat template reads: JSON schemas, or functions.
            chat_template_kwargs: arguments of the chat template, as `{"enable_thinking": False}`.
            continue_final_message: whether the last message is the beginning of the answer, which then goes on; by
                default it is if it is the assistant's.

        Raises:
            PromptError: if a prompt is neither text nor messages, is empty, too long for the model's context with its
                `max_new_tokens`, or refused by the chat template.
            ValueError: if an argument cannot be followed sentence by sentence, or the engine was detached.
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
                special = self.tokenizer.all_special_ids
                answers = [call.endings.trim(tokens, special) for tokens in output[:, length:].tolist()]
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
        """Answers one prompt piece by piece; the pieces concatenate to what `generate` gives.

        Each Piece is a str that also knows its `mixture`. The stream's `generation` is what `generate` would have
        given; leaving the loop early stops the model. The model runs in a thread and in a copy of the context in which
        the stream was made, so the blocks around this call hold for all of it, wherever it is read.

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
                with seeded(seed, self.device), torch.no_grad():
                    cast(Any, self.model).generate(**inputs, **{**kwargs, "return_dict_in_generate": False, **more})

            def finish(rows: Sequence[RowRouter], answers: Sequence[list[int]]) -> Generation:
                return joined(self._generations(inputs, rows, answers, call, kwargs))

            stopping = kwargs.get("stopping_criteria") or ()
            with self._overriding({"contexts": contexts_of(encoded)}):
                return Stream(run, finish, self._controller, call.endings, stopping, num_rows=len(encoded))

    @contextmanager
    def _calling(
        self, mixture: Mixtures | None, settings: RoutingSettings | None, kwargs: Mapping[str, Any]
    ) -> Iterator[Call]:
        """Puts what one call asks for into force; gives what then holds."""
        with (
            self.fixed(mixture) if mixture is not None else nullcontext(),
            self._overriding({} if settings is None else {"settings": settings}),
            self._overriding({"endings": Endings.of_call(kwargs, self.model.generation_config)}),
        ):
            yield self.call

    def _apart(
        self, prompts: Sequence[EncodedPrompt], call: Call, kwargs: Mapping[str, Any]
    ) -> list[list[EncodedPrompt]]:
        """Gives for each prompt those that are answered in its place: its questions, if they are answered apart."""
        numbers = ("num_beams", "num_return_sequences")
        is_one_row = all((call_setting(name, kwargs, self.model.generation_config) or 1) == 1 for name in numbers)
        return [self.apart(prompt, call=call) if is_one_row else [prompt] for prompt in prompts]

    def _generations(
        self,
        inputs: Mapping[str, torch.Tensor],
        rows: Sequence[RowRouter],
        answers: Sequence[list[int]],
        call: Call,
        kwargs: Mapping[str, Any],
    ) -> list[Generation]:
        """Gives the answers of the latest pass's rows with their traces.

        Raises:
            ModelError: if the passes have not followed the answers, so that nobody knows what these ran with.
        """
        if not (len(rows) == len(answers) and all(map(RowRouter.has_read, rows, answers))):
            # Beams end in other rows than they began in, and a row stopped without eos has read padding.
            has_beams = (call_setting("num_beams", kwargs, self.model.generation_config) or 1) > 1
            has_read_on = len(rows) == len(answers) and all(map(RowRouter.has_read_past, rows, answers))
            if not (has_beams or has_read_on or call.mixtures is not None):
                raise ModelError(
                    f"the passes of {type(self.model).__name__} did not follow its answer token by token, so there is "
                    "no trace of it; leave out what decodes in another way, or use engine.fixed()"
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
        """Checks a call of `generate`; gives its prompts as the model reads them."""
        if not self._is_attached:
            raise ValueError("the engine was detached from its model; make another one with dlp_lora.load")
        check_call(kwargs, self.model.generation_config, is_stream=is_stream)
        fixed = call.mixtures or ()
        if len(fixed) > 1 and len(fixed) != len(prompts):
            raise ValueError(f"{len(fixed)} mixtures were fixed for {len(prompts)} prompts; give one, or one a prompt")
        return padded(prompts, self.model, self.tokenizer, num_new=kwargs.get("max_new_tokens") or 1)

    def route(self, prompt: str | Context) -> tuple[dict[str, float], Mixture]:
        """Says what would answer a prompt, without running the model: a probability by adapter name, and the mixture.

        Raises:
            RouterError: if there is no router.
        """
        context = Context(prompt) if isinstance(prompt, str) else prompt
        with self.bank.lock:  # a router may run the base model
            return self._controller.routing(self.call).route(context)

    def apart(
        self, prompt: EncodedPrompt, *, call: Call | None = None, among: Collection[str] | None = None
    ) -> list[EncodedPrompt]:
        """Gives the prompts that are answered in the place of one, as `start_row` has it: the questions of a prompt
        that is answered in parts, or the prompt itself.
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
        """Routes a prompt of token ids, for who drives the answer token by token; `RowRouter.push` goes on from there.

        Args:
            call: in the place of that of here and now.
            prompt: what the router reads, in the place of what the tokens say.
            among: the adapters that the router may choose; what it gives others is the probability that none fits.

        Raises:
            RouterError: if there is no router.
        """
        with self.bank.lock:  # a router may run the base model
            return self._controller.start_row(tokens, call or self.call, prompt=prompt, among=among)

    @contextmanager
    def under(
        self, mixtures: Sequence[Mixture], tokens: torch.Tensor | None = None, *, reuse: bool = False
    ) -> Iterator[Callable[..., Any]]:
        """Gives the model's forward, which takes its arguments by name, and runs under given mixtures in the block.

        It is for who routes rows with `start_row` and batches them. The arguments are those of `AdapterBank.fuse`; the
        bank is locked meanwhile.

        Raises:
            ValueError: if the base weights hold a mixture, or the engine was detached.
        """
        if not self._is_attached:
            raise ValueError("the engine was detached from its model; make another one with dlp_lora.load")
        with self._controller.under(mixtures, tokens, reuse=reuse) as forward:
            yield forward

    @contextmanager
    def fixed(self, mixture: Mixtures) -> Iterator["Engine"]:
        """Uses the given mixture instead of the router; a list gives one mixture a row.

        It holds in this context: in the block, in asyncio tasks and `asyncio.to_thread` calls begun in it. A plain
        `threading.Thread` starts with the engine's defaults; `contextvars.copy_context().run` carries the block over.

        Raises:
            AdapterError: if the bank holds no adapter of a name.
        """
        with self._overriding({"mixtures": self._checked(mixture)}):
            yield self

    @contextmanager
    def merged(self, mixture: Mapping[str, float]) -> Iterator["Engine"]:
        """As `fixed`, with the mixture added to the base weights: a token costs what it costs the base model.

        The weights that it changes are held twice meanwhile, and come back bit for bit. They change for everybody:
        while the block lasts, passes of other contexts are refused.

        Raises:
            ModelError: if a layer has no weight of its own to add to, as a quantised or tied one.
        """
        mixtures = self._checked(mixture)
        with self._overriding({"mixtures": mixtures}) as override:
            with self.bank.lock:
                self._controller.merged = override
            try:
                with merged(self.model, self.bank, mixtures[0]):
                    yield self
            finally:
                self._controller.merged = None

    @contextmanager
    def disabled(self) -> Iterator["Engine"]:
        """The base model, bit for bit, in this context, as for `fixed`."""
        with self.fixed({}):
            yield self

    @contextmanager
    def using(self, **changes: Any) -> Iterator["Engine"]:
        """Changes routing settings for a while, in this context, as for `fixed`.

        Args:
            changes: `settings`, or some of them by name (`policy`, `switching`, `kv_policy`, `prompt_routing`);
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
        """Checks mixtures that a caller fixes; gives them as a tuple."""
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

    def compile(self, *, max_rank: int = 64, **kwargs: Any) -> None:
        """Compiles decoding steps over a static cache, once for each batch size and length of the cache.

        A step then computes with `max_rank` in each adapted layer, whatever the mixture, so that no switch compiles
        again; buffers stay where they are, as CUDA graphs need. Prompts, wider mixtures, other caches and `disabled`
        run as ever.

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
        """Writes a bundle: adapters, router, policy, a model card, and what tells the base model from others.

        A bundle there is replaced at the end.

        Raises:
            RouterError: if adapters were added or removed that the router does not know, or still knows.
            AdapterError: if an adapter's folder no longer holds what the engine runs with.
            ValueError: if the policy is not one of this package's, which alone can be saved by name.
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
        """Uploads the bundle to the Hugging Face hub, in one commit; gives the commit's address.

        The repository then has the adapters of this bundle alone. Its README.md stays if its owner wrote it.

        Args:
            private: of a repository that is made for it; one that is there stays as it is.
            token: by default the one that `hf auth login` saved.
            revision: the branch, which is made if there is none; "main" by default.
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
        base = Base.of(config._name_or_path, bundle=None if repo_id else path, commit=commit)
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
        """What the base model makes of the probe's text; None where it cannot be asked."""
        if not self._is_attached or self.bank.is_merged:
            return None
        tokens = self.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"][:PROBE_TOKENS]
        ids = torch.tensor([tokens], device=self.device)
        with self.under([Mixture()]) as forward:
            scores = forward(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
        return Probe(tokens=tuple(tokens), logprobs=tuple(scores.gather(1, ids[0, 1:, None])[:, 0].tolist()))

    def detach(self) -> PreTrainedModel:
        """Takes the adapters off and gives the base model back, bit for bit as it was."""
        with self.bank.lock:
            if self._is_attached:
                self._controller.uninstall(self.model)
            detach(self.model)
            self._is_attached = False
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
