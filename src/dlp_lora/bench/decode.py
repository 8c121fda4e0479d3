"""The decode benchmark: time per generated token of DLP-LoRA and of PEFT over the plain base model.

All variants live in one process and take turns, round by round, each with a model of its own; a ratio is formed
within a round, so a slow minute of the machine hits both sides of it. Sentence switching is live: the router, the
policy and the fusing are inside the time. Adapters and router have random weights, which cost what trained ones do.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from dlp_lora.engine import Engine
from dlp_lora.environment import environment
from dlp_lora.errors import DLPLoRAError
from dlp_lora.load import load
from dlp_lora.policy import Switching, TopK
from dlp_lora.router import Context, MiniMLP

PROMPTS = (
    "Tell me about the city you would most like to visit, and what you would do there on the first day.",
    "How does a bicycle stay upright when it moves? Explain it to a child.",
    "Write a short letter to a neighbour who has just moved in.",
    "What should I think about before I buy a used car?",
)


@dataclass(frozen=True, kw_only=True)
class DecodeArgs:
    """What is measured."""

    num_adapters: int = 26
    selected: int = 3
    r: int = 8
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    new_tokens: int = 64
    rounds: int = 9
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    threads: int | None = None  # torch's own choice

    def __post_init__(self) -> None:
        if self.new_tokens < 2 or self.rounds < 1:
            raise ValueError(f"new_tokens must be at least 2 and rounds 1, got {self.new_tokens} and {self.rounds}")
        for dtype in self.dtypes:
            found = getattr(torch, dtype, None)
            if not isinstance(found, torch.dtype) or not found.is_floating_point:
                raise ValueError(f"no dtype {dtype!r}; choose from bfloat16, float16, float32")


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One variant: the median time a token, and its ratio over the base with the spread over rounds."""

    name: str
    dtype: str
    ms_per_token: float
    ratio: float
    ratio_min: float
    ratio_max: float
    ttft_ms: float
    tokens_per_s: float


def bench_decode(
    model: str | Path, args: DecodeArgs | None = None, *, on_round: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Measures decoding at batch 1; gives the record as JSON data.

    Raises:
        DLPLoRAError: if the engine with its adapters disabled does not generate what the base does.
    """
    args = args or DecodeArgs()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rows: list[DecodeRow] = []
    switch: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapters = _random_adapters(model, Path(folder), args)
        for dtype in args.dtypes:
            variants, engine = _variants(model, adapters, dtype, args)
            _check_disabled(variants["base"], engine, args)
            rows += _measure(variants, engine.tokenizer, dtype, args, on_round)
            switch[dtype] = _switch_cost(engine)
            engine.detach()
    return {
        "benchmark": "decode",
        "model": Path(model).name,
        "settings": {**asdict(args), "batch": 1, "prompts": len(PROMPTS), "decoding": "greedy"},
        "environment": environment(),
        "rows": [asdict(row) for row in rows],
        "switch": switch,
        "does_not_measure": "batches, prefill beyond the first token's time, trained adapters' answers",
    }


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token comes out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _random_adapters(model: str | Path, folder: Path, args: DecodeArgs) -> dict[str, Path]:
    base: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=args.r, lora_alpha=2 * args.r, target_modules=list(args.target_modules)
    )
    peft_model = get_peft_model(base, config)
    adapters = {}
    for i in range(args.num_adapters):
        torch.manual_seed(i)
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                # Small enough that the text stays text, with sentences in it.
                parameter.data.normal_(std=0.02 if "lora_A" in name else 0.002)
        adapters[f"adapter_{i:02d}"] = folder / f"adapter_{i:02d}"
        peft_model.save_pretrained(str(folder / f"adapter_{i:02d}"))
    return adapters


def _variants(
    model: str | Path, adapters: dict[str, Path], dtype: str, args: DecodeArgs
) -> tuple[dict[str, PreTrainedModel], Engine]:
    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(str(model), dtype=getattr(torch, dtype)).eval()

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    torch.manual_seed(0)
    engine = load(
        fresh(),
        tokenizer=tokenizer,
        adapters=adapters,
        router=MiniMLP(list(adapters), tokenizer.backend_tokenizer).eval(),
        policy=TopK(args.selected),
        # A router of random weights is never sure: without a margin it switches at every sentence.
        switching=Switching(margin=0.0),
    )
    peft: Any = PeftModel.from_pretrained(fresh(), str(adapters["adapter_00"])).eval()
    variants = {
        "base": fresh(),
        "base again": fresh(),
        f"dlp-lora, {args.selected} of {args.num_adapters}": engine.model,
        "peft, one adapter": peft,
    }
    return variants, engine


def _measure(
    variants: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    args: DecodeArgs,
    on_round: Callable[[str, int, int], None],
) -> list[DecodeRow]:
    per_token: dict[str, list[float]] = {name: [] for name in variants}
    first: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for i in range(args.rounds + 1):
        prompt = _encode(tokenizer, PROMPTS[i % len(PROMPTS)])
        # Each round begins with another variant, so that none always comes after the same one.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            ttft, tpot = _time(variants[name], prompt, args.new_tokens)
            if i > 0:  # the first round warms up
                first[name].append(ttft)
                per_token[name].append(tpot)
        on_round(dtype, i, args.rounds)
    rows = []
    for name in names:
        ratios = [ours / base for ours, base in zip(per_token[name], per_token["base"], strict=True)]
        rows.append(
            DecodeRow(
                name=name,
                dtype=dtype,
                ms_per_token=round(median(per_token[name]) * 1e3, 3),
                ratio=round(median(ratios), 4),
                ratio_min=round(min(ratios), 4),
                ratio_max=round(max(ratios), 4),
                ttft_ms=round(median(first[name]) * 1e3, 2),
                tokens_per_s=round(1 / median(per_token[name]), 2),
            )
        )
    return rows


@torch.no_grad()
def _time(model: Any, prompt: dict[str, Tensor], new_tokens: int) -> tuple[float, float]:
    clock = _Clock()
    start = time.perf_counter()
    model.generate(**prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, streamer=clock)
    tokens = clock.times[1:]  # the first call brings the prompt
    return tokens[0] - start, (tokens[-1] - tokens[0]) / (len(tokens) - 1)


def _switch_cost(engine: Engine) -> dict[str, float]:
    """Median milliseconds of the router alone, and of router, policy and fusing together, at a sentence start."""
    router: Any = engine.router
    route_ms, switch_ms = [], []
    for i in range(50):
        context = Context(PROMPTS[i % len(PROMPTS)], "That is a good question. " * (i % 5 + 1), "The")
        start = time.perf_counter()
        probabilities = router.probabilities([context])[0].tolist()
        routed = time.perf_counter()
        names = list(router.names)
        shifted = dict(zip(names[i % 7 :] + names[: i % 7], probabilities, strict=True))
        engine.bank.fuse([engine.policy(shifted)])
        end = time.perf_counter()
        route_ms.append((routed - start) * 1e3)
        switch_ms.append((end - start) * 1e3)
    return {
        "router_ms": round(median(route_ms), 3),
        "router_ms_max": round(max(route_ms), 3),
        "switch_ms": round(median(switch_ms), 3),
        "switch_ms_max": round(max(switch_ms), 3),
    }


def _check_disabled(base: Any, engine: Engine, args: DecodeArgs) -> None:
    prompt = _encode(engine.tokenizer, PROMPTS[0])
    with torch.no_grad(), engine.disabled():
        ours = engine.model(**prompt).logits
    with torch.no_grad():
        if not torch.equal(ours, base(**prompt).logits):
            raise DLPLoRAError("the engine with adapters disabled differs from the base model; no figures are given")


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Tensor]:
    if not tokenizer.chat_template:
        return dict(tokenizer(prompt, return_tensors="pt"))
    messages = [{"role": "user", "content": prompt}]
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return dict(encoded)
