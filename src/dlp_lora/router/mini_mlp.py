"""MiniMLP, the paper's plugin: bags of token embeddings and four linear layers, about 5M parameters, nearly all of
them embeddings.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from dlp_lora.router.context import Calibration, Context, Encoded, Measured, check_labels, has_text, listed
from dlp_lora.router.folder import SavedRouter, reading_router, write_router
from dlp_lora.router.nearness import Nearness
from dlp_lora.router.neighbours import Neighbours, Prompts
from dlp_lora.router.recall import Recall, with_evidence
from dlp_lora.router.tokenizer import MAX_CHARS, plain_tokenizer, vocab_size

# The bags of a text: its distinct tokens (0), its beginning (1), its end (-1). The history has only its end.
LEANS: Mapping[str, tuple[int, ...]] = {"history": (-1,), "prompt": (0, 1, -1), "answer": (0, -1)}
NUM_BAGS = sum(map(len, LEANS.values()))
PIECES = re.compile(r"\n|(?<=[.!?])[^\S\n]+(?=\S)")
HISTORY_CHARS = 4_000  # older text has hardly any weight
TINY = 1e-12
MAX_CACHED_CHARS = 4_000  # of a line or sentence whose tokens are cached
CACHE_SIZE = 1024  # texts whose bags are cached, so that a prompt is read once for all sentences of its answer


@dataclass(frozen=True, kw_only=True)
class MiniMLPConfig:
    """The size of a MiniMLP and how it reads text."""

    dim: int = 96
    hidden: int = 384
    half_life: float = 16.0  # tokens after which a token counts half, in the bags of a beginning or an end
    history_half_life: float = 32.0
    max_chars: int = MAX_CHARS  # longer texts keep their end

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "half_life", "history_half_life", "max_chars"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MiniMLPConfig.{name} must be positive, got {getattr(self, name)}")


class MiniMLP(nn.Module):
    """The paper's 4-layer mini-MLP over bags of tokens.

    A bag is a mean of token embeddings, or zero if the text is empty. A context is six bags: the end of the history;
    the prompt's distinct tokens, its beginning and its end; the answer's distinct tokens and its end. Distinct tokens
    count once each. In the other bags, a token's weight depends on its place.

    The layers and the head know the adapters that they were trained on. `near` recognises texts of none of them. For
    these texts, `neighbours` decides whether the prompt belongs to an adapter that joined later (`add_tasks` of
    `dlp_lora.training.extend`). So a new adapter changes little for the others. If the prompt is a part of a longer
    one, `recall` decides whether it can be a question by itself.
    """

    def __init__(
        self,
        trained: Sequence[str],
        tokenizer: Tokenizer,
        config: MiniMLPConfig | None = None,
        *,
        calibration: Calibration | None = None,
        near: Nearness | None = None,
        neighbours: Neighbours | None = None,
        recall: Recall | None = None,
    ) -> None:
        """`trained` are the adapters of the head; those that joined come after them in `names`."""
        super().__init__()
        self.trained = tuple(trained)
        self.near, self.neighbours, self.recall = near, neighbours, recall
        self.names = check_labels((*trained, *(neighbours.names if neighbours else ())))
        self.calibration = calibration or Calibration()
        self.measured: Measured | None = None
        self.config = config = config or MiniMLPConfig()
        self.tokenizer = plain_tokenizer(tokenizer)
        self._line_break: list[int] = self.tokenizer.encode("\n", add_special_tokens=False).ids
        self._encode_piece = lru_cache(CACHE_SIZE)(self._tokenize)
        self._prompt_logits = lru_cache(CACHE_SIZE)(self._read_prompt)
        self.embedding = nn.Embedding(vocab_size(self.tokenizer), config.dim, sparse=True)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.layers = nn.Sequential(
            nn.Linear(NUM_BAGS * config.dim, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(config.hidden, len(trained))
        self._bags: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._bags_of: tuple[int, int] = (0, 0)  # the state of the embeddings that they were made with

    @property
    def num_parameters(self) -> int:
        """How many parameters the router has."""
        return sum(p.numel() for p in self.parameters())

    def encode(self, context: Context) -> Encoded:
        """Turns a context into the token ids of its bags; training, `route` and decoding all use this."""
        return Encoded(*map(self._encode, self._parts(context).values()))

    def encode_all(self, contexts: Sequence[Context]) -> list[Encoded]:
        """Encodes many contexts at once, each as `encode` does."""
        parts = [[_pieces(text) for text in self._parts(context).values()] for context in contexts]
        pieces = list(dict.fromkeys(piece for texts in parts for text in texts for piece in text))
        encodings = self.tokenizer.encode_batch(pieces, add_special_tokens=False)
        ids = {piece: tuple(encoding.ids) for piece, encoding in zip(pieces, encodings, strict=True)}
        return [Encoded(*(self._join([ids[piece] for piece in text]) for text in texts)) for texts in parts]

    def features(self, contexts: Sequence[Encoded]) -> Float[Tensor, "batch hidden"]:
        """Gives the input of the head for encoded contexts."""
        bags = self._sum([(part, ids) for context in contexts for part, ids in context._asdict().items()])
        hidden: Tensor = self.layers(bags.view(len(contexts), -1))
        return hidden

    def forward(self, contexts: Sequence[Encoded]) -> Float[Tensor, "batch trained"]:
        """Gives the logits of the trained adapters for encoded contexts."""
        logits: Tensor = self.head(self.features(contexts))
        return logits

    def prompts(self, texts: Sequence[str]) -> Prompts:
        """Turns prompts into the input of `neighbours`."""
        ids = [self._encode(text.strip()[-self.config.max_chars :]) for text in texts]
        return Prompts(self._sum([("prompt", tokens) for tokens in ids]).view(len(texts), -1), ids)

    def fit(
        self, features: Float[Tensor, "batch hidden"], logits: Float[Tensor, "batch trained"]
    ) -> Float[Tensor, " batch"]:
        """Scores how well the likeliest trained adapter fits these features, on the CPU."""
        if not self.trained:
            return torch.full((len(logits),), -torch.inf)
        energy = logits.float().logsumexp(dim=-1).cpu()
        return energy if self.near is None else energy + self.near(features, logits.argmax(dim=-1))

    @torch.no_grad()
    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]:
        """Gives a probability per adapter, on the CPU."""
        logits = self.head(features := self._cached_features(contexts))
        scores = self._scores(contexts, features, logits)
        probabilities = self.calibration.probabilities(logits, scores)
        if (joined := self._joined(contexts)) is not None:
            # The softmax of the log-odds of trained adapters, joined adapters and none; the log-odds of none are 0.
            lead = (joined.amax(dim=-1) - F.softplus(self.calibration.log_odds(scores)))[:, None]
            probabilities = torch.cat(
                [probabilities * (-lead).sigmoid(), joined.softmax(dim=-1) * lead.sigmoid()], dim=-1
            )
        self._read_parts(contexts, logits, probabilities[:, : len(self.trained)])
        return probabilities * has_text(contexts)[:, None]

    @torch.no_grad()
    def scores(self, contexts: Sequence[Context]) -> Float[Tensor, " batch"]:
        """Scores how surely a text belongs to any of the adapters, with or without its history; higher is surer.

        The score is the free energy of the logits (Liu et al. 2020, arXiv 2010.03759), plus that of `near` if there is
        one: the energy accepts short and unusual texts, and the distance rejects foreign ones. An adapter that joined
        later counts if its log-odds are higher.
        """
        features = self._cached_features(contexts)
        scores = self._scores(contexts, features, self.head(features))
        if (joined := self._joined(contexts)) is not None:
            scores = torch.maximum(scores, self.calibration.score(joined.amax(dim=-1)))
        return scores

    def __repr__(self) -> str:
        measured = f"; {self.measured}" if self.measured is not None else ""
        return f"MiniMLP({listed(self.names)}; {self.num_parameters:,} parameters{measured})"

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the router to a folder: weights, settings, tokenizer; the folder is replaced as a whole."""
        write_router(
            path,
            SavedRouter(
                type="mini-mlp",
                names=self.names,
                settings={
                    "size": asdict(self.config),
                    "calibration": asdict(self.calibration),
                    "measured": self.measured and asdict(self.measured),
                },
                weights=self.state_dict(),
                tokenizer=self.tokenizer,
            ),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "MiniMLP":
        """Reads a folder that `save_pretrained` wrote.

        Raises:
            RouterError: if a file is missing or damaged, or the router is of another type or a later version.
        """
        with reading_router(path, "mini-mlp") as saved:
            size, calibration = MiniMLPConfig(**saved.settings["size"]), Calibration(**saved.settings["calibration"])
            # Earlier versions kept a memory of features.
            weights = {name: tensor for name, tensor in saved.weights.items() if name != "memory"}
            num_trained = len(weights["head.weight"])
            trained, joined = saved.names[:num_trained], saved.names[num_trained:]
            near, neighbours, recall = (_part(weights, name) for name in ("near", "neighbours", "recall"))
            router = cls(
                trained,
                saved.tokenizer,
                size,
                calibration=calibration,
                near=Nearness(*(near[name] for name in ("whiten", "centres", "spreads"))) if near else None,
                neighbours=Neighbours.from_weights(joined, neighbours) if neighbours else None,
                recall=Recall.from_weights(recall) if recall else None,
            )
            router.load_state_dict(weights)
            router.measured = (marks := saved.settings.get("measured")) and Measured(**marks)
        return router.eval()

    def _cached_features(self, contexts: Sequence[Context]) -> Float[Tensor, "batch hidden"]:
        bags = self._cached_bags([part for context in contexts for part in self._parts(context).items()])
        features: Tensor = self.layers(bags.view(len(contexts), -1))
        return features

    def _scores(
        self,
        contexts: Sequence[Context],
        features: Float[Tensor, "batch hidden"],
        logits: Float[Tensor, "batch adapters"],
    ) -> Float[Tensor, " batch"]:
        scores = self.fit(features, logits)
        # A prompt that fits an adapter still fits after a foreign history.
        after = [i for i, c in enumerate(contexts) if c.history.strip() and (c.prompt + c.answer + c.sentence).strip()]
        if after:
            features = self._cached_features([replace(contexts[i], history="") for i in after])
            scores[after] = torch.maximum(scores[after], self.fit(features, self.head(features)))
        return scores

    def _joined(self, contexts: Sequence[Context]) -> Float[Tensor, "batch joined"] | None:
        """The log-odds of the adapters that joined; None if there is none."""
        if self.neighbours is None or not self.neighbours.names:
            return None
        return torch.stack([self._prompt_logits(self._parts(context)["prompt"]) for context in contexts])

    def _read_parts(
        self,
        contexts: Sequence[Context],
        logits: Float[Tensor, "batch trained"],
        probabilities: Float[Tensor, "batch trained"],
    ) -> None:
        """Changes the probabilities of the trained adapters for parts of prompts."""
        parts = [i for i, context in enumerate(contexts) if context.is_part]
        if not parts or not self.trained or self.recall is None or self.neighbours is None:
            return
        read = self.neighbours.read(self.prompts([contexts[i].prompt for i in parts]))
        owners = logits[parts].argmax(dim=-1).cpu()
        evidence = self.recall(read, owners)
        compared = [row for row, i in enumerate(parts) if contexts[i].whole]
        if compared:
            wholes = self.neighbours.read(self.prompts([contexts[parts[row]].whole for row in compared]))
            evidence[compared] = self.recall(read.only(compared), owners[compared], wholes)
        fits = probabilities[parts].sum(dim=-1).clamp(min=TINY, max=1.0)
        probabilities[parts] *= (with_evidence(fits, evidence) / fits)[:, None]

    def _read_prompt(self, prompt: str) -> Float[Tensor, " joined"]:
        assert self.neighbours is not None
        return self.neighbours.logits(self.prompts([prompt]))[0]

    def _parts(self, context: Context) -> dict[str, str]:
        chars = self.config.max_chars
        return {
            "history": context.history.strip()[-min(chars, HISTORY_CHARS) :],
            "prompt": context.prompt.strip()[-chars:],
            "answer": (context.answer + context.sentence).strip()[-chars:],
        }

    def _encode(self, text: str) -> Sequence[int]:
        # Piece by piece: of a growing answer, all pieces but the last are in the cache.
        return self._join(
            [
                (self._encode_piece if len(piece) <= MAX_CACHED_CHARS else self._tokenize)(piece)
                for piece in _pieces(text)
            ]
        )

    def _tokenize(self, piece: str) -> Sequence[int]:
        return tuple(self.tokenizer.encode(piece, add_special_tokens=False).ids)

    def _join(self, pieces: Sequence[Sequence[int]]) -> Sequence[int]:
        ids = list(pieces[0])
        for piece in pieces[1:]:
            ids += self._line_break
            ids += piece
        return ids

    def _cached_bags(self, parts: Sequence[tuple[str, str]]) -> Float[Tensor, "bags dim"]:
        """The bags of parts of contexts, cached for later sentences; another thread may use the cache meanwhile."""
        if self._bags_of != (state := _state(self.embedding.weight)):
            self._bags.clear()
            self._bags_of = state
        known = {part: bag for part in dict.fromkeys(parts) if (bag := self._bags.pop(part, None)) is not None}
        if new := [part for part in dict.fromkeys(parts) if part not in known]:
            bags = self._sum([(name, self._encode(text)) for name, text in new])
            known.update(zip(new, bags.split([len(LEANS[name]) for name, _ in new]), strict=True))
        self._bags.update(known)  # the newest last
        with suppress(KeyError):  # emptied meanwhile
            while len(self._bags) > CACHE_SIZE:
                self._bags.popitem(last=False)
        return torch.cat([known[part] for part in parts])

    def _sum(self, texts: Sequence[tuple[str, Sequence[int]]]) -> Float[Tensor, "bags dim"]:
        ids: list[int] = []
        weights: list[Tensor] = []
        offsets: list[int] = []
        for part, tokens in texts:
            half_life = self.config.history_half_life if part == "history" else self.config.half_life
            for lean in LEANS[part]:
                bag = tokens if lean else tuple(dict.fromkeys(tokens))
                offsets.append(len(ids))
                ids += bag
                weights.append(_bag_weights(len(bag), lean, half_life))
        weight = self.embedding.weight
        rows = torch.tensor(ids, dtype=torch.long, device=weight.device)
        table = weight
        if torch.is_grad_enabled():  # one row of the gradient for each distinct token of the batch
            used, rows = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            table = self.embedding(used)
        return F.embedding_bag(
            rows,
            table,
            torch.tensor(offsets, device=weight.device),
            mode="sum",
            per_sample_weights=torch.cat(weights).to(weight),
        )


def _part(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of a part, by their names in it."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}


def _state(tensor: Tensor) -> tuple[int, int]:
    """A value that changes if a tensor is replaced or written to."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _pieces(text: str) -> list[str]:
    """The lines and sentences of a text, in lower case and with single spaces: the task does not depend on these."""
    return [" ".join(piece.split()) for piece in PIECES.split(text.lower())]


@lru_cache(maxsize=4096)
def _bag_weights(length: int, lean: int, half_life: float) -> Float[Tensor, " tokens"]:
    if length == 0:
        return torch.empty(0)
    if lean == 0:
        return torch.full((length,), 1 / length)
    distance = torch.arange(length) if lean > 0 else torch.arange(length - 1, -1, -1)
    weights = 0.5 ** (distance / half_life)
    return weights / weights.sum()
