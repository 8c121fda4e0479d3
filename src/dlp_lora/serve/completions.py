"""/v1/completions: a checked request in, its answer whole or chunk by chunk out."""

from collections.abc import AsyncIterator
from typing import Any

from dlp_lora.engine.text import decode
from dlp_lora.serve.answers import Answers, Ended, Piece
from dlp_lora.serve.backend import PromptScores
from dlp_lora.serve.logprobs import CompletionScores, joined
from dlp_lora.serve.schema import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse
from dlp_lora.serve.service import Asked, Service
from dlp_lora.serve.wire import Chunk, envelope, finish_reason, sentence_field, trace_field, usage_of


class CompletionAnswer:
    """Writes the answers to the prompts of one completion."""

    def __init__(self, service: Service, body: CompletionRequest, asked: Asked) -> None:
        self._tokenizer = service.encoder.tokenizer
        self._body = body
        self._asked = asked
        self._scores = [CompletionScores(self._tokenizer) for _ in asked.answers]

    async def whole(self, answers: Answers) -> CompletionResponse:
        """Returns all answers when they are finished."""
        choices: list[CompletionChoice] = []
        for index, (pieces, scores, ended) in enumerate(await answers.whole()):
            parts = [] if scores is None else [self._prompt_scores(index, scores)]
            parts.append(self._scores[index].answer([token for piece in pieces for token in piece.tokens]))
            choices.append(
                {
                    "index": index,
                    "text": self._echo(index) + "".join(piece.text for piece in pieces),
                    "logprobs": joined(parts) if self._body.logprobs is not None else None,
                    "finish_reason": finish_reason(ended.done),
                    "stop_reason": ended.done.stop,
                    **trace_field(self._asked, index, ended),
                }
            )
        return {
            **envelope(self._asked),
            "object": "text_completion",
            "choices": choices,
            "usage": usage_of(answers, self._asked),
            "system_fingerprint": None,
        }

    async def chunks(self, answers: Answers) -> AsyncIterator[Chunk | None]:
        """Yields the chunks of a stream, up to the last choice's; None if there was none for a while."""
        has_scores = self._body.logprobs is not None
        if self._body.echo and not has_scores:
            for index in range(len(self._asked.answers)):
                yield self._chunk(index, self._echo(index))
        async for got in answers.items():
            if got is None:
                yield None
                continue
            index, item = got
            if isinstance(item, PromptScores):
                yield self._chunk(index, self._echo(index), self._prompt_scores(index, item))
            elif isinstance(item, Piece):
                scores = self._scores[index].answer(item.tokens) if has_scores and item.tokens else None
                yield self._chunk(index, item.text, scores, **sentence_field(self._asked, item.sentence))
            elif isinstance(item, Ended):
                more = trace_field(self._asked, index, item)
                done = item.done
                yield self._chunk(index, "", finish_reason=finish_reason(done), stop_reason=done.stop, **more)

    def _echo(self, index: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._asked.prompt_of(index)
        if isinstance(prompt.source, str):
            return prompt.source
        return decode(self._tokenizer, prompt.tokens, skip_special_tokens=False)

    def _prompt_scores(self, index: int, scores: PromptScores) -> CompletionLogprobs:
        return self._scores[index].prompt(self._asked.prompt_of(index).tokens, scores)

    def _chunk(self, index: int, text: str, logprobs: CompletionLogprobs | None = None, **more: Any) -> Chunk:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, **more}
        return {**envelope(self._asked), "object": "text_completion", "choices": [choice]}
