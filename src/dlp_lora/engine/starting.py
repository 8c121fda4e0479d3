"""Starting rows: prompts of token ids in, RowRouters out; this needs a tokenizer and adapters' names, but no model."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from dlp_lora.engine.apart import prompts_apart
from dlp_lora.engine.calls import Call
from dlp_lora.engine.prompts import EncodedPrompt, encode_prompt
from dlp_lora.engine.routing import Among, Prompt, Routing, RowRouter, start_rows
from dlp_lora.engine.text import Detokenizer, Passage, PromptReader


class RowStarter:
    """Routes prompts; `held` is a live view of the adapters' names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, held: Collection[str]) -> None:
        self.read_prompt = PromptReader(tokenizer)
        self._tokenizer = tokenizer
        self._held = held

    def routing(self, call: Call, among: Collection[str] | None = None) -> Routing:
        """The decisions of a call; `among` are the adapters that it may choose."""
        return Routing(call=call, held=self._held if among is None else Among(frozenset(among), self._held))

    def prompt(self, tokens: Sequence[int], call: Call) -> Prompt:
        """Returns a prompt's context for the router."""
        context = call.contexts.get(tuple(tokens)) or self.read_prompt.context(tokens)
        passages: list[Passage] = []
        if call.settings.prompt_routing == "sentences":
            min_tokens = call.settings.switching.min_tokens
            passages = self.read_prompt.sentences(tokens, call.segmenter, min_tokens=min_tokens)
        return Prompt.of(context, passages)

    def apart(self, prompt: EncodedPrompt, call: Call, *, among: Collection[str] | None = None) -> list[EncodedPrompt]:
        """Returns the prompts to answer instead of one: its questions, if the call answers them apart.

        A prompt of token ids is not cut, and under a fixed mixture no prompt is.
        """
        if call.settings.prompt_routing != "apart" or call.mixtures is not None or prompt.source is None:
            return [prompt]
        context = prompt.context or self.read_prompt.context(prompt.tokens)
        questions = prompts_apart(self.routing(call, among).read, prompt.source, context)
        is_text = isinstance(prompt.source, str)
        if len(questions) < 2 or (is_text and not self.read_prompt.is_user_last(prompt.tokens)):
            return [prompt]
        return [encode_prompt(self._tokenizer, each) for each in questions]

    def start_row(
        self, tokens: Sequence[int], call: Call, *, prompt: Prompt | None = None, among: Collection[str] | None = None
    ) -> RowRouter:
        """Routes one prompt; `prompt` is what the router reads, and `among` are the adapters that it may choose."""
        (row,) = self.start([self.prompt(tokens, call) if prompt is None else prompt], call, among=among)
        return row

    def start(self, prompts: Sequence[Prompt], call: Call, *, among: Collection[str] | None = None) -> list[RowRouter]:
        """Routes prompts, all in one call of the router.

        Raises:
            RouterError: if there is no router.
        """
        fixed = call.mixtures_of(len(prompts))
        rows = start_rows(prompts, self.routing(call, among), lambda: Detokenizer(self._tokenizer), fixed=fixed)
        if call.known is not None:
            call.known.clear()  # it has the texts of long prompts many times, and later sentences need none of them
        return rows
