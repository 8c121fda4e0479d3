"""The shared parts of both APIs' answers, and streams of chunks as server-sent events."""

from collections.abc import AsyncIterator, Callable
from typing import Any, TypedDict

from dlp_lora.serve.answers import Answers, Ended
from dlp_lora.serve.backend import Done, SentenceStart
from dlp_lora.serve.errors import APIError
from dlp_lora.serve.schema import DLPTrace, FinishReason, SentenceTrace, Usage
from dlp_lora.serve.service import Asked
from dlp_lora.serve.trace import sentences_of, start_of
from dlp_lora.sse import event

Chunk = dict[str, Any]

KEEPALIVE = b": keepalive\n\n"
END = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would buffer a stream


class Envelope(TypedDict):
    """The first fields of every answer and every chunk."""

    id: str
    created: int
    model: str


class TraceField(TypedDict, total=False):
    """The routing of an answer, unless its request switched it off."""

    dlp: DLPTrace


class SentenceField(TypedDict, total=False):
    """The routing of a sentence, for its first chunk."""

    dlp: SentenceTrace


def envelope(asked: Asked) -> Envelope:
    """The id, time and model of the answer to a request."""
    return {"id": asked.id, "created": asked.created, "model": asked.choice.asked}


def usage_of(answers: Answers, asked: Asked) -> Usage:
    """Counts the tokens of a request; those of a prompt count once, even with several answers."""
    num_prompt = asked.num_prompt_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": answers.num_answer,
        "total_tokens": num_prompt + answers.num_answer,
        "prompt_tokens_details": {"cached_tokens": min(answers.num_cached, num_prompt)},
    }


def finish_reason(done: Done) -> FinishReason:
    """The finish reason of an answer; "length" if it was cut off."""
    return "stop" if done.reason == "stop" else "length"


def sentence_field(asked: Asked, sentence: SentenceStart | None) -> SentenceField:
    """A chunk's facts about the sentence that begins with it."""
    return {} if sentence is None or not asked.options.trace else {"dlp": start_of(sentence)}


def trace_field(asked: Asked, index: int, ended: Ended) -> TraceField:
    """The facts about all sentences at the end of an answer."""
    fields: DLPTrace = {}
    if asked.options.trace:
        fields["trace"] = sentences_of(ended.done.generation.trace, ended.num_characters)
        if ended.done.generation.prompt_trace:
            fields["prompt_trace"] = sentences_of(ended.done.generation.prompt_trace)
        if ended.done.generation.parts:
            fields["parts"] = [part.text for part in ended.done.generation.parts]
    if asked.options.prompt_tokens:
        fields["prompt_tokens"] = [token for request in asked.answers[index] for token in request.tokens]
    return {"dlp": fields} if fields else {}


async def events(chunks: AsyncIterator[Chunk | None], usage: Callable[[], Usage] | None = None) -> AsyncIterator[bytes]:
    """Writes chunks as events, with the usage so far if it is given, and comments if there was none for a while."""
    async for chunk in chunks:
        if chunk is None:
            yield KEEPALIVE
        else:
            yield event(chunk if usage is None else {**chunk, "usage": usage()})


def error_event(asked: Asked, error: APIError) -> bytes:
    """Writes an error after the status was sent, with a finish reason for clients that wait for it."""
    choices = [{"index": 0, "delta": {}, "text": "", "logprobs": None, "finish_reason": "error"}]
    return event({**envelope(asked), "object": "error", **error.body, "choices": choices})


def usage_event(object_: str, answers: Answers, asked: Asked) -> bytes:
    """Writes the chunk that counts tokens."""
    return event({**envelope(asked), "object": object_, "choices": [], "usage": usage_of(answers, asked)})
