"""Routing: a prompt and tokens in, mixtures out, row by row (sections 3.1 and 3.2).

The router reads the text, the policy turns its probabilities into a mixture, and `Switching` decides when the mixture
changes. This module knows neither the model nor its KV cache nor the bank, so the controller and a server's scheduler
use the same rows.
"""

import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dlp_lora.engine.calls import Call
from dlp_lora.engine.text import Detokenizer, Passage
from dlp_lora.engine.trace import Decision, Generation, Sentence
from dlp_lora.errors import RouterError
from dlp_lora.policy import Mixture, Switching, choose
from dlp_lora.router import Context
from dlp_lora.router.questions import decide, questions_of, read_held, read_in_turn
from dlp_lora.sentences import Segmenter


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The decisions of one call. `held` is a live view of the adapters' names."""

    call: Call
    held: Collection[str]

    def route(self, context: Context) -> tuple[dict[str, float], Mixture]:
        """Returns each adapter's probability, and the mixture.

        Raises:
            RouterError: if there is no router.
        """
        routed = decide(self.read, context, self.call.settings)
        return dict(routed.probabilities), routed.mixture

    def read(self, contexts: Sequence[Context]) -> list[dict[str, float]]:
        """Reads contexts with the router and returns each adapter's probability.

        The probability of a removed adapter counts as the probability that none fits.

        Raises:
            RouterError: if there is no router.
        """
        if self.call.router is None:
            raise RouterError("this engine has no router; choose a mixture with engine.fixed() or engine.disabled()")
        return read_held(self.call.router, contexts, self.held, known=self.call.known)

    def decide(
        self,
        contexts: Sequence[Context],
        positions: Sequence[tuple[int, int]],
        questions: Sequence[Sequence[str]],
    ) -> list[Decision]:
        """Routes sentences that begin at `positions`, in tokens and characters; `questions` are their prompts'."""
        start = time.perf_counter()
        return self._decisions(read_in_turn(self.read, contexts, questions), positions, since=start)

    def decide_prompts(
        self, prompts: Sequence[Context], sentences: Sequence[Context]
    ) -> tuple[list[Decision], list[tuple[str, ...]]]:
        """Routes prompts and their sentences; also returns the questions of each prompt that asks several.

        If a prompt is not clearly one question, this takes a few more calls of the router.
        """
        start = time.perf_counter()
        bare = [replace(context, answer="", sentence="") for context in prompts]
        is_cut = self.call.settings.prompt_routing != "whole"
        begun = [i for i, context in enumerate(prompts) if is_cut and context != bare[i]]
        read_rows = list(self.read([*prompts, *sentences, *(bare[i] for i in begun)]))
        rows: list[Mapping[str, float]] = list(read_rows[: len(prompts) + len(sentences)])
        whole = dict(enumerate(rows[: len(prompts)])) | dict(zip(begun, read_rows[len(rows) :], strict=True))
        questions: list[tuple[str, ...]] = [()] * len(prompts)
        if is_cut:
            questions = [questions_of(self.read, context, whole[i]) for i, context in enumerate(bare)]
        for i, parts in enumerate(questions):
            if parts:
                (rows[i],) = read_in_turn(self.read, [prompts[i]], [parts])
        return self._decisions(rows, [(0, 0)] * len(rows), since=start), questions

    def _decisions(
        self, rows: Sequence[Mapping[str, float]], positions: Sequence[tuple[int, int]], *, since: float
    ) -> list[Decision]:
        settings = self.call.settings
        chosen = [choose(settings.policy, row, settings.switching.unsure) for row in rows]
        route_ms = (time.perf_counter() - since) * 1e3
        return [
            Decision(
                start=token,
                offset=offset,
                mixture=mixture,
                probabilities=probabilities,
                abstained=not mixture,
                route_ms=route_ms,
            )
            for (token, offset), (probabilities, mixture) in zip(positions, chosen, strict=True)
        ]


@dataclass(frozen=True)
class Among(Collection[str]):
    """A live view of the names that the bank has, among some names."""

    names: frozenset[str]
    held: Collection[str]

    def __contains__(self, name: object) -> bool:
        return name in self.names and name in self.held

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.held if name in self.names)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The parts of a prompt for the router: the earlier turns, the newest one, the caller's beginning of an answer, and
    the prompt's sentences if they are routed, too.
    """

    history: str
    text: str
    answer: str = ""
    passages: tuple[Passage, ...] = ()

    @classmethod
    def of(cls, context: Context, passages: Sequence[Passage] = ()) -> "Prompt":
        """Makes it from a router's context."""
        return cls(history=context.history, text=context.prompt, answer=context.answer, passages=tuple(passages))

    def context(self, answer: str, opens: int) -> Context:
        """The router's context at a new sentence of the answer."""
        answer, opens = self.answer + answer, len(self.answer) + opens
        return Context(self.text, answer[:opens], answer[opens:], self.history)


@dataclass
class RowRouter:
    """The routing of one row: it starts with a prompt, takes one token at a time, and reports changes of the mixture.

    `start_rows` makes several at once. Push a token after it is sampled and before it is encoded, so that the pass that
    encodes it can run under `mixture`.
    """

    routing: Routing
    prompt: Prompt
    detokenizer: Detokenizer
    segmenter: Segmenter
    decisions: list[Decision]
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])  # in the routing log
    prompt_trace: tuple[Sentence, ...] = ()
    questions: tuple[str, ...] = ()  # of the prompt, if it asks several
    is_fixed: bool = False  # by the caller: no router runs
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # generated so far, without padding
    ended: bool = False

    @property
    def num_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens)

    @property
    def mixture(self) -> Mixture:
        """The current mixture."""
        return self.decisions[-1].mixture

    @property
    def mixtures(self) -> tuple[Mixture, ...]:
        """The mixtures of the row's next passes: the current one, and those of its prompt."""
        return (self.mixture, *(sentence.mixture for sentence in self.prompt_trace))

    def push(self, token: int) -> bool:
        """Adds a generated token; if it begins a sentence, routes this sentence.

        Returns:
            Whether the mixture changed: then earlier tokens were encoded under another one.
        """
        return push_tokens([self], [token])[0]

    def fix(self, mixture: Mixture) -> bool:
        """Sets a fixed mixture from the next token on. True if it differs from the current one."""
        self.is_fixed = True
        if mixture == self.mixture:
            return False
        self.decisions.append(Decision(start=self.num_tokens, offset=len(self.text), mixture=mixture, switched=True))
        return True

    def has_read(self, answer: Sequence[int]) -> bool:
        """Whether it has read an answer up to the last token but one."""
        n = self.num_tokens
        return len(answer) - 1 <= n <= len(answer) and self.tokens == list(answer[:n])

    def has_read_past(self, answer: Sequence[int]) -> bool:
        """Whether it has read an answer and the padding of its row."""
        return not answer or self.tokens[: len(answer) - 1] == list(answer[:-1])

    def finish(self, tokens: Sequence[int]) -> None:
        """Adds the last tokens, which were sampled but not encoded, and held-back text."""
        for token in tokens[self.num_tokens :]:
            self.read(token)
        self.text += self.detokenizer.flush()

    def generation(self, tokens: Sequence[int]) -> Generation:
        """Returns the answer that it has read up to the last token but one; the row itself does not change."""
        row = self.copy()
        row.finish(tokens)
        return Generation(text=row.text, tokens=tuple(tokens), trace=row.sentences(), prompt_trace=row.prompt_trace)

    def copy(self) -> "RowRouter":
        """Returns an independent copy."""
        return replace(
            self,
            detokenizer=self.detokenizer.copy(),
            segmenter=self.segmenter.copy(),
            decisions=list(self.decisions),
            tokens=list(self.tokens),
        )

    def sentences(self) -> tuple[Sentence, ...]:
        """The trace so far; its spans cover all tokens, and its texts the whole text."""
        ends = [(d.start, d.offset) for d in self.decisions[1:]] + [(self.num_tokens, len(self.text))]
        return tuple(
            decision.sentence(self.text[decision.offset : offset], decision.start, end)
            for decision, (end, offset) in zip(self.decisions, ends, strict=True)
        )

    def read(self, token: int) -> list[int]:
        """Adds a generated token without routing; returns the offsets of the sentences that it begins."""
        self.tokens.append(token)
        piece = self.detokenizer.push(token)
        if not piece:
            return []
        self.text += piece
        return [max(offset - len(self.prompt.answer), 0) for offset in self.segmenter.push(piece)]

    def charge(self, *, fuse_ms: float, encode_ms: float = 0.0, kept_tokens: int | None = None) -> None:
        """Notes the time of the current decision, the first time that it is fused."""
        if self.decisions[-1].fuse_ms is None:
            self.decisions[-1] = replace(
                self.decisions[-1], fuse_ms=fuse_ms, encode_ms=encode_ms, kept_tokens=kept_tokens
            )

    def _opens_sentence(self, token: int) -> int | None:
        """Adds a token; returns the offset of the sentence that it begins, or None."""
        endings = self.routing.call.endings
        if self.ended and endings.is_after_end(token):
            return None
        self.ended = token in endings.eos_ids
        offsets = self.read(token)
        min_tokens = self.routing.call.settings.switching.min_tokens
        is_long_enough = self.num_tokens - 1 - self.decisions[-1].start >= min_tokens
        return offsets[-1] if offsets and is_long_enough else None


def start_rows(
    prompts: Sequence[Prompt],
    routing: Routing,
    make_detokenizer: Callable[[], Detokenizer],
    *,
    fixed: Sequence[Mixture] = (),
) -> list[RowRouter]:
    """Routes prompts in one call of the router; with `fixed`, one mixture per prompt, the router does not run."""
    passages = [passage for prompt in prompts for passage in prompt.passages]
    segmenters = [routing.call.segmenter() for _ in prompts]
    begun = [s.push(p.answer) if p.answer else [] for s, p in zip(segmenters, prompts, strict=True)]
    questions: Sequence[tuple[str, ...]] = [()] * len(prompts)
    if fixed:
        openings = [Decision(mixture=mixture) for mixture in fixed]
        routed = [Decision(mixture=m) for prompt, m in zip(prompts, fixed, strict=True) for _ in prompt.passages]
    else:
        contexts = [
            prompt.context("", (starts or [0])[-1] - len(prompt.answer))
            for prompt, starts in zip(prompts, begun, strict=True)
        ]
        sentences = [Context(p.text.strip(), history=p.history.strip()) for p in passages]
        decisions, questions = routing.decide_prompts(contexts, sentences)
        openings, routed = decisions[: len(prompts)], decisions[len(prompts) :]
    following = iter(routed)
    rows = [
        RowRouter(
            routing,
            prompt,
            make_detokenizer(),
            segmenter,
            [opening],
            prompt_trace=_prompt_trace(prompt.passages, following, routing.call.settings.switching),
            questions=parts,
            is_fixed=bool(fixed),
        )
        for prompt, segmenter, opening, parts in zip(prompts, segmenters, openings, questions, strict=True)
    ]
    if not fixed and (log := routing.call.routing_log) is not None:
        read = iter(sentences)
        for row, context in zip(rows, contexts, strict=True):
            for number, sentence in enumerate(row.prompt_trace):
                log.write(sentence, next(read), answer=row.id, sentence=number, is_prompt=True)
            log.write(row.decisions[0], context, answer=row.id, sentence=0)
    return rows


def push_tokens(rows: Sequence[RowRouter], tokens: Sequence[int]) -> list[bool]:
    """Pushes a token into each row; new sentences are routed in one call of the router.

    Returns:
        For each row whether its mixture changed.
    """
    switched = [False] * len(rows)
    opening: dict[int, tuple[int, int]] = {}
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if (offset := row._opens_sentence(token)) is None:
            continue
        if row.is_fixed:
            row.decisions.append(Decision(start=row.num_tokens - 1, offset=offset, mixture=row.mixture))
        else:
            opening[i] = row.num_tokens - 1, offset
    for routing, some in _by_routing(rows, opening):
        contexts = [rows[i].prompt.context(rows[i].text, at) for i, (_, at) in some.items()]
        decisions = routing.decide(contexts, list(some.values()), [rows[i].questions for i in some])
        for i, context, decision in zip(some, contexts, decisions, strict=True):
            decided = hold(rows[i].mixture, decision, routing.call.settings.switching)
            switched[i] = decided.mixture != rows[i].mixture
            rows[i].decisions.append(replace(decided, switched=switched[i]))
            if (log := routing.call.routing_log) is not None:
                number = len(rows[i].decisions) - 1
                log.write(rows[i].decisions[-1], context, answer=rows[i].id, sentence=number)
    return switched


def hold(current: Mixture, decision: Decision, switching: Switching) -> Decision:
    """Keeps the mixture in use if the decision for another one is not clear.

    This is hysteresis: near a tie, many changes between adapters cost more than they gain.
    """
    if not decision.mixture and switching.unsure == "keep":
        return replace(decision, mixture=current)
    if not current or not decision.mixture or not decision.probabilities:
        return decision
    in_use = decision.probabilities.get(next(iter(current)), 0.0)
    is_close = max(decision.probabilities.values()) - in_use < switching.margin
    return replace(decision, mixture=current) if is_close else decision


def _prompt_trace(
    passages: Sequence[Passage], decisions: Iterator[Decision], switching: Switching
) -> tuple[Sentence, ...]:
    trace: list[Sentence] = []
    for passage, decision in zip(passages, decisions, strict=False):
        if trace:
            decision = hold(trace[-1].mixture, decision, switching)
            decision = replace(decision, switched=decision.mixture != trace[-1].mixture)
        trace.append(decision.sentence(passage.text, passage.start, passage.end))
    return tuple(trace)


def _by_routing(
    rows: Sequence[RowRouter], opening: Mapping[int, tuple[int, int]]
) -> Iterator[tuple[Routing, dict[int, tuple[int, int]]]]:
    """Groups the rows with a new sentence by their router, so that it reads them together."""
    routings = {id(rows[i].routing): rows[i].routing for i in opening}
    for key, routing in routings.items():
        yield routing, {i: at for i, at in opening.items() if id(rows[i].routing) == key}
