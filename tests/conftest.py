"""Real tiny parts: two-layer models of six architectures, a byte tokenizer, PEFT adapters made by PEFT itself."""

import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

# No test waits for a hub that it does not bring along: see `hub.local_hub`.
os.environ["HF_HUB_OFFLINE"] = "1"

# Every shape in the package's annotations is checked while the tests run.
_hook = jaxtyping.install_import_hook("dlp_lora", "shapes.check")
_hook.__enter__()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import (  # noqa: E402
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import dlp_lora  # noqa: E402
from dlp_lora import Context, Engine, Generation, Switching  # noqa: E402
from dlp_lora.engine.cache import cache_argument  # noqa: E402

# What a test imports from `conftest` is this module, which pytest has loaded under another name.
sys.modules.setdefault("conftest", sys.modules[__name__])

torch.set_num_threads(1)

# Folders and files that take longer than the inner loop may. `models`, `engines` and `clients` are marked in place.
CI = (
    *(
        "lab",
        "cli",
        "training",
        "test_demo.py",
        "test_docs.py",
        "test_release.py",
        "test_examples.py",
        "test_public_api.py",
        "tasks/test_tasks_procedural.py",
    ),
    *("bank/test_linear.py", "bank/test_paths.py", "bank/test_peft_matrix.py"),
    *(
        "engine/test_compile.py",
        "engine/test_copies.py",
        "engine/test_engine.py",
        "engine/test_load.py",
        "engine/test_nothing_stays_behind.py",
        "engine/test_recompute.py",
    ),
    *("serve/test_apart.py", "serve/test_api.py", "serve/test_life.py", "serve/test_refusals.py"),
    *("serve/test_ray.py", "serve/test_reload.py", "serve/test_known_bugs.py"),
    *("engine/test_threads.py", "engine/test_prompt_routing.py"),
    *("serve/test_local.py", "serve/test_scheduler.py", "serve/test_vllm.py", "serve/test_vllm_front.py"),
)
OTHER_TIERS = {"models", "engines", "clients"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests into the tier `ci`; those without a tier are the inner loop."""
    root = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(root).as_posix()
        if place.startswith(CI) and not OTHER_TIERS & {mark.name for mark in item.iter_markers()}:
            item.add_marker("ci")


EOS = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SMALL: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 258,
}
ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=False)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SMALL, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_SMALL, head_dim=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=260,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            bos_token_id=257,
            eos_token_id=256,
            pad_token_id=258,
        )
    ),
}
# What people usually adapt in each architecture.
USUAL_TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "gemma": ["q_proj", "v_proj"],
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
}


def tiny_model(architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer model of random weights, the same ones for the same seed."""
    torch.manual_seed(seed)
    return ARCHITECTURES[architecture]().to(dtype).eval()


def byte_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte, so characters beyond ASCII are split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, "<|im_start|>", "<|pad|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token="<|pad|>")
    fast.chat_template = chat_template
    return fast


def make_adapter(
    model: PreTrainedModel, folder: Path, *, seed: int, scale: float = 0.1, base_name: str = "", **config: Any
) -> Path:
    """Writes a PEFT adapter with random A and B for a model, through PEFT."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=scale)
    if base_name:
        peft_model.peft_config["default"].base_model_name_or_path = base_name
    peft_model.save_pretrained(folder)
    peft_model.unload()
    return folder


def lively_model(architecture: str = "llama", *, seed: int = 0) -> PreTrainedModel:
    """A tiny model of large weights: what it says depends on every token before, and on the adapters."""
    model = tiny_model(architecture, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


class HashRouter:
    """Gives probabilities that depend on every character of the context: another text, another mixture."""

    def __init__(self, names: Sequence[str] = ("math", "poems", "units")) -> None:
        self.names = tuple(names)
        self.asked: list[Context] = []

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        self.asked += contexts
        rows = []
        for c in contexts:
            texts = (f"{name}|{c.prompt}|{c.answer}|{c.sentence}" for name in self.names)
            scores = [math.exp(4 * zlib.crc32(text.encode()) / 2**32) for text in texts]
            rows.append([score / sum(scores) for score in scores])
        return torch.tensor(rows)

    def save_pretrained(self, path: str | Path) -> None:
        raise OSError("the disk is full")


WORDS = {"add": "math", "sum": "math", "rhyme": "poems", "verse": "poems", "metre": "units", "inch": "units"}


class WordRouter(HashRouter):
    """Counts the words that belong to an adapter; a text of several adapters' words, or of none's, fits less."""

    def _row(self, text: str) -> list[float]:
        words = [WORDS[word] for word in text.lower().replace("?", " ").replace(".", " ").split() if word in WORDS]
        counts = [words.count(name) for name in self.names]
        fit = max(counts) / max(len(words), 1)
        return [0.98 * fit * count / max(sum(counts), 1) for count in counts]

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        self.asked += contexts
        return torch.tensor([self._row(context.prompt) for context in contexts])


class EveryK:
    """Opens a sentence every `k` characters, however the text is cut into pieces."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.offset = 0

    def push(self, text: str) -> list[int]:
        start, self.offset = self.offset, self.offset + len(text)
        return [i for i in range(start, self.offset) if i and i % self.k == 0]

    def copy(self) -> "EveryK":
        other = EveryK(self.k)
        other.offset = self.offset
        return other


@pytest.fixture(scope="session")
def lively_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three adapters that change what `lively_model` says."""
    root = tmp_path_factory.mktemp("lively")
    model = lively_model()
    make_adapter(model, root / "math", seed=1, scale=0.3)
    make_adapter(model, root / "units", seed=2, scale=0.3, r=8, lora_alpha=8, use_rslora=True)
    make_adapter(model, root / "poems", seed=3, scale=0.3, r=2, target_modules="all-linear")
    return root


@pytest.fixture
def make_engine(lively_adapters: Path) -> Callable[..., Engine]:
    """Makes an engine whose rows switch every six characters, unless told otherwise."""

    def make(**settings: Any) -> Engine:
        settings = {
            "tokenizer": byte_tokenizer(),
            "router": HashRouter(),
            "segmenter": partial(EveryK, 6),
            "switching": Switching(min_tokens=1, margin=0.0),
            **settings,
        }
        return dlp_lora.load(lively_model(), adapters=lively_adapters, **settings)

    return make


@dataclass(frozen=True)
class Seen:
    """What a forward pass ran under."""

    gates: list[Tensor | None]  # of the groups that some adapter changes
    ranks: list[int]  # fused in their first siblings
    is_padded: bool


@contextmanager
def watching(engine: Engine) -> Iterator[list[Seen]]:
    """Notes what each forward pass of an engine runs under: nothing of it stays behind."""
    passes: list[Seen] = []

    def note(*_: Any) -> None:
        groups = engine.bank.touched()
        active = [group.active for group in groups]
        first = [fused.pairs[0] if fused else None for fused in active]
        ranks = [layers[0].a.shape[1] if layers else 0 for layers in first]
        gates = [None if fused is None or fused.gate is None else fused.gate.clone() for fused in active]
        passes.append(Seen(gates, ranks, engine.bank.is_padded))

    handle = engine.model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        yield passes
    finally:
        handle.remove()


def as_after_a_fresh_start(engine: Engine, prompt: str, answer: Generation, **options: Any) -> list[int]:
    """The tokens that follow where each sentence's pass begins again from nothing, under its mixture alone."""
    ids, tokens = list(engine.tokenizer(prompt)["input_ids"]), list(answer.tokens)
    chosen = []
    for sentence in answer.trace:
        for i in range(sentence.start, sentence.end):
            # The token i is the first that is sampled after the pass that encoded the one before it.
            with engine.fixed(sentence.mixture):
                chosen.append(_next_token(engine, ids + tokens[: i + 1], **options))
    return chosen


def as_continued(engine: Engine, prompt: str, answer: Generation, **options: Any) -> list[int]:
    """The tokens that follow where each token's pass goes on from the cache, under the mixture of its sentence."""
    ids, tokens = list(engine.tokenizer(prompt)["input_ids"]), list(answer.tokens)
    cache = cache_argument(DynamicCache(config=engine.model.config))
    with engine.fixed(answer.trace[0].mixture):
        _next_token(engine, ids, **cache, **options)
    chosen = []
    for sentence in answer.trace:
        for i in range(sentence.start, sentence.end):
            with engine.fixed(sentence.mixture):
                chosen.append(_next_token(engine, ids + tokens[: i + 1], **cache, **options))
    return chosen


def _next_token(engine: Engine, ids: Sequence[int], **options: Any) -> int:
    row = torch.tensor([ids])
    options = {**options, "max_new_tokens": 1, "do_sample": False}
    return int(engine.model.generate(row, attention_mask=torch.ones_like(row), **options)[0, -1])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _fixed_paths() -> Iterator[None]:
    """Layers are multiplied in one way, whatever this machine is like and whatever else it does now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlp_lora.bank.attach.DEFAULT", "stacked")
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Calls the package as a user does, without the type checks of the tests: its own checks must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def adapters(tmp_path: Path) -> Mapping[str, Path]:
    """Three Llama adapters of different rank, alpha, scaling and targets, in one folder."""
    model = tiny_model("llama")
    root = tmp_path / "adapters"
    return {
        "math": make_adapter(model, root / "math", seed=1),
        "units": make_adapter(model, root / "units", seed=2, r=8, lora_alpha=8, use_rslora=True),
        "poems": make_adapter(model, root / "poems", seed=3, r=2, target_modules="all-linear"),
    }


@pytest.fixture(scope="session", autouse=True)
def _shapes() -> Iterator[None]:
    yield
    _hook.__exit__(None, None, None)
