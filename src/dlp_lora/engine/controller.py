"""The controller: before each forward pass of the model, it decides which mixture each row has (Fig. 1).

It watches the tokens that go into the model. A forward that starts a KV cache is a prompt: the router reads it
whole, for the opening of the answer, and with `prompt_routing="sentences"` each of its sentences, too. One more token
on a cache is a decoding step: where the token opens a new sentence, the router reads the history and that token, and
the pass that encodes the token already runs under the new mixture.

What is known of each row lives on the KV cache object (`dlp_lora.engine.trace`).

Several threads may run the model at once: their passes take turns. A pass holds the bank's lock from before it is
routed until it has ended, and what it leaves behind belongs to its thread.
"""

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.store import Lease
from dlp_lora.engine.cache import CachedRows, LatestRows, bind, cache_among, cache_of, rows_of
from dlp_lora.engine.calls import Endings, kept_tokens
from dlp_lora.engine.routing import Routing
from dlp_lora.engine.text import Detokenizer, Passage, PromptReader
from dlp_lora.engine.trace import Decision, Row, Sentence
from dlp_lora.errors import PromptError
from dlp_lora.policy import Mixture
from dlp_lora.router import Context


class Calls(threading.local):
    """What belongs to one thread: the rows of its last forward pass, and how its call of `generate` ends answers."""

    def __init__(self, endings: Endings) -> None:
        self.endings = endings
        self.latest: LatestRows | None = None

    @contextmanager
    def ending(self, endings: Endings) -> Iterator[None]:
        """Lets rows end so for a while."""
        before, self.endings = self.endings, endings
        try:
            yield
        finally:
            self.endings = before


class Pass(NamedTuple):
    """What a forward pass is given, and the rows that it is over, if they are known."""

    rows: CachedRows | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Controller:
    """Routes the rows of a model's forward passes; installed by the engine around the model's `forward`."""

    def __init__(
        self,
        bank: AdapterBank,
        tokenizer: PreTrainedTokenizerBase,
        routing: Routing,
        *,
        endings: Endings,
    ) -> None:
        self.bank = bank
        self.tokenizer = tokenizer
        self.routing = routing
        self.calls = Calls(endings)
        self._compiled: Callable[..., Any] | None = None  # runs decoding steps over a static cache
        self.fixed: tuple[Mixture, ...] | None = None
        self._read_prompt = PromptReader(tokenizer)

    @property
    def latest(self) -> LatestRows | None:
        """The rows of this thread's last forward pass."""
        return self.calls.latest

    def install(self, model: torch.nn.Module) -> None:
        """Puts the controller around a model's `forward`."""
        plain = self._plain = model.forward
        names = [p.name for p in inspect.signature(plain).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

        # No pair of hooks: an interrupt between them would leave the lock with a thread that is done.
        @wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            # By name, so that a mask or a cache given by position is seen; what does not go together fails below.
            if len(args) <= len(names) and not kwargs.keys() & names[: len(args)]:
                args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
            with self.bank.lock:
                rows, args, kwargs = self._before(args, kwargs)
                run = plain if self._compiled is None or not self.bank.is_padded else self._compiled
                output = run(*args, **kwargs)
                cache = cache_of(output)
                if rows is not None and cache is not None and rows_of(cache) is None:
                    bind(cache, rows)
            return output

        vars(model)["forward"] = forward

    def compile(self, **kwargs: Any) -> None:
        """Has `torch.compile` compile what runs for the decoding steps whose fusing is padded."""
        self._compiled = torch.compile(self._plain, **kwargs)

    @torch.inference_mode(False)  # what is fused here outlives the call, and may be asked for gradients in the next
    @torch.no_grad()
    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Pass":
        self.calls.latest = None  # of what cannot be routed, nothing is left behind
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            if self.fixed is None:
                raise PromptError(
                    "routing reads token ids, but got inputs_embeds; pass input_ids or use engine.fixed()"
                )
            self.bank.fuse(self._fixed_for(kwargs["inputs_embeds"].shape[0]))
            return Pass(None, args, kwargs)
        cache = cache_among(kwargs.values())
        known = rows_of(cache)
        length = int(cache.get_seq_length()) if cache is not None else 0
        switched = False
        if known is None or length == 0:
            kept = kept_tokens(ids, kwargs.get("attention_mask"), num_cached=length)
            new_rows = self._prompt_rows(ids, kept)
            rows = CachedRows(new_rows, ids, kept, self._lease(new_rows))
        elif ids.shape[1] == 1 and known.ids.shape[1] == length:
            rows = known
            rows.append(ids, torch.ones_like(ids, dtype=torch.bool))
            is_fixed_anew = self._fix(known.rows)
            switched = self._step(known.rows, ids[:, 0].tolist()) or is_fixed_anew
            if switched:
                rows.lease = self._lease(rows.rows)
        else:
            # A cropped cache, or several tokens at once (the next turn of a chat, a chunk of a long prompt).
            whole = torch.cat([known.ids[:, :length], ids], dim=1)
            new = kept_tokens(ids, kwargs.get("attention_mask"), num_cached=length)
            kept = torch.cat([known.kept[:, :length], new], dim=1)
            new_rows = self._prompt_rows(whole, kept)
            rows = CachedRows(new_rows, whole, kept, self._lease(new_rows))
            switched = any(
                # What the cached tokens are sentences of has changed with the text.
                bool(row.prompt_trace) or row.mixture != before.mixture
                for row, before in zip(rows.rows, known.rows, strict=True)
            )
        self.calls.latest = LatestRows(rows.rows, rows.ids)
        if cache is not None:
            bind(cache, rows)
        if switched and self.routing.kv_policy == "recompute":
            self._fuse(rows, kwargs, num_tokens=rows.ids.shape[1])
            return Pass(rows, (), self._recompute(rows.ids, kwargs, num_logits=ids.shape[1]))
        self._fuse(rows, kwargs, num_tokens=ids.shape[1])
        return Pass(rows, args, kwargs)

    def _lease(self, rows: Sequence[Row]) -> Lease:
        """Keeps the adapters that rows run with: those of their mixtures, and of the sentences of their prompts."""
        return self.bank.lease(m for row in rows for m in (row.mixture, *(s.mixture for s in row.prompt_trace)))

    def replay(self, inputs: Mapping[str, Tensor], answers: Sequence[Sequence[int]]) -> list[Row]:
        """Routes given answers without the model: what it decided, as decisions follow from the tokens alone."""
        copies = len(answers) // inputs["input_ids"].shape[0]
        ids, mask = (inputs[key].repeat_interleave(copies, dim=0) for key in ("input_ids", "attention_mask"))
        rows = self._prompt_rows(ids, kept_tokens(ids, mask))
        for row, tokens in zip(rows, answers, strict=True):
            for token in tokens[:-1]:
                self._step([row], [token])
        return rows

    def _fuse(self, cached: CachedRows, kwargs: Mapping[str, Any], *, num_tokens: int) -> None:
        """Fuses for a pass over the last `num_tokens` tokens."""
        start = time.perf_counter()
        rows = cached.rows
        # The last token of a prompt belongs to the answer, so a pass over one token is none over a prompt's sentences.
        if num_tokens > 1 and self.fixed is None and any(row.prompt_trace for row in rows):
            if isinstance(kwargs.get("logits_to_keep"), Tensor):
                raise ValueError("with prompt_routing='sentences', logits_to_keep must be a number, not positions")
            self.bank.fuse(*_by_token(rows, cached.kept, num_tokens=num_tokens))
        else:
            # What is disabled is the base bit for bit, which a compiled pass is not.
            is_disabled = self.fixed is not None and not any(self.fixed)
            padded = self._compiled is not None and num_tokens == 1 and not is_disabled and _is_static(kwargs)
            self.bank.fuse([row.mixture for row in rows], reuse=num_tokens == 1, padded=padded)
        fuse_ms = (time.perf_counter() - start) * 1e3
        for row in rows:
            if row.decisions[-1].fuse_ms == 0.0:
                row.decisions[-1].fuse_ms = fuse_ms

    def _prompt_rows(self, ids: Tensor, kept: Bool[Tensor, "batch seq"]) -> list[Row]:
        tokens = [row[own].tolist() for row, own in zip(ids, kept, strict=True)]
        turns = [self._read_prompt.turns(own) for own in tokens]
        passages = [self._passages(own) for own in tokens]
        fixed = self._fixed_for(len(turns))
        questions: list[tuple[str, ...]] = [()] * len(turns)
        if fixed:
            routed = [Decision(0, 0, m) for own, m in zip(passages, fixed, strict=True) for _ in own]
            decisions = [Decision(0, 0, mixture) for mixture in fixed]
        else:
            contexts = [Context(prompt, history=history) for history, prompt in turns]
            sentences = [Context(p.text.strip(), history=p.history.strip()) for own in passages for p in own]
            decisions, questions = self.routing.decide_prompts(contexts, sentences)
            decisions, routed = decisions[: len(turns)], decisions[len(turns) :]
        following = iter(routed)
        return [
            Row(
                history,
                prompt,
                Detokenizer(self.tokenizer),
                self.routing.segmenter(),
                [decision],
                prompt_trace=self._prompt_trace(own, following),
                questions=asked,
            )
            for (history, prompt), decision, own, asked in zip(turns, decisions, passages, questions, strict=True)
        ]

    def _passages(self, tokens: Sequence[int]) -> list[Passage]:
        if self.routing.prompt_routing != "sentences":
            return []
        return self._read_prompt.sentences(tokens, self.routing.segmenter, min_tokens=self.routing.switching.min_tokens)

    def _prompt_trace(self, passages: Sequence[Passage], decisions: Iterator[Decision]) -> tuple[Sentence, ...]:
        trace: list[Sentence] = []
        for passage, decision in zip(passages, decisions, strict=False):
            if trace:
                self.routing.hold(trace[-1].mixture, decision)
            trace.append(
                Sentence(
                    text=passage.text,
                    start=passage.start,
                    end=passage.end,
                    probabilities=decision.probabilities,
                    mixture=decision.mixture,
                    switched=bool(trace) and decision.mixture != trace[-1].mixture,
                    abstained=decision.abstained,
                    route_ms=decision.route_ms,
                )
            )
        return tuple(trace)

    def _fix(self, rows: Sequence[Row]) -> bool:
        """Takes up mixtures that were fixed after the cache was begun. True if a mixture changed."""
        changed = False
        for row, mixture in zip(rows, self._fixed_for(len(rows)), strict=False):  # none where none is fixed
            if mixture != row.mixture:
                row.decisions.append(Decision(row.num_tokens, len(row.text), mixture, switched=True))
                changed = True
        return changed

    def _step(self, rows: Sequence[Row], tokens: Sequence[int]) -> bool:
        """Adds one token a row; routes the rows where it opens a sentence. True if a mixture changed."""
        opening: list[tuple[Row, int]] = []
        endings = self.calls.endings
        for row, token in zip(rows, tokens, strict=True):
            if row.ended and endings.is_behind(token):
                continue
            row.ended = token in endings.eos_ids
            offsets = row.push(token)
            if offsets and row.num_tokens - 1 - row.decisions[-1].start >= self.routing.switching.min_tokens:
                opening.append((row, offsets[-1]))
        if not opening:
            return False
        positions = [(row.num_tokens - 1, offset) for row, offset in opening]
        if self.fixed is not None:
            for (row, _), (start, offset) in zip(opening, positions, strict=True):
                row.decisions.append(Decision(start, offset, row.mixture))
            return False
        contexts = [Context(row.prompt, row.text[:at], row.text[at:], row.history) for row, at in opening]
        decisions = self.routing.decide(contexts, positions, [row.questions for row, _ in opening])
        for (row, _), decision in zip(opening, decisions, strict=True):
            self.routing.hold(row.mixture, decision)
            decision.switched = decision.mixture != row.mixture
            row.decisions.append(decision)
        return any(decision.switched for decision in decisions)

    def _fixed_for(self, batch: int) -> list[Mixture]:
        if self.fixed is None:
            return []
        if batch % len(self.fixed):
            raise ValueError(
                f"{len(self.fixed)} mixtures were fixed for a batch of {batch} rows; give one, or one a row"
            )
        return [mixture for mixture in self.fixed for _ in range(batch // len(self.fixed))]

    def _recompute(self, ids: Tensor, kwargs: dict[str, Any], *, num_logits: int) -> dict[str, Any]:
        """Turns a decoding step into a pass over all tokens so far, into an emptied cache."""
        kwargs = {k: v for k, v in kwargs.items() if k not in ("input_ids", "position_ids", "cache_position")}
        cache: Any = cache_among(kwargs.values())
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise ValueError(
                "kv_policy='recompute' needs an attention mask of (batch, seq), which static caches do not come with; "
                "leave cache_implementation alone or use kv_policy='keep'"
            )
        cache.reset()
        if length := int(cache.get_seq_length()):  # earlier versions of transformers fill it with zeros instead
            cache.crop(-length)
        if mask is not None:
            kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        # The caller expects logits for the tokens that it gave.
        return {"logits_to_keep": num_logits, **kwargs, "input_ids": ids}


def _is_static(kwargs: Mapping[str, Any]) -> bool:
    cache = cache_among(kwargs.values())
    return cache is not None and bool(cache.is_compileable)


def _by_token(
    rows: Sequence[Row], kept: Bool[Tensor, "batch seq"], *, num_tokens: int
) -> tuple[list[Mixture], Int[Tensor, "batch tokens"]]:
    """The mixtures that the last `num_tokens` tokens are encoded under, and which of them each token has.

    A sentence of the prompt has its own, all that follows the one in force now.
    """
    mixtures = [row.mixture for row in rows]
    numbers = torch.arange(len(rows))[:, None].repeat(1, kept.shape[1])
    for row, own, columns in zip(rows, numbers, kept.cpu(), strict=True):
        places = columns.nonzero()[:, 0]
        for sentence in row.prompt_trace:
            own[places[sentence.start : sentence.end]] = len(mixtures)
            mixtures.append(sentence.mixture)
    used, tokens = numbers[:, -num_tokens:].unique(return_inverse=True)
    return [mixtures[i] for i in used.tolist()], tokens
