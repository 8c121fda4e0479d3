"""Questions apart: a request for each question of a prompt in, one stream of their answers out, in their order."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from dlp_lora.engine.apart import joined, line_break_after
from dlp_lora.engine.trace import Generation, Sentence
from dlp_lora.policy import Mixture
from dlp_lora.serve.backend import Done, Event, SentenceStart, Stream, Token, Usage


def in_order(streams: Sequence[Stream]) -> Stream:
    """The stream of one answer, of the one or more that it takes."""
    return streams[0] if len(streams) == 1 else InOrder(streams)


class InOrder:
    """A Stream of several: each is read when those before it have ended, and a line break stands between their texts.

    The `generation` of its `Done` is what `Engine.generate` joins, but its texts end where stop strings begin. The
    reason is "length" if one of the parts was cut off.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        self._parts: list[Done] = []  # those that have ended
        self._number = 0  # of the part whose turn it is
        self._num_characters = 0  # of that part
        self._held = ""  # text without a token of its own: the next one brings it
        # Of the parts before:
        self._num_sentences = self._num_tokens = self._offset = 0
        self._mixture: Mixture | None = None

    def __iter__(self) -> "InOrder":
        return self

    def __next__(self) -> Event:
        while (event := self._passed(next(self._turn))) is None:
            pass
        return event

    def __aiter__(self) -> "InOrder":
        return self

    async def __anext__(self) -> Event:
        while (event := self._passed(await self._turn.__anext__())) is None:
            await asyncio.sleep(0)  # the next part may be there as a whole, and other answers wait
        return event

    def cancel(self) -> None:
        """Ends all of them soon."""
        for stream in self._streams:
            stream.cancel()

    @property
    def _turn(self) -> Stream:
        return self._streams[self._number]

    def _passed(self, event: Event) -> Event | None:
        """The event as that of the whole answer; None for the end of a part that is not the last."""
        match event:
            case SentenceStart():
                is_first = event.number == 0 and self._mixture is not None
                return replace(
                    event,
                    number=self._num_sentences + event.number,
                    position=self._num_tokens + event.position,
                    offset=self._offset + event.offset,
                    switched=event.mixture != self._mixture if is_first else event.switched,
                )
            case Token():
                self._num_characters += len(event.text)
                text, self._held = self._held + event.text, ""
                return replace(event, position=self._num_tokens + event.position, text=text)
            case Done():
                return self._ended(event)
        return event

    def _ended(self, done: Done) -> Done | None:
        self._num_characters += len(done.text)
        self._held += done.text
        generation = _as_sent(done.generation, self._num_characters)
        self._parts.append(replace(done, generation=generation))
        if done.reason == "abort" or len(self._parts) == len(self._streams):
            return self._whole()
        line_break = line_break_after(generation.text)
        self._held += line_break
        self._offset += self._num_characters + len(line_break)
        self._num_characters = 0
        self._num_tokens += len(generation.tokens)
        self._num_sentences += len(generation.trace)
        self._mixture = generation.trace[-1].mixture
        self._number += 1
        return None

    def _whole(self) -> Done:
        first, last = self._parts[0], self._parts[-1]
        usages = [part.usage for part in self._parts]
        before_s = first.times.queued_s + first.times.prompt_s
        whole_s = max(part.times.queued_s + part.times.prompt_s + part.times.answer_s for part in self._parts)
        is_cut_off = last.reason == "stop" and any(part.reason == "length" for part in self._parts)
        return Done(
            reason="length" if is_cut_off else last.reason,
            stop=None if is_cut_off else last.stop,
            text=self._held,
            generation=joined([part.generation for part in self._parts if part.generation.trace]),
            usage=Usage(
                prompt_tokens=sum(usage.prompt_tokens for usage in usages),
                completion_tokens=sum(usage.completion_tokens for usage in usages),
                cached_tokens=sum(usage.cached_tokens for usage in usages),
            ),
            times=replace(first.times, answer_s=whole_s - before_s),
        )


def _as_sent(generation: Generation, num_characters: int) -> Generation:
    """A generation up to so many characters of its text: those before a stop string."""
    trace: list[Sentence] = []
    start = 0
    for sentence in generation.trace:
        trace.append(replace(sentence, text=sentence.text[: max(0, num_characters - start)]))
        start += len(sentence.text)
    return replace(generation, text=generation.text[:num_characters], trace=tuple(trace))
