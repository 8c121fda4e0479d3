import json
import math
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache

import dlp_lora
from conftest import byte_tokenizer, lively_model
from dlp_lora import Context, MiniMLP, Router, RouterError
from dlp_lora.cli.route import context_of
from dlp_lora.router import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, Calibration, Encoded, MiniMLPConfig
from dlp_lora.router.context import has_text
from dlp_lora.router.nearness import RIDGE, Nearness
from dlp_lora.tasks import Example
from dlp_lora.training.contexts import draw_contexts
from reference import mahalanobis

NAMES = ("math", "poems", "units")
BYTES = byte_tokenizer().backend_tokenizer
CONTEXTS = [
    Context("Why?"),
    Context("Why?", "It is so. ", "T"),
    Context("How far is it to the moon, and back?", "", ""),
    Context("", "Nothing was asked. ", "Y"),
    Context("漢字 👋🏽", "é", "ß"),
    Context("And back?", history="How far is it?\nFar."),
]
ODD = {
    "empty": "",
    "one token": "a",
    "spaces": " \n\t ",
    "punctuation": string.punctuation * 5,
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u200b\ufeff\ufffd",
    "100,000 characters": "Why is it so? " * 7143,
}


def router(
    *, seed: int = 0, tokenizer: Tokenizer = BYTES, calibration: Calibration | None = None, **config: Any
) -> MiniMLP:
    """A router of random weights, large enough to tell texts apart."""
    torch.manual_seed(seed)
    mlp = MiniMLP(
        NAMES, tokenizer, MiniMLPConfig(**{"dim": 16, "hidden": 24, **config}), calibration=calibration
    ).eval()
    with torch.no_grad():
        mlp.embedding.weight.normal_()
        for layer in [*mlp.layers, mlp.head]:
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(2)
    return mlp


def prompt_ids(mlp: MiniMLP, text: str) -> list[int]:
    return list(mlp.encode(Context(text)).prompt)


def words(vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


class TestProbabilities:
    @pytest.mark.parametrize("odd", ODD)
    def test_any_text_gets_finite_probabilities_that_sum_to_one_if_it_says_anything(self, odd: str) -> None:
        text = ODD[odd]
        found = router().probabilities([Context(text), Context("Why?", text), Context(text, text, text)])
        assert found.shape == (3, 3)
        assert torch.isfinite(found).all()
        assert (found >= 0).all()
        says = float(any(c.isprintable() and not c.isspace() for c in text))
        torch.testing.assert_close(found.sum(dim=1), torch.tensor([says, 1.0, says]))

    @given(st.text(max_size=50), st.text(max_size=50))
    @settings(deadline=None, max_examples=50)
    def test_any_strings_get_finite_probabilities(self, prompt: str, answer: str) -> None:
        found = router().probabilities([Context(prompt, answer)])
        assert torch.isfinite(found).all()
        assert found.sum().item() == pytest.approx(has_text([Context(prompt, answer)]).item(), abs=1e-5)

    def test_a_batch_is_its_rows_alone(self) -> None:
        mlp = router()
        alone = torch.cat([mlp.probabilities([context]) for context in CONTEXTS])
        torch.testing.assert_close(mlp.probabilities(CONTEXTS), alone, rtol=0, atol=1e-6)
        torch.testing.assert_close(mlp.probabilities(CONTEXTS[::-1]), alone.flip(0), rtol=0, atol=1e-6)

    def test_other_texts_get_other_probabilities(self) -> None:
        found = router().probabilities(CONTEXTS)
        assert len({tuple(row) for row in found.tolist()}) == len(CONTEXTS)

    def test_prompt_and_answer_are_told_apart(self) -> None:
        one, two = router().probabilities([Context("Why?", "So."), Context("So.", "Why?")])
        assert (one - two).abs().max() > 1e-3

    def test_the_order_of_words_matters(self) -> None:
        one, two = router().probabilities([Context("abcdef " * 9 + "xyz"), Context("xyz" + " abcdef" * 9)])
        assert (one - two).abs().max() > 1e-3

    def test_a_sentences_first_token_joins_the_answer(self) -> None:
        mlp = router()
        split, joined = mlp.probabilities([Context("Why?", "It is. ", "So"), Context("Why?", "It is. So")])
        assert torch.equal(split, joined)

    def test_temperature_divides_the_logits(self) -> None:
        logits = router()([Encoded((), BYTES.encode("why?").ids, ())])
        found = router(calibration=Calibration(temperature=3.0)).probabilities([Context("Why?")])
        torch.testing.assert_close(found, (logits / 3).softmax(dim=-1).detach())

    def test_what_fits_none_takes_its_share_of_each_row(self) -> None:
        mlp = router(calibration=Calibration(temperature=2.0, fit_threshold=0.5, fit_slope=3.0))
        contexts = [replace(context, history="") for context in CONTEXTS]
        rows = mlp([mlp.encode(context) for context in contexts]).tolist()
        for row, found, score in zip(rows, mlp.probabilities(contexts), mlp.scores(contexts).tolist(), strict=True):
            energy = math.log(sum(map(math.exp, row)))
            fits = 1 / (1 + math.exp(-3 * (energy - 0.5)))
            halved = [math.exp(z / 2) for z in row]
            assert found.tolist() == pytest.approx([fits * own / sum(halved) for own in halved], abs=1e-5)
            assert score == pytest.approx(energy, abs=1e-5)

    @pytest.mark.parametrize("directions", [4, 100])
    def test_the_distance_to_the_likeliest_adapter_and_the_energy_say_what_fits(
        self, directions: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dlp_lora.router.nearness.DIRECTIONS", directions)
        mlp = router(calibration=Calibration(temperature=2.0, fit_threshold=-4.0, fit_slope=0.7))
        memory = torch.randn(len(NAMES), 5, 24)
        mlp.near = Nearness.of(memory)
        contexts = [replace(context, history="") for context in CONTEXTS]
        features = mlp.features([mlp.encode(context) for context in contexts]).detach()
        logits = mlp.head(features).detach()
        owners = [row.index(max(row)) for row in logits.tolist()]
        near = mahalanobis(features, owners, memory, ridge=RIDGE, directions=directions)
        expected = [math.log(sum(map(math.exp, row))) + own for row, own in zip(logits.tolist(), near, strict=True)]
        assert mlp.scores(contexts).tolist() == pytest.approx(expected, abs=1e-3)
        shares = (logits / 2).softmax(dim=-1).tolist()
        for row, found, score in zip(shares, mlp.probabilities(contexts), expected, strict=True):
            fits = 1 / (1 + math.exp(-0.7 * (score + 4)))
            assert found.tolist() == pytest.approx([fits * share for share in row], abs=1e-3)

    @given(st.integers(0, 10**6), st.floats(0.1, 1.0), st.floats(-3.0, 3.0))
    @settings(deadline=None, max_examples=30)
    def test_a_reach_is_widened_to_the_share_of_texts_asked_for_and_never_narrowed(
        self, seed: int, coverage: float, least: float
    ) -> None:
        torch.manual_seed(seed)
        near = Nearness.of(torch.randn(3, 8, 12))
        texts, owners = torch.randn(40, 12), torch.arange(40) % 2  # none of the third
        wide = near.reaching(texts, owners, torch.full((40,), least), coverage=coverage)
        assert (wide.spreads >= near.spreads).all()
        assert wide.spreads[2] == near.spreads[2]
        passed = wide(texts, owners) >= least - 1e-4
        assert all(passed[owners == owner].float().mean() >= coverage - 0.05 for owner in (0, 1))

    def test_a_history_makes_no_stranger_of_a_prompt(self) -> None:
        mlp = router()
        mlp.near = Nearness.of(torch.randn(len(NAMES), 5, 24))
        alone, after = mlp.scores([Context("Why?", "So."), Context("Why?", "So.", history="Hello!")]).tolist()
        both = mlp.features(mlp.encode_all([Context("Why?", "So.", history="Hello!")])).detach()
        assert after == pytest.approx(max(alone, mlp.fit(both, mlp.head(both)).item()), abs=1e-5)
        assert after >= alone

    @given(st.lists(st.sampled_from([*CONTEXTS, *map(Context, ODD.values())]), min_size=1, max_size=8))
    @settings(deadline=None, max_examples=50)
    def test_a_context_scores_alone_as_in_a_batch(self, contexts: list[Context]) -> None:
        mlp = router()
        mlp.near = Nearness.of(torch.randn(len(NAMES), 5, 24))
        alone = torch.cat([mlp.scores([context]) for context in contexts])
        torch.testing.assert_close(mlp.scores(contexts), alone)

    @pytest.mark.parametrize("text", ["", "\x00\x01\x1b", " \n\t", "\u200b\ufeff"])
    def test_what_says_nothing_fits_no_adapter(self, text: str) -> None:
        assert router().probabilities([Context(text)]).sum() == 0
        assert router().probabilities([Context(text, history="Why?")]).sum() > 0

    def test_a_picture_of_symbols_says_something(self) -> None:
        assert router().probabilities([Context("..#..\n.###.\n#####")]).sum() > 0

    def test_nearness_of_one_text_each_is_finite(self) -> None:
        mlp = router()
        mlp.near = Nearness.of(torch.randn(len(NAMES), 1, 24))
        assert mlp.scores([Context(text) for text in ODD.values()]).isfinite().all()

    @pytest.mark.parametrize("field", ["temperature", "fit_slope"])
    def test_a_calibration_is_positive(self, field: str) -> None:
        with pytest.raises(ValueError, match=f"a router's {field} must be positive, got 0"):
            Calibration(**{field: 0})

    @pytest.mark.parametrize("gradients", [True, False])
    def test_bags_are_the_means_of_distinct_tokens_and_the_weighted_means_that_the_half_life_says(
        self, gradients: bool
    ) -> None:
        mlp = router(half_life=2.0)
        inputs: list[torch.Tensor] = []
        mlp.layers.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with torch.set_grad_enabled(gradients):
            mlp([mlp.encode(Context("aba", "cc", ""))])
        a, b, c = mlp.embedding.weight[BYTES.encode("abc").ids]
        h = 0.5**0.5
        total = 1 + h + h * h
        prompt = [(a + b) / 2, (a + h * b + h * h * a) / total, (h * h * a + h * b + a) / total]
        expected = torch.cat([torch.zeros(16), *prompt, c, c])
        torch.testing.assert_close(inputs[0][0], expected)

    def test_a_history_fades_by_its_own_half_life(self) -> None:
        mlp = router(history_half_life=1.0)
        inputs: list[torch.Tensor] = []
        mlp.layers.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        mlp([mlp.encode(Context("", history="ab"))])
        a, b = mlp.embedding.weight[BYTES.encode("ab").ids]
        torch.testing.assert_close(inputs[0][0], torch.cat([(a + 2 * b) / 3, torch.zeros(5 * 16)]))

    def test_the_same_words_weigh_otherwise_as_history_than_as_prompt(self) -> None:
        as_history, as_prompt = router().probabilities([Context("", history="Why?"), Context("Why?")])
        assert (as_history - as_prompt).abs().max() > 1e-3

    def test_what_is_kept_from_earlier_sentences_changes_nothing(self) -> None:
        mlp = router()
        first = mlp.probabilities(CONTEXTS)
        logits = mlp(mlp.encode_all(CONTEXTS)).detach()
        torch.testing.assert_close(first, logits.softmax(dim=-1))
        assert torch.equal(mlp.probabilities(CONTEXTS), first)
        assert torch.equal(router().probabilities(CONTEXTS[::-1]).flip(0), first)

    def test_kept_bags_are_dropped_when_the_embeddings_change(self) -> None:
        mlp = router()
        before = mlp.probabilities(CONTEXTS)
        with torch.no_grad():
            mlp.embedding.weight.mul_(2)
        assert not torch.equal(mlp.probabilities(CONTEXTS), before)

    def test_no_more_texts_are_kept_than_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dlp_lora.router.mini_mlp.CACHE_SIZE", 5)
        mlp = router()
        for i in range(20):
            mlp.probabilities([Context(f"Why {i}?")])
        assert len(mlp._bags) == 5
        assert len(mlp.probabilities([Context(f"Why {i}?") for i in range(20)])) == 20

    def test_probabilities_carry_no_gradient_but_logits_do(self) -> None:
        mlp = router()
        assert not mlp.probabilities(CONTEXTS).requires_grad
        mlp([mlp.encode(Context("Why?", "So."))]).sum().backward()
        assert mlp.embedding.weight.grad is not None
        assert mlp.embedding.weight.grad.abs().sum() > 0

    def test_it_is_a_router(self) -> None:
        assert isinstance(router(), Router)


class TestEncoding:
    def test_training_and_routing_read_text_the_same_way(self) -> None:
        mlp = router()
        logits = mlp([mlp.encode(context) for context in CONTEXTS])
        torch.testing.assert_close(logits.softmax(dim=-1).detach(), mlp.probabilities(CONTEXTS), rtol=0, atol=1e-6)

    def test_training_the_command_and_decoding_give_the_router_the_same_text(self, lively_adapters: Path) -> None:
        example = Example(prompt="And  BACK?", answer="As far. Y")  # its second sentence is one token
        drawn = draw_contexts([[example], [example]], 200, {"whole": 1, "answer": 1}, random.Random(0))
        learned = {sample.context for sample in drawn if not sample.context.history}
        asked = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": "As far. Y"}]
        routed = [context_of({"messages": asked[:1]}), context_of({"messages": asked})]

        class Listening(MiniMLP):
            def probabilities(self, contexts: Sequence[Context]) -> Tensor:
                min_effect.extend(contexts)
                return super().probabilities(contexts)

        min_effect: list[Context] = []
        mlp = Listening(NAMES, BYTES, MiniMLPConfig(dim=16, hidden=24)).eval()
        engine = dlp_lora.load(lively_model(), tokenizer=byte_tokenizer(), adapters=lively_adapters, router=mlp)
        template = engine.tokenizer.apply_chat_template(asked[:1], tokenize=False, add_generation_prompt=True)
        cache = DynamicCache(config=engine.model.config)
        for text in (template, *"As far. Y"):
            ids = torch.tensor([engine.tokenizer(text, add_special_tokens=False)["input_ids"]])
            engine.model(ids, past_key_values=cache)
        assert len(min_effect) == 2
        for decoded, said in zip(min_effect, routed, strict=True):
            assert mlp.encode(decoded) == mlp.encode(said)
            assert mlp.encode(decoded) in mlp.encode_all(sorted(learned, key=repr))

    @given(st.lists(st.text(alphabet="ab\n ?é", max_size=20), min_size=4, max_size=4))
    @settings(deadline=None, max_examples=50)
    def test_many_contexts_are_encoded_as_each_alone(self, texts: list[str]) -> None:
        mlp = router()
        contexts = [Context(*texts), Context(texts[3]), *CONTEXTS]
        assert [tuple(map(list, e)) for e in mlp.encode_all(contexts)] == [
            tuple(map(list, mlp.encode(context))) for context in contexts
        ]

    @pytest.mark.parametrize("text", ["Why?\nSo.", "Why? So.", "Why?  \t So."])
    def test_lines_and_sentences_are_encoded_one_by_one_and_joined_by_a_line_break(self, text: str) -> None:
        assert router().encode(Context(text)).prompt == BYTES.encode("why?\nso.").ids

    def test_all_but_the_last_sentence_of_a_growing_answer_are_encoded_once(self) -> None:
        mlp = router()
        seen: list[str] = []
        tokenize = mlp._tokenize
        mlp._encode_piece = lru_cache(lambda piece: (seen.append(piece), tokenize(piece))[1])  # type: ignore[assignment]
        answer = ""
        for sentence in ("It is so. ", "Why not? ", "So there. "):
            mlp.probabilities([Context("Why?", answer, sentence[:2])])
            answer += sentence
        assert [seen.count(piece) for piece in ("why?", "it is so.")] == [1, 1]

    @pytest.mark.parametrize("text", ["WHY is  it?\nso.", "Why\tis it? \n  So."])
    def test_capitals_and_spaces_are_not_told_apart(self, text: str) -> None:
        mlp = router()
        assert mlp.encode(Context(text)) == mlp.encode(Context("Why is it?\nSo."))

    def test_a_long_history_keeps_its_end(self) -> None:
        mlp = router()
        long, end = "a" * 3_000 + "b" * 4_000, "b" * 4_000
        assert mlp.encode(Context("", history=long)) == mlp.encode(Context("", history=end))

    def test_long_texts_keep_their_end(self) -> None:
        mlp = router(max_chars=10)
        assert prompt_ids(mlp, "far too long: " + "0123456789") == prompt_ids(mlp, "0123456789")
        assert prompt_ids(mlp, "  0123456789\n") == prompt_ids(mlp, "0123456789")

    def test_text_is_encoded_without_special_tokens(self) -> None:
        tokenizer = byte_tokenizer()
        from tokenizers.processors import TemplateProcessing

        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)])
        assert backend.encode("Why?").ids[0] == 257
        assert prompt_ids(router(tokenizer=backend), "Why?") == BYTES.encode("why?").ids

    def test_padding_and_truncation_in_a_tokenizer_file_are_ignored(self, tmp_path: Path) -> None:
        backend = Tokenizer.from_str(BYTES.to_str())
        backend.enable_padding(length=32, pad_id=258, pad_token="<|pad|>")
        backend.enable_truncation(max_length=4)
        mlp = router(tokenizer=backend)
        assert prompt_ids(mlp, "Why is it?") == BYTES.encode("why is it?").ids
        assert backend.padding  # the caller's own is left as it was
        mlp.save_pretrained(tmp_path / "router")
        assert prompt_ids(MiniMLP.from_pretrained(tmp_path / "router"), "Why is it?") == BYTES.encode("why is it?").ids

    def test_tokens_may_have_gaps_between_their_ids(self, tmp_path: Path) -> None:
        backend = Tokenizer(models.WordLevel({"why": 0, "far": 7}, unk_token="why"))
        mlp = router(tokenizer=backend)
        assert torch.isfinite(mlp.probabilities([Context("far")])).all()


class TestMaking:
    @pytest.mark.parametrize("names", [(), ("math", "math"), ("math", "poems", "math")])
    def test_names_must_be_there_and_once_each(self, names: tuple[str, ...]) -> None:
        with pytest.raises(RouterError, match="at least one adapter name, each once"):
            MiniMLP(names, BYTES)

    @pytest.mark.parametrize("field", ["dim", "hidden", "half_life", "history_half_life", "max_chars"])
    def test_sizes_must_be_positive(self, field: str) -> None:
        with pytest.raises(ValueError, match=rf"MiniMLPConfig\.{field} must be positive, got 0"):
            MiniMLPConfig(**{field: 0})

    def test_the_papers_size_is_about_five_million(self) -> None:
        mlp = MiniMLP([f"task{i}" for i in range(26)], words(49_152))
        assert 4.5e6 < mlp.num_parameters < 5.5e6
        assert sum(isinstance(layer, torch.nn.Linear) for layer in [*mlp.layers, mlp.head]) == 4


def damage(file: str, data: bytes | None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        if data is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(data)

    return apply


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text()) | changes
        (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return apply


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


class TestSaving:
    def test_a_saved_router_is_the_same_to_the_last_bit(self, tmp_path: Path) -> None:
        mlp = router(half_life=3.5, max_chars=500, calibration=Calibration(temperature=1.3, fit_threshold=0.4))
        mlp.near = Nearness.of(torch.randn(3, 8, 24))
        mlp.save_pretrained(tmp_path / "router")
        loaded = MiniMLP.from_pretrained(tmp_path / "router")
        assert loaded.names == NAMES
        assert loaded.config == mlp.config
        assert loaded.calibration == mlp.calibration
        assert not loaded.training
        assert torch.equal(loaded.probabilities(CONTEXTS), mlp.probabilities(CONTEXTS))
        for context in CONTEXTS:
            assert torch.equal(loaded.probabilities([context]), mlp.probabilities([context]))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["router"]

    def test_a_router_of_an_earlier_version_is_read_without_its_memory(self, tmp_path: Path) -> None:
        router().save_pretrained(tmp_path / "router")
        weights = load_file(tmp_path / "router" / WEIGHTS_FILE)
        save_file({**weights, "memory": torch.randn(3, 2, 24)}, tmp_path / "router" / WEIGHTS_FILE)
        loaded = MiniMLP.from_pretrained(tmp_path / "router")
        assert torch.equal(loaded.probabilities(CONTEXTS), router().probabilities(CONTEXTS))

    def test_saving_again_replaces_the_router_and_its_report_alone(self, tmp_path: Path) -> None:
        router(seed=1).save_pretrained(tmp_path / "router")
        for file in ("report.json", "README.md"):
            (tmp_path / "router" / file).write_text("old")
        router(seed=2).save_pretrained(str(tmp_path / "router"))
        loaded = MiniMLP.from_pretrained(str(tmp_path / "router"))
        assert torch.equal(loaded.probabilities(CONTEXTS), router(seed=2).probabilities(CONTEXTS))
        assert not (tmp_path / "router" / "report.json").exists()
        assert (tmp_path / "router" / "README.md").read_text() == "old"

    def test_a_save_that_breaks_off_keeps_the_router_that_was_there(self, tmp_path: Path) -> None:
        router(seed=1).save_pretrained(tmp_path / "router")
        broken = router(seed=2)
        broken.names = ("math", {"a", "set"}, "units")  # type: ignore[assignment]  # JSON cannot hold it
        with pytest.raises(TypeError):
            broken.save_pretrained(tmp_path / "router")
        loaded = MiniMLP.from_pretrained(tmp_path / "router")
        assert torch.equal(loaded.probabilities(CONTEXTS), router(seed=1).probabilities(CONTEXTS))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["router"]

    @pytest.mark.parametrize(
        "damage, message",
        [
            (damage(CONFIG_FILE, None), f"is not a router folder: it has no {CONFIG_FILE}"),
            (damage(WEIGHTS_FILE, None), "is damaged .*copy it again or train it again"),
            (damage(TOKENIZER_FILE, None), "cannot be read|is damaged"),
            (truncate, "is damaged .*copy it again or train it again"),
            (damage(WEIGHTS_FILE, b""), "is damaged .*copy it again or train it again"),
            (damage(CONFIG_FILE, b'{"format": 4, "na'), "is damaged .*copy it again or train it again"),
            (damage(CONFIG_FILE, b"[1, 2]"), "is damaged .*copy it again or train it again"),
            (damage(CONFIG_FILE, b"\xff\xfe"), "is damaged .*copy it again or train it again"),
            (damage(TOKENIZER_FILE, b"{}"), "is not the tokenizer that the router was trained with; copy the router"),
            (rewrite(tokenizer=None), "is damaged .*tokenizer"),
            (rewrite(format=5), "was written by a later version; upgrade dlp-lora"),
            (rewrite(type="oracle"), "was written by a later version; upgrade dlp-lora"),
            (rewrite(type="encoder"), "holds a router of type 'encoder', not 'mini-mlp'; read it with load_router"),
            (rewrite(format=None), "is damaged .*format"),
            (rewrite(names=None), "is damaged .*names"),
            (rewrite(names=["math", "math", "units"]), "at least one adapter name, each once"),
            (rewrite(names=["math", "units"]), "is damaged .*size mismatch"),
            (rewrite(size={"dim": 17}), "is damaged .*size mismatch"),
            (rewrite(size={"half_life": -1}), "is damaged .*half_life must be positive"),
            (rewrite(size={"surprise": 1}), "is damaged .*surprise"),
        ],
    )
    def test_a_damaged_folder_is_refused_with_the_reason(
        self, tmp_path: Path, damage: Callable[[Path], None], message: str
    ) -> None:
        router().save_pretrained(tmp_path / "router")
        damage(tmp_path / "router")
        with pytest.raises(RouterError, match=rf"(?s){message}"):
            MiniMLP.from_pretrained(tmp_path / "router")

    def test_a_missing_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RouterError, match="nowhere is not a router folder"):
            MiniMLP.from_pretrained(tmp_path / "nowhere")
