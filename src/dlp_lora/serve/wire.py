"""What the answers of the two APIs have in common, and how a stream of chunks is written (server-sent events)."""

import json
from collections.abc import AsyncIterator
from typing import Any, TypedDict

from dlp_lora.serve.answers import Answers, Ended
from dlp_lora.serve.backend import Done, SentenceStart
from dlp_lora.serve.errors import APIError
from dlp_lora.serve.schema import DLPTrace, FinishReason, SentenceTrace, Usage
from dlp_lora.serve.service import Asked
from dlp_lora.serve.trace import sentences_of, start_of

Chunk = dict[str, Any]

KEEPALIVE = b": keepalive\n\n"
END = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold a stream back


class Envelope(TypedDict):
    """What every answer and every chunk of a stream begins with."""

    id: str
    created: int
    model: str


class TraceField(TypedDict, total=False):
    """How an answer was routed, unless its request switched that off."""

    dlp: DLPTrace


class SentenceField(TypedDict, total=False):
    """How a sentence is routed, on its first chunk."""

    dlp: SentenceTrace


def envelope(asked: Asked) -> Envelope:
    """Says which request is answered, and by whom."""
    return {"id": asked.id, "created": asked.created, "model": asked.choice.asked}


def usage_of(answers: Answers, asked: Asked) -> Usage:
    """Counts the tokens of a request: those of a prompt once, however many answers it has."""
    num_prompt = asked.num_prompt_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": answers.num_answer,
        "total_tokens": num_prompt + answers.num_answer,
        "prompt_tokens_details": {"cached_tokens": min(answers.num_cached, num_prompt)},
    }


def finish_reason(done: Done) -> FinishReason:
    """Why an answer ended; one that was cut off is too short."""
    return "stop" if done.reason == "stop" else "length"


def sentence_field(asked: Asked, sentence: SentenceStart | None) -> SentenceField:
    """What a chunk tells of the sentence that begins with it."""
    return {} if sentence is None or not asked.options.trace else {"dlp": start_of(sentence)}


def trace_field(asked: Asked, index: int, ended: Ended) -> TraceField:
    """What the end of an answer tells of all its sentences."""
    told: DLPTrace = {}
    if asked.options.trace:
        told["trace"] = sentences_of(ended.done.generation.trace, ended.num_characters)
        if ended.done.generation.prompt_trace:
            told["prompt_trace"] = sentences_of(ended.done.generation.prompt_trace)
        if ended.done.generation.parts:
            told["parts"] = [part.text for part in ended.done.generation.parts]
    if asked.options.prompt_tokens:
        told["prompt_tokens"] = [token for request in asked.answers[index] for token in request.tokens]
    return {"dlp": told} if told else {}


def event(data: Any) -> bytes:
    """Writes one event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def events(chunks: AsyncIterator[Chunk | None]) -> AsyncIterator[bytes]:
    """Writes chunks as events, and comments where nothing came for a while."""
    async for chunk in chunks:
        yield KEEPALIVE if chunk is None else event(chunk)


def error_event(asked: Asked, error: APIError) -> bytes:
    """Writes an error that comes after the status was sent; for clients that wait for a reason to finish, too."""
    choices = [{"index": 0, "delta": {}, "text": "", "logprobs": None, "finish_reason": "error"}]
    return event({**envelope(asked), "object": "error", **error.body, "choices": choices})


def usage_event(object_: str, answers: Answers, asked: Asked) -> bytes:
    """Writes the chunk that counts tokens."""
    return event({**envelope(asked), "object": object_, "choices": [], "usage": usage_of(answers, asked)})
