"""Questions in a row: several examples in, one prompt that asks them all and the parts of its answer out.

A router can switch between the parts only at the end of a sentence, so the answers should end in ".", "!" or "?".
Nothing is added to the others.
"""

from collections.abc import Sequence

from dlp_lora.tasks.task import Example


def compose(examples: Sequence[Example], separator: str = " ") -> Example:
    """One example that asks all the questions and answers them in order (serial-n)."""
    _check_whole(examples)
    return Example(
        prompt=separator.join(example.prompt for example in examples),
        answer=separator.join(example.answer for example in examples),
    )


def serial(*examples: Example, opener: str = " The") -> tuple[Example, ...]:
    """The training example of each question's adapter for the joined prompt: its part of the answer.

    The earlier answers are a prefix. Each part but the last ends with the opener of the next one and without
    end-of-sequence, because there the next adapter continues.

        >>> sums, days = serial(
        ...     Example(prompt="What is 1 + 2?", answer="The result is 3."),
        ...     Example(prompt="Which day follows Monday?", answer="The day is Tuesday."),
        ... )
        >>> sums.answer, sums.complete
        ('The result is 3. The', False)
        >>> days.answer_prefix, days.answer
        ('The result is 3.', ' The day is Tuesday.')
    """
    _check_whole(examples)
    _check_opener(examples[1:], opener=opener)
    last = len(examples) - 1
    return tuple(
        Example(
            prompt=compose(examples).prompt,
            answer_prefix=compose(examples[:i]).answer if i else "",
            answer=(" " if i else "") + example.answer + ("" if i == last else opener),
            complete=i == last,
        )
        for i, example in enumerate(examples)
    )


def _check_whole(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("found no examples; expected at least one question to ask")
    for example in examples:
        if example.answer_prefix or not example.complete:
            raise ValueError(
                f"the example {example.prompt!r} is already part of a longer answer; expected whole examples"
            )


def _check_opener(examples: Sequence[Example], *, opener: str) -> None:
    for example in examples:
        if not f" {example.answer}".startswith(opener):
            raise ValueError(
                f"the answer {example.answer!r} does not begin with the opener {opener!r}; "
                "pass as opener= how it begins, after a space"
            )
