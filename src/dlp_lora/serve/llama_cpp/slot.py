"""A slot: one request with its answer, as one sequence of llama.cpp's context."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from dlp_lora.bank.mixture_folder import Sources
from dlp_lora.policy import Mixture
from dlp_lora.serve.answer_builder import AnswerBuilder
from dlp_lora.serve.backend import BackendError, PromptScores
from dlp_lora.serve.llama_cpp.mixtures import Part, parts_of
from dlp_lora.serve.sampler import Sampler, logprobs


@dataclass(eq=False)
class Slot:
    """A request; the KV of its first `num_read` tokens is in the context, as the sequence `place`.

    `sources` are the adapters at its start; it keeps them.
    """

    answer: AnswerBuilder
    sources: Sources
    sampler: Sampler | None = None
    place: int | None = None
    num_read: int = 0
    encode_ms: float = 0.0  # of reading it since its last switch
    fuse_ms: float = 0.0
    scores: PromptScores = field(default_factory=lambda: PromptScores(logprobs=(None,), top=({},)))

    @property
    def tokens(self) -> list[int]:
        """The tokens of the prompt and of the answer so far."""
        return self.answer.tokens

    @property
    def sequence(self) -> int:
        """Its sequence in the context, while it has one."""
        assert self.place is not None
        return self.place

    @property
    def is_read(self) -> bool:
        """Whether all its tokens are in the context, so that the next one can be sampled."""
        return self.num_read == len(self.tokens)

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether the prompt's scores are needed, and it is read the first time."""
        return self.answer.request.sampling.num_prompt_logprobs is not None and not self.answer.num_tokens

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of its mixture; slots with equal ones can decode together."""
        return parts_of(self.answer.routed.mixture, self.sources)

    def mixture_at(self, position: int) -> Mixture:
        """Returns the mixture of a token: that of its sentence in a prompt by sentence, else the current one."""
        for sentence in self.answer.routed.prompt_trace:
            if sentence.start <= position < sentence.end:
                return sentence.mixture
        return self.answer.routed.mixture

    def add_prompt_scores(self, scores: Float[Tensor, "seq vocab"]) -> None:
        """Adds the scores of the tokens that were read last; the last ones of the prompt are for the answer."""
        num_top = self.answer.request.sampling.num_prompt_logprobs or 0
        first = self.num_read - len(scores) + 1
        following = self.tokens[first : self.answer.num_prompt]
        pairs = [logprobs(row, token, num_top) for row, token in zip(scores, following, strict=False)]
        self.scores = PromptScores(
            logprobs=(*self.scores.logprobs, *(logprob for logprob, _ in pairs)),
            top=(*self.scores.top, *(top for _, top in pairs)),
        )
        if self.is_read:
            self.answer.add_prompt_scores(self.scores)

    def take(self, scores: Float[Tensor, " vocab"]) -> bool:
        """Samples the next token; returns whether the mixture changed.

        Raises:
            BackendError: if the scores are not numbers.
        """
        sampler = self.sampler
        assert sampler is not None
        if bool(scores.isnan().any()):
            raise BackendError("the model gave scores that are not numbers; its weights or an adapter overflow")
        token = int(scores.argmax()) if sampler.is_argmax else sampler.sample(scores)
        sampler.add(token)
        num_top = self.answer.request.sampling.num_logprobs
        logprob, top = (None, {}) if num_top is None else logprobs(scores, token, num_top)
        return self.answer.take(token, logprob=logprob, top=top)
