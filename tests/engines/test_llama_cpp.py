"""llama.cpp answers as the engine does, from a file in float32: with one adapter, mixtures and switches.

Run it in an environment with the extra `llama-cpp`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

import dlp_lora
from commands import ok
from conftest import USUAL_TARGETS, EveryK, HashRouter, WordRouter, byte_tokenizer, lively_model, make_adapter
from dlp_lora import AdapterError, Engine, Switching, TopK
from dlp_lora.default_model import default_gguf, default_model
from dlp_lora.engine.outline import Outline, read_outline
from dlp_lora.errors import ModelError, PromptError
from dlp_lora.serve.adapters import AdapterManager
from dlp_lora.serve.answerer import BackendAnswerer
from dlp_lora.serve.backend import Done, PromptScores, QueueFullError, Request, Token
from dlp_lora.serve.keys import Keys
from dlp_lora.serve.server import make_service
from dlp_lora.serve.settings import ServerSettings
from serving import PROMPTS, alone, ask, extra_adapters, over_http, read

llama_cpp: Any = pytest.importorskip(
    "llama_cpp", reason='llama.cpp is not installed: pip install "dlp-lora[llama-cpp]"'
)
gguf = pytest.importorskip("gguf", reason='gguf is not installed: pip install "dlp-lora[demo]"')

from dlp_lora.serve.llama_cpp.adapter_file import permuted  # noqa: E402
from dlp_lora.serve.llama_cpp.backend import LlamaCppBackend  # noqa: E402
from dlp_lora.serve.llama_cpp.library import check_runs  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
TOLERANCE = 1e-2  # of log-probabilities
ASKED: dict[str, Any] = {"prompt": "How far is it to the moon", "max_tokens": 12, "temperature": 0}


GGUF_NAMES = {"mistral": "llama"}  # of architectures, where another


def write_model(model: PreTrainedModel, path: Path) -> Path:
    """Writes a model as a GGUF file in float32, without its tokenizer, as llama.cpp's conversion does."""
    config: Any = model.config
    architecture = GGUF_NAMES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(str(path), architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    keys = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(keys[architecture], config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows, kind = weight.float(), name.split(".")[-2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(kind)
        if heads and architecture == "llama":
            rows = permuted(rows, heads)
        if "norm" in kind and architecture == "gemma":
            rows = rows + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    lively_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    return write_model(lively_model(), model / "model.gguf")


@pytest.fixture(scope="module")
def engine(model: Path, lively_adapters: Path) -> Engine:
    return dlp_lora.load(
        str(model),
        adapters=lively_adapters,
        router=HashRouter(),
        segmenter=partial(EveryK, 6),
        switching=Switching(min_tokens=1, margin=0.0),
    )


@pytest.fixture(scope="module")
def outline(engine: Engine) -> Outline:
    outline = Outline.of(engine)
    return replace(outline, base=replace(outline.base, probe=engine.probe()))


@pytest.fixture(scope="module")
def backend(outline: Outline, file: Path) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend(outline, file, max_batch=3, chunk_tokens=8, num_threads=1)
    yield backend
    backend.close()


@torch.no_grad()
def check_answer(engine: Engine, request: Request, events: list[Any]) -> Done:
    """Checks that each token is the likeliest under the mixtures that the trace says, and its log-probability."""
    done = read(events)
    generation = done.generation
    prompt, answer = list(generation.prompt_tokens), list(generation.tokens)
    logprobs = [event.logprob for event in events if isinstance(event, Token)]
    mixtures, numbers = [generation.trace[0].mixture], [0] * (len(prompt) + len(answer))
    place = 0
    for i, sentence in enumerate(generation.trace):
        if sentence.switched:
            mixtures.append(sentence.mixture)
            kept = len(prompt) + sentence.start if request.call.settings.kv_policy == "keep" else 0
            numbers[kept:] = [len(mixtures) - 1] * (len(numbers) - kept)
        end = len(answer) if i + 1 == len(generation.trace) else generation.trace[i + 1].start + 1
        with engine.under(mixtures, torch.tensor([numbers])) as forward:
            rows = forward(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
        for place in range(place, end):  # noqa: B020
            row = rows[len(prompt) - 1 + place]
            assert logprobs[place] == pytest.approx(float(row[answer[place]]), abs=TOLERANCE)
            assert float(row.max() - row[answer[place]]) < 2 * TOLERANCE
        place = end
    return done


@pytest.mark.parametrize("kv_policy", ["recompute", "keep"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_answers_that_switch_are_those_of_the_engine(
    engine: Engine, backend: LlamaCppBackend, prompt: str, kv_policy: str
) -> None:
    request = ask(engine, prompt, settings={"kv_policy": kv_policy}, num_logprobs=1)
    check_answer(engine, request, list(backend.open(request)))


def test_requests_of_equal_and_other_mixtures_decode_side_by_side(engine: Engine, backend: LlamaCppBackend) -> None:
    mixtures: list[dict[str, float] | None] = [{"math": 1.0}, {"math": 1.0}, {"units": 0.6, "poems": 0.4}, {}, None]
    requests = [ask(engine, PROMPTS[1], mixture=mixture, num_logprobs=1) for mixture in mixtures]
    streams = [backend.open(request) for request in requests]
    done = [check_answer(engine, r, list(s)) for r, s in zip(requests, streams, strict=True)]
    assert done[0].generation.tokens == done[1].generation.tokens
    stats = backend.stats()
    assert stats.num_step_tokens > stats.num_steps  # some steps gave several tokens
    assert stats.waiting == stats.reading == stats.decoding == 0


def test_one_adapter_gives_the_tokens_of_the_engine(engine: Engine, backend: LlamaCppBackend) -> None:
    for name in ("math", "units", "poems"):
        request = ask(engine, PROMPTS[1], mixture={name: 1.0})
        assert read(backend.open(request)).generation.tokens == alone(engine, request).tokens


@torch.no_grad()
@pytest.mark.parametrize("mixture", [{"math": 1.0}, {"math": 0.6, "units": 0.4}], ids=["one", "two"])
def test_adapters_give_the_tokens_and_log_probabilities_of_peft(
    engine: Engine, backend: LlamaCppBackend, lively_adapters: Path, mixture: dict[str, float]
) -> None:
    peft = PeftModel.from_pretrained(lively_model(), lively_adapters / "math", adapter_name="math")
    peft.load_adapter(lively_adapters / "units", adapter_name="units")
    peft.base_model.set_adapter([*mixture])
    for module in peft.modules():
        if isinstance(module, LoraLayer):
            for name, weight in mixture.items():
                module.set_scale(name, weight)
    for prompt in PROMPTS:
        request = ask(engine, prompt, mixture=mixture, num_logprobs=0)
        events = list(backend.open(request))
        answer = list(read(events).generation.tokens)
        ids = torch.tensor([[*request.tokens, *answer]])
        rows = peft(ids).logits[0, len(request.tokens) - 1 : -1].log_softmax(dim=-1)
        assert answer == rows.argmax(dim=-1).tolist()
        logprobs = [event.logprob for event in events if isinstance(event, Token)]
        assert logprobs == pytest.approx(rows.max(dim=-1).values.tolist(), abs=TOLERANCE)


def test_a_prompt_is_scored(engine: Engine, backend: LlamaCppBackend) -> None:
    request = ask(engine, PROMPTS[1], mixture={"math": 1.0}, num_prompt_logprobs=2, max_tokens=0)
    (scores,) = [event for event in backend.open(request) if isinstance(event, PromptScores)]
    with engine.fixed({"math": 1.0}), torch.no_grad():
        rows = engine.model(torch.tensor([request.tokens])).logits[0].log_softmax(dim=-1)
    expected = rows[:-1].gather(1, torch.tensor(request.tokens[1:])[:, None])[:, 0].tolist()
    assert scores.logprobs[1:] == pytest.approx(expected, abs=TOLERANCE)


def test_adapters_come_are_replaced_and_go(engine: Engine, backend: LlamaCppBackend, tmp_path: Path) -> None:
    answers = []
    for path in extra_adapters(tmp_path):
        backend.check_adapter(path, "extra")
        backend.put_adapters({"extra": path})
        answers.append(read(backend.open(ask(engine, PROMPTS[1], mixture={"extra": 1.0}))).generation.tokens)
    assert answers[0] != answers[1]
    backend.remove_adapter("extra")
    with pytest.raises(AdapterError, match="no adapter 'extra'"):
        backend.open(ask(engine, PROMPTS[1], mixture={"extra": 1.0}))
    with pytest.raises(AdapterError, match="no adapter 'extra'"):
        backend.remove_adapter("extra")


def test_a_bundle_that_is_written_again_is_answered_from_its_new_files_after_a_reload(
    model: Path, file: Path, lively_adapters: Path, tmp_path: Path
) -> None:
    old = {name: lively_adapters / name for name in ("math", "units", "poems")}
    first, second = extra_adapters(tmp_path / "shelf")
    new = {"math": first, "units": old["units"], "extra": second}
    dlp_lora.load(str(model), adapters=old).save_pretrained(tmp_path / "bundle")
    outline = read_outline(tmp_path / "bundle")
    backend = LlamaCppBackend(outline, file, max_batch=2, num_threads=1)
    service = make_service(outline, backend, ServerSettings(), Keys({}, admin="A"), name="tiny")
    manager = AdapterManager(service, folders=[tmp_path / "shelf"], bundle=tmp_path / "bundle")

    def post(path: str, body: Any) -> httpx.Response:
        return over_http(service, manager, path, body, key="A")

    def answered(name: str) -> str:
        response = post("/v1/completions", {**ASKED, "model": name})
        body = response.json()
        return str(body["choices"][0]["text"] if response.status_code == 200 else body["error"]["code"])

    def expected(folder: Path) -> str:
        engine = dlp_lora.load(str(model), adapters={"it": folder})
        return engine.generate(ASKED["prompt"], mixture={"it": 1.0}, max_new_tokens=12, do_sample=False).text

    before = answered("math")
    assert before == expected(old["math"])
    dlp_lora.load(str(model), adapters=new).save_pretrained(tmp_path / "bundle")
    assert answered("math") == before  # in memory
    assert answered("units") == "adapter_changed"
    told = post("/v1/reload", {}).json()
    assert (told["added"], told["removed"], told["replaced"]) == (["extra"], ["poems"], ["math"])
    assert {name: answered(name) for name in new} == {name: expected(folder) for name, folder in new.items()}
    assert answered("math") != before
    assert answered("poems") == "model_not_found"
    body = {"lora_name": "math", "lora_path": "1", "load_inplace": True}
    assert post("/v1/load_lora_adapter", body).status_code == 200
    assert answered("math") == answered("extra") == expected(second)
    assert post("/v1/unload_lora_adapter", {"lora_name": "math"}).status_code == 200
    assert answered("math") == "model_not_found"
    backend.close()


def test_a_reader_that_leaves_frees_its_place(engine: Engine, outline: Outline, file: Path) -> None:
    backend = LlamaCppBackend(outline, file, max_batch=1, max_queue=1, num_threads=1)
    long = ask(engine, "x", mixture={}, max_tokens=400, ignore_eos=True)
    running, waiting = backend.open(long), backend.open(ask(engine, PROMPTS[1], mixture={}))
    with pytest.raises(QueueFullError):
        backend.open(long)
    running.cancel()
    assert read(running).reason == "abort"
    assert read(waiting).reason in ("stop", "length")
    backend.close()
    assert not backend.health.is_alive


def test_another_model_is_refused(outline: Outline, tmp_path: Path) -> None:
    other = write_model(lively_model(seed=5), tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"has another model than .* differ by"):
        LlamaCppBackend(outline, other, num_threads=1)


def test_a_file_without_a_model_is_refused_by_the_child_process(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"llama.cpp cannot run .*no\.gguf"):
        check_runs(tmp_path / "no.gguf")


@pytest.mark.models
def test_the_default_model_answers_as_the_engine_from_its_file_in_float32(tmp_path: Path) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    file = tmp_path / "f32.gguf"
    assert not llama_cpp.llama_model_quantize(str(default_gguf()).encode(), str(file).encode(), params)
    model = AutoModelForCausalLM.from_pretrained(default_model(), dtype=torch.float32)
    for number, name in enumerate(("math", "poems", "units")):
        make_adapter(model, tmp_path / "adapters" / name, seed=number, scale=0.02, target_modules="all-linear")
    engine = dlp_lora.load(
        str(default_model()),
        adapters=tmp_path / "adapters",
        router=HashRouter(),
        dtype=torch.float32,
        segmenter=partial(EveryK, 40),
        switching=Switching(min_tokens=1, margin=0.0),
    )
    backend = LlamaCppBackend(Outline.of(engine), file, max_context=512)
    for kv_policy in ("recompute", "keep"):
        request = ask(engine, "The sea is", settings={"kv_policy": kv_policy}, num_logprobs=1, max_tokens=40)
        done = check_answer(engine, request, list(backend.open(request)))
        assert sum(sentence.switched for sentence in done.generation.trace) > 1
    backend.close()


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "gemma", "phi3"])
def test_adapters_of_other_architectures_are_exact(architecture: str, tmp_path: Path) -> None:
    model = lively_model(architecture)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for number, name in enumerate(("one", "two")):
        targets = "all-linear" if number else USUAL_TARGETS[architecture]
        make_adapter(model, tmp_path / "adapters" / name, seed=number, scale=0.3, target_modules=targets)
    engine = dlp_lora.load(str(tmp_path), adapters=tmp_path / "adapters")
    backend = LlamaCppBackend(Outline.of(engine), write_model(model, tmp_path / "model.gguf"), num_threads=1)
    for mixture in ({}, {"one": 1.0}, {"one": 0.3, "two": 0.7}):
        request = ask(engine, PROMPTS[1], mixture=mixture, num_logprobs=1)
        check_answer(engine, request, list(backend.open(request)))
    backend.close()


def test_an_adapter_is_freed_after_its_last_request(engine: Engine, outline: Outline, file: Path) -> None:
    backend = LlamaCppBackend(outline, file, max_batch=2, num_threads=1)
    running = backend.open(ask(engine, PROMPTS[1], mixture={"math": 1.0}, max_tokens=200, ignore_eos=True))
    next(event for event in running if isinstance(event, Token))
    backend.remove_adapter("math")
    answer = backend.open(ask(engine, PROMPTS[1], mixture={"units": 1.0}))
    read(answer)
    assert len(backend.mixtures.loaded) == 2
    running.cancel()
    read(backend.open(ask(engine, PROMPTS[1], mixture={"units": 1.0})))
    assert len(backend.mixtures.loaded) == 1
    backend.close()


def test_questions_apart_are_answered_over_http_as_by_the_engine(
    model: Path, file: Path, lively_adapters: Path
) -> None:
    engine = dlp_lora.load(
        str(model), adapters=lively_adapters, router=WordRouter(), policy=TopK(1), prompt_routing="apart"
    )
    prompt = "Add the sum?\nA rhyme in verse?\nHow long is an inch?"
    expected = engine.generate(prompt, max_new_tokens=12, do_sample=False)
    backend = LlamaCppBackend(Outline.of(engine), file, max_batch=2, num_threads=1)
    service = make_service(Outline.of(engine), backend, ServerSettings(), Keys({}), name="tiny")
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
    answer = over_http(service, AdapterManager(service), "/v1/completions", body).json()
    assert answer["choices"][0]["text"] == expected.text
    assert [s["mixture"] for s in answer["choices"][0]["dlp"]["trace"]] == [dict(s.mixture) for s in expected.trace]
    with BackendAnswerer(Outline.of(engine), backend).stream(prompt, max_new_tokens=12) as stream:
        assert "".join(stream) == expected.text
        assert stream.generation.tokens == expected.tokens
    backend.close()


def test_commands_answer_as_with_the_local_backend(model: Path, file: Path, lively_adapters: Path) -> None:
    parts = ("--model", model, "--adapters", lively_adapters, "--fixed", "math=0.5,units=0.5", "--max-new-tokens", "12")
    options = ("--backend", "llama.cpp", "--gguf", file, "--threads", "1")
    expected = ok("generate", "How far is it?", *parts)
    assert ok("generate", "How far is it?", *parts, *options) == expected


def test_an_answerer_gives_what_the_engine_gives(engine: Engine, outline: Outline, file: Path) -> None:
    backend = LlamaCppBackend(outline, file, max_batch=1, num_threads=1)
    answerer = BackendAnswerer(outline, backend)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "mixture": {"math": 1.0}}
    expected = engine.generate(PROMPTS[1], **options)
    assert answerer.generate(PROMPTS[1], **options).tokens == expected.tokens
    with answerer.stream(PROMPTS[1], **options) as stream:
        pieces = list(stream)
    assert "".join(pieces) == expected.text
    assert {piece.mixture for piece in pieces} == {expected.trace[0].mixture}
    with pytest.raises(PromptError):
        answerer.generate("", max_new_tokens=3)
    backend.close()
