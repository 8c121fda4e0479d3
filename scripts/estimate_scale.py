"""Estimates what one GPU could carry, from a formula and cited costs: an estimate, and no measurement.

    python scripts/estimate_scale.py --plots docs/images        # prints the tables of docs/scale.md, draws its curves

docs/scale.md explains the formula; the functions follow its order. The last ones check the formula against records of
servers on a CPU.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from dlp_lora.lab.records.table import markdown_grid

RESULTS = Path(__file__).parents[1] / "results"

Policy = Literal["request", "recompute", "keep", "resident"]
POLICIES: dict[Policy, str] = {
    "request": "one mixture an answer",
    "recompute": "by sentence, recompute",
    "keep": "by sentence, keep",
    "resident": "by sentence, resident bank",
}


@dataclass(frozen=True, kw_only=True)
class GPU:
    """An H100 SXM: datasheet, and the share of it that is reached."""

    bandwidth: float = 3.35e12  # bytes a second
    flops: float = 989e12
    memory: float = 80e9
    usable: float = 0.9
    bandwidth_share: float = 0.7
    flops_share: float = 0.5
    step_s: float = 0.001  # of a decoding step that is neither
    host_bandwidth: float = 25e9  # from the host's memory to the GPU


@dataclass(frozen=True, kw_only=True)
class Model:
    """Llama-3.1-8B in bfloat16, with adapters of rank 16 on all linear layers."""

    parameters: float = 8.03e9
    bytes_each: float = 2
    kv_bytes: float = 2 * 32 * 8 * 128 * 2  # a token: K and V, layers, heads, their size
    widths: float = 32 * (2 * 4096 + 2 * (4096 + 1024) + 2 * 4096 + 3 * (4096 + 14336))  # sum of d_in + d_out
    rank: int = 16

    def lora_bytes(self, rank: int) -> float:
        """How large a LoRA of a rank is."""
        return self.widths * rank * self.bytes_each


@dataclass(frozen=True, kw_only=True)
class Load:
    """The requests, the adapters and their costs."""

    prompt: int = 500  # tokens
    answer: int = 250
    sentence: int = 25
    switch_rate: float = 0.1  # of sentence starts that change the mixture
    cached_prompt: float = 0.3  # of prompts' tokens, in the prefix cache
    cached_switch: float = 0.1  # of the context at a switch, under `recompute`
    num_adapters: int = 1000
    num_mixtures: int = 5000  # that are asked for at all
    zipf: float = 1.0  # how unevenly
    num_fused: int = 3
    max_loras: int = 32
    cached_loras: int = 256  # in the host's memory
    lora_cost: float = 0.15  # of a pass, above one without adapters
    read_bandwidth: float = 2.5e9  # of a mixture from its folder, while the server's loop waits
    load_s: float = 0.005  # and what does not depend on its size
    block: int = 16
    max_batch: int = 256

    @property
    def num_switches(self) -> float:
        """Of an answer."""
        return self.switch_rate * max(0, self.answer / self.sentence - 1)

    @property
    def context(self) -> float:
        """Tokens before a step, on average."""
        return self.prompt + self.answer / 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimated rate and times."""

    requests_s: float
    batch: float
    step_ms: float
    prompt_ms: float
    switch_ms: float  # of an answer
    decode_ms: float
    load_ms: float
    held_gb: float  # by slots, or the bank

    @property
    def gpu_ms(self) -> float:
        """Of the GPU, for one answer."""
        return self.prompt_ms + self.switch_ms + self.decode_ms + self.load_ms


def slot_rank(load: Load, model: Model) -> int:
    """The rank of vLLM's slots that holds a mixture."""
    return next(rank for rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) if rank >= load.num_fused * model.rank)


@cache
def shares(num_mixtures: int, zipf: float) -> tuple[float, ...]:
    """How often each mixture is asked for, by Zipf's law."""
    weights = [1 / i**zipf for i in range(1, num_mixtures + 1)]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


@cache
def answers_in_slots(p: Sequence[float], num_slots: int, most: int) -> float:
    """How many answers decode together, whose mixtures fill the slots."""
    return solved(lambda batch: num_distinct(p, batch), num_slots, most)


def num_distinct(p: Sequence[float], batch: float) -> float:
    """How many mixtures are among `batch` answers, on average."""
    return math.fsum(1 - (1 - share) ** batch for share in p)


def solved(f: Callable[[float], float], goal: float, high: float) -> float:
    """Where a growing function reaches a goal, at most `high`."""
    low = 0.0
    if f(high) <= goal:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) <= goal else (low, middle)
    return low


@cache
def misses(p: Sequence[float], size: float) -> float:
    """How many requests find their mixture not among the `size` used last (Che's approximation)."""
    if size >= len(p):
        return 0.0
    time = solved(lambda t: math.fsum(1 - math.exp(-share * t) for share in p), size, 1e9)
    return math.fsum(share * math.exp(-share * time) for share in p)


def estimate(policy: Policy, load: Load, gpu: GPU, model: Model) -> Estimate:
    """Estimates how many requests a second a GPU carries at most."""
    rank = slot_rank(load, model)
    slot = model.lora_bytes(rank)
    bank = load.num_adapters * model.lora_bytes(model.rank)
    weights = model.parameters * model.bytes_each
    held = bank if policy == "resident" else load.max_loras * slot
    free = gpu.memory * gpu.usable - weights - held
    end = load.prompt + load.answer
    by_memory = max(0.0, free / (model.kv_bytes * end))
    p = shares(load.num_mixtures, load.zipf)
    by_slots = float(load.max_batch)
    if policy in ("request", "recompute"):
        by_slots = answers_in_slots(p, load.max_loras, load.max_batch)
    elif policy == "keep":
        by_slots = float(min(load.max_loras, load.max_batch))  # each answer has a name of its own
    batch = min(by_memory, by_slots, load.max_batch)
    slow = 1 + load.lora_cost
    token_s = 2 * model.parameters / (gpu.flops * gpu.flops_share) * slow  # of a prompt
    by_bytes = (weights + batch * load.context * model.kv_bytes) / (gpu.bandwidth * gpu.bandwidth_share)
    step_s = max(by_bytes, batch * token_s / slow) * slow + gpu.step_s
    prompt_s = load.prompt * (1 - load.cached_prompt) * token_s
    k = load.num_switches
    switch_s = load_s = 0.0
    to_gpu = slot / gpu.host_bandwidth
    read_s = load.load_s + model.lora_bytes(load.num_fused * model.rank) / load.read_bandwidth
    if policy == "recompute":
        switch_s = k * load.context * (1 - load.cached_switch) * token_s
    if policy == "keep":
        prompt_s = load.prompt * token_s  # nobody else's blocks have its name
        switch_s = (k * load.block / 2 + load.answer) * token_s  # each block is encoded once more
        load_s = (1 + k) * (read_s + to_gpu)
    elif policy != "resident":
        asked = 1 + (k if policy == "recompute" else 0)
        load_s = asked * (misses(p, load.max_loras) * to_gpu + misses(p, load.cached_loras) * read_s)
    decode_s = load.answer * step_s / batch if batch >= 1 else math.inf
    total = prompt_s + switch_s + decode_s + load_s
    return Estimate(
        requests_s=1 / total,
        batch=batch,
        step_ms=step_s * 1e3,
        prompt_ms=prompt_s * 1e3,
        switch_ms=switch_s * 1e3,
        decode_ms=decode_s * 1e3,
        load_ms=load_s * 1e3,
        held_gb=held / 1e9,
    )


def answer_s(policy: Policy, load: Load, gpu: GPU, model: Model, requests_s: float) -> float:
    """How long an answer takes at a rate of requests: as long as its tokens at the batch that this rate makes, and its
    share of what else the GPU does. Infinite beyond what it carries.
    """
    most = estimate(policy, load, gpu, model)
    if requests_s >= most.requests_s:
        return math.inf
    other = (most.prompt_ms + most.switch_ms + most.load_ms) / 1e3
    busy = requests_s * other  # of the GPU's time; the rest is left for decoding
    seconds = 0.0
    batch = 1.0
    for _ in range(50):
        step = replace(load, max_batch=max(1, round(batch)))
        step_s = estimate(policy, step, gpu, model).step_ms / 1e3
        seconds = load.answer * step_s / (1 - busy) + other / (1 - busy)
        batch = min(most.batch, max(1.0, requests_s * seconds))
    return seconds


@dataclass(frozen=True, kw_only=True)
class Check:
    """A number that the formula predicts, and its measurement."""

    what: str
    predicted: float
    measured: float

    @property
    def deviation(self) -> float:
        """Of the prediction, as a share of the measurement."""
        return self.predicted / self.measured - 1


# SmolLM2-135M in bfloat16, with adapters of rank 8
SMALL = Model(parameters=134.5e6, kv_bytes=2 * 30 * 3 * 64 * 2, rank=8)
OURS, VLLM = "dlp-lora serve, fixed", "vLLM with a LoRA, fixed"
CHUNK = 256  # tokens that the local server reads while another answer waits
BLOCK = 128  # of vLLM on CPUs


def checks() -> list[Check]:
    """Predicts what the records measured, from the times of one stream."""
    served, peers, switched, vllm = map(read_record, ("serve", "serve_peers", "switch_context", "vllm"))
    one = row_of(served, OURS, 1)
    (waited,) = (row for row in served["rows"] if "longest_ms" in row)
    token_ms = (waited["longest_ms"] - one["gap_ms_p50"]) / CHUNK
    prompt = (one["first_ms_p50"] - one["gap_ms_p50"]) / token_ms
    found = [
        *check_streams("`dlp-lora serve`", served, OURS, prompt),
        *check_streams("vLLM with one LoRA", peers, VLLM, prompt),
        *check_routed(served, one["gap_ms_p50"], token_ms),
    ]
    for row in switched["rows"]:
        if row["name"].endswith("recompute"):
            what = f"a switch after {row['context']:,} tokens, `recompute`, ms"
            found.append(Check(what=what, predicted=row["context"] * token_ms, measured=row["extra_ms"]))
    recompute, keep = (vllm["cases"][policy] for policy in ("recompute", "keep"))
    if "encoded_tokens" in keep:
        what = "a switch on vLLM, `keep`"
        predicted = recompute["encode_ms"] / recompute["encoded_tokens"] * keep["encoded_tokens"]
        found += [
            Check(what=f"{what}: tokens that are encoded", predicted=BLOCK / 2, measured=keep["encoded_tokens"]),
            Check(what=f"{what}, ms, from `recompute`", predicted=predicted, measured=keep["encode_ms"]),
        ]
    return found


def check_streams(server: str, record: dict[str, Any], name: str, prompt: float) -> list[Check]:
    """The tokens a second of several streams over those of one: from the time of one's steps, and of their own."""
    one = row_of(record, name, 1)
    first_ms = one["first_ms_p50"] - one["gap_ms_p50"]
    load = replace(NO_LOADING, prompt=round(prompt), answer=record["settings"]["new_tokens"])
    machine = machine_of(
        load, step_ms=one["gap_ms_p50"], token_ms=first_ms / load.prompt, bandwidth_gb_s=record["bandwidth_gb_s"]
    )
    alone = estimate("request", replace(load, max_batch=1), machine, SMALL)
    found = []
    for row in (row for row in record["rows"] if row["name"] == name and row["streams"] > 1):
        batch, what = row["streams"], f"{server}, {row['streams']} streams over 1"
        together = estimate("request", replace(load, max_batch=batch), machine, SMALL)
        with_step = alone.gpu_ms / (alone.prompt_ms + load.answer * row["gap_ms_p50"] / batch)
        found += [
            Check(what=what, predicted=together.requests_s / alone.requests_s, measured=row["speedup"]),
            Check(what=f"{what}, with the measured time of a step", predicted=with_step, measured=row["speedup"]),
        ]
    return found


def check_routed(record: dict[str, Any], step_ms: float, token_ms: float) -> list[Check]:
    """The tokens a second of routed answers from the measured time of their steps, if the record has their sizes."""
    found = []
    for row in record["rows"]:
        name, _, kv_policy = row["name"].rpartition(", ")
        if kv_policy == "fixed" or "switches" not in row:
            continue
        answer = round(row["answer_tokens"])
        load = replace(
            NO_LOADING,
            prompt=round(row["prompt_tokens"]),
            answer=answer,
            sentence=1,
            switch_rate=row["switches"] / (answer - 1),
        )
        machine = machine_of(load, step_ms=step_ms, token_ms=token_ms, bandwidth_gb_s=record["bandwidth_gb_s"])
        # In our server, a switch under `keep` encodes nothing.
        times = estimate("recompute" if kv_policy == "recompute" else "request", load, machine, SMALL)
        all_ms = times.prompt_ms + times.switch_ms + answer * row["gap_ms_p50"] / row["streams"]
        what = f"`{name}`, `{kv_policy}`, streams: {row['streams']}, tokens/s with the measured time of a step"
        found.append(Check(what=what, predicted=1e3 * answer / all_ms, measured=row["tokens_per_s"]))
    return found


# Eight mixtures that are loaded before. LoRA's cost is in the measured times.
NO_LOADING = Load(
    switch_rate=0, cached_prompt=0, cached_switch=0, num_mixtures=8, num_fused=1, max_loras=8, lora_cost=0
)


def machine_of(load: Load, *, step_ms: float, token_ms: float, bandwidth_gb_s: float) -> GPU:
    """The machine on which a step of one answer, and a token of a prompt, take so long."""
    machine = GPU(
        bandwidth=bandwidth_gb_s * 1e9,
        flops=2 * SMALL.parameters / (token_ms / 1e3) / GPU.flops_share,
        memory=1e12,  # it is no limit
        step_s=0.0,
    )
    rest_ms = step_ms - estimate("request", replace(load, max_batch=1), machine, SMALL).step_ms
    return replace(machine, step_s=rest_ms / 1e3)


def check_table() -> str:
    """The predictions beside the measurements."""
    rows = [
        (check.what, three_digits(check.predicted), three_digits(check.measured), f"{100 * check.deviation:+.0f} %")
        for check in checks()
    ]
    return markdown_grid(("", "predicted", "measured", "deviation"), rows)


def three_digits(value: float) -> str:
    """A number with about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def read_record(name: str) -> dict[str, Any]:
    """Reads a record of `results/`."""
    read: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return read


def row_of(record: dict[str, Any], name: str, streams: int) -> dict[str, Any]:
    """The row of a server with so many streams."""
    (row,) = (row for row in record["rows"] if row["name"] == name and row.get("streams") == streams)
    found: dict[str, Any] = row
    return found


LOW = {"lora_cost": 0.04, "read_bandwidth": 8e9, "cached_switch": 0.3}
HIGH = {"lora_cost": 0.5, "read_bandwidth": 0.8e9, "cached_switch": 0.0}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", type=Path, help="folder to draw the curves into")
    options = parser.parse_args()
    gpu, model, load = GPU(), Model(), Load()
    for name, adapters in (("all linear layers", model), ("q and v alone", only_qv(model))):
        print(f"adapters on {name}\n\n{table(load, gpu, adapters)}\n")
    print(slots_table(load, gpu, model))
    print()
    print(memory_table(model))
    print(f"\n{check_table()}")
    if options.plots is not None:
        for dark in (False, True):
            draw(options.plots / f"scale-{'dark' if dark else 'light'}.svg", load, gpu, model, dark=dark)


def table(load: Load, gpu: GPU, model: Model) -> str:
    """Requests a second by policy, with a range, and what a request's time goes into."""
    head = ("", "requests/s", "range", "batch", "prompt", "switches", "decoding", "loading")
    rows = []
    for policy, name in POLICIES.items():
        found = estimate(policy, load, gpu, model)
        if found.batch < 1:
            rows.append((name, f"does not fit: {found.held_gb:.0f} GB", *[""] * 6))
            continue
        best, worst = (estimate(policy, replace(load, **costs), gpu, model) for costs in (LOW, HIGH))
        times = (found.prompt_ms, found.switch_ms, found.decode_ms, found.load_ms)
        requests = (f"{found.requests_s:.1f}", f"{worst.requests_s:.1f}-{best.requests_s:.1f}")
        rows.append((name, *requests, f"{found.batch:.0f}", *(f"{time:.0f} ms" for time in times)))
    return markdown_grid(head, rows)


def slots_table(load: Load, gpu: GPU, model: Model) -> str:
    """What `--max-loras` does."""
    head = ("`--max-loras`", "slots", "answers at once", "requests/s, one mixture", "recompute", "keep")
    rows = []
    for slots in (4, 8, 16, 32, 64, 96):
        now = replace(load, max_loras=slots)
        found = {policy: estimate(policy, now, gpu, model) for policy in ("request", "recompute", "keep")}
        one = found["recompute"]
        rates = (f"{one.requests_s:.1f}" for one in found.values())
        rows.append((str(slots), f"{one.held_gb:.1f} GB", f"{one.batch:.0f}", *rates))
    return markdown_grid(head, rows, num_labels=0)


def memory_table(model: Model) -> str:
    """How the bank grows."""
    rows = []
    for number in (10, 100, 1_000, 10_000):
        sizes = [number * m.lora_bytes(m.rank) / 1e9 for m in (model, only_qv(model))]
        rows.append((f"{number:,}", *(f"{size:,.1f} GB" for size in sizes)))
    return markdown_grid(("adapters", "all linear layers", "q and v alone"), rows, num_labels=0)


def only_qv(model: Model) -> Model:
    """The same with adapters on q and v alone."""
    return replace(model, widths=32 * (2 * 4096 + 4096 + 1024))


def draw(path: Path, load: Load, gpu: GPU, model: Model, *, dark: bool) -> None:
    """Draws the curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#4c9be8", "#e8894c", "#b27be0", "#5cb87a")
    text = "#dddddd" if dark else "#333333"
    style = {"axes.edgecolor": text, "axes.labelcolor": text, "xtick.color": text, "ytick.color": text}
    style |= {"text.color": text, "axes.titlecolor": text, "svg.hashsalt": "scale", "font.size": 9}
    policies: tuple[Policy, ...] = ("request", "recompute", "keep")
    with plt.rc_context(style):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
        for policy, colour in zip(policies, colours, strict=False):
            most = estimate(policy, load, gpu, model).requests_s
            rates = [most * i / 60 for i in range(1, 60)]
            left.plot(
                rates, [answer_s(policy, load, gpu, model, r) for r in rates], color=colour, label=POLICIES[policy]
            )
            slots = range(2, 97, 2)
            found = [estimate(policy, replace(load, max_loras=n), gpu, model).requests_s for n in slots]
            middle.plot(slots, found, color=colour)
            switching = [i / 40 for i in range(41)]
            now = [replace(load, switch_rate=rate) for rate in switching]
            right.plot(switching, [estimate(policy, one, gpu, model).requests_s for one in now], color=colour)
            for axes, where, loads in (
                (middle, slots, [replace(load, max_loras=n) for n in slots]),
                (right, switching, now),
            ):
                ends = [
                    [estimate(policy, replace(one, **costs), gpu, model).requests_s for one in loads]
                    for costs in (HIGH, LOW)
                ]
                axes.fill_between(where, *ends, color=colour, alpha=0.15, linewidth=0)
        left.set(xlabel="requests a second", ylabel="seconds an answer", ylim=(0, 15), title="where the knee is")
        middle.set(xlabel="--max-loras", ylabel="requests a second", ylim=0, title="slots for mixtures")
        right.set(xlabel="sentences that switch", ylabel="requests a second", ylim=0, title="how often it switches")
        left.legend(frameon=False, labelcolor=text, fontsize=8)
        for axes in (left, middle, right):
            axes.set_facecolor("none")
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle("An estimate, and no measurement: 8B model, 1,000 adapters, one H100", color=text, fontsize=10)
        figure.tight_layout()
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
