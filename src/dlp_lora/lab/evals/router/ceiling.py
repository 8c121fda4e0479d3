"""The ceiling: the accuracy of a much larger classifier on the same samples, trained only for this.

Logistic regression over TF-IDF of words and word pairs, of 2 to 5 letters too where it matters most, each part of the
context apart: up to a million features. What it gets wrong is mostly not in the text.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from dlp_lora.errors import DLPLoRAError
from dlp_lora.lab.evals.router.samples import Sample

MAX_HISTORY = 300  # characters of it that are read, the last ones
NUM_FEATURES = 2**18  # of each part and kind
INSTALL = "the ceiling needs scikit-learn; run `pip install 'dlp-lora[eval]'`"


def ceiling(train: Sequence[Sample], test: Sequence[Sample], *, seed: int = 0) -> Bool[np.ndarray, " test"]:
    """The samples of `test` that a large classifier trained on `train` gets right.

    Raises:
        DLPLoRAError: if scikit-learn is not installed.
    """
    try:
        from scipy.sparse import hstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import SGDClassifier
    except ImportError as error:
        raise DLPLoRAError(INSTALL) from error
    learned, asked = [], []
    prompts, histories, answers = zip(*map(_parts, (*train, *test)), strict=True)
    words = {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"\w+|[^\w\s]"}
    letters = {"analyzer": "char_wb", "ngram_range": (2, 5)}
    for part, kind in ((prompts, words), (prompts, letters), (histories, words), (answers, words)):
        if any(part):
            vectoriser = TfidfVectorizer(**kind, max_features=NUM_FEATURES, sublinear_tf=True, dtype=np.float32)
            learned.append(vectoriser.fit_transform(part[: len(train)]))
            asked.append(vectoriser.transform(part[len(train) :]))
    classifier = SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=30, random_state=seed)
    classifier.fit(hstack(learned).tocsr(), [s.task for s in train])
    found: Bool[np.ndarray, " test"] = classifier.predict(hstack(asked).tocsr()) == np.array([s.task for s in test])
    return found


def shared(train: Sequence[Sample], test: Sequence[Sample]) -> float:
    """The share of test samples whose very text, context and all, is another task's in training, too."""
    tasks: dict[Any, set[str]] = defaultdict(set)
    for sample in train:
        tasks[sample.context].add(sample.task)
    return sum(bool(tasks.get(s.context, set()) - {s.task}) for s in test) / len(test)


def _parts(sample: Sample) -> tuple[str, str, str]:
    context = sample.context
    return context.prompt, context.history[-MAX_HISTORY:], context.answer[-MAX_HISTORY:] + context.sentence
