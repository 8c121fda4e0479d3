"""Measures how exactly stock vLLM servers answer: each token's log-probability beside that of the engine in this
process, under the mixtures that the trace says; over mixed ranks, rsLoRA, switches, abstention under both KV policies,
and 8 requests at once.

    python scripts/measure_vllm.py --vllm-python .venv-vllm/bin/python --json results/vllm.json

It starts vLLM itself, in float32, with adapters of random weights on the embedded default model.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import dlp_lora
from dlp_lora import Context, Engine, Mixture, Switching
from dlp_lora.default_model import default_model
from dlp_lora.engine.loading import load_model
from dlp_lora.engine.outline import Outline
from dlp_lora.engine.prompts import encode_chat
from dlp_lora.engine.trace import Generation
from dlp_lora.files import write_json
from dlp_lora.lab.records.environment import environment
from dlp_lora.policy import Only, TopP
from dlp_lora.serve.backend import Done, Request, Sampling, Token
from dlp_lora.serve.vllm.backend import Needs, VLLMBackend, VLLMSettings
from dlp_lora.serve.vllm.process import VLLMFlags, vllm_server

ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "stabilised": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
    "wide": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "rank_pattern": {"k_proj": 2},
        "alpha_pattern": {"v_proj": 4},
    },
}
SCALE = 0.02  # of random weights: answers stay text, and differ by adapter
QUESTIONS = (
    "Tell me three things about the sea. Use short sentences.",
    "How do I boil an egg? Explain it step by step.",
    "Write a few sentences about a dog, a cat and a bird.",
    "What is the difference between weather and climate? Give two examples.",
    "List four uses of a brick.",
    "Why is the sky blue? Answer in plain words.",
    "Describe a market in the morning.",
    "Give me advice for a long train journey.",
)
STORY = "The old mill stood by the river, and every spring the children came to see the wheel turn. " * 12
ALONE = ("recompute", "keep")  # cases whose requests are sent one after the other
NEAR = 1e-4  # log-probabilities closer than that may come in any order


class TextRouter:
    """Gives probabilities that follow from every character of the context: another sentence, another mixture."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Scores each context."""
        texts = [f"{c.prompt}|{c.answer}|{c.sentence}" for c in contexts]
        scores = [[zlib.crc32(f"{name}|{text}".encode()) / 2**30 for name in self.names] for text in texts]
        return torch.tensor(scores).softmax(dim=-1)

    def save_pretrained(self, path: str | Path) -> None:
        """It is made again from its names."""
        raise NotImplementedError


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="Python of an environment that has vLLM")
    parser.add_argument("--json", type=Path, required=True, help="record to write")
    parser.add_argument("--tokens", type=int, default=60, help="of an answer")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="asked in each case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(Path(folder), default_model())
        questions = QUESTIONS[: options.questions]
        record = measured(engine, options.vllm_python, options.tokens, questions)
    write_json(options.json, {"script": "measure_vllm", "model": "SmolLM2-135M-Instruct", **record})
    print(f"wrote {options.json}")


def make_engine(folder: Path, model: Path, *, scale: float = SCALE, **settings: Any) -> Engine:
    """Loads a model in float32 with adapters of random weights, which it writes into a folder."""
    base, _ = load_model(str(model), dtype=torch.float32, device="cpu")
    for number, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.data.normal_(std=scale)
        adapted.save_pretrained(folder / name)
        base = adapted.unload()
    return dlp_lora.load(
        str(model),
        adapters=folder,
        router=TextRouter(list(ADAPTERS)),
        dtype=torch.float32,
        device="cpu",
        policy=TopP(0.7),
        switching=Switching(min_tokens=1, margin=0.0),
        paths="plain",
        **settings,
    )


def measured(
    engine: Engine, vllm_python: str, num_tokens: int, questions: Sequence[str] = QUESTIONS, *, story: str = STORY
) -> dict[str, Any]:
    """Starts vLLM with an engine's model, and asks it all cases; returns the record."""
    outline = replace(Outline.of(engine), base=replace(Outline.of(engine).base, probe=engine.probe()))
    arguments = "--dtype float32 --enforce-eager"
    flags = VLLMFlags(python=vllm_python, max_loras=8, max_context=1024, arguments=arguments)
    print("starting vLLM", flush=True)
    needs = Needs.of(outline)
    with vllm_server(outline, flags, targets=needs.targets, max_rank=needs.max_rank) as server:
        backend = VLLMBackend(outline, [server.url], settings=VLLMSettings(key=server.key))
        print(*backend.notes, sep="\n")
        try:
            return measure(engine, backend, num_tokens, questions, story)
        finally:
            backend.close()


def measure(
    engine: Engine, backend: VLLMBackend, num_tokens: int, questions: Sequence[str], story: str
) -> dict[str, Any]:
    """Asks all cases, one after the other; returns the record. The requests of a case are sent at once, except for two
    cases, so that answers are compared alone and in batches. Prompts under `keep` begin with the story, because vLLM
    keeps whole blocks.
    """

    def request(question: str, *, before: str = "", **changes: Any) -> Request:
        messages = [{"role": "user", "content": before + question}]
        encoded = encode_chat(engine.tokenizer, messages)
        sampling = Sampling(temperature=0.0, max_tokens=num_tokens, num_logprobs=1)
        return Request(
            tokens=encoded.tokens, prompt=encoded.prompt, call=engine.call.changed(changes), sampling=sampling
        )

    def fixed(mixture: Mapping[str, float]) -> dict[str, Any]:
        return {"mixtures": (Mixture(mixture),)}

    few = questions[:4]
    unsure: dict[str, Any] = {"policy": Only("plain"), "router": _Unsure(engine)}
    cases: dict[str, list[Request]] = {
        "recompute": [request(q) for q in few],
        "keep": [request(q, before=story, kv_policy="keep") for q in few],
        "one adapter": [request(q, **fixed({name: 1.0})) for q, name in zip(few, ADAPTERS, strict=False)],
        "base": [request(q, **fixed({})) for q in few],
        "abstaining": [request(q, **unsure) for q in few],
        "abstaining, keep": [request(q, before=story, kv_policy="keep", **unsure) for q in few],
        "8 at once": [
            *(request(q) for q in questions[:2]),
            *(request(q, before=story, kv_policy="keep") for q in questions[2:4]),
            *(request(q, **unsure) for q in questions[4:5]),
            *(request(q, before=story, kv_policy="keep", **unsure) for q in questions[5:6]),
            *(request(q, **fixed({})) for q in questions[6:7]),
            *(request(q, **fixed({"stabilised": 0.5, "wide": 0.5})) for q in questions[7:]),
        ],
    }
    compared: dict[str, dict[str, Any]] = {}
    for name, asked in cases.items():
        started = time.perf_counter()
        answers = list(answered(backend, asked, at_once=name not in ALONE))
        seconds = time.perf_counter() - started
        case = compared[name] = compare(engine, answers)
        print(
            f"{name:<16} {case['num_tokens']:>4} tokens in {seconds:.0f} s, {case['num_switches']:>3} switches, "
            f"max |d logprob| {case['max_difference']:.1e}, {case['num_not_greedy']} not greedy",
            flush=True,
        )
    return {
        "environment": environment(),
        "vllm": next(iter(backend._replicas)).found.version,
        "dtype": "float32",
        "adapters": {name: dict(config) for name, config in ADAPTERS.items()},
        "num_tokens": num_tokens,
        "cases": compared,
    }


class _Unsure:
    """A router that finds that no adapter fits in every other sentence."""

    def __init__(self, engine: Engine) -> None:
        self.names = engine.bank.names

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Scores each context."""
        fits = [zlib.crc32(f"{c.prompt}|{c.answer}".encode()) % 2 for c in contexts]
        return torch.tensor([[0.9 * fit if name == "plain" else 0.0 for name in self.names] for fit in fits])

    def save_pretrained(self, path: str | Path) -> None:
        """It is made again from an engine."""
        raise NotImplementedError


def answered(backend: VLLMBackend, requests: Iterable[Request], *, at_once: bool) -> Iterator[tuple[Done, list[float]]]:
    """Gives the end of each answer, and the log-probabilities of its tokens."""
    streams = map(backend.open, requests)
    for stream in list(streams) if at_once else streams:
        logprobs: list[float] = []
        for event in stream:
            if isinstance(event, Token):
                assert event.logprob is not None
                logprobs.append(event.logprob)
            elif isinstance(event, Done):
                yield event, logprobs


def compare(engine: Engine, answers: Sequence[tuple[Done, Sequence[float]]]) -> dict[str, Any]:
    """Compares answers with the engine in this process."""
    differences: list[float] = []
    num_not_greedy = 0
    for done, logprobs in answers:
        expected, best = scores(engine, done.generation)
        differences += [abs(a - b) for a, b in zip(logprobs, expected, strict=True)]
        num_not_greedy += sum(b - a > NEAR for a, b in zip(expected, best, strict=True))
    generations = [done.generation for done, _ in answers]
    sentences = [s for generation in generations for s in generation.trace]
    switches = [s for s in sentences if s.switched]
    contexts = [len(g.prompt_tokens) + s.start + 1 for g in generations for s in g.trace if s.switched]
    encoded = [context - (s.kept_tokens or 0) for context, s in zip(contexts, switches, strict=True)]
    return {
        "num_answers": len(answers),
        "num_tokens": len(differences),
        "num_sentences": len(sentences),
        "num_switches": len(switches),
        "most_switches": max(sum(s.switched for s in generation.trace) for generation in generations),
        "num_abstained": sum(s.abstained for s in sentences),
        "max_difference": max(differences),
        "mean_difference": statistics.fmean(differences),
        "num_not_greedy": num_not_greedy,
        "kept_tokens": [s.kept_tokens for s in switches if s.kept_tokens is not None],
        "fuse_ms": statistics.median(s.fuse_ms for s in switches) if switches else None,
        "encode_ms": statistics.median(s.encode_ms for s in switches) if switches else None,
        "encoded_tokens": statistics.median(encoded) if encoded else None,  # at a switch
    }


@torch.no_grad()
def scores(engine: Engine, generation: Generation) -> tuple[list[float], list[float]]:
    """The log-probability of each token of an answer, and of the likeliest there, where each part of the context has
    the mixture that it was encoded under.
    """
    prompt, answer = list(generation.prompt_tokens), list(generation.tokens)
    ids = torch.tensor([prompt + answer])
    mixtures, numbers = [generation.trace[0].mixture], [0] * ids.shape[1]
    found: list[float] = []
    best: list[float] = []
    logits: torch.Tensor | None = None
    for i, sentence in enumerate(generation.trace):
        if sentence.switched:
            kept = sentence.kept_tokens or 0  # all is encoded again under `recompute`
            mixtures.append(sentence.mixture)
            numbers[kept:] = [len(mixtures) - 1] * (len(numbers) - kept)
            logits = None
        if logits is None:
            with engine.under(mixtures, torch.tensor([numbers])) as forward:
                logits = forward(input_ids=ids).logits[0].float().log_softmax(dim=-1)
        # The token that opens a sentence is sampled before the switch, and so with the sentence before.
        end = len(answer) if i + 1 == len(generation.trace) else generation.trace[i + 1].start + 1
        for place in range(len(found), end):
            row = logits[len(prompt) - 1 + place]
            found.append(float(row[answer[place]]))
            best.append(float(row.max()))
    return found, best


if __name__ == "__main__":
    main()
