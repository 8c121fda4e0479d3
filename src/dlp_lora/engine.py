"""The engine: a causal LM, a bank of adapters, a router and a policy, working as one model (Fig. 1).

`engine.model` stays an ordinary Hugging Face model that routes by itself in every forward pass; `generate` and
`stream` are its own `generate`, plus a trace of which sentence used which adapters.
"""

import queue
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from dlp_lora.bank import AdapterBank
from dlp_lora.bundle import FILES, is_bundle, read_bundle, write_bundle
from dlp_lora.controller import CachedRows, Controller, KVPolicy, Row, Sentence, Switching
from dlp_lora.errors import AdapterError, BundleError, ModelError, PromptError, RouterError
from dlp_lora.fused import attach, detach, linear_layers
from dlp_lora.hub import local_folder
from dlp_lora.peft_format import CONFIG_FILE, WEIGHTS_FILE, Adapter, find_adapters, read_adapter
from dlp_lora.policy import FusionPolicy, Mixture, TopP, policy_from_dict, policy_to_dict
from dlp_lora.router import MiniMLP, Router
from dlp_lora.sentences import Segmenter, SentenceSegmenter

Message = Mapping[str, str]
Adapters = str | Path | Mapping[str, str | Path]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generated answer: its text, its tokens (the last may be end-of-sequence), and its trace by sentence."""

    text: str
    tokens: tuple[int, ...]
    trace: tuple[Sentence, ...]

    def to_dict(self) -> dict[str, Any]:
        """Gives the answer as JSON data."""
        return {"text": self.text, "trace": [sentence.to_dict() for sentence in self.trace]}


class Piece(str):
    """A piece of streamed text; `mixture` is what it was generated under, `sentence` its sentence's number."""

    mixture: Mixture
    sentence: int

    __slots__ = ("mixture", "sentence")

    @classmethod
    def of(cls, text: str, mixture: Mixture, sentence: int) -> "Piece":
        """Makes a piece."""
        piece = cls(text)
        piece.mixture, piece.sentence = mixture, sentence
        return piece


class Engine:
    """A model with many adapters that picks among them by itself, sentence by sentence.

    Make one with `dlp_lora.load`. `detach` gives the plain model back.
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
    ) -> None:
        if kv_policy not in ("keep", "recompute"):
            raise ValueError(f"kv_policy must be 'keep' or 'recompute', got {kv_policy!r}")
        if router is not None:
            _check_names(router, bank)
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank
        generation = model.generation_config
        self._controller = Controller(
            bank,
            tokenizer,
            router=router,
            policy=policy or TopP(),
            segmenter=segmenter,
            switching=switching or Switching(),
            kv_policy=kv_policy,
            eos_ids=_ids(generation.eos_token_id) | _ids(tokenizer.eos_token_id),
            pad_ids=_ids(generation.pad_token_id) | _ids(tokenizer.pad_token_id),
        )
        attach(model, bank)
        self._handles = self._controller.install(model)

    @property
    def router(self) -> Router | None:
        """The router, None where only `fixed` and `disabled` choose."""
        return self._controller.router

    @property
    def policy(self) -> FusionPolicy:
        """The policy that turns probabilities into a mixture; may be set."""
        return self._controller.policy

    @policy.setter
    def policy(self, policy: FusionPolicy) -> None:
        self._controller.policy = policy

    @property
    def kv_policy(self) -> KVPolicy:
        """What a switch does to the KV cache: "keep" it, or "recompute" it under the new mixture."""
        return self._controller.kv_policy

    @property
    def switching(self) -> Switching:
        """When a sentence start may switch."""
        return self._controller.switching

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]],
        *,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answers a prompt (gives a Generation) or a list of prompts (gives a list of them).

        A string is raw text, as in `model.generate`; a list of messages with role and content is one chat and goes
        through the tokenizer's chat template. Other arguments are those of Hugging Face's `generate`.

        Raises:
            PromptError: if a prompt is empty, or too long for the model's context with its `max_new_tokens`.
        """
        chats, single = _as_batch(prompts)
        for name in ("return_dict_in_generate", "inputs", "input_ids", "attention_mask", "assistant_model"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not an argument of engine.generate; use engine.model.generate")
        inputs = self._encode(chats, kwargs)
        with _seeded(seed, self.model.device), torch.no_grad():
            output = cast(Any, self.model).generate(**inputs, **kwargs)
        length = inputs["input_ids"].shape[1]
        answers = [self._trim(tokens) for tokens in output[:, length:].tolist()]
        rows = cast(CachedRows, self._controller.latest).rows
        if kwargs.get("num_beams", self.model.generation_config.num_beams) not in (None, 1):
            rows = self._controller.replay(inputs, answers)
        generations = [self._generation(row.copy(), tokens) for row, tokens in zip(rows, answers, strict=True)]
        return generations[0] if single and len(generations) == 1 else generations

    def stream(self, prompt: str | Sequence[Message], *, seed: int | None = None, **kwargs: Any) -> Iterator[Piece]:
        """Answers one prompt piece by piece; the pieces concatenate to what `generate` gives.

        Each Piece is a str that also knows its `mixture`. Leaving the loop early stops the model.
        """
        chats, single = _as_batch(prompt)
        if not single:
            raise ValueError("engine.stream takes one prompt; use engine.generate for several")
        inputs = self._encode(chats, kwargs)
        streamer = _Pieces(self._controller)
        stopping = StoppingCriteriaList([*kwargs.pop("stopping_criteria", []), _Stopped(streamer)])

        def run() -> None:
            try:
                with _seeded(seed, self.model.device), torch.no_grad():
                    cast(Any, self.model).generate(**inputs, streamer=streamer, stopping_criteria=stopping, **kwargs)
                streamer.queue.put(None)
            except BaseException as error:
                streamer.queue.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (event := streamer.queue.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            streamer.stopped = True
            thread.join()

    @contextmanager
    def fixed(self, mixture: Mapping[str, float] | Sequence[Mapping[str, float]]) -> Iterator["Engine"]:
        """Uses the given mixture instead of the router; a list gives one mixture a row.

        Raises:
            AdapterError: if the bank holds no adapter of a name.
        """
        mixtures = [mixture] if isinstance(mixture, Mapping) else list(mixture)
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
    def disabled(self) -> Iterator["Engine"]:
        """The base model, bit for bit."""
        with self.fixed({}):
            yield self

    @contextmanager
    def using(self, **settings: Any) -> Iterator["Engine"]:
        """Changes `policy`, `kv_policy`, `switching` or `router` for a while, as an ablation does."""
        unknown = set(settings) - {"policy", "kv_policy", "switching", "router"}
        if unknown:
            raise ValueError(f"engine.using takes policy, kv_policy, switching and router, not {', '.join(unknown)}")
        if settings.get("router") is not None:
            _check_names(settings["router"], self.bank)
        before = {name: getattr(self._controller, name) for name in settings}
        self._controller.__dict__.update(settings)
        try:
            yield self
        finally:
            self._controller.__dict__.update(before)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a bundle: adapters, router, policy, and the base model's name. A bundle there is replaced at the end.

        Raises:
            ValueError: if the policy is not one of this package's, which alone can be saved by name.
        """
        write_bundle(
            path,
            base_model=self.model.config._name_or_path,
            adapters={name: adapter.path for name, adapter in self.bank.adapters.items()},
            router=self.router,
            policy=policy_to_dict(self.policy),
            switching=asdict(self.switching),
            kv_policy=self.kv_policy,
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
        for handle in self._handles:
            handle.remove()
        detach(self.model)
        return self.model

    def _encode(self, chats: Sequence[str | Sequence[Message]], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        rows = [self._tokens(chat) for chat in chats]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = kwargs.get("max_new_tokens") or 1
        for i, row in enumerate(rows):
            which = f"prompt {i}" if len(rows) > 1 else "the prompt"
            if not row:
                raise PromptError(f"{which} is empty; give at least one token of text")
            if limit is not None and len(row) + room > limit:
                raise PromptError(
                    f"{which} has {len(row)} tokens, and {room} new ones do not fit: the model's context is {limit}; "
                    f"shorten the prompt or lower max_new_tokens"
                )
        width = max(map(len, rows))
        pad = next(iter(sorted(_ids(self.tokenizer.pad_token_id) or _ids(self.tokenizer.eos_token_id))), 0)
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        device = self.model.device
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def _tokens(self, chat: str | Sequence[Message]) -> list[int]:
        if isinstance(chat, str):
            return list(self.tokenizer(chat)["input_ids"]) if chat.strip() else []
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptError("the tokenizer has no chat template; give the prompt as a string instead of messages")
        if not any(message.get("content", "").strip() for message in chat):
            return []
        messages = [dict(message) for message in chat]
        encoded: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def _trim(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens) if token in self._controller.eos_ids), len(tokens) - 1)
        return tokens[: end + 1]

    def _generation(self, row: Row, tokens: Sequence[int]) -> Generation:
        row.finish(tokens)
        return Generation(text=row.text, tokens=tuple(tokens), trace=tuple(row.sentences()))

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def load(
    model: str | Path | PreTrainedModel,
    *,
    adapters: Adapters | None = None,
    router: str | Path | Router | None = None,
    policy: FusionPolicy | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model: str | Path | PreTrainedModel | None = None,
    segmenter: Callable[[], Segmenter] = SentenceSegmenter,
    switching: Switching | None = None,
    kv_policy: KVPolicy | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    strict: bool = False,
    **model_kwargs: Any,
) -> Engine:
    """Makes an engine out of a base model, adapters and a router; or out of a bundle, which holds all of it.

    Args:
        model: a path or hub id of a base model or of a bundle, or a model already in memory (with `tokenizer`).
        adapters: a folder of PEFT adapter folders, or a path or hub id by name.
        router: a folder written by `train-router`, or any Router; None leaves the choice to `Engine.fixed`.
        policy: which adapters are fused; `TopP(0.6)` unless given or in the bundle.
        base_model: takes the place of the base model that a bundle names.
        strict: refuses adapters that say they were trained on a model of another name, instead of warning.
        model_kwargs: go to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        DLPLoRAError: of the kind that says which part cannot be used, and why.
    """
    bundle_path = _bundle_path(model, adapters)
    if bundle_path is not None:
        bundle = read_bundle(bundle_path)
        adapters = bundle.adapters if adapters is None else adapters
        router = bundle.router if router is None else router
        policy = policy or policy_from_dict(bundle.policy)
        switching = switching or Switching(**bundle.switching)
        kv_policy = kv_policy or cast(KVPolicy, bundle.kv_policy)
        model = base_model or bundle.base_model
    elif base_model is not None:
        raise ValueError("base_model replaces the base of a bundle, but the first argument is no bundle")
    if adapters is None:
        raise BundleError(f"{model} is no bundle; give adapters=, a folder of PEFT adapters or {{name: path}}")
    model, tokenizer = _load_model(model, tokenizer, dtype=dtype, device=device, **model_kwargs)
    bank = AdapterBank(linear_layers(model), dtype=model.dtype, device=model.device)
    for adapter in _read_adapters(adapters):
        _check_base(adapter, model.config._name_or_path, strict=strict)
        bank.add(adapter)
    return Engine(
        model,
        tokenizer,
        bank,
        router=MiniMLP.from_pretrained(router) if isinstance(router, str | Path) else router,
        policy=policy,
        segmenter=segmenter,
        switching=switching,
        kv_policy=kv_policy or "keep",
    )


class _Pieces(BaseStreamer):
    """Hands text from the generating thread to the reading one, a token after it was sampled.

    A token's mixture is known once the model has encoded it, which is when the next one arrives.
    """

    def __init__(self, controller: Controller) -> None:
        self.queue: queue.Queue[Piece | BaseException | None] = queue.Queue()
        self.stopped = False
        self._controller = controller
        self._tokens: list[int] | None = None
        self._told = 0

    def put(self, value: Tensor) -> None:
        if self._tokens is None:
            self._tokens = []  # the first call brings the prompt
            return
        self._tell(cast(CachedRows, self._controller.latest).rows[0])
        self._tokens.append(int(value))

    def end(self) -> None:
        row = cast(CachedRows, self._controller.latest).rows[0].copy()
        row.finish(self._tokens or [])
        self._tell(row)

    def _tell(self, row: Row) -> None:
        if len(row.text) > self._told:
            self.queue.put(Piece.of(row.text[self._told :], row.mixture, len(row.decisions) - 1))
            self._told = len(row.text)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends generation when nobody reads its stream any more."""

    def __init__(self, streamer: _Pieces) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._streamer.stopped, device=input_ids.device)


def _as_batch(prompts: Any) -> tuple[list[str | Sequence[Message]], bool]:
    if isinstance(prompts, str):
        return [prompts], True
    prompts = list(prompts)
    if not prompts:
        raise PromptError("there is no prompt; give a string, a list of strings, or messages")
    if isinstance(prompts[0], Mapping):
        return [prompts], True
    return prompts, False


def _bundle_path(model: Any, adapters: Adapters | None) -> Path | None:
    if not isinstance(model, str | Path):
        return None
    if is_bundle(model):
        return Path(model)
    if adapters is None:
        path = local_folder(model, files=FILES, error=BundleError)
        return path if is_bundle(path) else None
    return None


def _load_model(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, *, dtype: Any, device: Any, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(model, str | Path):
        source = str(model)
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
            # Safetensors only: a pickled checkpoint can run code.
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **kwargs)
        except (OSError, ValueError) as error:
            raise ModelError(f"the base model {source!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer is None:
        raise ValueError("a model in memory comes with its tokenizer: load(model, tokenizer=...)")
    if device is not None:
        model = model.to(device)
    return model.eval(), tokenizer


def _read_adapters(adapters: Adapters) -> list[Adapter]:
    if not isinstance(adapters, Mapping):
        adapters = {name: path for name, path in find_adapters(adapters).items()}
    if not adapters:
        raise AdapterError("adapters= is empty; give at least one adapter")
    files = (CONFIG_FILE, WEIGHTS_FILE)
    return [
        read_adapter(local_folder(source, files=files, error=AdapterError), name) for name, source in adapters.items()
    ]


def _check_base(adapter: Adapter, base: str, *, strict: bool) -> None:
    # "owner/Model", "./Model" and ".cache/Model/" are one model: only the last part of the name says which.
    told, found = (Path(str(name or "").rstrip("/")).name.lower() for name in (adapter.base_model, base))
    if not told or not found or told == found:
        return
    message = f"{adapter.path} says it was trained on {adapter.base_model!r}, but the base model is {base!r}"
    if strict:
        raise AdapterError(f"{message}; load without strict=True if they are the same model")
    warnings.warn(f"{message}; its shapes fit, so it is used", stacklevel=3)


def _check_names(router: Router, bank: AdapterBank) -> None:
    unknown, unrouted = set(router.names) - set(bank.names), set(bank.names) - set(router.names)
    if unknown or unrouted:
        raise RouterError(
            f"router and adapters disagree: the router knows {', '.join(sorted(unknown)) or 'nothing'} that is no "
            f"adapter, and not the {'adapters ' + ', '.join(sorted(unrouted)) if unrouted else 'rest'}; "
            f"give the adapters it was trained for, or train it anew"
        )


def _ids(value: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []) if seed is not None else nullcontext()
    ):
        if seed is not None:
            torch.manual_seed(seed)
        yield
