"""The peers benchmark (Table 7): decoding of every other way to use several adapters, side by side with ours.

PEFT's ways are PEFT's own code. Methods that exist as papers are this package's baselines, written from the papers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from peft import ArrowConfig, XLoraConfig, create_arrow_model, get_peft_model

from dlp_lora.bank.peft_format import read_adapter
from dlp_lora.errors import DLPLoRAError
from dlp_lora.lab.bench.agreement import Twin, check_paths
from dlp_lora.lab.bench.baselines import attach_lora_switch, attach_meteora, attach_mola, attach_moral, attach_pesc
from dlp_lora.lab.bench.case import Benchmark, Case, NumAdapters, Row
from dlp_lora.lab.bench.decoding import DecodingArgs, decoding_rows
from dlp_lora.lab.bench.models import (
    AGAIN,
    PEFT_ONE,
    STACKED,
    base_model,
    engine_with,
    peft_active,
    peft_merged,
    peft_one,
    stacked_base,
)
from dlp_lora.lab.bench.timing import BASE

OURS = "dlp-lora"
PEFT_ACTIVE = "peft several active"


@dataclass(frozen=True, kw_only=True)
class PeersArgs(DecodingArgs):
    """The settings. Every method has `num_adapters` and uses `selected` at a time."""

    num_adapters: NumAdapters = 8
    selected: Annotated[int, "Adapters used at a time."] = 2
    methods: Annotated[tuple[str, ...], "Names of the other methods. [default: all]"] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.methods if name not in PEERS]
        if unknown:
            raise ValueError(f"no method {unknown[0]!r}; there are {', '.join(PEERS)}")


def _measure(case: Case, args: PeersArgs) -> list[Row]:
    engine, prompts, used = engine_with(case, selected=args.selected), case.prompts(), case.names[: args.selected]
    variants = {BASE: base_model(case), AGAIN: base_model(case), STACKED: stacked_base(case), OURS: engine}
    variants |= {name: PEERS[name](case, args) for name in args.methods or PEERS}
    twins = {
        STACKED: Twin(variants[STACKED], {}),
        PEFT_ONE: Twin(variants.get(PEFT_ONE), {used[0]: 1.0}),
        PEFT_ACTIVE: Twin(variants.get(PEFT_ACTIVE), dict.fromkeys(used, 1.0)),
    }
    measured = {name: twin for name, twin in twins.items() if name in variants}
    check_paths(engine, variants[BASE], prompts[0], measured)
    rows = decoding_rows(case, variants, prompts, new_tokens=args.new_tokens, rounds=args.rounds)
    return list(rows.values())


bench_peers = Benchmark(
    name="peers",
    args=PeersArgs,
    measure=_measure,
    num_adapters=lambda args: args.num_adapters,
    does_not_measure="answers",
)
"""Measures decoding by every method."""


def _arrow(case: Case, args: PeersArgs) -> Any:
    # By default, PEFT takes the adapter's type from the first path's name.
    paths = [str(path) for path in case.adapters.values()]
    return create_arrow_model(
        base_model(case), task_specific_adapter_paths=paths, arrow_config=ArrowConfig(top_k=args.selected)
    ).eval()


def _xlora(case: Case, args: PeersArgs) -> Any:
    base = base_model(case)
    base.config.use_cache = base.generation_config.use_cache = False  # PEFT's X-LoRA refuses a KV cache
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters={str(i): str(path) for i, path in enumerate(case.adapters.values())},  # it loads them by number
        top_k_lora=args.selected,
    )
    found: Any = get_peft_model(base, config)
    return found.to(base.dtype).eval()


def _baseline(attach: Callable[..., Any]) -> Callable[[Case, PeersArgs], Any]:
    def build(case: Case, args: PeersArgs) -> Any:
        read = {name: read_adapter(path, name) for name, path in case.adapters.items()}
        options: dict[str, Any] = {"top_k": args.selected}
        if attach is attach_mola:
            most = len(read)
            options["num_experts"] = tuple(max(args.selected, round(most * share)) for share in (0.25, 0.5, 0.75, 1.0))
        try:
            return attach(base_model(case), read, **options)
        except ValueError as error:
            raise DLPLoRAError(f"{attach.__name__}: {error}") from error

    return build


PEERS: dict[str, Callable[[Case, PeersArgs], Any]] = {
    PEFT_ONE: lambda case, args: peft_one(case),
    PEFT_ACTIVE: lambda case, args: peft_active(case, args.selected),
    "peft merged": lambda case, args: peft_merged(case),
    "peft arrow": _arrow,
    "peft x-lora": _xlora,
    "meteora (ours)": _baseline(attach_meteora),
    "moral (ours)": _baseline(attach_moral),
    "mola (ours)": _baseline(attach_mola),
    "pesc (ours)": _baseline(attach_pesc),
    "lora-switch (ours)": _baseline(attach_lora_switch),
}
"""Every peer by name; "(ours)" marks methods that this package wrote from a paper."""
