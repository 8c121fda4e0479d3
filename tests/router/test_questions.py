from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import WORDS, WordRouter
from dlp_lora import Context, Engine, RoutingSettings, Switching, TopK
from dlp_lora.router.questions import decide, in_turn, questions_apart, questions_of, read_held, read_in_turn, route
from dlp_lora.sentences import LineSegmenter

MakeEngine = Callable[..., Engine]


def reading(router: WordRouter) -> Callable[[Sequence[Context]], list[Mapping[str, float]]]:
    return lambda contexts: [
        dict(zip(router.names, row, strict=True)) for row in router.probabilities(contexts).tolist()
    ]


def cut(prompt: str, router: WordRouter | None = None) -> tuple[str, ...]:
    read = reading(router or WordRouter())
    (row,) = read([Context(prompt)])
    return questions_of(read, Context(prompt), row)


@pytest.mark.parametrize(
    "questions",
    [
        ("Add the sum?", "A rhyme?"),
        ("Add it. What is the sum?", "A rhyme in verse?", "How long is an inch?"),
        ("A verse?", "Add it?", "A rhyme?"),
    ],
)
def test_a_prompt_of_several_questions_is_cut_into_them(questions: tuple[str, ...]) -> None:
    assert cut("\n\n".join(questions)) == questions


@pytest.mark.parametrize(
    "prompt",
    [
        "Add the sum?",  # one sentence
        "Add it. What is the sum?",  # two of the same adapter
        "Hello there. How are you?",  # of none
        "Hello there. What is the sum?",  # the other part fits no adapter
        "Add a rhyme? Add a verse?",  # no part fits better than the whole
        "",
    ],
)
def test_any_other_prompt_is_one_question(prompt: str) -> None:
    assert cut(prompt) == ()


def test_a_part_that_fits_no_adapter_belongs_to_the_question_before_it_or_to_the_first() -> None:
    assert cut("Add the sum. Now what? Give me a rhyme.") == ("Add the sum. Now what?", "Give me a rhyme.")
    assert cut("Hello! Add the sum. Give me a rhyme.") == ("Hello! Add the sum.", "Give me a rhyme.")


def test_a_prompt_that_surely_fits_is_not_looked_into() -> None:
    router = WordRouter()
    row = {"math": 0.995, "poems": 0.0, "units": 0.0}
    assert questions_of(reading(router), Context("Add it. A rhyme?"), row) == ()
    assert router.asked == []


def test_without_adapters_no_prompt_is_cut() -> None:
    assert route(lambda contexts: [{} for _ in contexts], Context("Add the sum? A rhyme?")) == {}


def test_a_prompt_of_very_many_sentences_is_one_text() -> None:
    assert len(cut("Add it. " * 255 + "A rhyme?")) == 2
    assert cut("Add it. " * 256 + "A rhyme?") == ()


def test_sentences_are_read_after_what_stands_before_them_and_questions_after_the_turns_before() -> None:
    router = WordRouter()
    context = Context("Add it. A rhyme?", history="Earlier.")
    questions_of(reading(router), context, {"math": 0.4, "poems": 0.0, "units": 0.0})
    sentences = [Context("Add it.", history="Earlier."), Context("A rhyme?", history="Earlier.\nAdd it.")]
    parts = [Context(part, history="Earlier.", is_part=True) for part in ("Add it.", "A rhyme?")]
    assert router.asked == [*sentences, *parts]


@pytest.mark.parametrize(
    "answer, turn, rest",
    [
        ("", 0, ""),
        ("4", 0, "4"),
        ("4\n", 1, ""),
        ("4\n\n", 1, "\n"),
        ("\n4\n", 1, ""),  # an empty line is no answer
        ("4\nSo it", 1, "So it"),
        ("4\nlong\n", 2, ""),
        ("4\nlong\nmetre\nmore", 2, "metre\nmore"),
    ],
)
def test_each_line_of_the_answer_is_one_questions(answer: str, turn: int, rest: str) -> None:
    questions = ("Add?", "Rhyme?", "Inch?")
    found = in_turn(Context("Add? Rhyme? Inch?", answer, "Now", "before"), questions)
    assert found == Context(questions[turn], rest, "Now", "before")
    asked = Context("Add? Rhyme?", answer, "Now", "before")
    assert in_turn(asked, ()) == asked


def test_a_sentence_within_a_line_is_read_with_the_whole_prompt_where_that_fits() -> None:
    class Learned(WordRouter):  # prompts of several questions, with answers of a sentence each in one line
        def _row(self, text: str) -> list[float]:
            return [0.0, 0.3, 0.6] if "\n\n" in text else super()._row(text)

    questions, whole = ("Add?", "Rhyme?"), "Add?\n\nRhyme?"
    router = Learned()
    answers = [Context(whole), Context(whole, "4.", "The"), Context(whole, "4.\n", "The")]
    found = [read_in_turn(reading(router), [context], [questions])[0] for context in answers]
    assert [max(row, key=row.__getitem__) for row in found] == ["math", "units", "poems"]
    # Where the whole does not fit, the sentence is still the question's whose line it stands in.
    router = WordRouter()
    (row,) = read_in_turn(reading(router), [Context("Add? Rhyme?", "4.", "The")], [questions])
    assert max(row, key=row.__getitem__) == "math"
    assert [context.prompt for context in router.asked] == ["Add? Rhyme?", "Add?"]


PROMPT = "Add the sum?\n\nA rhyme?\n\nHow long is an inch?"
QUESTIONS = tuple(PROMPT.split("\n\n"))
LEADERS = ("math", "poems", "units")


def traced(answer: Any) -> list[str | None]:
    return [next(iter(sentence.mixture), None) for sentence in answer.trace]


class TestEngine:
    @pytest.fixture
    def make(self, make_engine: MakeEngine) -> MakeEngine:
        def made(**settings: Any) -> Engine:
            given = {"router": WordRouter(), "policy": TopK(1), "segmenter": LineSegmenter}
            return make_engine(**{**given, "switching": Switching(margin=0.0), **settings})

        return made

    def lines(self, engine: Engine, prompts: Any) -> Any:
        """Three lines of a word each, whatever the model would say."""
        newline = engine.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]

        def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ends = (ids.shape[1] - start) % 4 == 3
            scores[:, newline] = 1e4 if ends else -1e4
            return scores

        chats = [prompts] if isinstance(prompts, str) else prompts
        start = max(len(engine.tokenizer(p)["input_ids"]) for p in chats)
        return engine.generate(prompts, max_new_tokens=12, do_sample=False, logits_processor=[broken])

    @pytest.mark.parametrize("settings", [{}, {"kv_policy": "recompute"}, {"prompt_routing": "sentences"}])
    def test_questions_are_answered_in_turn_each_by_its_own_adapter(
        self, make: MakeEngine, settings: dict[str, Any]
    ) -> None:
        assert traced(self.lines(make(**settings), PROMPT))[:3] == list(LEADERS)

    def test_as_a_whole_such_a_prompt_is_left_to_the_base(self, make: MakeEngine) -> None:
        assert set(traced(self.lines(make(prompt_routing="whole"), PROMPT))) == {None}

    def test_rows_of_a_batch_have_questions_of_their_own(self, make: MakeEngine) -> None:
        engine = make()
        alone = "Add the sum?"
        together = self.lines(engine, [PROMPT, alone])
        assert traced(together[0])[:3] == list(LEADERS)
        assert set(traced(together[1])) == {"math"}

    def test_beams_keep_the_questions(self, make: MakeEngine) -> None:
        engine = make(segmenter=lambda: LineSegmenter(), prompt_routing="questions")
        answer = engine.generate(PROMPT, max_new_tokens=4, num_beams=2, do_sample=False)
        assert traced(answer)[0] == "math"
        greedy = engine.generate(PROMPT, max_new_tokens=4, do_sample=False)
        assert {s.mixture for s in answer.trace} == {s.mixture for s in greedy.trace}

    def test_route_says_what_would_answer(self, make: MakeEngine) -> None:
        engine = make()
        assert dict(engine.route(PROMPT)[1]) == {"math": 1.0}
        assert dict(engine.route(Context(PROMPT, "4\n"))[1]) == {"poems": 1.0}
        assert dict(engine.route("Hello there.")[1]) == {}
        with engine.using(prompt_routing="whole"):
            assert dict(engine.route(PROMPT)[1]) == {}


@pytest.mark.parametrize("way", ["apart", "questions"])
def test_a_decision_names_the_questions_and_is_about_the_one_in_turn(way: Any) -> None:
    read, settings = reading(WordRouter()), RoutingSettings(policy=TopK(1), prompt_routing=way)
    first = decide(read, Context(PROMPT), settings)
    assert first.questions == QUESTIONS
    assert first.to_dict()["questions"] == list(QUESTIONS)
    assert dict(first.mixture) == dict(decide(read, Context(QUESTIONS[0]), settings).mixture) == {"math": 1.0}
    assert dict(decide(read, Context(PROMPT, "4\n"), settings).mixture) == {"poems": 1.0}
    whole = decide(read, Context(PROMPT), replace(settings, prompt_routing="whole"))
    assert whole.questions == ()
    for one in (whole, decide(read, Context(QUESTIONS[0]), settings)):
        assert "questions" not in one.to_dict()


def test_the_command_asks_as_the_engine_does() -> None:
    read = reading(WordRouter())
    assert max(route(read, Context(PROMPT, "4\nlong\n")).items(), key=lambda own: own[1])[0] == "units"
    assert sum(route(read, Context("Hello there.")).values()) == 0


class SureRouter(WordRouter):
    """Is sure of a text all of whose words belong to one adapter; other words keep it from fitting."""

    def _row(self, text: str) -> list[float]:
        words = text.lower().replace("?", " ").replace(".", " ").split()
        counts = [sum(WORDS.get(word) == name for word in words) for name in self.names]
        return [0.999 * (count / max(len(words), 1)) ** 2 for count in counts]


@pytest.mark.parametrize(
    "around",
    ["Be kind. {}", "{} Think well.", "Du bist klug. Lies genau.\n\n{}\n\nDenke nach.", "Une. Deux. Trois. Quatre. {}"],
)
def test_a_question_among_instructions_is_read_without_them(around: str) -> None:
    assert cut(around.format("Add sum add."), SureRouter()) == ("Add sum add.",)


def test_instructions_that_are_a_little_like_an_adapters_texts_are_no_question_beside_one_that_surely_fits() -> None:
    like_poems, like_math = "Rhyme verse rhyme verse rhyme please.", "Add sum add sum add now."
    assert cut(f"{like_poems} Add sum add.", SureRouter()) == ("Add sum add.",)
    assert cut(f"{like_poems} {like_math}", SureRouter()) == (like_poems, like_math)


class StrictRouter(SureRouter):
    """Says of a part whether it is a question, too: only if it says so."""

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        strict = [float(not c.is_part or "?" in c.prompt) for c in contexts]
        return super().probabilities(contexts) * torch.tensor(strict)[:, None]


def test_a_sentence_that_fits_an_adapter_is_no_question_if_the_router_is_stricter_with_parts() -> None:
    assert cut("Rhyme verse. Add sum?", SureRouter()) == ("Rhyme verse.", "Add sum?")
    assert cut("Rhyme verse. Add sum?", StrictRouter()) == ("Add sum?",)
    assert cut("Rhyme verse? Add sum?", StrictRouter()) == ("Rhyme verse?", "Add sum?")
    assert cut("Rhyme verse. Une.", StrictRouter()) == ()


def test_the_question_in_turn_is_read_as_any_prompt() -> None:
    row = route(reading(StrictRouter()), Context("Rhyme verse. Add sum?"))
    assert max(row, key=row.__getitem__) == "math"
    router = StrictRouter()
    route(reading(router), Context("Rhyme verse. Add sum?"))
    assert router.asked[-1] == Context("Add sum?")


def test_a_question_among_instructions_goes_to_its_adapter_with_all_its_answer() -> None:
    read = reading(SureRouter())
    context = Context("Be kind. Add sum add.", "One line.\nAnother line.\n", "T")
    assert in_turn(context, ("Add sum add.",)) == Context("Add sum add.", context.answer, context.sentence)
    row = route(read, context)
    assert max(row, key=lambda name: row[name]) == "math"
    assert sum(row.values()) > 0.99


def test_a_prompt_of_which_no_stretch_surely_fits_is_read_as_it_is() -> None:
    assert cut("Be kind. Add some sum. Think well.", SureRouter()) == ()


def test_a_question_that_surely_fits_costs_no_further_call() -> None:
    router = SureRouter()
    assert cut("Add sum. Sum add.", router) == ()
    assert len(router.asked) == 1


class ComparingRouter(WordRouter):
    """Says of a part, if the longer prompt is known, that it needs that: if it says "it"."""

    def probabilities(self, contexts: Sequence[Context]) -> torch.Tensor:
        alone = [float(not c.whole or "it" not in c.prompt.rstrip("?").split()) for c in contexts]
        return super().probabilities(contexts) * torch.tensor(alone)[:, None]


def test_questions_are_not_apart_if_one_is_less_like_its_adapters_prompts_than_all_together() -> None:
    apart, needed = "Add the sum?\n\nA rhyme?", "Add the sum?\n\nA rhyme with it?"
    assert questions_apart(reading(ComparingRouter()), Context(apart)) == ("Add the sum?", "A rhyme?")
    assert questions_apart(reading(WordRouter()), Context(needed)) == ("Add the sum?", "A rhyme with it?")
    assert questions_apart(reading(ComparingRouter()), Context(needed)) == ()
    assert cut(needed, ComparingRouter()) == ("Add the sum?", "A rhyme with it?")


def test_a_prompt_that_is_known_is_not_read_again_and_keeps_its_names() -> None:
    router = WordRouter()
    known: dict[Context, dict[str, float]] = {}
    contexts = [Context("Add the sum?"), Context("Add the sum?", "4\n", "l")]
    first = read_held(router, contexts, known=known)
    assert list(known) == contexts[:1]  # an answer grows, so what is read of it does not come back
    router.asked.clear()
    router.names = (*router.names, "joined")  # while the answer was prepared
    assert read_held(router, contexts[:1], held=["math"], known=known) == [{"math": first[0]["math"]}]
    assert router.asked == []
