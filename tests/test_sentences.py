from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dlp_lora.sentences import Segmenter, SentenceSegmenter, split

# Each case is the list of its sentences; the text is their concatenation.
CASES = {
    # Numbers
    "en-decimal": ["Pi is 3.14 or so. ", "It never ends."],
    "de-thousands-and-decimal": ["Das kostet 1.000,50 Euro. ", "Mehr nicht."],
    "en-version-number": ["Use Python 3.11.2 or later. ", "Version 2.0 is gone."],
    "en-time": ["Come at 3.30 pm. ", "Bring cake."],
    "en-number-opens-a-sentence": ["It is 84. ", "3 km is 3000 m. ", "Done."],
    "en-number-ends-a-sentence": ["She has 12. ", "He has 13. ", "They have 25 in all."],
    "en-factorial": ["We know 5! $ 3! = 720. ", "Then stop."],
    "en-unit": ["The cake weighs 5 g. ", "The other 10 oz. ", "Fine."],
    "en-age": ["I am 12. ", "My sister is 9. ", "We fight."],
    # Abbreviations and initials
    "en-titles": ["Dr. Smith met Mrs. Jones and Prof. X. Li on Main St. Paul's bridge. ", "They spoke."],
    "en-eg-and-ie": ["Some fruit, e.g. Bananas, i.e. Yellow ones, is sweet. ", "Eat it."],
    "en-country": ["The U.S. Senate and the U.K. Parliament met at 3 p.m. Eastern time. ", "Nobody came."],
    "en-etc-is-not-trusted-to-end": ["Cats, dogs, etc. Then more."],
    "en-etc-then-newline": ["Cats, dogs, etc.\n", "Then more."],
    "en-etc-in-brackets": ["Pets (cats, dogs, etc.) Sleep a lot. ", "Yes."],
    "en-company": ["Acme Inc. Chairman John Doe Jr. Left Foo Ltd. Yesterday. ", "Sad."],
    "en-number-abbreviation": ["See No. 5, Fig. 3, p. 12 and vol. 2 approx. 20 times. ", "Good."],
    "en-no-is-a-word": ["Is it so? ", "No. ", "It is not."],
    "en-initials": ["J. K. Rowling and J.R.R. Tolkien met George W. Bush. ", "No, they did not."],
    "en-i-is-an-initial": ["He is taller than I. She is not. ", "So it goes."],
    "en-labelled-letter": ["Take vitamin C. ", "The answer is option B. ", "It is right."],
    "en-variable": ["Now solve for x. ", "Then add y. ", "Done."],
    "en-et-al": ["Smith et al. Showed it, and Al. ", "Then came others."],
    "en-month": ["On Jan. 5 we met. ", "It was in Jan. ", "Then we left."],
    "de-abbreviations": ["Es gibt z. B. Äpfel, d. h. Obst u. a. Dinge, bzw. Birnen. ", "Gut."],
    "de-units-of-law": ["Nach Abs. 3 und Nr. 4, ca. 20 Seiten in der Hauptstr. 5. ", "Ende."],
    "de-usw": ["Äpfel, Birnen usw. Alles da.\n", "Gut so."],
    "de-date": ["Am 3. Oktober 1990 war das. ", "Vom 3. bis 5. Mai auch."],
    "de-weekday-date": ["Montag, 3. Oktober, und der 3. 10. 1990. ", "Das war es. ", "Ja."],
    "de-before-christ": ["Er starb 44 v. Chr. In Rom. ", "Das ist lange her."],
    "es-titles": ["La Sra. Pérez y el Dr. Ruiz viven en EE. UU. Desde 1990. ", "Ud. Lo sabe."],
    "es-p-ej": ["Hay frutas, p. ej. Manzanas. ", "Son ricas."],
    "it-titles": ["Il Sig. Rossi e la Sig.ra Bianchi, ecc. Sono qui, v. pag. 3. ", "Bene."],
    "it-per-es": ["Frutta, per es. Mele. ", "Buone."],
    "it-elided": ["Com'è. ", "Vedi l'art. 5 e basta. ", "Fine."],
    "fr-titles": ["M. Dupont et Mme. Durand sont là, cf. Paris. ", "Bien."],
    "fr-spaced-marks": ["Quoi ? ", "Non ! ", "Il dit « Oui ! » ", "Puis il part."],
    # Ends
    "en-ellipsis-goes-on": ["Well... maybe not… or yes. ", "Fine."],
    "en-ellipsis-ends": ["Well... ", "Maybe not… ", "Fine. . . ", "Good."],
    "en-mark-run": ["What?! ", "No way!!! ", "Really?? ", "Yes."],
    "en-mark-then-lowercase": ["Yahoo! is a firm. ", "Who? me? ", "Yes."],
    "en-no-space": ["This is odd.Right?Yes. ", "Now split."],
    "en-question-in-one-word": ["Go to www.a.b/c?d=e!f or http://x.org/?q=A.B now. ", "Then stop."],
    "en-domains-and-files": ["Write to a.b@example.com about Node.js and .NET in main.py. ", "Go on."],
    "en-domain-ends": ["Visit example.com. ", "It is good."],
    # Quotes and brackets
    "en-quote-closes": ['He said "Stop." ', "Then he left."],
    "en-quote-goes-on": ['"Stop!" he said. ', "“Why?” she asked. ", "‘Go.’"],
    "en-quote-opens": ["He left. ", '"Why?" ', "“Because.” ", "(Nobody knew.) ", "[Silence.]"],
    "de-quote": ["„Komm.“ ", "„Nein!“ rief er. ", "Dann ging er."],
    "es-inverted": ["Hola. ", "¿Qué tal? ", "¡Muy bien! ", "Adiós… ", "¿Sí?"],
    "en-bold": ["**Note.** ", "*This* is good. ", "_That_ is not. ", "`x` is."],
    "en-latex": ["Add them. ", "\\(x = 3.5\\) is it. ", "$y$ too."],
    # Emoji
    "en-emoji-stays": ["Great! 🎉 ", "Next one."],
    "en-emoji-sequences": ["Hi!👩🏽‍💻 👨‍👩‍👧‍👦 ❤️ 🇩🇪 ", "Then 1️⃣ comes. 👍🏿 ", "End."],
    "en-emoji-opens-a-line": ["Great!\n", "🎉 Next one."],
    # Other scripts
    "zh": ["你好。", "我叫小明！", "你呢？", "3.14是圆周率；对吗？"],
    "zh-quotes": ["他说：“走吧。”", "“好！", "真好！”", "（完。）", "再见。"],
    "ja": ["今日は晴れ。", "明日は雨！？", "はい。"],
    "ja-quote-goes-on": ["「はい。」と言った。", "「いいえ。」って。", "終わり。"],
    "ja-quote-closes": ["「はい。」", "彼は言った。", "「え？」", "次。"],
    "ja-fullwidth-decimal": ["円周率は３．１４です．", "はい．"],
    "ja-wide-space": ["はい！　", "そうです。"],
    "ko": ["안녕하세요. ", "저는 3.5살입니다! ", "네."],
    "hi": ["यह है। ", "वह नहीं है। ", "क्यों? ", "हाँ।"],
    "ar": ["كيف حالك؟ ", "بخير. ", "شكرا."],
    "ru": ["А. С. Пушкин родился. ", "Он писал, и т. д. Потом.\n", "Вот."],
    "ka-has-no-capitals": ["გამარჯობა. ", "კარგი."],
    "fr-decomposed-accents": ["Il est a\u0300 l'e\u0301cole. ", "E\u0301tonnant\u0301! ", "Oui."],
    # Lines and Markdown
    "en-numbered-list": ["1. First item\n", "2. Second. ", "Still second\n", "10. Tenth"],
    "en-numbered-inline": ["Steps: 1. Do this. ", "2. Do that. ", "3. Rest."],
    "en-lettered-list": ["A. Paris\n", "B. London in\nii. Rome is one item\n", "C. Oslo"],
    "en-bold-number": ["**1. Title.** ", "Text.\n", "- 2. Item\n", "## 2.1. Setup"],
    "en-bullets": ["Items:\n", "- milk\n", "* eggs\n    ", "- white\n", "• tea"],
    "en-heading": ["# Title\n", "Text goes\non here. ", "End.\n\n", "## next"],
    "en-hard-wrap": ["This line is\nwrapped by hand. ", "And this\nis too."],
    "en-blank-line": ["no stop\n\n", "lowercase too\r\n\r\n", "end"],
    "en-trailing-space": ["\n  One. ", "Two.  \n"],
    "en-fence": ["Run this:\n", "```python\nA = 1. \n\n# Do it. Now!\nprint(A)\n```\n", "it works. ", "Yes."],
    "en-fence-tilde-in-list": ["1. Do:\n   ", "~~~\nX. Y\n\n   ~~~\n", "2. Go"],
    "en-fence-in-fence": ["````md\n```\nA. B\n\n```\n````\n", "Done."],
    "en-fence-never-closed": ["Ok.\n", "```\nX\n\nFoo. Bar"],
    "en-code-span-of-three": ["```x``` is code\n", "Next. ", "Good."],
    "en-code-without-fence": ["def f():\n    X = 1\n    if X:\n        Y.Z(\n\t\tA)\n\n", "f()"],
    "en-indented-paragraph": ["One ends.\n    ", "Two begins."],
}  # fmt: skip
TEXTS = ["".join(sentences) for sentences in CASES.values()]
LIVELY = st.text(
    st.sampled_from(" \n\t.!?…。！？．\"'”」)(*`~-#1234aAxIéÀ你は👍🏽\u200d\ufe0f\u0301🇩«»:;"), max_size=80
)
TEXT = st.one_of(LIVELY, st.text(max_size=60), st.sampled_from(TEXTS))


@cache
def byte_level_tokenizer() -> Tokenizer:
    """GPT-2's kind: so few merges that emoji and Chinese are spread over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@cache
def unigram_tokenizer() -> Tokenizer:
    """SentencePiece's kind: words with a leading "▁", bytes for what the vocabulary lacks."""
    latin = [text for text in TEXTS if all(ord(char) < 0x250 or char in "“”’" for char in text)]
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(latin, trainers.UnigramTrainer(vocab_size=300, show_progress=False))
    pieces = [("<unk>", 0.0)] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(piece, -10.0) for piece in trained.get_vocab() if piece != "<unk>"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def pieces_as_generated(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """What each token adds to the decoded text, held back while the text ends inside a character."""
    ids = tokenizer.encode(text).ids
    num_read = 0
    for stop in range(1, len(ids) + 1):
        decoded = tokenizer.decode(ids[:stop])
        if not decoded.endswith("\ufffd"):
            yield decoded[num_read:]
            num_read = len(decoded)


def starts_of(pieces: Iterable[str]) -> list[int]:
    segmenter = SentenceSegmenter()
    return [start for piece in pieces for start in segmenter.push(piece)]


def starts_in(sentences: list[str]) -> list[int]:
    """Where the sentences start in their concatenation: the first visible character of each."""
    return [sum(map(len, sentences[:index])) for index in range(1, len(sentences))]


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:stop] for start, stop in pairwise(bounds)]


each_case = pytest.mark.parametrize("sentences", CASES.values(), ids=CASES)


@each_case
def test_a_text_splits_into_its_sentences(sentences):
    assert split("".join(sentences)) == sentences


@each_case
@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, unigram_tokenizer])
def test_tokens_give_the_splits_of_the_whole_text(sentences, make_tokenizer):
    text = "".join(sentences)
    pieces = list(pieces_as_generated(make_tokenizer(), text))
    assert "".join(pieces) == text
    assert starts_of(pieces) == starts_in(sentences)


@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, unigram_tokenizer])
def test_the_tokenizers_spread_a_character_over_tokens(make_tokenizer):
    assert len(make_tokenizer().encode("🎉").ids) > 2
    assert len(list(pieces_as_generated(make_tokenizer(), "🎉"))) == 1
    assert any(len(piece) > 2 for piece in pieces_as_generated(make_tokenizer(), TEXTS[0]))


@each_case
def test_a_start_is_told_at_its_first_character(sentences):
    text, starts, segmenter = "".join(sentences), starts_in(sentences), SentenceSegmenter()
    told = [segmenter.push(char) for char in text]
    assert told == [[offset] if offset in starts else [] for offset in range(len(text))]


@given(TEXT, st.lists(st.integers(0, 80)))
def test_cutting_the_text_elsewhere_changes_nothing(text, cuts):
    assert starts_of(pieces_of(text, cuts)) == SentenceSegmenter().push(text)


@given(TEXT)
def test_sentences_concatenate_to_the_text(text):
    assert "".join(split(text)) == text
    assert all(split(text))


@given(TEXT)
@example("\n\nA")
@example("\u200d\n\nA")
def test_starts_are_visible_characters_in_order(text):
    starts = SentenceSegmenter().push(text)
    assert starts == sorted(set(starts))
    assert all(0 < start < len(text) and not text[start].isspace() for start in starts)


@given(TEXT, TEXT, TEXT)
def test_a_copy_goes_its_own_way(read, here, there):
    segmenter = SentenceSegmenter()
    before = segmenter.push(read)
    copied = segmenter.copy()
    assert before + segmenter.push(here) == SentenceSegmenter().push(read + here)
    assert before + copied.push(there) == SentenceSegmenter().push(read + there)


def test_what_follows_a_start_does_not_move_it():
    for text in TEXTS:
        starts = SentenceSegmenter().push(text)
        for stop in range(len(text)):
            assert SentenceSegmenter().push(text[:stop]) == [start for start in starts if start < stop]


def test_an_empty_text_has_no_sentences():
    assert split("") == []
    assert SentenceSegmenter().push("") == []


def test_split_takes_any_segmenter():
    class EveryWord:
        def push(self, text):
            return [offset for offset in range(1, len(text)) if text[offset - 1] == " "]

        def copy(self):
            return self

    assert isinstance(EveryWord(), Segmenter)
    assert isinstance(SentenceSegmenter(), Segmenter)
    assert split("a bc d", EveryWord()) == ["a ", "bc ", "d"]


@pytest.mark.parametrize("words", [1, 20, 200])
def test_a_line_that_begins_with_code_opens_no_block(words):
    line = f"```{'inline code ' * words}``` and more.\n"
    assert split(f"{line}Next one. And this.") == [line, "Next one. ", "And this."]
    assert len(split(f"```{'python ' * words}\nx = 1. Y = 2.\n```\nNext one. And this.")) == 3


@pytest.mark.parametrize("unit", ["a", ".", "\n", "。」", "👍", "`", "a ", ' "', "a."])
def test_the_state_stays_small_however_long_the_text(unit):
    segmenter = SentenceSegmenter()
    segmenter.push("A" + unit * 2000)
    assert len(repr(vars(segmenter))) < 600
