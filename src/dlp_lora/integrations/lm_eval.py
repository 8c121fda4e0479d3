"""lm-evaluation-harness: an engine in, a model for lm-eval out.

`generate_until` routes at the prompt and at every sentence, as `Engine.generate` does. A log-likelihood uses the
mixture of its context: the continuation, which may be a wrong answer, has no influence on it.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dlp_lora.engine.engine import Engine
from dlp_lora.engine.loading import load
from dlp_lora.errors import DLPLoRAError, RouterError
from dlp_lora.policy import Mixture, RoutingSettings, with_p

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise DLPLoRAError(f"lm-eval cannot be imported ({error}); run `pip install 'dlp-lora[lm-eval]'`") from error

logger = logging.getLogger(__name__)

NAME = "dlp_lora"
# HFLM's arguments that apply to a finished model; HFLM ignores unknown arguments silently.
OPTIONS = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "add_bos_token", "prefix_token_id", "logits_cache"),
    *("softmax_dtype", "think_end_token", "enable_thinking", "chat_template_args"),
)

Request = tuple[Any, list[int], list[int]]
"""Context and continuation as strings (None for a window of a whole text), and the tokens of both."""


class EngineLM(HFLM):  # type: ignore[misc]
    """An engine as a model of lm-eval. The blocks `engine.fixed` and `disabled` apply here, too.

    Raises:
        RouterError: if the engine has no router.
    """

    def __init__(self, engine: Engine, **options: Any) -> None:
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(
                f"{NAME} takes no argument {', '.join(unknown)}; of lm-eval's it takes {', '.join(OPTIONS)}"
            )
        if engine.router is None:
            raise RouterError("there is no router to choose adapters; train one with train-router")
        super().__init__(pretrained=engine.model, tokenizer=engine.tokenizer, backend="causal", **options)
        self.engine = engine

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._is_fixed or not requests:
            return self._score(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        if self.batch_size == "auto":  # measured once, not for each mixture
            override_bs = self._detect_batch_size([max(requests, key=lambda r: len(r[1]) + len(r[2]))])
        # The strings, as lm-eval moves a context's last spaces to the continuation's tokens.
        contexts = [context for (context, _), _, _ in requests]
        mixtures = {context: self._route(context) for context in dict.fromkeys(contexts)}
        # Requests of one mixture at a time: HFLM may then sort them, batch them and share logits as for any model.
        # Not across mixtures: HFLM takes equal tokens for one request, even if their contexts end at different places.
        alike: dict[Mixture, list[int]] = {}
        for i, context in enumerate(contexts):
            alike.setdefault(mixtures[context], []).append(i)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as progress:
            for mixture, places in alike.items():
                with self.engine.fixed(mixture):
                    scores = self._score([requests[i] for i in places], disable_tqdm=True, override_bs=override_bs)
                answers.update(zip(places, scores, strict=True))
                progress.update(len(places))
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Works only under a fixed mixture, because a whole text has no context for the router."""
        if not self._is_fixed:
            tasks = ", ".join(sorted({request.task_name or "a task" for request in requests}))
            raise ValueError(
                f"{tasks}: a text whose likelihood is measured as a whole has no context to route on, and would choose "
                f"its adapters with hindsight; leave the task out, or fix a mixture with engine.fixed()"
            )
        likelihoods: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return likelihoods

    def _route(self, context: str) -> Mixture:
        return self.engine.start_row(self.tok_encode(context)).mixture  # with the beginning of an answer

    def _score(self, requests: Sequence[Request], **settings: Any) -> list[tuple[float, bool]]:
        scored: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **settings)
        return scored

    @property
    def _is_fixed(self) -> bool:
        return self.engine.call.mixtures is not None


class DLPLoRALM(EngineLM):
    """The model `--model dlp_lora`; its arguments are those of `--model_args`.

    Pass either `bundle`, or `model`, `adapters` and `router`. A `model` with a bundle replaces its base model. `p`
    replaces the bundle's `TopP.p`. `kv_policy` and `prompt_routing` are routing settings; `prepack` and `budget_mb` are
    arguments of `dlp_lora.load`.
    """

    def __init__(
        self,
        *,
        bundle: str | Path | None = None,
        model: str | Path | None = None,
        adapters: str | Path | None = None,
        router: str | Path | None = None,
        p: float | None = None,
        device: str | None = None,
        dtype: str = "auto",
        prepack: bool = False,
        budget_mb: float | None = None,
        **options: Any,
    ) -> None:
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            logger.warning("there is no CUDA device: running on the CPU")
            device = "cpu"  # cuda:0 is the default of lm-eval's command line
        settings: dict[str, Any] = {
            "device": device or "auto",
            "dtype": dtype,
            "prepack": prepack,
            "budget_mb": budget_mb,
            **{name: options.pop(name) for name in RoutingSettings.names() if name in options},
        }
        if bundle is not None:
            if adapters is not None or router is not None:
                raise ValueError("bundle= holds adapters and router; leave adapters= and router= out")
            engine = load(bundle, base_model=model, **settings)
        elif model is not None and adapters is not None and router is not None:
            engine = load(model, adapters=adapters, router=router, **settings)
        else:
            raise ValueError("give bundle=, or model=, adapters= and router=")
        if p is not None:
            engine.policy = with_p(engine.policy, p)
        super().__init__(engine, **options)


def register() -> None:
    """Registers the model in lm-eval, because releases up to 0.4.13 read no entry points."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=DLPLoRALM)


def run(args: Sequence[str]) -> None:
    """Runs lm-eval's command line with the model registered."""
    register()
    before = sys.argv
    sys.argv = ["lm_eval", *args]  # the part that lm-eval reads
    try:
        cli_evaluate()
    finally:
        sys.argv = before
