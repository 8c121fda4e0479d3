"""Routing: contexts in, decisions out, by what an engine is set to (sections 3.1 and 3.2).

The router reads, the policy turns its probabilities into a mixture, and `Switching` says when one gives way to another.
Nothing here knows of tokens, caches or the model.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dlp_lora.bank.bank import AdapterBank
from dlp_lora.engine.trace import Decision
from dlp_lora.errors import RouterError
from dlp_lora.policy import FusionPolicy, KVPolicy, Mixture, PromptRouting, Switching, choose
from dlp_lora.router import Context, Router
from dlp_lora.router.questions import decide, questions_of, read_held, read_in_turn
from dlp_lora.sentences import Segmenter


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How rows are routed: the settings of an engine, and the decisions that they lead to."""

    bank: AdapterBank
    router: Router | None
    policy: FusionPolicy
    segmenter: Callable[[], Segmenter]
    switching: Switching
    kv_policy: KVPolicy
    prompt_routing: PromptRouting

    def route(self, context: Context) -> tuple[dict[str, float], Mixture]:
        """Gives a probability for each adapter name, and the mixture that follows."""
        routed = decide(
            self.read,
            context,
            policy=self.policy,
            unsure=self.switching.unsure,
            prompt_routing=self.prompt_routing,
        )
        return dict(routed.probabilities), routed.mixture

    def read(self, contexts: Sequence[Context]) -> list[dict[str, float]]:
        """Asks the router what it gives each adapter, for each context.

        What it gives an adapter that the bank no longer holds is the probability that none fits.

        Raises:
            RouterError: if there is no router.
        """
        if self.router is None:
            raise RouterError("this engine has no router; choose a mixture with engine.fixed() or engine.disabled()")
        with self.bank.lock:  # a router may run the base model
            return read_held(self.router, contexts, self.bank.adapters)

    def decide(
        self,
        contexts: Sequence[Context],
        positions: Sequence[tuple[int, int]],
        questions: Sequence[Sequence[str]],
    ) -> list[Decision]:
        """Routes sentences that open at `positions`, in tokens and characters, of prompts that ask `questions`."""
        start = time.perf_counter()
        return self._decisions(read_in_turn(self.read, contexts, questions), positions, since=start)

    def decide_prompts(
        self, prompts: Sequence[Context], sentences: Sequence[Context]
    ) -> tuple[list[Decision], list[tuple[str, ...]]]:
        """Routes prompts and sentences of theirs; and gives the questions of each prompt that asks several."""
        start = time.perf_counter()
        rows: list[Mapping[str, float]] = list(self.read([*prompts, *sentences]))
        questions: list[tuple[str, ...]] = [()] * len(prompts)
        if self.prompt_routing != "whole":
            questions = [questions_of(self.read, c, row) for c, row in zip(prompts, rows, strict=False)]
        for i, asked in enumerate(questions):
            if asked:
                (rows[i],) = read_in_turn(self.read, [prompts[i]], [asked])
        return self._decisions(rows, [(0, 0)] * len(rows), since=start), questions

    def hold(self, current: Mixture, decision: Decision) -> None:
        """Keeps the mixture in use where the decision for another one is not clear."""
        # Hysteresis: near a tie, going back and forth between adapters costs more than it gains.
        if not decision.mixture and self.switching.unsure == "keep":
            decision.mixture = current
        if not current or not decision.mixture or not decision.probabilities:
            return
        in_use = decision.probabilities.get(next(iter(current)), 0.0)
        if max(decision.probabilities.values()) - in_use < self.switching.margin:
            decision.mixture = current

    def _decisions(
        self, rows: Sequence[Mapping[str, float]], positions: Sequence[tuple[int, int]], *, since: float
    ) -> list[Decision]:
        chosen = [choose(self.policy, row, self.switching.unsure) for row in rows]
        route_ms = (time.perf_counter() - since) * 1e3
        return [
            Decision(token, offset, mixture, probabilities, abstained=not mixture, route_ms=route_ms)
            for (token, offset), (probabilities, mixture) in zip(positions, chosen, strict=True)
        ]
