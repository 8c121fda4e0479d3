"""Answers without HTTP: a backend and answers out, as from an engine."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlp_lora.chat import Chat, Message
from dlp_lora.engine.outline import Outline
from dlp_lora.engine.prompts import as_batch, encode_prompt
from dlp_lora.engine.streaming import Piece
from dlp_lora.engine.trace import Generation
from dlp_lora.policy import Mixture
from dlp_lora.serve.apart import in_order
from dlp_lora.serve.backend import Backend, Done, Request, Sampling, SentenceStart, Token
from dlp_lora.serve.backend import Stream as Events
from dlp_lora.serve.cutter import SentenceCutter
from dlp_lora.serve.sampler import SAMPLED, defaults_of


class BackendAnswerer:
    """Answers prompts with a backend."""

    def __init__(self, outline: Outline, backend: Backend) -> None:
        self.tokenizer: PreTrainedTokenizerBase = outline.tokenizer
        self._backend = backend
        self._call = outline.call
        self._defaults = defaults_of(outline.generation_config)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return self._backend.adapters

    @property
    def max_context(self) -> int:
        """The largest number of tokens of a prompt and its answer."""
        return self._backend.max_context

    def generate(
        self,
        prompt: str | Chat | Sequence[Message],
        *,
        max_new_tokens: int,
        mixture: Mapping[str, float] | None = None,
        do_sample: bool | None = None,
        seed: int | None = None,
    ) -> Generation:
        """Answers a prompt, as `Engine.generate` does."""
        options: dict[str, Any] = {"mixture": mixture, "do_sample": do_sample, "seed": seed}
        with self.stream(prompt, max_new_tokens=max_new_tokens, **options) as stream:
            for _ in stream:
                pass
            return stream.generation

    def stream(
        self,
        prompt: str | Chat | Sequence[Message],
        *,
        max_new_tokens: int,
        mixture: Mapping[str, float] | None = None,
        do_sample: bool | None = None,
        seed: int | None = None,
    ) -> "AnswerStream":
        """Answers a prompt piece by piece, as `Engine.stream` does.

        Raises:
            PromptError: if the prompt is empty or too long.
            AdapterError: if the mixture names an unknown adapter.
        """
        call = self._call if mixture is None else self._call.changed({"mixtures": (Mixture(mixture),)})
        (chat,), _ = as_batch(prompt)
        sampling = Sampling(**self._sampling(do_sample), seed=seed, max_tokens=max_new_tokens)
        prompts = self._backend.prompt_router.apart(encode_prompt(self.tokenizer, chat), call=call)
        requests = [Request(tokens=p.tokens, call=call, prompt=p.prompt, sampling=sampling) for p in prompts]
        return AnswerStream(in_order(self._backend.open_all(requests)))

    def _sampling(self, do_sample: bool | None) -> dict[str, Any]:
        is_sampled = self._defaults.get("temperature") != 0 if do_sample is None else do_sample
        if not is_sampled:
            return {**self._defaults, "temperature": 0.0}
        return {**SAMPLED, **{name: value for name, value in self._defaults.items() if value != 0}}


class AnswerStream(Iterator[Piece]):
    """The pieces of one answer while a backend computes it; together, they are the text of `generation`."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._done: Done | None = None
        self._pieces = self._read()

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def generation(self) -> Generation:
        """The answer with its trace. If the stream is still running, this closes it."""
        self.close()
        return Generation(text="", tokens=(), trace=()) if self._done is None else self._done.generation

    def close(self) -> None:
        """Ends the answer here."""
        if self._done is None:
            self._events.cancel()
            for event in self._events:
                if isinstance(event, Done):
                    self._done = event

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Iterator[Piece]:
        cutter, mixture, sentence = SentenceCutter(), Mixture(), 0
        for event in self._events:
            match event:
                case SentenceStart():
                    cutter.begin(event)
                case Token() | Done():
                    for text, start in cutter.cut(event.text):
                        if start is not None:
                            mixture, sentence = start.mixture, start.number
                        if text:
                            yield Piece.of(text, mixture, sentence)
                    if isinstance(event, Done):
                        self._done = event
