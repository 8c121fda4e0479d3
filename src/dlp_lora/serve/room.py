"""Room: whether a request fits into the model's context, and whether several have places."""

from collections.abc import Iterable

from dlp_lora.errors import PromptError
from dlp_lora.serve.backend import QueueFullError, Request


def room_for(request: Request, *, max_context: int, vocab_size: int) -> int:
    """Checks the tokens of a request; returns the largest number of its answer's tokens.

    Raises:
        PromptError: if the prompt is empty, has an unknown token, or leaves no room for `max_tokens`.
        ValueError: if the logit bias names an unknown token.
    """
    num_prompt, max_tokens = len(request.tokens), request.sampling.max_tokens
    if not num_prompt:
        raise PromptError("the prompt is empty; give at least one token of text")
    _check_ids("the prompt", request.tokens, vocab_size, PromptError)
    _check_ids("logit_bias", request.sampling.logit_bias, vocab_size, ValueError)
    room, num_new = max_context - num_prompt, 1 if max_tokens is None else max_tokens
    if room < num_new:
        raise PromptError(
            f"the prompt has {num_prompt} tokens, and {num_new} new ones do not fit: this model's maximum context "
            f"length is {max_context}; shorten the prompt or lower max_tokens"
        )
    return room if max_tokens is None else max_tokens


def check_places(num_new: int, num_open: int, max_open: int) -> None:
    """Checks that there is a place for each of some requests.

    Raises:
        QueueFullError: if there is not.
    """
    if num_open + num_new > max_open:
        more = f", and {num_new} more do not fit" if num_new > 1 else ""
        raise QueueFullError(f"{num_open} requests run or wait already{more}; try again later")


def _check_ids(what: str, ids: Iterable[int], vocab_size: int, error: type[Exception]) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise error(f"{what} has the token id {token}, and the model knows 0 to {vocab_size - 1}")
