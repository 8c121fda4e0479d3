"""The catalog: the 26 tasks of the paper's Table 8, the places of their data, and the composites of these tasks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dlp_lora.errors import TaskError

Kind = Literal["mcq", "qa"]

METRICS: dict[Kind, tuple[str, ...]] = {"mcq": ("accuracy",), "qa": ("bleu", "rouge1", "rougeL")}
"""The paper's measures for each kind of task."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The place of a task's data on the Hugging Face hub."""

    dataset: str
    config: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    """The official test part; None if train and test come from one split."""
    bigbench: str | None = None
    """The task's name in BIG-bench."""
    licence: str | None = None
    """From the data set's card; None if the card has none."""

    def __str__(self) -> str:
        return f"{self.dataset} {self.config}" if self.config else self.dataset


@dataclass(frozen=True, kw_only=True)
class CatalogTask:
    """One of the paper's tasks. `name` is its folder's name, `paper_name` its name in the paper's tables."""

    name: str
    paper_name: str
    kind: Kind
    source: Source

    @property
    def metrics(self) -> tuple[str, ...]:
        """The paper's measures for it."""
        return METRICS[self.kind]


def _bigbench(name: str, paper_name: str, kind: Kind = "mcq") -> CatalogTask:
    # `default` is all of it; its train and validation splits share narratives, paragraphs and stories.
    source = Source(
        dataset="hails/bigbench",
        config=f"{name}_zero_shot",
        train_split="default",
        bigbench=name,
        licence="Apache-2.0",
    )
    return CatalogTask(name=name, paper_name=paper_name, kind=kind, source=source)


def _qa(name: str, paper_name: str, source: Source) -> CatalogTask:
    return CatalogTask(name=name, paper_name=paper_name, kind="qa", source=source)


def _news(config: str) -> Source:
    return Source(dataset="Helsinki-NLP/news_commentary", config=config)


_TASKS = (
    # In the order of the paper's Table 1 ...
    _bigbench("abstract_narrative_understanding", "AbsNarr"),
    _bigbench("contextual_parametric_knowledge_conflicts", "ConParaKC"),
    _bigbench("cs_algorithms", "CSAlg"),
    _bigbench("disfl_qa", "DisflQA"),
    _bigbench("elementary_math_qa", "ElemMath"),
    _bigbench("epistemic_reasoning", "EpiReason"),
    _bigbench("formal_fallacies_syllogisms_negation", "FormFall"),
    _bigbench("language_identification", "LangID"),
    _bigbench("logical_deduction", "LogDeduc"),
    _bigbench("object_counting", "ObjCount"),
    _bigbench("play_dialog_same_or_different", "PlayDiag"),
    _bigbench("question_selection", "QuesSel"),
    _bigbench("reasoning_about_colored_objects", "ColorReason"),
    _bigbench("tracking_shuffled_objects", "TrackObj"),
    _bigbench("unit_conversion", "UnitConv"),
    _bigbench("vitaminc_fact_verification", "VitaFact"),
    _bigbench("winowhy", "WinoWhy"),
    # ... and of its Table 2.
    _qa("gsm8k", "GSM8K", Source(dataset="openai/gsm8k", config="main", test_split="test", licence="MIT")),
    _qa(
        "cnn_dailymail",
        "CNNDM",
        Source(dataset="abisee/cnn_dailymail", config="3.0.0", test_split="test", licence="Apache-2.0"),
    ),
    _bigbench("linguistics_puzzles", "LingPuzz", "qa"),
    _qa("news_commentary_de", "NewsDE", _news("de-en")),
    _qa("news_commentary_es", "NewsES", _news("en-es")),
    _qa("news_commentary_it", "NewsIT", _news("en-it")),
    _bigbench("strategyqa", "StratQA", "qa"),
    _bigbench("topical_chat", "TopChat", "qa"),
    _qa("alpaca", "ALPACA", Source(dataset="tatsu-lab/alpaca", licence="CC-BY-NC-4.0")),
)

CATALOG: dict[str, CatalogTask] = {task.name: task for task in _TASKS}
"""The 26 tasks by name: the 17 of kind mcq first, then the 9 of kind qa."""

COMPOSITES: dict[str, tuple[str, ...]] = {
    "composite-9": tuple(task.name for task in _TASKS if task.kind == "qa"),
    "composite-17": tuple(task.name for task in _TASKS if task.kind == "mcq"),
    "composite-26": tuple(CATALOG),
}
"""The paper's pooled settings by name (its Table 3)."""


def composite(names: str | Iterable[str]) -> tuple[str, ...]:
    """The tasks of the catalog for a composite, a name, or a comma-separated list of both.

        >>> composite("composite-9")[:2]
        ('gsm8k', 'cnn_dailymail')
        >>> composite("winowhy, strategyqa")
        ('winowhy', 'strategyqa')

    Raises:
        TaskError: if a name is neither a composite nor in the catalog, or there is no name.
    """
    expanded = expand_composites(names)
    unknown = [name for name in expanded if name not in CATALOG]
    if unknown or not expanded:
        fault = f"no task {', '.join(map(repr, unknown))} in the catalog" if unknown else "no task is named"
        raise TaskError(f"{fault}; choose from {', '.join((*COMPOSITES, *CATALOG))}")
    return expanded


def expand_composites(names: str | Iterable[str]) -> tuple[str, ...]:
    """The names, each once, with composites replaced by their tasks; other names do not change."""
    listed = names.split(",") if isinstance(names, str) else names
    stripped = (name.strip() for name in listed)
    return tuple(dict.fromkeys(task for name in stripped if name for task in COMPOSITES.get(name, (name,))))
