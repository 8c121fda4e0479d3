"""Metrics: a free-running answer and its references in, a number out."""

import re
from collections.abc import Sequence


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end: what two equal answers share."""
    return " ".join(text.lower().split()).removesuffix(".")


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """True if the answer is one of the references, but for case, spaces and a final full stop."""
    return normalise(answer) in {normalise(reference) for reference in references}


def contains(answer: str, references: Sequence[str]) -> bool:
    """True if a reference stands in the answer as whole words.

    Lenient towards a model that answers at length: it is right if the value appears anywhere.
    """
    found = normalise(answer)
    wanted = filter(None, map(normalise, references))
    # "3" does not stand in "3.5", nor "5".
    return any(re.search(rf"(?<!\w)(?<!\d\.){re.escape(r)}(?!\w|\.\d)", found) for r in wanted)
