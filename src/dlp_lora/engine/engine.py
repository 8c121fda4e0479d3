"""The engine: a causal LM, a bank of adapters, a router and a policy, working as one model (Fig. 1).

`engine.model` stays an ordinary Hugging Face model that routes by itself in every forward pass; `generate` and
`stream` are its own `generate`, plus a trace of which sentence used which adapters.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from dlp_lora.bank.attach import attach, detach, merged
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import FILES, check_base_name, read_adapter
from dlp_lora.engine.bundle import check_names, write_bundle
from dlp_lora.engine.cache import LatestRows
from dlp_lora.engine.calls import Endings, check_call, seeded
from dlp_lora.engine.controller import Controller
from dlp_lora.engine.prompts import Message, as_batch, encode_prompts
from dlp_lora.engine.routing import Routing
from dlp_lora.engine.streaming import Abandoned, Piece, PieceStreamer
from dlp_lora.engine.trace import Generation, Row
from dlp_lora.errors import AdapterError
from dlp_lora.files import local_folder
from dlp_lora.policy import (
    CHOICES,
    FusionPolicy,
    KVPolicy,
    Mixture,
    PromptRouting,
    Switching,
    TopP,
    check_choices,
    policy_to_dict,
)
from dlp_lora.router import Context, Router
from dlp_lora.sentences import Segmenter, SentenceSegmenter

SETTINGS = ("policy", "kv_policy", "prompt_routing", "switching", "segmenter", "router")


class Engine:
    """A model with many adapters that picks among them by itself, sentence by sentence.

    Make one with `dlp_lora.load`. `detach` gives the plain model back.

    Several threads may generate at once with one engine: their forward passes take turns. Its settings (`using`,
    `fixed`, `disabled`, `merged`) hold for all of them, and with a `seed` only one may sample at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bank: AdapterBank,
        *,
        router: Router | None = None,
        policy: FusionPolicy | None = None,
        segmenter: Callable[[], Segmenter] = SentenceSegmenter,
        switching: Switching | None = None,
        kv_policy: KVPolicy = "keep",
        prompt_routing: PromptRouting = "questions",
        prepack: bool = False,
    ) -> None:
        check_choices(kv_policy=kv_policy, prompt_routing=prompt_routing)
        if router is not None:
            check_names(router.names, bank.names)
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank
        routing = Routing(
            bank=bank,
            router=router,
            policy=policy or TopP(),
            segmenter=segmenter,
            switching=switching or Switching(),
            kv_policy=kv_policy,
            prompt_routing=prompt_routing,
        )
        endings = Endings.of_model(model.generation_config, tokenizer)
        self._controller = Controller(bank, tokenizer, routing, endings=endings)
        bank.unattached.update(bank.names)  # to this model, whatever it was attached to before
        attach(model, bank, prepack=prepack)
        self._overridden = {name: vars(model).get(name) for name in ("forward", "get_compiled_call")}
        # `generate` over a static cache on a GPU would compile the controller, too.
        vars(model)["get_compiled_call"] = MethodType(_own_call, model)
        self._controller.install(model)
        self._is_attached = True

    @property
    def router(self) -> Router | None:
        """The router, None where only `fixed` and `disabled` choose."""
        return self._controller.routing.router

    @property
    def policy(self) -> FusionPolicy:
        """The policy that turns probabilities into a mixture; may be set."""
        return self._controller.routing.policy

    @policy.setter
    def policy(self, policy: FusionPolicy) -> None:
        self._controller.routing = replace(self._controller.routing, policy=policy)

    @property
    def kv_policy(self) -> KVPolicy:
        """What a switch does to the KV cache: "keep" it, or "recompute" it under the new mixture."""
        return self._controller.routing.kv_policy

    @property
    def prompt_routing(self) -> PromptRouting:
        """Prompts are read "whole", as the "questions" that they ask, or so and encoded by "sentences" (Eq. 6)."""
        return self._controller.routing.prompt_routing

    @property
    def switching(self) -> Switching:
        """When a sentence start may switch."""
        return self._controller.routing.switching

    @torch.inference_mode(False)  # what is made here outlives the call
    def add_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Adds a PEFT adapter from a folder or hub id, also while answers are generated; gives its name.

        Rows that run are not disturbed. `fixed` may use the adapter from the next pass on; the router gives it nothing
        until one that knows it is used.

        Raises:
            AdapterError: if it cannot be read or does not fit the base, its name is taken, or rows still run with
                a removed adapter of its name.
        """
        folder = local_folder(path, files=FILES, error=AdapterError)
        adapter = read_adapter(folder, name, weights=self.bank.budget_mb is None, layout=self.bank.layout, stacklevel=4)
        check_base_name(adapter, self.model.config._name_or_path, stacklevel=4)
        with self.bank.lock:
            if self.bank.is_merged:
                raise ValueError("the base weights hold a mixture; leave engine.merged() first")
            self.bank.add(adapter)
            try:
                attach(self.model, self.bank)
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

    def routing_settings(self) -> dict[str, Any]:
        """What a bundle keeps of how the router is asked and obeyed, as JSON data.

        Raises:
            ValueError: if the policy is not one of this package's, which alone can be saved by name.
        """
        return {
            "policy": policy_to_dict(self.policy),
            "switching": asdict(self.switching),
            "kv_policy": self.kv_policy,
            "prompt_routing": self.prompt_routing,
        }

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._controller.calls.endings.eos_ids

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]],
        *,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answers a prompt (gives a Generation) or a list of prompts (gives a list of them).

        A string is raw text, as in `model.generate`; a list of messages with role and content is one chat and goes
        through the tokenizer's chat template. Other arguments are those of Hugging Face's `generate`, and answers are
        sampled or greedy as there: by the model's generation config unless `do_sample` is given. `seed` seeds sampling.

        Raises:
            PromptError: if a prompt is neither text nor messages, is empty, or too long for the model's context with
                its `max_new_tokens`.
            ValueError: if an argument cannot be followed sentence by sentence, or the engine was detached.
        """
        chats, single = as_batch(prompts)
        inputs = self._inputs(chats, kwargs)
        with self._ending(kwargs) as endings:
            with seeded(seed, self.model.device), torch.no_grad():
                output = cast(Any, self.model).generate(**inputs, **kwargs)
            length = inputs["input_ids"].shape[1]
            special = self.tokenizer.all_special_ids
            answers = [endings.trim(tokens, special) for tokens in output[:, length:].tolist()]
            known = cast(LatestRows, self._controller.latest)
            read = known.ids[:, length:].tolist()
            rows = known.rows
            # Beams end in other rows than they began in, and a row stopped without eos has read padding.
            if not (len(rows) == len(answers) and all(map(Row.has_read, rows, read, answers))):
                rows = self._controller.replay(inputs, answers)
        generations = [self._generation(row.copy(), tokens) for row, tokens in zip(rows, answers, strict=True)]
        return generations[0] if single and len(generations) == 1 else generations

    def stream(self, prompt: str | Sequence[Message], *, seed: int | None = None, **kwargs: Any) -> Iterator[Piece]:
        """Answers one prompt piece by piece; the pieces concatenate to what `generate` gives.

        Each Piece is a str that also knows its `mixture`. Leaving the loop early stops the model. The model begins with
        the first piece, so `fixed`, `using` and the like are to be around the loop.

        Raises:
            PromptError, ValueError: as `generate`.
        """
        chats, single = as_batch(prompt)
        if not single:
            raise ValueError("engine.stream takes one prompt; use engine.generate for several")
        inputs, streamer = self._inputs(chats, kwargs), PieceStreamer(self._controller)
        stopping = StoppingCriteriaList([*kwargs.pop("stopping_criteria", []), Abandoned(streamer)])

        def run() -> None:
            with self._ending(kwargs), seeded(seed, self.model.device), torch.no_grad():
                cast(Any, self.model).generate(**inputs, streamer=streamer, stopping_criteria=stopping, **kwargs)

        return streamer.pieces(run)

    def _inputs(self, chats: Sequence[str | Sequence[Message]], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Checks a call of `generate` and encodes its prompts."""
        if not self._is_attached:
            raise ValueError("the engine was detached from its model; make another one with dlp_lora.load")
        check_call(kwargs, self.model.generation_config)
        fixed = self._controller.fixed or ()
        if len(fixed) > 1 and len(fixed) != len(chats):
            raise ValueError(f"{len(fixed)} mixtures were fixed for {len(chats)} prompts; give one, or one a prompt")
        return encode_prompts(self.model, self.tokenizer, chats, num_new=kwargs.get("max_new_tokens") or 1)

    def route(self, prompt: str | Context) -> tuple[dict[str, float], Mixture]:
        """Says what would answer a prompt, without running the model: a probability by adapter name, and the mixture.

        Raises:
            RouterError: if there is no router.
        """
        return self._controller.routing.route(Context(prompt) if isinstance(prompt, str) else prompt)

    @contextmanager
    def fixed(self, mixture: Mapping[str, float] | Sequence[Mapping[str, float]]) -> Iterator["Engine"]:
        """Uses the given mixture instead of the router; a list gives one mixture a row.

        Raises:
            AdapterError: if the bank holds no adapter of a name.
        """
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
        before = self._controller.fixed
        self._controller.fixed = tuple(Mixture(m) for m in mixtures)
        try:
            yield self
        finally:
            self._controller.fixed = before

    @contextmanager
    def merged(self, mixture: Mapping[str, float]) -> Iterator["Engine"]:
        """As `fixed`, with the mixture added to the base weights: a token costs what it costs the base model.

        The weights that it changes are held twice meanwhile, and come back bit for bit.

        Raises:
            ModelError: if a layer has no weight of its own to add to, as a quantised or tied one.
        """
        with self.fixed(mixture), merged(self.model, self.bank, Mixture(mixture)):
            yield self

    @contextmanager
    def disabled(self) -> Iterator["Engine"]:
        """The base model, bit for bit."""
        with self.fixed({}):
            yield self

    @contextmanager
    def using(self, **settings: Any) -> Iterator["Engine"]:
        """Changes `policy`, `kv_policy`, `prompt_routing`, `switching`, `segmenter` or `router` for a while."""
        unknown = set(settings) - set(SETTINGS)
        if unknown:
            raise ValueError(f"engine.using takes {', '.join(SETTINGS)}, not {', '.join(unknown)}")
        check_choices(**{name: settings[name] for name in CHOICES if name in settings})
        if settings.get("router") is not None:
            check_names(settings["router"].names, self.bank.names)
        before = {name: getattr(self._controller.routing, name) for name in settings}
        self._controller.routing = replace(self._controller.routing, **settings)
        try:
            yield self
        finally:
            self._controller.routing = replace(self._controller.routing, **before)

    def compile(self, *, max_rank: int = 64, **kwargs: Any) -> None:
        """Compiles decoding steps over a static cache, once for each batch size and length of the cache.

        A step then computes with `max_rank` in each adapted layer, whatever the mixture, so that no switch compiles
        anew; buffers stay where they are, as CUDA graphs need. Prompts, wider mixtures, other caches and `disabled` run
        as ever.

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
        """Writes a bundle: adapters, router, policy, and the base model's name. A bundle there is replaced at the end.

        Raises:
            RouterError: if adapters were added or removed that the router does not know, or still knows.
            AdapterError: if an adapter's folder no longer holds what the engine runs with.
            ValueError: if the policy is not one of this package's, which alone can be saved by name.
        """
        if self.router is not None:
            check_names(self.router.names, self.bank.names)
        for name in self.bank.names:
            self.bank.check_files(name)
        write_bundle(
            path,
            base_model=self.model.config._name_or_path,
            adapters={name: adapter.path for name, adapter in self.bank.adapters.items()},
            router=self.router,
            **self.routing_settings(),
        )

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Uploads the bundle to the Hugging Face hub; returns its address."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "bundle")
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "bundle"))

    def detach(self) -> PreTrainedModel:
        """Takes the adapters off and gives the base model back, bit for bit as it was."""
        with self.bank.lock:
            for name, before in self._overridden.items():
                vars(self.model).pop(name, None)
                if before is not None:
                    vars(self.model)[name] = before
            detach(self.model)
            self._is_attached = False
        return self.model

    @contextmanager
    def _ending(self, kwargs: Mapping[str, Any]) -> Iterator[Endings]:
        """Tells the controller how this call of `generate` ends answers."""
        endings = Endings.of_call(kwargs, self.model.generation_config)
        with self._controller.calls.ending(endings):
            yield endings

    def _generation(self, row: Row, tokens: Sequence[int]) -> Generation:
        row.finish(tokens)
        return Generation(
            text=row.text, tokens=tuple(tokens), trace=tuple(row.sentences()), prompt_trace=row.prompt_trace
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _own_call(model: PreTrainedModel, _: Any) -> Callable[..., Any]:
    return model.__call__
