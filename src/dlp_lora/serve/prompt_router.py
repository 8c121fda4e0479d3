"""Routing prompts without answers, also for backends whose model is not an engine."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager

from dlp_lora.engine.calls import Call
from dlp_lora.engine.engine import Engine
from dlp_lora.engine.outline import Outline
from dlp_lora.engine.prompts import EncodedPrompt
from dlp_lora.engine.routing import Prompt, RowRouter
from dlp_lora.engine.starting import RowStarter


class OutlinePromptRouter:
    """Routes as an engine does, with the tokenizer, the router and the settings of an outline.

    Args:
        outline: of the model.
        names: a live view of the adapters' names.
        lock: of the adapters and the router.
        limited: changes each call before it is routed.
    """

    def __init__(
        self,
        outline: Outline,
        names: Collection[str],
        *,
        lock: AbstractContextManager[object],
        limited: Callable[[Call], Call] = lambda call: call,
    ) -> None:
        self._call = outline.call
        self._starter = RowStarter(outline.tokenizer, names)
        self._lock = lock
        self._limited = limited

    def apart(
        self, prompt: EncodedPrompt, *, call: Call | None = None, among: Collection[str] | None = None
    ) -> list[EncodedPrompt]:
        """Returns the prompts to answer instead of one, as `Engine.apart` does."""
        with self._lock:
            return self._starter.apart(prompt, call or self._call, among=among)

    def start_row(
        self,
        tokens: Sequence[int],
        *,
        call: Call | None = None,
        prompt: Prompt | None = None,
        among: Collection[str] | None = None,
    ) -> RowRouter:
        """Routes a prompt, as `Engine.start_row` does."""
        call = self._limited(call or self._call)
        with self._lock:
            return self._starter.start_row(tokens, call, prompt=prompt, among=among)


PromptRouter = Engine | OutlinePromptRouter
