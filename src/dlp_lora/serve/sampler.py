"""Sampling for one row: the model's scores in, one token out; rows are sampled separately and are independent."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dlp_lora.serve.backend import BackendError, Sampling

SAMPLED = {"temperature": 1.0, "top_k": 50}  # of transformers' `generate` if it samples


class Sampler:
    """Samples the tokens of one answer by its `Sampling`, with a separate random generator.

    The steps are those of transformers' `generate`, in its order, so that a seed gives the same answer. `end_ids` are
    the tokens that end the answer.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], end_ids: Collection[int], device: torch.device
    ) -> None:
        self.sampling = sampling
        self._device = device
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.long, device=device)
        self._tokens = list(prompt)
        self._num_prompt = len(prompt)
        self._counts: Counter[int] = Counter()
        self._bias = _pairs(sampling.logit_bias, device)
        self._warpers = [] if sampling.temperature == 0 else _warpers(sampling)
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator(device)
            self._generator.seed() if sampling.seed is None else self._generator.manual_seed(sampling.seed)

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is always the likeliest one."""
        s = self.sampling
        changes = s.logit_bias or s.presence_penalty or s.frequency_penalty or s.grammar
        return s.temperature == 0 and not changes and s.repetition_penalty == 1 and not self._is_too_short

    def sample(self, scores: Float[Tensor, " vocab"]) -> int:
        """Samples a token; `scores` are the model's, in float32.

        Raises:
            BackendError: if no token is allowed.
        """
        scores = self._processed(scores.clone())
        if self._generator is None:
            token = int(scores.argmax())
        else:
            probabilities = scores.softmax(dim=-1)
            if not math.isfinite(float(scores.max())):
                raise BackendError("no token may come next: the grammar and the settings leave none")
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        if scores[token] == -math.inf:
            raise BackendError("no token may come next: the grammar and the settings leave none")
        return token

    def add(self, token: int) -> None:
        """Notes a token, for the penalties of later tokens."""
        self._tokens.append(token)
        self._counts[token] += 1

    @property
    def _is_too_short(self) -> bool:
        return len(self._tokens) - self._num_prompt < self.sampling.min_tokens

    def _processed(self, scores: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        s = self.sampling
        if s.logit_bias:
            scores.index_add_(0, *self._bias)
        if s.repetition_penalty != 1:
            ids = torch.tensor([self._tokens], device=self._device)
            scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, scores[None])[0]
        if (s.presence_penalty or s.frequency_penalty) and self._counts:
            penalties = {t: -s.presence_penalty - s.frequency_penalty * n for t, n in self._counts.items()}
            scores.index_add_(0, *_pairs(penalties, self._device))
        if s.grammar is not None:
            s.grammar.mask(scores)
        elif self._is_too_short and self._end_ids.numel():
            scores[self._end_ids] = -math.inf
        for warper in self._warpers:
            scores = warper(None, scores[None])[0]
        return scores


def defaults_of(generation_config: Any) -> dict[str, Any]:
    """The sampling of a model's generation config, as in `generate`: greedy by default."""
    settings = generation_config.to_diff_dict()
    defaults = {name: settings[name] for name in ("repetition_penalty",) if settings.get(name) is not None}
    if not settings.get("do_sample"):
        return {**defaults, "temperature": 0.0}
    chosen = ("temperature", "top_p", "top_k", "min_p")
    return {**defaults, **SAMPLED, **{name: settings[name] for name in chosen if settings.get(name) is not None}}


def logprobs(scores: Float[Tensor, " vocab"], token: int, num_top: int) -> tuple[float, dict[int, float]]:
    """Returns the log-probability of a token, and those of the likeliest tokens."""
    all_logprobs = scores.float().log_softmax(dim=-1)
    values, ids = all_logprobs.topk(min(num_top, scores.shape[0]))
    return float(all_logprobs[token]), dict(zip(ids.tolist(), values.tolist(), strict=True))


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


def _pairs(values: Mapping[int, float], device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.tensor(list(values), dtype=torch.long, device=device)
    return ids, torch.tensor(list(values.values()), dtype=torch.float32, device=device)
