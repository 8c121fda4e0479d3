"""Compares the tokenizer and chat template in an adapter's folder with the base model's."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

_TEMPLATE, _CONFIG, _TOKENIZER, _ADDED = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "tokenizer.json",
    "added_tokens.json",
)
NUM_SHOWN = 3  # of the tokens that differ


class BaseTokens:
    """The tokenizer of a base model, from its files; `source` is its folder or hub id, "" for none."""

    def __init__(self, source: str) -> None:
        self.source = source

    def file(self, name: str) -> Path | None:
        """Returns one of its files, from its folder or the hub; None if it has no such file."""
        if not self.source:
            return None
        if Path(self.source).is_dir():
            path = Path(self.source) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.source, name))
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            return None

    @cached_property
    def template(self) -> str | None:
        """Its chat template."""
        return _template(self.file(_TEMPLATE), self.file(_CONFIG))

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Its tokens and their numbers."""
        return _tokens(self.file(_TOKENIZER), self.file(_CONFIG), self.file(_ADDED))

    @cached_property
    def rules(self) -> Any:
        """Its rules for cutting text into tokens."""
        return _rules(self.file(_TOKENIZER))


def foreign_tokens(path: Path, base: BaseTokens) -> list[str]:
    """Lists the differences between the tokenizer and chat template in an adapter's folder and the base's."""
    files = {name: _existing(path / name) for name in (_TEMPLATE, _CONFIG, _TOKENIZER, _ADDED)}
    if not any(files.values()) or not base.source:
        return []
    notes = []
    template = _template(files[_TEMPLATE], files[_CONFIG])
    if template is not None and template != base.template:
        than = "the base has none" if base.template is None else "differs from the base's"
        notes.append(f"{path} brings a chat template, which {than}: it is not used, and its adapter may expect it")
    tokens = _tokens(files[_TOKENIZER], files[_CONFIG], files[_ADDED])
    if tokens and base.tokens:
        if missing := [token for token in tokens if token not in base.tokens]:
            notes.append(
                f"{path} brings a tokenizer with {len(missing)} tokens that the base lacks ({_shown(missing)}): the "
                f"base reads them as other tokens"
            )
        if moved := [token for token, number in tokens.items() if base.tokens.get(token, number) != number]:
            notes.append(
                f"{path} brings a tokenizer in which {len(moved)} tokens have other numbers than in the base's "
                f"({_shown(moved)}): it was trained with another tokenizer"
            )
        if not missing and not moved and files[_TOKENIZER] and base.rules and _rules(files[_TOKENIZER]) != base.rules:
            notes.append(f"{path} brings a tokenizer that cuts text otherwise than the base's, which is used")
    return notes


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _shown(tokens: list[str]) -> str:
    return ", ".join(tokens[:NUM_SHOWN]) + (", ..." if len(tokens) > NUM_SHOWN else "")


def _json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}  # a tokenizer of an adapter is never used
    return data if isinstance(data, dict) else {}


def _template(jinja: Path | None, config: Path | None) -> str | None:
    if jinja is not None:
        return jinja.read_text(encoding="utf-8", errors="replace").strip()
    template = _json(config).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template.strip() if isinstance(template, str) else None


def _tokens(tokenizer: Path | None, config: Path | None, added: Path | None) -> dict[str, int]:
    data = _json(tokenizer)
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: token and score, in order
        vocab = {one[0]: i for i, one in enumerate(vocab) if isinstance(one, list) and one}
    tokens = dict(vocab) if isinstance(vocab, dict) else {}
    listed = data.get("added_tokens")
    tokens |= {t["content"]: t["id"] for t in listed or [] if isinstance(t, dict) and {"content", "id"} <= t.keys()}
    decoder = _json(config).get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdigit():
            tokens[token["content"]] = int(number)
    tokens |= {token: number for token, number in _json(added).items() if isinstance(number, int)}
    return tokens


def _rules(tokenizer: Path | None) -> Any:
    data = _json(tokenizer)
    model = data.get("model") if isinstance(data.get("model"), dict) else {}
    assert isinstance(model, dict)
    merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model.get("merges") or []]
    return (model.get("type"), merges, *(data.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")))
