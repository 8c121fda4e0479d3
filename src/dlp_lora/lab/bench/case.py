"""The shared parts of the benchmarks: settings in, a case for each precision, and a record out."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dlp_lora.lab.bench.memory import bandwidth_gb_s
from dlp_lora.lab.bench.random_adapters import write_random_adapters
from dlp_lora.lab.records.environment import environment
from dlp_lora.progress import OnProgress, unseen
from dlp_lora.tasks import PROCEDURAL, procedural_task
from dlp_lora.tasks.hub import read_data

PROMPTS = (
    "Tell me about the city you would most like to visit, and what you would do there on the first day.",
    "How does a bicycle stay upright when it moves? Explain it to a child.",
    "Write a short letter to a neighbour who has just moved in.",
    "What should I think about before I buy a used car?",
    "Why is the sky blue in the day and red in the evening? Give the reason in plain words.",
    "Plan a meal for six people, two of whom eat no meat. Say what to buy and in which order to cook.",
    "Explain how a library lends books, and what happens when one comes back late.",
    "My phone does not charge any more. What could be the matter, and what should I try first?",
)
MAX_PROMPTS = 64  # of a data folder

Row = dict[str, Any]
"""One row of a benchmark's table, as JSON data."""


# The texts are the help of the command line's options.
Rounds = Annotated[int, "Rounds after the warm-up."]
NumAdapters = Annotated[int, "Adapters in the bank."]
NewTokens = Annotated[int, "Tokens per run."]
Batch = Annotated[int, "Prompts at once."]
Dtypes = Annotated[tuple[str, ...], "Precisions of the base model."]
Prepacked = Annotated[bool, "Also measure prepacked weights, on a CPU."]


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """How every benchmark measures. All whole numbers of its settings are at least 1."""

    rounds: Rounds = 7
    device: Annotated[str, "cpu or cuda."] = "cpu"
    threads: Annotated[int | None, "Threads of torch. [default: torch's choice]"] = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(type(number) is int and number < 1 for number in numbers) or (value == () != field.default):
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"benchmarks run on cpu or cuda, not on {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class AdapterBenchArgs(BenchArgs):
    """How a benchmark that runs random adapters measures."""

    selected: Annotated[int, "Adapters fused at a time."] = 3
    r: Annotated[int, "Rank of the adapters."] = 8
    target_modules: Annotated[tuple[str, ...], 'Adapted modules, or "all-linear".'] = ("q_proj", "v_proj")
    dtypes: Dtypes = ("bfloat16",)
    prompts: Annotated[str | None, "Folder of task folders with questions. [default: the package's prompts]"] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for dtype in self.dtypes:
            found = getattr(torch, dtype, None)
            if not isinstance(found, torch.dtype) or not found.is_floating_point:
                raise ValueError(f"no dtype {dtype!r}; choose from bfloat16, float16, float32")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One precision of a benchmark: the parts of its variants, and their prompts."""

    benchmark: str
    model: str | Path
    dtype: str
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    adapters: Mapping[str, Path]
    texts: tuple[str, ...]
    bandwidth_gb_s: float
    on_progress: OnProgress = unseen

    @property
    def scenario(self) -> str:
        """Its name for a progress bar."""
        return f"{self.benchmark}, {self.dtype}"

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names."""
        return tuple(self.adapters)

    def prompts(self, batch: int = 1) -> list[dict[str, Tensor]]:
        """As many batches as there are texts, through the chat template where there is one, padded on the left."""
        count, template = len(self.texts), self.tokenizer.chat_template
        texts = list(self.texts)
        if template:
            chats = [[{"role": "user", "content": text}] for text in texts]
            texts = [
                str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
                for chat in chats
            ]
        batches = [[texts[(i + j) % count] for j in range(batch)] for i in range(count)]
        encoded = [
            self.tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=not template) for rows in batches
        ]
        return [{key: found[key].to(self.device) for key in ("input_ids", "attention_mask")} for found in encoded]

    def long_prompts(self, batch: int, length: int) -> dict[str, Tensor]:
        """One batch of rows of `length` tokens, each of other texts; questions of the package's own tasks come last."""
        own = [procedural_task(name, num_test=0).train for name in PROCEDURAL]
        texts = [*self.texts, *(example.prompt for turn in zip(*own, strict=True) for example in turn)]
        ids = self.tokenizer(" ".join(texts))["input_ids"]
        ids *= -(-batch * length // len(ids))
        found = torch.tensor(ids[: batch * length], device=self.device).view(batch, length)
        return {"input_ids": found, "attention_mask": torch.ones_like(found)}


Args = TypeVar("Args", bound=AdapterBenchArgs)


@dataclass(frozen=True, kw_only=True)
class Benchmark(Generic[Args]):
    """A benchmark: its settings, the rows that it measures of a case with so many adapters, and what it leaves out."""

    name: str
    args: type[Args]
    measure: Callable[[Case, Args], list[Row]]
    num_adapters: Callable[[Args], int]
    does_not_measure: str

    def __call__(
        self, model: str | Path, args: Args | None = None, *, on_progress: OnProgress = unseen
    ) -> dict[str, Any]:
        """Makes random adapters and measures a case for each precision; gives the record as JSON data.

        Raises:
            DLPLoRAError: if paths that must agree differ.
        """
        args = args or self.args()
        device = begin(args)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(model), padding_side="left", trust_remote_code=False
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        texts, bandwidth = read_prompts(args.prompts), bandwidth_gb_s(device)
        rows: list[Row] = []
        with tempfile.TemporaryDirectory() as folder:
            adapters = write_random_adapters(
                model, Path(folder), self.num_adapters(args), r=args.r, target_modules=args.target_modules
            )
            for dtype in args.dtypes:
                case = Case(
                    benchmark=self.name,
                    model=model,
                    dtype=dtype,
                    device=device,
                    tokenizer=tokenizer,
                    adapters=adapters,
                    texts=texts,
                    bandwidth_gb_s=bandwidth,
                    on_progress=on_progress,
                )
                rows += [{"name": row["name"], "dtype": dtype, **row} for row in self.measure(case, args)]
        found = record(self.name, model, args, rows, bandwidth=bandwidth, does_not_measure=self.does_not_measure)
        return {**found, "num_prompts": len(texts)}


def begin(args: BenchArgs) -> torch.device:
    """Sets the number of threads; gives the device to measure on."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return torch.device(args.device)


def record(
    benchmark: str, model: str | Path, args: BenchArgs, rows: list[Row], *, bandwidth: float, does_not_measure: str
) -> dict[str, Any]:
    """Returns the results, the settings and the environment as JSON data."""
    settings = asdict(args)
    if settings.get("prompts"):
        settings["prompts"] = Path(settings["prompts"]).name
    return {
        "benchmark": benchmark,
        "model": Path(model).name,
        "settings": settings,
        "environment": environment(),
        "bandwidth_gb_s": round(bandwidth, 2),
        "rows": rows,
        "does_not_measure": does_not_measure,
    }


def read_prompts(data: str | None) -> tuple[str, ...]:
    """The package's prompts, or questions of a data folder, one of each task in turn."""
    if data is None:
        return PROMPTS
    examples = zip_longest(*(task.test or task.train for task in read_data(data)))
    return tuple(example.prompt for turn in examples for example in turn if example is not None)[:MAX_PROMPTS]
