"""Load on a server that speaks OpenAI's API: requests in, the moments at which their tokens came out."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from dlp_lora.errors import DLPLoRAError

TIMEOUT_S = 600
PERCENTILES = (50, 95, 99)

Body = Mapping[str, Any]
"""The body of a request: a chat if it has messages, otherwise a completion."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server: its name for tables, its address, which ends with /v1, and the model name."""

    name: str
    url: str
    model: str


@dataclass(kw_only=True)
class Answer:
    """A streamed answer: the times of the request and of its pieces, and their texts.

    `routing` has the `dlp` objects of its pieces, in their order. The tokens are those that the server counts.
    """

    start_s: float = field(default_factory=time.perf_counter)
    times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    text: str = ""
    routing: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def first_ms(self) -> float:
        """Time to the first token."""
        return (self.times_s[0] - self.start_s) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        """Times between tokens."""
        return [(b - a) * 1e3 for a, b in zip(self.times_s, self.times_s[1:], strict=False)]

    @property
    def ms_per_token(self) -> float:
        """Mean time between tokens."""
        return (self.times_s[-1] - self.times_s[0]) * 1e3 / max(1, self.num_tokens - 1)


def tokens_per_s(answers: Sequence[Answer]) -> float:
    """Tokens of all answers, by the seconds from the first request to the last token."""
    seconds = max(a.times_s[-1] for a in answers) - min(a.start_s for a in answers)
    return sum(a.num_tokens for a in answers) / seconds


def ms_per_token(answers: Sequence[Answer]) -> float:
    """The median over answers."""
    return median(a.ms_per_token for a in answers)


def latency(answers: Sequence[Answer]) -> dict[str, float]:
    """Percentiles of the time to the first token, and between tokens, as a table shows them."""
    columns: dict[str, float] = {}
    firsts, gaps = [a.first_ms for a in answers], [gap for a in answers for gap in a.gaps_ms]
    for name, values in (("first_ms", firsts), ("gap_ms", gaps)):
        for share in PERCENTILES:
            columns[f"{name}_p{share}"] = round(percentile(values, share), 1)
    return columns


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share / 100 * len(ordered)))]


def ask(target: Target, bodies: Sequence[Body], *, streams: int) -> list[Answer]:
    """Sends requests over so many streams at once; a stream sends its next one after an answer.

    Raises:
        DLPLoRAError: if the server refuses one, or breaks off.
    """
    return asyncio.run(_ask(target, bodies, streams))


def ask_beside(target: Target, running: Body, body: Body, *, after: int) -> tuple[Answer, Answer]:
    """Sends a request while another one runs, once that has `after` tokens; gives the answers of both."""
    return asyncio.run(_ask_beside(target, running, body, after))


async def _ask(target: Target, bodies: Sequence[Body], streams: int) -> list[Answer]:
    left = deque(bodies)
    answers: list[Answer] = []

    async def work(client: Any) -> None:
        while left:
            body = left.popleft()
            answers.append(await send(client, target, body, Answer()))

    async with connect() as client:
        await asyncio.gather(*(work(client) for _ in range(streams)))
    return answers


async def _ask_beside(target: Target, running: Body, body: Body, after: int) -> tuple[Answer, Answer]:
    async with connect() as client:
        first = Answer()
        task = asyncio.create_task(send(client, target, running, first))
        while len(first.times_s) < after and not task.done():
            await asyncio.sleep(0.001)
        second = await send(client, target, body, Answer())
        await task
    return first, second


def connect() -> Any:
    """An asynchronous HTTP client without a limit of connections."""
    import httpx  # of the extra `serve`

    return httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None))


async def send(client: Any, target: Target, body: Body, answer: Answer, *, leave_after: int | None = None) -> Answer:
    """Sends a request and fills `answer` as its pieces come; hangs up after so many of them.

    Raises:
        DLPLoRAError: if the server refuses it, breaks off, or says nothing.
    """
    import httpx

    from dlp_lora.sse import data_of

    asked = {"model": target.model, **body, "stream": True, "stream_options": {"include_usage": True}}
    route = "chat/completions" if "messages" in body else "completions"
    try:
        async with client.stream("POST", f"{target.url}/{route}", json=asked) as response:
            if response.status_code != 200:
                raise DLPLoRAError(f"{target.name}: {response.status_code} {(await response.aread())[:300]!r}")
            async for data in data_of(response):
                _take(target, answer, data)
                if leave_after is not None and len(answer.times_s) >= leave_after:
                    return answer
    except httpx.HTTPError as error:
        raise DLPLoRAError(f"{target.name} at {target.url} breaks off: {error!r}") from error
    if not answer.times_s:
        raise DLPLoRAError(f"{target.name} gave an answer without text to {str(body)[:200]}")
    answer.num_tokens = answer.num_tokens or len(answer.times_s)  # some servers do not count
    return answer


def _take(target: Target, answer: Answer, data: str) -> None:
    now = time.perf_counter()
    if data == "[DONE]":
        return
    chunk = json.loads(data)
    if "error" in chunk:
        raise DLPLoRAError(f"{target.name}: {chunk['error']}")
    usage = chunk.get("usage") or {}
    answer.num_tokens = usage.get("completion_tokens", answer.num_tokens)
    answer.num_prompt_tokens = usage.get("prompt_tokens", answer.num_prompt_tokens)
    for choice in chunk.get("choices") or ():
        text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        if text:
            answer.text += text
            answer.times_s.append(now)
        if choice.get("dlp"):
            answer.routing.append(choice["dlp"])
