"""Checks whether a vLLM server can answer for this bundle; errors name the remedy."""

import asyncio
import re
from dataclasses import dataclass

from dlp_lora.engine.base import PROBE_TEXT, PROBE_TOKENS, Probe
from dlp_lora.engine.outline import Outline
from dlp_lora.errors import ModelError
from dlp_lora.serve.vllm.client import FailedError, GoneError, LostError, Model, RefusedError, UpstreamError, VLLMClient

# The same model in 16 or 8 bits has a smaller mean difference; a fine-tuned one has a larger one.
MAX_MEAN_DIFFERENCE = 0.2
# Earlier releases on CPUs compute rows without an adapter wrongly beside rows with one, and log-probabilities of
# prompts beside them end the server.
FIXED_ON_CPU = (0, 33)
NUM_SCORED = 12  # tokens of the probe
HOW = "docs/how-to-scale.md has the command"


@dataclass(frozen=True, kw_only=True)
class ProbeAdapter:
    """An adapter that changes nothing, with the largest rank of mixtures: a server that loads it can load them."""

    name: str
    path: str
    max_rank: int


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The results of a server's check; `notes` are for its owner."""

    base: str  # its name for the base model
    max_context: int | None
    version: str
    block_size: int | None  # of the prefix cache; None if there is none or it is unknown
    tells_cached: bool  # tokens of a prompt that came from the cache
    needs_zero_adapter: bool  # for answers of the base model
    breaks_on_prompt_scores: bool  # the whole server, if others run with adapters
    notes: tuple[str, ...] = ()


async def check(client: VLLMClient, outline: Outline, probe: ProbeAdapter, *, num_running: int) -> Checked:
    """Checks a server; `num_running` is the largest number of requests at once.

    Raises:
        LostError: if it does not answer.
        ModelError: if it cannot answer for this bundle.
    """
    base = await _base(client)
    notes: list[str] = []
    await _check_tokenizer(client, outline, base)
    if outline.base.probe is None:
        notes.append("the bundle has no record of its base model's answers, so only the tokenizer was compared")
    else:
        await _check_scores(client, outline, base)
    await _check_lora(client, probe)
    metrics = await client.metrics()
    block_size = _number(metrics, "vllm:cache_config_info", "block_size")
    has_cache = _label(metrics, "vllm:cache_config_info", "enable_prefix_caching") != "False"
    tells_cached = has_cache and await _tells_cached(client, outline, probe, block_size or 128)
    if not has_cache:
        notes.append("it has no prefix cache (--enable-prefix-caching): kv_policy keep is refused")
    elif not tells_cached:
        notes.append("it does not tell cached tokens (--enable-prompt-tokens-details): kv_policy keep is refused")
    max_loras = _number(await client.metrics(), "vllm:lora_requests_info", "max_lora")
    if max_loras is not None and max_loras < num_running:
        notes.append(
            f"it has slots for {max_loras} mixtures (--max-loras), and {num_running} requests may run: those of other "
            "mixtures wait"
        )
    release = await client.version()
    return Checked(
        base=base.name,
        max_context=base.max_context,
        version=release,
        block_size=block_size if has_cache else None,
        tells_cached=tells_cached,
        needs_zero_adapter=_is_before(release, FIXED_ON_CPU),
        breaks_on_prompt_scores=_is_before(release, FIXED_ON_CPU),
        notes=tuple(notes),
    )


async def _base(client: VLLMClient) -> Model:
    try:
        models = await client.models()
    except (GoneError, FailedError) as error:
        raise ModelError(f"{client.url} is no vLLM server: {error}") from error
    except RefusedError as error:
        raise ModelError(f"{error}; the key of the backend is read from DLP_LORA_BACKEND_KEY") from error
    bases = [model for model in models if model.parent is None]
    if not bases:
        raise ModelError(f"{client.url} serves no base model; {HOW}")
    return bases[0]


async def _check_tokenizer(client: VLLMClient, outline: Outline, base: Model) -> None:
    expected = tuple(outline.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])
    try:
        tokens = await client.tokenize(base.name, PROBE_TEXT)
    except (RefusedError, GoneError) as error:
        raise ModelError(f"{client.url} does not tokenize: {error}") from error
    if tokens != expected:
        raise ModelError(
            f"{client.url} serves {base.root!r}, whose tokenizer is another one than that of {outline.source!r}: serve "
            "the bundle's base model"
        )


async def _check_scores(client: VLLMClient, outline: Outline, base: Model) -> None:
    probe = outline.base.probe
    assert probe is not None
    last = len(probe.logprobs) - 1
    places = sorted({last * i // (NUM_SCORED - 1) for i in range(NUM_SCORED)})
    try:
        scores = await asyncio.gather(*(_score(client, base, probe, place) for place in places))
    except (RefusedError, KeyError, IndexError) as error:
        raise ModelError(f"{client.url} gives no log-probabilities: {error}") from error
    if not any(scores):
        raise ModelError(f"{client.url} gives log-probabilities of what it sampled: leave --logprobs-mode out")
    mean = sum(abs(score - probe.logprobs[place]) for score, place in zip(scores, places, strict=True)) / len(scores)
    if not mean <= MAX_MEAN_DIFFERENCE:
        raise ModelError(
            f"{client.url} serves {base.root!r}, which is another model than {outline.base.name!r}: its "
            f"log-probabilities differ by {mean:.2f} on average from those in the bundle; serve the bundle's base model"
        )


async def _score(client: VLLMClient, base: Model, probe: Probe, place: int) -> float:
    """The log-probability of a token of the probe, after those before it."""
    body = {
        "model": base.name,
        "prompt": list(probe.tokens[: place + 1]),
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 0,
        "return_tokens_as_token_ids": True,
        "allowed_token_ids": [probe.tokens[place + 1]],
        "add_special_tokens": False,
        "return_token_ids": True,
    }
    chunk, _ = await client.complete(body)
    return chunk.logprobs[0] or 0.0


async def _check_lora(client: VLLMClient, probe: ProbeAdapter) -> None:
    try:
        await client.load(probe.name, probe.path)
    except GoneError as error:
        if probe.path in str(error):
            raise ModelError(
                f"{client.url} does not see {probe.path}: give --adapter-cache a folder that both sides see under one "
                "path"
            ) from error
        raise ModelError(
            f"{client.url} loads no adapters while it runs: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and "
            f"--enable-lora; {HOW}"
        ) from error
    except UpstreamError as error:
        if isinstance(error, LostError):
            raise
        reason = str(error)
        if "max_lora_rank" in reason or "rank" in reason.lower():
            raise ModelError(
                f"{client.url} refuses an adapter of rank {probe.max_rank}: start it with --max-lora-rank "
                f"{probe.max_rank} or more, or this server with a smaller --max-rank ({reason})"
            ) from error
        if "lora" in reason.lower() and "enabled" in reason.lower():
            raise ModelError(f"{client.url} has no LoRA: start it with --enable-lora; {HOW} ({reason})") from error
        raise ModelError(f"{client.url} cannot load an adapter: {reason}") from error
    if probe.name not in {model.name for model in await client.models()}:
        raise ModelError(f"{client.url} loaded an adapter and does not list it; {HOW}")


async def _tells_cached(client: VLLMClient, outline: Outline, probe: ProbeAdapter, block_size: int) -> bool:
    """Sends a prompt longer than a block twice; returns whether the second answer reports cached tokens."""
    tokens = list(outline.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"])[:PROBE_TOKENS]
    prompt = (tokens * (block_size // len(tokens) + 2))[: block_size + 2]
    body = {
        "model": probe.name,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0.0,
        "add_special_tokens": False,
        "return_token_ids": True,
    }
    try:
        first, _ = await client.complete(body)
        chunk, _ = await client.complete(body)
    except RefusedError:  # the model's context is shorter than a block
        return False
    if not first.tokens:
        raise ModelError(f"{client.url} gives no token ids: it takes a vLLM that knows return_token_ids")
    return bool(chunk.cached_tokens)


def _label(metrics: str, name: str, label: str) -> str | None:
    """A label of a metric, in Prometheus' text format."""
    match = re.search(rf'^{re.escape(name)}{{[^}}]*\b{label}="([^"]*)"', metrics, re.MULTILINE)
    return None if match is None else match[1]


def _number(metrics: str, name: str, label: str) -> int | None:
    value = _label(metrics, name, label)
    return int(value) if value is not None and value.isdigit() else None


def _is_before(release: str, other: tuple[int, int]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", release)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < other
