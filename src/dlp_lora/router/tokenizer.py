"""How routers read text: through any `tokenizer.json`, without loading a model's tokenizer class."""

from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from dlp_lora.errors import RouterError, reason_of

MAX_CHARS = 32_000  # longer texts keep their end


def load_tokenizer(source: str | Path, **kwargs: Any) -> Tokenizer:
    """Loads the tokenizer of a folder or hub id, for a router to read text with; `from_pretrained` gets `kwargs`.

    Raises:
        RouterError: if there is none, or none of the fast kind.
    """
    from transformers import AutoTokenizer  # seconds, and only who makes a router needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), **{"trust_remote_code": False, **kwargs})
    except Exception as error:  # the tokenizers library raises bare ones for files that it cannot read
        raise RouterError(f"no tokenizer can be loaded from {str(source)!r}: {reason_of(error)}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RouterError(f"the tokenizer of {str(source)!r} has no tokenizer.json; choose another with --tokenizer")
    return cast(Tokenizer, backend)


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Copies a tokenizer, without the padding and truncation that its file may ask for."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: not the number of tokens, as ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1
