"""/v1/chat/completions: a checked request in, its answer whole or chunk by chunk out."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dlp_lora.serve.answers import KEEPALIVE_S, Answers, Ended, Piece
from dlp_lora.serve.backend import Token
from dlp_lora.serve.calls import (
    ArgumentsWriter,
    CallWriter,
    Delta,
    MessageWriter,
    TemplateWriter,
    TextWriter,
    message_of,
)
from dlp_lora.serve.logprobs import chat_logprobs
from dlp_lora.serve.schema import ChatChoice, ChatLogprobs, ChatRequest, ChatResponse
from dlp_lora.serve.service import Asked, Service, called_tools, offered
from dlp_lora.serve.wire import Chunk, envelope, finish_reason, sentence_field, trace_field, usage_of


class ChatAnswer:
    """Writes the answers to one chat."""

    def __init__(self, service: Service, body: ChatRequest, asked: Asked) -> None:
        self._tokenizer = service.encoder.tokenizer
        self._body = body
        self._asked = asked
        self._writers = [self._writer() for _ in asked.answers]

    async def whole(self, answers: Answers) -> ChatResponse:
        """Returns all answers when they are finished."""
        choices: list[ChatChoice] = []
        for index, (pieces, _, ended) in enumerate(await answers.whole()):
            deltas = [delta for piece in pieces for delta in self._writers[index].push(piece.text)]
            last, reason = self._writers[index].end(finish_reason(ended.done), ended.done)
            tokens = [token for piece in pieces for token in piece.tokens]
            choices.append(
                {
                    "index": index,
                    "message": message_of([*deltas, *last]),
                    "logprobs": self._logprobs(tokens),
                    "finish_reason": reason,
                    "stop_reason": ended.done.stop,
                    **trace_field(self._asked, index, ended),
                }
            )
        return {
            **envelope(self._asked),
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_of(answers, self._asked),
            "system_fingerprint": None,
        }

    async def chunks(self, answers: Answers) -> AsyncIterator[Chunk | None]:
        """Yields the chunks of a stream, up to the last choice's; None if there was none for a while."""
        for index in range(len(self._asked.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        sent_s = time.perf_counter()
        async for got in answers.items():
            if got is None:
                yield None
                continue
            index, item = got
            if isinstance(item, Piece):
                deltas = self._writers[index].push(item.text)
                # Even if a call is not certain yet, its sentence is sent.
                for i, delta in enumerate(deltas or [{}]):
                    more = sentence_field(self._asked, item.sentence) if i == 0 else {}
                    if delta or more or self._body.logprobs:
                        yield self._chunk(index, delta, tokens=item.tokens if i == 0 else (), **more)
                        sent_s = time.perf_counter()
                if time.perf_counter() - sent_s > KEEPALIVE_S:  # a call is written, of which nothing can be sent yet
                    yield None
                    sent_s = time.perf_counter()
            elif isinstance(item, Ended):
                deltas, reason = self._writers[index].end(finish_reason(item.done), item.done)
                for delta in deltas:
                    yield self._chunk(index, delta)
                field = trace_field(self._asked, index, item)
                yield self._chunk(index, {}, finish_reason=reason, stop_reason=item.done.stop, **field)

    def _chunk(self, index: int, delta: Delta, *, tokens: Sequence[Token] = (), **more: Any) -> Chunk:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": None,
            **more,
        }
        return {**envelope(self._asked), "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return {"content": chat_logprobs(self._tokenizer, tokens, self._body.top_logprobs or 0), "refusal": None}

    def _writer(self) -> MessageWriter:
        if called := called_tools(self._body):
            return CallWriter() if self._body.tool_choice == "required" else ArgumentsWriter(called[0].function.name)
        if tools := offered(self._body):
            end_ids = self._asked.answers[0][0].call.endings.eos_ids
            return TemplateWriter(self._tokenizer, self._asked.prompts[0].tokens, tools, end_ids)
        return TextWriter()
