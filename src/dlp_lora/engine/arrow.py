"""Arrow routing: the adapters' weights choose the adapter, without texts or training (Ostapenko et al., 2024).

An adapter's prototype in a layer is the top right singular vector of B A: the direction of the layer's input that it
changes most. A text belongs to the adapter whose prototypes react most to its hidden states.

This differs from Arrow in two ways. Arrow routes every token in every layer; here there is one choice for the whole
text, from the mean over its tokens and layers, as the method needs. And Arrow compares |x . v| between adapters
directly. This is unfair if adapters change different layers, because some directions react to any text. Here each
number is compared with its values on texts that the base model makes up, in standard deviations; `docs/log.md` has the
effect. If a text excites its likeliest adapter no more than everyday prompts do, no adapter fits.

This is the only router that runs the base model, so it is here and not with the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from dlp_lora.bank.adapter_files import find_adapters
from dlp_lora.bank.attach import linear_layers
from dlp_lora.bank.bank import AdapterBank
from dlp_lora.bank.peft_format import Adapter, LoraWeights, read_adapter
from dlp_lora.errors import AdapterError, RouterError
from dlp_lora.router import Context
from dlp_lora.router.context import Calibration, check_labels, has_text, listed
from dlp_lora.router.everyday import Threshold, everyday_prompts
from dlp_lora.router.folder import SavedRouter, reading_router, write_router
from dlp_lora.router.tokenizer import MAX_CHARS, plain_tokenizer, vocab_size

MAX_TOKENS = 256
TEMPERATURE = 0.5  # of standard deviations; with it, confidence and accuracy were near on five adapters
NUM_SAMPLES, SAMPLE_TOKENS = 32, 24


class ArrowRouter:
    """Routes by the adapters' weights: it needs no texts, but a forward pass of the base model per choice.

    It reads the last 256 tokens of a context as one text (`Context.text`); a blank text fits no adapter.
    A router from a folder needs a base model: `load_router(path, base=model)`.
    """

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: Tokenizer,
        prototypes: Mapping[str, Float[Tensor, "here d_in"]],
        owners: Int[Tensor, " prototypes"],
        mean: Float[Tensor, " prototypes"],
        std: Float[Tensor, " prototypes"],
        *,
        temperature: float = TEMPERATURE,
        threshold: Threshold | None = None,
        base: PreTrainedModel | None = None,
    ) -> None:
        """`prototypes` are by module. In the modules' order, `owners` has the adapter of each prototype, and `mean` and
        `std` its values on any text. Without a threshold some adapter always fits.
        """
        if not temperature > 0:
            raise ValueError(f"a router's temperature must be positive, got {temperature}")
        self.names = check_labels(names)
        self.tokenizer = plain_tokenizer(tokenizer)
        self.prototypes = dict(prototypes)
        self.owners, self.mean, self.std = owners, mean, std
        self.temperature = temperature
        self.threshold = threshold
        if base is not None:
            _check_base(base, self.prototypes, self.tokenizer)
        self.base = base

    @classmethod
    def from_adapters(
        cls,
        adapters: str | Path | Mapping[str, str | Path],
        base: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        temperature: float = TEMPERATURE,
        seed: int = 0,
    ) -> "ArrowRouter":
        """Makes a router for a folder of PEFT adapters, or for adapter folders by name, and their base model.

        Args:
            base: the plain model; build the router before an engine.
            seed: of the texts that the base makes up, 32 of 24 tokens.

        Raises:
            AdapterError: if an adapter cannot be read, does not fit the base, or was never trained.
        """
        folders = adapters if isinstance(adapters, Mapping) else find_adapters(adapters)
        base = base.eval()
        layout = linear_layers(base)
        read = [read_adapter(folders[name], name, layout=layout) for name in sorted(folders)]
        AdapterBank(layout, read, device="meta")  # refuses adapters that do not fit
        names = check_labels([adapter.name for adapter in read])
        prototypes, owners = _prototypes(read, inside=base.base_model_prefix)
        excited = excitation(base, prototypes, _samples(base, seed=seed))
        std, mean = torch.std_mean(excited, dim=0)
        std = std.clamp(min=1e-6)
        router = cls(names, tokenizer, prototypes, owners, mean, std, temperature=temperature, base=base)
        everyday = router.scores([Context(prompt) for prompt in everyday_prompts()])
        router.threshold = Threshold.between(everyday.new_zeros(0), everyday)
        return router

    @torch.no_grad()
    def probabilities(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]:
        """Gives a probability per adapter, on the CPU.

        Raises:
            RouterError: if the router has no base model.
        """
        scores = self._all_scores(contexts)
        calibration = Calibration(temperature=self.temperature)
        if (threshold := self.threshold) is not None:
            calibration = replace(calibration, fit_threshold=threshold.at, fit_slope=threshold.slope)
        return calibration.probabilities(scores, scores.amax(dim=-1)) * has_text(contexts)[:, None]

    @torch.no_grad()
    def scores(self, contexts: Sequence[Context]) -> Float[Tensor, " batch"]:
        """Scores how much a text excites its likeliest adapter; higher is surer."""
        return self._all_scores(contexts).amax(dim=-1)

    def _all_scores(self, contexts: Sequence[Context]) -> Float[Tensor, "batch adapters"]:
        # One by one: beside longer texts padding would shift the last digits, which the deviations multiply.
        return torch.stack([self._scores(context.text) for context in contexts])

    def __repr__(self) -> str:
        return f"ArrowRouter({listed(self.names)}; over {len(self.prototypes)} layers of the base model)"

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the router to a folder, without the base model; the folder is replaced as a whole."""
        prototypes = {f"prototypes.{module}": vectors for module, vectors in self.prototypes.items()}
        write_router(
            path,
            SavedRouter(
                type="arrow",
                names=self.names,
                settings={
                    "temperature": self.temperature,
                    "threshold": None if self.threshold is None else asdict(self.threshold),
                    "modules": list(self.prototypes),
                },
                weights={**prototypes, "owners": self.owners, "mean": self.mean, "std": self.std},
                tokenizer=self.tokenizer,
            ),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, base: PreTrainedModel | None = None) -> "ArrowRouter":
        """Reads a folder that `save_pretrained` wrote, and gives it its base model.

        Raises:
            RouterError: if a file is missing or damaged, the router is of another type or a later version, or was made
                for another base model.
        """
        with reading_router(path, "arrow") as saved:
            prototypes = {module: saved.weights[f"prototypes.{module}"] for module in saved.settings["modules"]}
            parts = [saved.weights[part] for part in ("owners", "mean", "std")]
            settings = saved.settings.get("threshold")  # earlier versions never abstained
            return cls(
                saved.names,
                saved.tokenizer,
                prototypes,
                *parts,
                temperature=saved.settings["temperature"],
                threshold=None if settings is None else Threshold(**settings),
                base=base,
            )

    def _scores(self, text: str) -> Float[Tensor, " adapters"]:
        if self.base is None:
            raise RouterError("an Arrow router runs the base model; give it one with load_router(path, base=model)")
        scores = torch.zeros(len(self.names))
        ids = self.tokenizer.encode(text[-MAX_CHARS:], add_special_tokens=False).ids[-MAX_TOKENS:]
        if not ids:
            return scores
        excited = excitation(self.base, self.prototypes, torch.tensor([ids], device=self.base.device))[0]
        # The mean over an adapter's prototypes.
        return scores.index_add(0, self.owners, (excited - self.mean) / self.std) / self.owners.bincount()


@torch.no_grad()
def excitation(
    base: PreTrainedModel, prototypes: Mapping[str, Tensor], ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch prototypes"]:
    """Measures how much texts excite each prototype: the mean over tokens of |cosine| with its module's input."""
    values: dict[str, Tensor] = {}

    def reading(module: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = F.normalize(args[0].float(), dim=-1)
            values[module] = (x @ prototypes[module].to(x.device).T).abs().mean(dim=1).cpu()

        return read

    handles = [base.get_submodule(module).register_forward_pre_hook(reading(module)) for module in prototypes]
    try:
        base.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([values[module] for module in prototypes], dim=1)


def top_direction(lora: LoraWeights) -> Float[Tensor, " d_in"] | None:
    """Returns the top right singular vector of B A; None if the product is zero."""
    # From the triangular factors, so that B A is never computed.
    q, r_a = torch.linalg.qr(lora.a.float().T)
    _, r_b = torch.linalg.qr(lora.b.float())
    _, sizes, directions = torch.linalg.svd(r_b @ r_a.T)
    return q @ directions[0] if sizes[0] > 0 else None


def _prototypes(adapters: Sequence[Adapter], *, inside: str) -> tuple[dict[str, Tensor], Tensor]:
    vectors: dict[str, list[Tensor]] = {}
    owners: dict[str, list[int]] = {}
    for owner, adapter in enumerate(adapters):
        num_found = 0
        for module, lora in adapter.modules.items():
            # A head outside the decoder is not run for routing.
            if module.startswith(f"{inside}.") and (vector := top_direction(lora)) is not None:
                vectors.setdefault(module, []).append(vector)
                owners.setdefault(module, []).append(owner)
                num_found += 1
        if not num_found:
            raise AdapterError(
                f"{adapter.path} changes nothing inside the decoder, so the router cannot use its weights; "
                f"train it, or describe it: router-from-descriptions"
            )
    modules = sorted(vectors)
    flat = [owner for module in modules for owner in owners[module]]
    return {module: torch.stack(vectors[module]) for module in modules}, torch.tensor(flat)


def _samples(base: PreTrainedModel, *, seed: int) -> Int[Tensor, "batch seq"]:
    """Lets the base model continue random tokens: texts without any prompt."""
    num_tokens = cast(nn.Embedding, base.get_input_embeddings()).num_embeddings
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=SAMPLE_TOKENS - 1,
        min_new_tokens=SAMPLE_TOKENS - 1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        start = torch.randint(num_tokens, (NUM_SAMPLES, 1)).to(base.device)
        samples: Tensor = cast(Any, base).generate(
            start, attention_mask=torch.ones_like(start), generation_config=config
        )
    return samples


def _check_base(base: PreTrainedModel, prototypes: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    num_tokens = cast(nn.Embedding, base.get_input_embeddings()).num_embeddings
    if vocab_size(tokenizer) > num_tokens:
        raise RouterError(
            f"the router's tokenizer has ids up to {vocab_size(tokenizer) - 1}, but {base.config._name_or_path!r} "
            f"embeds {num_tokens}; make the router again for this base model"
        )
    modules = dict(base.named_modules())
    for module, vectors in prototypes.items():
        layer = getattr(modules.get(module), "base_layer", modules.get(module))
        d_in = getattr(layer, "in_features", getattr(layer, "nx", None))
        if d_in != vectors.shape[1]:
            raise RouterError(
                f"the router was made for a base model whose {module} reads {vectors.shape[1]} features, but that of "
                f"{base.config._name_or_path!r} reads {d_in or 'nothing: there is none'}; make it again for this one"
            )
