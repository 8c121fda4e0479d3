"""The catalog's tasks from the Hugging Face hub: a task's name in, its data set's rows as Examples out.

Prompts are built as in BIG-bench, with one option per line. Rows that are left out are counted and logged.
"""

import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlp_lora.errors import TaskError
from dlp_lora.tasks.catalog import CATALOG, CatalogTask, composite, expand_composites
from dlp_lora.tasks.sources import read_tasks
from dlp_lora.tasks.task import Example, Task

HUB = "hub"
NUM_TRAIN = 900
NUM_TEST = 100
MAX_ROWS = 20_000
"""The number of rows of a split that are read, drawn at random."""
MAX_TEST_PER_TEXT = 3
MAX_PROMPT = 1200
LONGER_PROMPTS = {"question_selection": 1600, "cnn_dailymail": 1600}
MAX_ARTICLE = 1500
MAX_INSTRUCTED_ANSWER = 1000
NEWS_INSTRUCTIONS = {
    "news_commentary_de": ("de", "Den folgenden Text ins Englische übersetzen."),
    "news_commentary_es": ("es", "Traducir las siguientes frases al inglés."),
    "news_commentary_it": ("it", "Tradurre le seguenti frasi in inglese."),
}

# Tasks whose prompts name their options, so that no option lines are added, and those without options.
OPTIONS_IN_TEXT = (
    "epistemic_reasoning",
    "formal_fallacies_syllogisms_negation",
    "play_dialog_same_or_different",
    "vitaminc_fact_verification",
)
FREE_ANSWERS = ("disfl_qa", "object_counting")
# The line that asks for the answer: options go before it, or at the end of prompts without it.
ASKS = re.compile(
    r"\n(A:|Answer:|Language:|The above reasoning is|Length of longest common subsequence:"
    r"|Choose the appropriate question which has the given answer\.)$"
)
OPTION_LINE = re.compile(r"\n *choice: ?(.*)")

# Many questions are about one text. They are all in train or all in test; otherwise the adapter would be scored on
# texts that it has learned. The group is the text, or a run of rows with overlapping windows of it.
TEXTS = {
    "abstract_narrative_understanding": re.compile(r"\nNarrative: (.*)"),
    "contextual_parametric_knowledge_conflicts": re.compile(r"\nQuestion: (.*)"),
    "disfl_qa": re.compile(r"\ncontext: (.*)"),
    "linguistics_puzzles": re.compile(r"English: (.*?)(?: Other:|\n)"),
    "logical_deduction": re.compile(r"\n\n(.*) Which choice is correct\?"),
    "question_selection": re.compile(r" Context: (.*)"),
    "topical_chat": re.compile(r'"(.*?)"', re.DOTALL),
    "tracking_shuffled_objects": re.compile(r"(.*) At the end of the", re.DOTALL),
    "vitaminc_fact_verification": re.compile(r"\nPassage: (.*?):"),
    "winowhy": re.compile(r"\n\n(.*?) The '"),
}
RUNS = {"play_dialog_same_or_different": 24, **dict.fromkeys(NEWS_INSTRUCTIONS, 20)}

logger = logging.getLogger(__name__)


def read_data(data: str | Path, names: str | Iterable[str] | None = None) -> list[Task]:
    """The tasks of a data directory, or of the hub if `data` is "hub"; `names` may have composites."""
    chosen = None if names is None else expand_composites(names)
    return read_hub_tasks(chosen) if is_hub(data) else read_tasks(data, names=chosen)


def is_hub(data: str | Path) -> bool:
    """True for "hub", unless there is a folder of that name."""
    return str(data) == HUB and not Path(data).exists()


def read_hub_tasks(
    names: str | Iterable[str] | None = None,
    *,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
    seed: int = 0,
    mirror: str | Path | None = None,
) -> list[Task]:
    """Tasks of the catalog from the hub, the same ones for the same seed.

    Test examples come from the official test part if there is one. No prompt is in both parts, nor are two questions
    about the same text. A `mirror` is a folder of data set folders, `<owner>/<name>`, to read instead.

    Raises:
        TaskError: for an unknown name, a data set that is missing or has too few rows, or without `datasets`.
    """
    if num_train < 1 or num_test < 0:
        raise ValueError(f"num_train={num_train}, num_test={num_test}; expected at least 1 and 0")
    chosen = tuple(CATALOG) if names is None else composite(names)
    return [
        _read_task(CATALOG[name], num_train=num_train, num_test=num_test, seed=seed, mirror=mirror) for name in chosen
    ]


@dataclass(frozen=True, kw_only=True)
class _Question:
    example: Example
    text: str
    """The text of a question: questions with the same text stay together."""


def _read_task(task: CatalogTask, *, num_train: int, num_test: int, seed: int, mirror: str | Path | None) -> Task:
    rng = random.Random(f"{task.name} {seed}")
    questions = _questions(task, task.source.train_split, rng, mirror)
    if task.source.test_split is None:
        train, test = _cut(questions, num_test, rng)
    else:
        _, test = _cut(_questions(task, task.source.test_split, rng, mirror), num_test, rng)
        tested = {example.prompt for example in test}
        train, _ = _cut([q for q in questions if q.example.prompt not in tested], 0, rng)
    if len(train) < num_train or len(test) < num_test:
        raise TaskError(
            f"{task.name}: {task.source} has {len(train)} usable rows for train and {len(test)} for test; "
            f"expected {num_train} and {num_test}; ask for fewer"
        )
    return Task(name=task.name, train=tuple(train[:num_train]), test=tuple(test))


def _cut(questions: list[_Question], num_test: int, rng: random.Random) -> tuple[list[Example], list[Example]]:
    """Takes texts, and a few test examples of each, until there are enough; returns train and test examples."""
    texts: dict[str, list[Example]] = {}
    for question in questions:
        texts.setdefault(question.text, []).append(question.example)
    groups = list(texts.values())
    rng.shuffle(groups)
    test: list[Example] = []
    while groups and len(test) < num_test:
        test += groups.pop()[:MAX_TEST_PER_TEXT]
    train = [example for group in groups for example in group]
    rng.shuffle(train)
    return train, test[:num_test]


def _questions(task: CatalogTask, split: str, rng: random.Random, mirror: str | Path | None) -> list[_Question]:
    rows = _load(task, split, mirror)
    chosen = sorted(rng.sample(range(len(rows)), min(len(rows), MAX_ROWS)))
    questions: dict[str, _Question] = {}
    ambiguous: set[str] = set()
    left_out: Counter[str] = Counter()
    for index, row in zip(chosen, rows.select(chosen), strict=True):
        example = READERS[task.source.dataset](task.name, row)
        if example is None:
            left_out["unusable"] += 1
        elif len(example.prompt) > LONGER_PROMPTS.get(task.name, MAX_PROMPT):
            left_out["too long"] += 1
        elif example.prompt not in questions:
            questions[example.prompt] = _Question(example=example, text=_text(task.name, example, index))
        elif questions[example.prompt].example.answer == example.answer:
            left_out["repeated"] += 1
        else:
            ambiguous.add(example.prompt)
            left_out["with two answers"] += 1
    if ambiguous:
        left_out["with two answers"] += len(ambiguous)  # the first rows of these prompts
    if left_out:
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        logger.warning("%s: left out %d of %d rows (%s)", task.name, left_out.total(), len(chosen), counts)
    return [question for prompt, question in questions.items() if prompt not in ambiguous]


def _load(task: CatalogTask, split: str, mirror: str | Path | None) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TaskError('the hub is read with the package datasets; run `pip install "dlp-lora[hub]"`') from error
    source = task.source
    path = source.dataset if mirror is None else str(Path(mirror) / source.dataset)
    try:
        return load_dataset(path, source.config, split=split)
    except Exception as cause:  # datasets raises many kinds of errors
        raise TaskError(
            f"{task.name}: {source} ({split}) cannot be loaded from {mirror or 'the hub'}: {cause}; "
            "check the connection, or give a folder of task folders"
        ) from cause


def _text(name: str, example: Example, index: int) -> str:
    if name in RUNS:
        return str(index // RUNS[name])
    if name == "elementary_math_qa":
        # A word problem has five forms, one of them with only hints; the options are the same.
        return "\n".join(sorted(example.choices or ()))
    match = TEXTS[name].search(example.prompt) if name in TEXTS else None
    return match[1] if match else example.prompt


def _read_bigbench(name: str, row: Mapping[str, Any]) -> Example | None:
    prompt = _tidy(row["inputs"])
    scores = dict(zip(row["multiple_choice_targets"], row["multiple_choice_scores"], strict=True))
    if CATALOG[name].kind == "qa" or name in FREE_ANSWERS:
        return _example(prompt, row["targets"])
    right = [option for option, score in scores.items() if score == max(scores.values())]
    if not prompt or len(right) == len(scores):
        return None
    # A count is listed as "3" and as "three", both right; only the digits become options.
    listed = [option for option in scores if len(right) == 1 or option.isdigit()]
    if name == "logical_deduction":
        prompt += " Which choice is correct?"  # the source has statements only
    shown = OPTION_LINE.findall(prompt)
    options = shown if sorted(shown) == sorted(listed) else listed
    if name not in OPTIONS_IN_TEXT and not prompt.endswith("Valid/Invalid?"):
        prompt = _with_options(OPTION_LINE.sub("", prompt), options)
    return _example(prompt, right, options)


def _with_options(prompt: str, options: list[str]) -> str:
    lines = "".join(f"\nchoice: {option}" for option in options)
    asks = ASKS.search(prompt)
    return f"{prompt}{lines}" if asks is None else f"{prompt[: asks.start()]}{lines}{asks[0]}"


def _read_gsm8k(name: str, row: Mapping[str, Any]) -> Example | None:
    return _example(row["question"], [row["answer"]])


def _read_alpaca(name: str, row: Mapping[str, Any]) -> Example | None:
    if len(row["output"]) > MAX_INSTRUCTED_ANSWER:
        return None
    return _example("\n".join(filter(None, (row["instruction"], row["input"]))), [row["output"]])


def _read_cnn_dailymail(name: str, row: Mapping[str, Any]) -> Example | None:
    article = row["article"]
    if len(article) > MAX_ARTICLE:
        end = max(article.rfind(mark, 0, MAX_ARTICLE) for mark in (". ", "! ", "? "))
        article = article[: end + 1]
    if not article.strip():
        return None
    return _example(f"Generate a summarization of the news article.\n{article}", [row["highlights"]])


def _read_news_commentary(name: str, row: Mapping[str, Any]) -> Example | None:
    language, instruction = NEWS_INSTRUCTIONS[name]
    foreign, english = row["translation"][language] or "", row["translation"]["en"] or ""
    # Pairs of very different length are seldom translations of each other.
    if not (20 <= len(foreign) <= 500 and 15 <= len(english) <= 500 and 0.5 <= len(english) / len(foreign) <= 2):
        return None
    return _example(f"{instruction}\n{foreign}", [english])


def _example(prompt: str, answers: list[str], choices: list[str] | None = None) -> Example | None:
    prompt, references = _tidy(prompt), tuple(filter(None, (answer.strip() for answer in answers)))
    if not prompt or not references:
        return None
    return Example(
        prompt=prompt,
        answer=references[0],
        choices=None if choices is None else tuple(filter(None, (choice.strip() for choice in choices))),
        references=references,
    )


def _tidy(text: str) -> str:
    """Removes spaces at line ends, repeated empty lines, and blank space around the whole."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip()


READERS: dict[str, Callable[[str, Mapping[str, Any]], Example | None]] = {
    "hails/bigbench": _read_bigbench,
    "openai/gsm8k": _read_gsm8k,
    "abisee/cnn_dailymail": _read_cnn_dailymail,
    "Helsinki-NLP/news_commentary": _read_news_commentary,
    "tatsu-lab/alpaca": _read_alpaca,
}
"""Turns the rows of each data set into Examples, by the data set's id; None for a useless row."""
