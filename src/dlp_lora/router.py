"""The router: what has been said in, a probability per adapter name out (section 3.1, Eq. 3).

It reads text only and never sees the language model. MiniMLP is the paper's plugin: the mean embedding of the
text's tokens and four linear layers, about 5M parameters, nearly all of them embeddings.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from dlp_lora.errors import RouterError
from dlp_lora.folders import recover_folder, replace_folder

CONFIG_FILE = "router_config.json"
WEIGHTS_FILE = "router.safetensors"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = 1


@dataclass(frozen=True)
class Context:
    """What the router reads: the prompt, the answer before the sentence that opens now, and its first token.

    Plain text, without special tokens or chat template. `answer` and `sentence` are empty at the prompt.
    """

    prompt: str
    answer: str = ""
    sentence: str = ""


@runtime_checkable
class Router(Protocol):
    """Gives each adapter name a probability; the names join it with the bank."""

    names: tuple[str, ...]

    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]: ...

    def save_pretrained(self, path: str | Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class MiniMLPConfig:
    """The size of a MiniMLP and how it reads text."""

    dim: int = 96
    hidden: int = 256
    half_life: float = 16.0  # tokens after which a token counts half in the bags that lean to one end
    max_chars: int = 32_000  # longer texts keep their end
    temperature: float = 1.0  # fitted on held-out text; the logits are divided by it

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "half_life", "max_chars", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MiniMLPConfig.{name} must be positive, got {getattr(self, name)}")


class MiniMLP(nn.Module):
    """The paper's 4-layer mini-MLP over bags of tokens.

    A text is five bags, so that order is not lost altogether: the prompt's mean, its beginning, its end; the
    answer's mean and its end. Each is a weighted mean of token embeddings, zero where the text is empty.
    """

    NUM_BAGS = 5

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer, config: MiniMLPConfig | None = None) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names):
            raise RouterError(f"a router needs at least one adapter name, each once; got {list(names)}")
        self.names = tuple(names)
        self.config = config = config or MiniMLPConfig()
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        vocab = max(self.tokenizer.get_vocab().values()) + 1  # not the vocabulary's size: ids may have gaps
        self.embedding = nn.EmbeddingBag(vocab, config.dim, mode="sum", sparse=True)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.layers = nn.Sequential(
            nn.Linear(self.NUM_BAGS * config.dim, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, len(names)),
        )

    @property
    def num_parameters(self) -> int:
        """How many parameters the router has."""
        return sum(p.numel() for p in self.parameters())

    def encode(self, text: str) -> list[int]:
        """Turns text into the token ids that the bags hold: the one way in for training, `route` and decoding."""
        ids: list[int] = self.tokenizer.encode(self._cut(text), add_special_tokens=False).ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many texts at once, each as `encode` does."""
        cut = [self._cut(text) for text in texts]
        return [encoding.ids for encoding in self.tokenizer.encode_batch(cut, add_special_tokens=False)]

    def set_temperature(self, temperature: float) -> None:
        """Sets what the logits are divided by; fitted on held-out text."""
        self.config = replace(self.config, temperature=temperature)

    def forward(self, contexts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Float[Tensor, "batch adapters"]:
        """Gives the logits of encoded (prompt, answer) pairs."""
        ids: list[Tensor] = []
        weights: list[Tensor] = []
        offsets: list[int] = []
        total = 0
        for prompt, answer in contexts:
            for tokens, leans in ((prompt, (0, 1, -1)), (answer, (0, -1))):
                bag = torch.tensor(tokens, dtype=torch.long)
                for lean in leans:
                    ids.append(bag)
                    weights.append(_bag_weights(len(tokens), lean, self.config.half_life))
                    offsets.append(total)
                    total += len(tokens)
        device = self.embedding.weight.device
        bags = F.embedding_bag(
            torch.cat(ids).to(device),
            self.embedding.weight,
            torch.tensor(offsets, device=device),
            mode="sum",
            sparse=True,
            per_sample_weights=torch.cat(weights).to(device, self.embedding.weight.dtype),
        )
        logits: Tensor = self.layers(bags.view(len(contexts), -1))
        return logits

    @torch.no_grad()
    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]:
        """Gives a probability per adapter, on the CPU."""
        encoded = [(self.encode(c.prompt), self.encode(c.answer + c.sentence)) for c in contexts]
        logits: Tensor = self(encoded)
        return (logits.float() / self.config.temperature).softmax(dim=-1).cpu()

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the router to a folder: weights, settings, tokenizer; the folder is replaced as a whole."""
        with replace_folder(path, marker=CONFIG_FILE) as folder:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS_FILE)
            self.tokenizer.save(str(folder / TOKENIZER_FILE))
            config = {"format": FORMAT, "type": "mini-mlp", "names": self.names, **asdict(self.config)}
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "MiniMLP":
        """Reads a folder that `save_pretrained` wrote.

        Raises:
            RouterError: if a file is missing, damaged or of a later format.
        """
        path = Path(path)
        recover_folder(path)
        if not (path / CONFIG_FILE).is_file():
            raise RouterError(f"{path} is not a router folder: it has no {CONFIG_FILE}; train one with train-router")
        try:
            config = json.loads((path / CONFIG_FILE).read_text())
            if config.pop("format") != FORMAT or config.pop("type") != "mini-mlp":
                raise RouterError(f"{path} was written by a later version; upgrade dlp-lora")
            names = config.pop("names")
            router = cls(names, Tokenizer.from_file(str(path / TOKENIZER_FILE)), MiniMLPConfig(**config))
            router.load_state_dict(load_file(path / WEIGHTS_FILE))
        except RouterError:
            raise
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise RouterError(f"{path} is damaged ({error}); copy it again or train it anew") from error
        except Exception as error:
            # The tokenizers library raises bare Exception for files that it cannot read.
            raise RouterError(f"{path}/{TOKENIZER_FILE} cannot be read ({error}); copy it again") from error
        return router.eval()

    def _cut(self, text: str) -> str:
        return text.strip()[-self.config.max_chars :]


@lru_cache(maxsize=4096)
def _bag_weights(length: int, lean: int, half_life: float) -> Float[Tensor, " tokens"]:
    if length == 0:
        return torch.empty(0)
    if lean == 0:
        return torch.full((length,), 1 / length)
    distance = torch.arange(length) if lean > 0 else torch.arange(length - 1, -1, -1)
    weights = 0.5 ** (distance / half_life)
    return weights / weights.sum()
