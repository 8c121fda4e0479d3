"""What an engine promises, gone through for a model family."""

import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import dlp_lora
from conftest import EveryK, HashRouter, as_after_a_fresh_start, as_continued, byte_tokenizer, make_adapter
from dlp_lora import DLPLoRAError, Engine, Generation, Switching
from dlp_lora.engine.loading import load_model
from families import FAMILIES, IDS, NOT_BUILT, build
from reference import with_mixture

PACKAGE = Path(dlp_lora.__file__).parent
PROMPTS = ("Tell me a tale", "Why?", "How far is it to the moon")
MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # PEFT adapts no out_proj of these
MIXTURE = {"math": 0.7, "poems": -0.4, "units": 0.5}
TOKENIZER = byte_tokenizer()
LETTERS = [TOKENIZER(chr(code))["input_ids"][0] for code in range(32, 127)]
NO_LETTERS = sorted({*range(IDS["vocab_size"])} - {*LETTERS})
GREEDY: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "suppress_tokens": NO_LETTERS}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What holds for a family: `limits` are the promises that do not hold, each with the reason."""

    name: str
    kind: str
    status: Literal["supported", "refused", "not built"]
    reason: str = ""
    limits: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Walked:
    """An engine for a family, the base model apart from it, and the folders of the adapters."""

    engine: Engine
    base: PreTrainedModel
    folders: Mapping[str, Path]

    @torch.no_grad()
    def logits(self, mixture: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The logits of each row's tokens, padding left out, under a fixed mixture or one a row."""
        with self.engine.fixed(mixture):
            return _by_row(self.engine.model(**inputs).logits, inputs)


def walk(family: str, folder: Path) -> Family:
    """Goes through the promises for a tiny model of a family.

    Raises:
        AssertionError: if one does not hold, and nobody says why.
    """
    about: dict[str, Any] = {"name": family, "kind": FAMILIES[family]}
    if family in NOT_BUILT:
        return Family(**about, status="not built", reason=NOT_BUILT[family])
    model = build(family)
    try:
        load_model(model, TOKENIZER)
    except DLPLoRAError as error:
        return Family(**about, status="refused", reason=str(error))
    base = deepcopy(model)
    targets = _targets(model)
    parents = sorted({target.rpartition(".")[0] for target in targets})
    some = [target for target in targets if target.rpartition(".")[0] in parents[: len(parents) // 2 + 1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = {
            "math": make_adapter(model, folder / "math", seed=1, target_modules=some),
            "units": make_adapter(model, folder / "units", seed=2, target_modules=targets, r=8, use_rslora=True),
            "poems": make_adapter(model, folder / "poems", seed=3, target_modules=targets, r=2),
        }
        engine = dlp_lora.load(
            model,
            adapters=folders,
            tokenizer=TOKENIZER,
            router=HashRouter(),
            segmenter=partial(EveryK, 4),
            switching=Switching(min_tokens=1, margin=0.0),
        )
        walked = Walked(engine=engine, base=base, folders=folders)
        reasons = {promise: _reason(promise, walked) for promise in PROMISES}
    limits = {promise: reason for promise, reason in reasons.items() if reason is not None}
    return Family(**about, status="supported", limits=limits)


def _reason(promise: str, walked: Walked) -> str | None:
    """Says why a promise is not kept, None if it is; an error is a reason only if the base model has it, too."""
    try:
        PROMISES[promise](walked)
    except Exception as error:
        if _is_refusal(error):
            return str(error)
        if promise not in OF_ANSWERS:
            raise
        try:
            with walked.engine.disabled():
                OF_ANSWERS[promise](walked)
        except Exception as of_base:
            shown = "" if isinstance(of_base, AssertionError) else f" ({type(of_base).__name__}: {of_base})"
            return f"it does not hold for the base model either{shown}"
        raise
    return None


def _is_refusal(error: Exception) -> bool:
    """Whether the package itself has raised an error."""
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, DLPLoRAError | ValueError) and PACKAGE in place.parents


# Of single passes


def _one_adapter(walked: Walked) -> None:
    """One adapter is applied as PEFT applies it."""
    for name, folder in walked.folders.items():
        theirs = PeftModel.from_pretrained(deepcopy(walked.base), folder).eval()
        _assert_same_logits(lambda inputs, name=name: walked.logits({name: 1.0}, inputs), theirs)


def _mixture(walked: Walked) -> None:
    """A mixture is the weighted sum of the adapters' deltas."""
    summed = with_mixture(walked.base, MIXTURE, walked.folders).to(walked.base.dtype)
    _assert_same_logits(lambda inputs: walked.logits(MIXTURE, inputs), summed)


def _rows(walked: Walked) -> None:
    """Rows of a batch have each their mixture."""
    mixtures: list[dict[str, float]] = [{"math": 1.0}, {}, {"units": 0.5, "poems": 0.5}]
    inputs = _inputs(PROMPTS)
    together = walked.logits(mixtures, inputs)
    for i, mixture in enumerate(mixtures):
        _assert_close(together[i], walked.logits(mixture, inputs)[i])


@torch.no_grad()
def _disabled(walked: Walked) -> None:
    """`disabled` is the base model bit for bit."""
    for inputs in (_inputs(PROMPTS[:1]), _inputs(PROMPTS)):
        for ours, theirs in zip(walked.logits({}, inputs), _by_row(walked.base(**inputs).logits, inputs), strict=True):
            assert torch.equal(ours, theirs)


# Of answers


def _batch(walked: Walked, kv_policy: str) -> None:
    """The answers of a left-padded batch are those that its prompts get alone."""
    with walked.engine.using(kv_policy=kv_policy):
        together = walked.engine.generate(list(PROMPTS), **GREEDY)
        alone = [walked.engine.generate(prompt, **GREEDY) for prompt in PROMPTS]
    _assert_same_answers(together, alone)


def _static_cache(walked: Walked, kv_policy: str) -> None:
    """A static cache gives the answers of a dynamic one, also behind left padding."""
    with walked.engine.using(kv_policy=kv_policy):
        dynamic = walked.engine.generate(list(PROMPTS), **GREEDY)
        static = walked.engine.generate(list(PROMPTS), **GREEDY, cache_implementation="static")
    _assert_same_answers(static, dynamic)


def _trace(walked: Walked, kv_policy: str) -> None:
    """An answer is what follows under the mixtures of its trace, each of them fixed."""
    with walked.engine.using(kv_policy=kv_policy):
        answer = walked.engine.generate(PROMPTS[0], **GREEDY)
        follow = as_after_a_fresh_start if kv_policy == "recompute" else as_continued
        assert follow(walked.engine, PROMPTS[0], answer, suppress_tokens=NO_LETTERS)[:-1] == list(answer.tokens[1:])


OF_ANSWERS: dict[str, Callable[[Walked], None]] = {
    f"{name}, {kv_policy}": partial(check, kv_policy=kv_policy)
    for name, check in {"batch": _batch, "static cache": _static_cache, "trace": _trace}.items()
    for kv_policy in ("recompute", "keep")
}
PROMISES: dict[str, Callable[[Walked], None]] = {
    "one adapter": _one_adapter,
    "mixture": _mixture,
    "rows": _rows,
    "disabled": _disabled,
    **OF_ANSWERS,
}


def _targets(model: PreTrainedModel) -> list[str]:
    """The linear layers that read text and that PEFT adapts, but for the output embeddings."""
    called: set[str] = set()

    def note(name: str, output: Any) -> None:
        layer: Any = model.get_submodule(name)
        width = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        # Some routers of experts, and layers of blocks, are linear layers that give something else.
        if isinstance(output, Tensor) and output.shape[-1] == width:
            called.add(name)

    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    ]
    with torch.no_grad():
        model(**_inputs(PROMPTS))
    for handle in handles:
        handle.remove()
    leaves = set()
    if model.config.model_type in MAMBAS:
        leaves |= {"out_proj"}
    if any(".experts." in name for name, _ in model.named_parameters()):
        # These PEFT takes for layers of experts.
        leaves |= {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
    return sorted(name for name in called if name.rpartition(".")[2] not in leaves)


def _inputs(prompts: Sequence[str]) -> dict[str, Tensor]:
    rows = [TOKENIZER(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, rows))
    padding = TOKENIZER.pad_token_id
    return {
        "input_ids": torch.tensor([[padding] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def _by_row(logits: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [row[kept.bool()] for row, kept in zip(logits, inputs["attention_mask"], strict=True)]


@torch.no_grad()
def _assert_same_logits(ours: Callable[[Mapping[str, Tensor]], list[Tensor]], theirs: nn.Module) -> None:
    for inputs in (_inputs(PROMPTS[:1]), _inputs(PROMPTS)):
        for one, other in zip(ours(inputs), _by_row(theirs(**inputs).logits, inputs), strict=True):
            _assert_close(one, other)


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def _assert_same_answers(ours: Sequence[Generation], theirs: Sequence[Generation]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens == other.tokens
        assert [sentence.mixture for sentence in one.trace] == [sentence.mixture for sentence in other.trace]
