"""The paper's equations as plain loops in float64, and a reader of PEFT folders that shares no code with ours."""

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel


def eq4_threshold(probabilities: Mapping[str, float], p: float) -> list[str]:
    """Eq. 4: the adapters whose probability is at least p."""
    selected = []
    for name, probability in probabilities.items():
        if probability >= p:
            selected.append(name)
    return selected


def nucleus(probabilities: Mapping[str, float], p: float, *, slack: float = 1e-6) -> list[str]:
    """Top-p selection as the paper's text has it: the most likely adapters until their mass reaches p."""
    left = list(probabilities)
    selected: list[str] = []
    mass = 0.0
    while left and (not selected or mass < p - slack):
        best = left[0]
        for name in left:
            if probabilities[name] > probabilities[best]:
                best = name
        left.remove(best)
        selected.append(best)
        mass += probabilities[best]
    return selected


def eq5_softmax_weights(probabilities: Mapping[str, float], selected: Sequence[str]) -> dict[str, float]:
    """Eq. 5: the softmax of the selected adapters' probabilities."""
    total = 0.0
    for name in selected:
        total += math.exp(probabilities[name])
    return {name: math.exp(probabilities[name]) / total for name in selected}


def renormalised_weights(probabilities: Mapping[str, float], selected: Sequence[str]) -> dict[str, float]:
    """The selected adapters' probabilities, divided by their sum."""
    total = 0.0
    for name in selected:
        total += probabilities[name]
    return {name: probabilities[name] / total for name in selected}


def deltas(folder: Path) -> dict[str, Tensor]:
    """What a PEFT adapter folder adds to each linear layer: scaling * B A, of shape (d_out, d_in), in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        found[module] = scaling(config, module) * _product(b, a)
    return found


def scaling(config: Mapping[str, Any], module: str) -> float:
    """PEFT's scaling of one module, by its documentation: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    r, alpha = config["r"], config["lora_alpha"]
    for pattern, value in reversed(list((config.get("rank_pattern") or {}).items())):
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            r = value
    for pattern, value in reversed(list((config.get("alpha_pattern") or {}).items())):
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            alpha = value
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def eq6(mixture: Mapping[str, float], folders: Mapping[str, Path]) -> dict[str, Tensor]:
    """Eq. 6: by module, the sum over the adapters of weight * scaling * B A."""
    total: dict[str, Tensor] = {}
    for name, weight in mixture.items():
        for module, delta in deltas(folders[name]).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return total


def with_mixture(model: PreTrainedModel, mixture: Mapping[str, float], folders: Mapping[str, Path]) -> PreTrainedModel:
    """A float64 copy of a model with a mixture's deltas added to its weights."""
    changed = copy.deepcopy(model).double()
    for name, delta in eq6(mixture, folders).items():
        module = changed.get_submodule(name)
        weight = module.weight.data
        # A weight of its own: where it is tied to the embedding, the embedding must stay as it is. GPT-2's Conv1D
        # stores (d_in, d_out).
        module.weight = nn.Parameter(weight + (delta if isinstance(module, nn.Linear) else delta.T))
    return changed


def with_mixtures_by_token(
    model: PreTrainedModel, mixtures: Sequence[Sequence[Mapping[str, float]]], folders: Mapping[str, Path]
) -> PreTrainedModel:
    """A float64 copy of a model in which each token has a mixture of its own: W x + sum_i w_i(b, t) s_i B_i A_i x."""
    changed = copy.deepcopy(model).double()
    by_adapter = {name: deltas(folder) for name, folder in folders.items()}

    def add(module: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output.clone()
            for b, row in enumerate(mixtures):
                for t, mixture in enumerate(row):
                    for name, weight in mixture.items():
                        if module in by_adapter[name]:
                            output[b, t] += weight * (by_adapter[name][module] @ args[0][b, t])
            return output

        return hook

    for module in {module for found in by_adapter.values() for module in found}:
        changed.get_submodule(module).register_forward_hook(add(module))
    return changed


def _product(b: Tensor, a: Tensor) -> Tensor:
    product = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    for rank in range(a.shape[0]):
        for row in range(b.shape[0]):
            product[row] += b[row, rank].double() * a[rank].double()
    return product


def mahalanobis(
    features: Tensor, owners: Sequence[int], memory: Tensor, *, ridge: float, directions: int
) -> list[float]:
    """Minus the log of each row's squared Mahalanobis distance to its owner's mean (Lee et al. 2018), divided by the
    mean one of that adapter's own texts.

    `memory` is (adapters, texts, hidden). The shared covariance has `ridge` times the mean of its diagonal on top, and
    only the `directions` of largest variance count.
    """
    means = [[math.fsum(column) / len(own) for column in zip(*own, strict=True)] for own in memory.tolist()]
    hidden = len(means[0])
    covariance = [[0.0] * hidden for _ in range(hidden)]
    texts = [(text, mean) for own, mean in zip(memory.tolist(), means, strict=True) for text in own]
    for text, mean in texts:
        for i in range(hidden):
            for j in range(hidden):
                covariance[i][j] += (text[i] - mean[i]) * (text[j] - mean[j]) / len(texts)
    variance = sum(covariance[i][i] for i in range(hidden)) / hidden
    values, vectors = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
    axes = sorted(zip(values.tolist(), vectors.T.tolist(), strict=True), reverse=True)[:directions]

    def squared(row: list[float], mean: list[float]) -> float:
        along = [math.fsum(a * (x - m) for a, x, m in zip(axis, row, mean, strict=True)) for _, axis in axes]
        return math.fsum(d * d / (value + ridge * variance) for d, (value, _) in zip(along, axes, strict=True))

    spreads = [
        math.fsum(squared(text, mean) for text in own) / len(own)
        for own, mean in zip(memory.tolist(), means, strict=True)
    ]
    return [
        -math.log(squared(row, means[owner]) / spreads[owner])
        for row, owner in zip(features.tolist(), owners, strict=True)
    ]


def evidence_of_likeness(
    own: Sequence[Sequence[float]],
    foreign: Sequence[Sequence[float]],
    asked: Sequence[Sequence[float]],
    *,
    nearest: int,
    lost: float,
    foreign_share: float,
    most: float,
) -> list[float]:
    """The evidence that texts are an adapter's questions: 0 in the middle between its prompts and foreign texts.

    Each row has a text's likeness to the adapter's examples, which are its first prompts. A text counts by
    its mean likeness to the `nearest` examples; a prompt is not compared with itself.
    """

    def mean_of_nearest(row: Sequence[float]) -> float:
        return math.fsum(sorted(row)[-nearest:]) / nearest

    def quantile(values: Sequence[float], share: float) -> float:
        ordered, place = sorted(values), share * (len(values) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    others = [mean_of_nearest([x for j, x in enumerate(row) if j != i]) for i, row in enumerate(own)]
    inner = quantile(others, lost)
    outer = quantile([mean_of_nearest(row) for row in foreign], foreign_share)
    found = []
    for row in asked:
        along = (mean_of_nearest(row) - outer) / (inner - outer)  # 0 at the foreign texts, 1 at the prompts
        found.append(most * max(-1.0, min(1.0, 2 * along - 1)))
    return found


def mean_log_likelihood(model: PreTrainedModel, read: Sequence[int], choice: Sequence[int]) -> float:
    """The mean over a choice's tokens of the log-probability of each after all before it, one forward pass each."""
    total = 0.0
    for i, token in enumerate(choice):
        with torch.no_grad():
            logits = model(torch.tensor([[*read, *choice[:i]]]), use_cache=False).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    return total / len(choice)


def likeliest_after_each_beginning(model: PreTrainedModel, read: Sequence[int], gold: Sequence[int]) -> list[int]:
    """The likeliest next token after the prompt and each beginning of the gold answer, one forward pass each."""
    found = []
    for i in range(len(gold)):
        with torch.no_grad():
            logits = model(torch.tensor([[*read, *gold[:i]]]), use_cache=False).logits[0, -1]
        found.append(int(logits.argmax()))
    return found


def bleu_of_letters(answer: str, references: Sequence[str]) -> float:
    """BLEU-4 (Papineni et al. 2002) without smoothing, a letter as a word; the brevity penalty is by the closest."""
    logarithms = 0.0
    for n in range(1, 5):
        found = [answer[i : i + n] for i in range(len(answer) - n + 1)]
        matches = 0
        for gram in sorted(set(found)):
            most = 0
            for reference in references:
                own = [reference[i : i + n] for i in range(len(reference) - n + 1)]
                most = max(most, own.count(gram))
            matches += min(found.count(gram), most)
        if matches == 0:
            return 0.0
        logarithms += math.log(matches / len(found)) / 4
    closest = min((abs(len(reference) - len(answer)), len(reference)) for reference in references)[1]
    return math.exp(logarithms) * math.exp(min(0.0, 1 - closest / len(answer)))
