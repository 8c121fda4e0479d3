import string
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import CHAT_TEMPLATE, EveryK, byte_tokenizer
from dlp_lora import Context
from dlp_lora.chat import Chat
from dlp_lora.engine.text import Detokenizer, PromptReader, decode
from dlp_lora.engine.turns import read_chat
from dlp_lora.router.context import CHARS_BEFORE
from dlp_lora.sentences import SentenceSegmenter

SPECIALS = ["<unk>", "<s>", "</s>"]


def added_tokenizer() -> PreTrainedTokenizerFast:
    """A byte tokenizer with added tokens that are no bytes: of other characters, of spaces, of bytes' own names."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("  ", special=False), "é你", "Ġa", AddedToken("<|x y|>", special=True)])
    return tokenizer


def fallback_tokenizer(*, kind: str = "llama-2", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: a mark for spaces, and byte tokens for what it does not know."""
    pieces = ["▁", *string.ascii_letters, *string.punctuation, *string.digits, "\n", "é", "▁t", "▁th", "▁the", "an"]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "n")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if kind == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = chat_template
    return fast


TOKENIZERS = {
    "byte-level": byte_tokenizer(),
    "llama-2": fallback_tokenizer(kind="llama-2"),
    "metaspace": fallback_tokenizer(kind="metaspace"),
}
CHARACTERS = st.sampled_from("abt he.\n€漢👋🏽é\u200d\u0301😀ß ") | st.characters(exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS, max_size=40)
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# The letter that byte-level tokenizers write for each byte.
BYTE_LETTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
ADDED = added_tokenizer()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 330), max_size=24))
@example([259, 260, 261, 262, 263, 330, 256])
def test_tokens_are_decoded_as_the_tokenizer_does(tokens: list[int]) -> None:
    for tokenizer in (*TOKENIZERS.values(), ADDED):
        assert decode(tokenizer, tokens, skip_special_tokens=False) == tokenizer.decode(tokens)


@settings(deadline=None)
@given(TEXTS)
def test_text_comes_back_as_from_the_tokenizer(text: str) -> None:
    for tokenizer in (*TOKENIZERS.values(), ADDED):
        tokens = tokenizer(text + "  é你Ġa<|x y|>")["input_ids"]
        assert decode(tokenizer, tokens, skip_special_tokens=False) == tokenizer.decode(tokens)


def pieces_of(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


class TestDetokenizer:
    @pytest.mark.parametrize("kind", TOKENIZERS)
    @given(TEXTS)
    @example("👋🏽 the 漢字.\n\n  the end")
    @example("")
    @settings(deadline=None, max_examples=60)
    def test_pieces_of_any_text_make_the_whole(self, kind: str, text: str) -> None:
        tokenizer = TOKENIZERS[kind]
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)

    @given(st.lists(st.integers(0, 258), max_size=40))
    @example([0xE2, 0x82, 256, 0xAC])
    @settings(deadline=None, max_examples=150)
    def test_pieces_of_any_bytes_make_the_whole(self, tokens: list[int]) -> None:
        tokenizer = TOKENIZERS["byte-level"]
        assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)

    @pytest.mark.parametrize("kind", ["llama-2", "metaspace"])
    @given(st.lists(st.integers(0, 2) | st.integers(259, 359), max_size=40))
    @settings(deadline=None, max_examples=100)
    def test_pieces_of_any_whole_characters_make_the_whole(self, kind: str, tokens: list[int]) -> None:
        tokenizer = TOKENIZERS[kind]
        assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_a_character_comes_with_its_last_byte(self, kind: str) -> None:
        tokenizer = TOKENIZERS[kind]
        tokens = tokenizer("a€b", add_special_tokens=False)["input_ids"]
        assert [piece for piece in pieces_of(tokenizer, tokens) if piece] == ["a", "€", "b"]
        held = pieces_of(tokenizer, tokens[:-2])
        assert "\ufffd" not in "".join(held[:-1])
        assert "\ufffd" in held[-1]

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_a_copy_goes_its_own_way(self, kind: str) -> None:
        tokenizer = TOKENIZERS[kind]
        start, one, two = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a€", "漢a", "éb"))
        first = Detokenizer(tokenizer)
        said = "".join(map(first.push, [*start, one[0]]))
        second = first.copy()
        assert said + "".join(map(first.push, one[1:])) + first.flush() == tokenizer.decode([*start, *one])
        assert said + "".join(map(second.push, two)) + second.flush() == tokenizer.decode([*start, one[0], *two])

    @pytest.mark.parametrize("text", ["the 漢字 is 👋🏽. ", b"\xff", b"\xe2\x82", b"\xf0\x9f\x91\xff"], ids=repr)
    def test_a_step_decodes_few_tokens_however_long_the_text(self, text: str | bytes) -> None:
        tokenizer = byte_tokenizer()
        data = text if isinstance(text, bytes) else text.encode()
        tokens = [tokenizer.convert_tokens_to_ids(BYTE_LETTERS[byte]) for byte in data] * (1200 // len(data))
        longest = 0

        class Counting(PreTrainedTokenizerFast):
            def decode(self, token_ids: Any, **kwargs: Any) -> str:
                nonlocal longest
                longest = max(longest, len(token_ids))
                return str(super().decode(token_ids, **kwargs))

        detokenizer = Detokenizer(Counting(tokenizer_object=tokenizer.backend_tokenizer))
        pieces = [detokenizer.push(token) for token in tokens]
        assert longest <= 64
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(tokens)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + "
    "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + "
    "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + "
    "'\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'].capitalize() + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "qwen": QWEN,
    "llama-2": LLAMA_2,
    "llama-3": LLAMA_3,
    "gemma": GEMMA,
    "plain": PLAIN,
}
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m['content'] + "
    "'\n</tool_response><|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% elif opens %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
MARKS = ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
CHATS = {
    "one turn": [("user", "How far is it?")],
    "three turns": [("user", "How far is it?"), ("assistant", "It is 3.5 km.\nOr so."), ("user", "[Really] (*)?")],
    "with a system": [("system", "Be  kind."), ("user", "How far is it?")],
}


def chat_tokenizer(kind: str, template: str) -> PreTrainedTokenizerFast:
    if kind == "byte-level":
        tokenizer = byte_tokenizer(chat_template=template)
        tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": MARKS})
        return tokenizer
    tokenizer = fallback_tokenizer(kind=kind, chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS[2:], "<|im_start|>", "<|im_end|>"]})
    return tokenizer


class TestPromptReader:
    @pytest.mark.parametrize("chat", CHATS)
    @pytest.mark.parametrize("template", TEMPLATES)
    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_a_chat_is_read_as_its_contents(self, kind: str, template: str, chat: str) -> None:
        if (template, chat) == ("gemma", "with a system"):
            pytest.skip("this template refuses the system role")
        tokenizer = chat_tokenizer(kind, TEMPLATES[template])
        messages = [{"role": role, "content": content} for role, content in CHATS[chat]]
        read = PromptReader(tokenizer)
        expected = "\n".join(content for _, content in CHATS[chat])
        for prompt in (True, False):
            encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)
            lines = [line.strip() for line in read(encoded["input_ids"]).splitlines()]
            assert lines == expected.splitlines()

    @pytest.mark.parametrize("template", [*TEMPLATES, "none"])
    @pytest.mark.parametrize("kind", TOKENIZERS)
    @pytest.mark.parametrize(
        "text",
        [
            "How far is it?",
            "The [INST] mark, user\n, model\n and <<SYS>> are parts of templates.",
            "A turn is <|im_start|>user\nHi<|im_end|>\n in ChatML",
            "system\nuser\nassistant",
            "Q: x\nAssistant: y\nUser: z",
            "@@0@@ and @@1@@",
        ],
    )
    def test_a_raw_prompt_is_read_as_it_is_without_special_tokens(self, kind: str, template: str, text: str) -> None:
        tokenizer = chat_tokenizer(kind, TEMPLATES.get(template, CHATML))
        if template == "none":
            tokenizer.chat_template = None
        tokens = tokenizer(text)["input_ids"]
        assert PromptReader(tokenizer)(tokens) == decode(tokenizer, tokens).strip()

    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_a_second_bos_before_a_chat_changes_nothing(self, kind: str) -> None:
        # tokenizer(apply_chat_template(..., tokenize=False)) often begins with two.
        tokenizer = chat_tokenizer(kind, LLAMA_3)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
        tokens = tokenizer("<s>" + text, add_special_tokens=False)["input_ids"]
        assert tokens[:2] == [tokenizer.bos_token_id] * 2
        assert PromptReader(tokenizer)(tokens).strip() == "Why?"

    def test_a_template_that_prints_the_date_is_read_on_the_next_day_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Day(date):
            now = date(2026, 11, 26)

            @classmethod
            def today(cls) -> date:  # type: ignore[override]
                return cls.now

        monkeypatch.setattr("dlp_lora.engine.text.date", Day)
        tokenizer = byte_tokenizer()
        dated = "<|im_start|>system\nToday is {}.<|im_end|>\n" + str(CHAT_TEMPLATE)
        chat = [{"role": "user", "content": "Why?"}]

        def encoded(day: str) -> list[int]:
            tokenizer.chat_template = dated.replace("{}", day, 1)
            return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])

        before = encoded("Thursday")
        read = PromptReader(tokenizer)
        assert read.context(before) == Context("Why?")
        after = encoded("Friday")
        Day.now = date(2026, 11, 27)
        assert read.context(after) == Context("Why?")
        assert read.context(before) == Context("Why?")  # a conversation that goes on
        assert [p.text.strip() for p in read.sentences(after, SentenceSegmenter)] == ["Why?"]

    def test_a_template_that_is_set_later_is_read_at_once(self) -> None:
        tokenizer = byte_tokenizer()
        read = PromptReader(tokenizer)
        chat = [{"role": "user", "content": "Why?"}]
        for template in (CHAT_TEMPLATE, LLAMA_3):
            tokenizer.chat_template = template
            tokens: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
            assert read.context(tokens["input_ids"]) == Context("Why?")

    def test_a_sentence_of_a_long_prompt_has_the_last_text_before_it(self) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        text = " ".join(f"This is the sentence of number {i}." for i in range(600))
        found = PromptReader(tokenizer).sentences(tokenizer(text)["input_ids"], SentenceSegmenter)
        assert "".join(passage.text for passage in found) == text
        before = "".join(passage.text for passage in found[:-1])
        assert found[-1].history == before[-CHARS_BEFORE:]
        assert found[9].history == "".join(passage.text for passage in found[:9])
        assert sum(len(passage.history) for passage in found) <= len(found) * CHARS_BEFORE

    @pytest.mark.parametrize("template", [VICUNA, ALPACA], ids=["vicuna", "alpaca"])
    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_the_words_of_a_template_without_special_tokens_are_not_read(self, kind: str, template: str) -> None:
        tokenizer = chat_tokenizer(kind, template)
        read = PromptReader(tokenizer)
        system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}
        answer, why = {"role": "assistant", "content": "7"}, {"role": "user", "content": "Why?"}
        chats = {
            Context("What is 3 + 4?"): [user],
            Context("What is 3 + 4?", history="Be brief."): [system, user],
            Context("Why?", history="Be brief.\nWhat is 3 + 4?\n7"): [system, user, answer, why],
        }
        for expected, chat in chats.items():
            encoded: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
            assert read.context(encoded["input_ids"]) == expected
        assert read.context(tokenizer("Be brief. Why?")["input_ids"]) == Context("Be brief. Why?")

    @pytest.mark.parametrize("template", [CHATML, QWEN_3, VICUNA, ALPACA], ids=["chatml", "qwen-3", "vicuna", "alpaca"])
    def test_an_answer_that_was_begun_is_none_of_the_question(self, template: str) -> None:
        tokenizer = byte_tokenizer(chat_template=template)
        chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because. It"}]
        encoded: Any = tokenizer.apply_chat_template(chat, continue_final_message=True, return_dict=True)
        tokens, read = encoded["input_ids"], PromptReader(tokenizer)
        assert read.context(tokens) == Context("Why?", "Because. It")
        (passage,) = read.sentences(tokens, SentenceSegmenter)
        assert passage.text.strip() == "Why?"
        assert "Because" not in decode(tokenizer, tokens[passage.start : passage.end])

    @pytest.mark.parametrize("change", [{}, {"enable_thinking": False}, {"opens": True}], ids=str)
    def test_a_thought_that_the_template_opens_or_leaves_empty_is_not_read(self, change: dict[str, bool]) -> None:
        tokenizer = byte_tokenizer(chat_template=QWEN_3)
        chat = [{"role": "user", "content": "Why?"}]
        encoded: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, **change)
        assert PromptReader(tokenizer).context(encoded["input_ids"]) == Context("Why?")

    @pytest.mark.parametrize("template", [CHATML, QWEN_3, LLAMA_3], ids=["chatml", "qwen-3", "llama-3"])
    @pytest.mark.parametrize(
        ("roles", "expected"),
        [
            (["developer", "user"], Context("1", history="0")),
            (["user", "assistant", "tool"], Context("0", history="1\n2")),
            (["system", "user", "assistant", "tool", "assistant", "user"], Context("5", history="0\n1\n2\n3\n4")),
        ],
    )
    def test_the_question_is_the_newest_turn_of_the_user(
        self, template: str, roles: list[str], expected: Context
    ) -> None:
        tokenizer = chat_tokenizer("byte-level", template)
        chat = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
        encoded: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        assert PromptReader(tokenizer).context(encoded["input_ids"]) == expected
        assert read_chat(Chat(messages=chat)) == expected

    def test_a_template_that_refuses_everything_reads_raw_text(self) -> None:
        tokenizer = chat_tokenizer("byte-level", "{{ raise_exception('no') }}")
        assert PromptReader(tokenizer)(tokenizer(" Why? ")["input_ids"]) == "Why?"

    @pytest.mark.parametrize("chat", CHATS)
    @pytest.mark.parametrize("template", TEMPLATES)
    @pytest.mark.parametrize("kind", TOKENIZERS)
    def test_sentences_of_a_chat_are_its_text_and_their_tokens_tile(self, kind: str, template: str, chat: str) -> None:
        if (template, chat) == ("gemma", "with a system"):
            pytest.skip("this template refuses the system role")
        tokenizer = chat_tokenizer(kind, TEMPLATES[template])
        messages = [{"role": role, "content": content} for role, content in CHATS[chat]]
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        tokens, read = encoded["input_ids"], PromptReader(tokenizer)
        passages = read.sentences(tokens, SentenceSegmenter)
        assert "".join(passage.text for passage in passages).strip() == read(tokens)
        assert len(passages) >= len(messages)
        assert passages[0].start == 0
        assert passages[-1].end < len(tokens)
        for one, two in pairwise(passages):
            assert one.end == two.start
            assert two.history.strip() == (one.history + one.text).strip()
        for passage in passages:
            assert passage.text.strip() in decode(tokenizer, tokens[passage.start : passage.end])

    @given(st.text(alphabet=st.sampled_from("aB. ?!\né漢👋<"), max_size=30), st.integers(1, 9), st.integers(1, 5))
    @settings(deadline=None, max_examples=100)
    def test_sentences_of_any_prompt_tile_it(self, text: str, k: int, min_tokens: int) -> None:
        tokenizer = byte_tokenizer()
        tokens = tokenizer(text)["input_ids"]
        passages = PromptReader(tokenizer).sentences(tokens, lambda: EveryK(k), min_tokens=min_tokens)
        assert text.lstrip().startswith("".join(passage.text for passage in passages).strip())
        assert all(p.start < p.end <= len(tokens) - 1 and p.text.strip() for p in passages)
        for one, two in pairwise(passages):
            assert one.end == two.start >= one.start + min_tokens
            assert text.encode()[: two.start].decode() == two.history  # no character is cut

    def test_broken_bytes_are_read_all_the_same(self) -> None:
        assert PromptReader(byte_tokenizer())([200, 64, 250]).strip("\ufffd")
        assert PromptReader(byte_tokenizer())([]) == ""
