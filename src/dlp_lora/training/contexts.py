"""The contexts for a router's training, as they occur in prompts, in conversations and while a model writes.

Examples are single questions with their answers. From these come conversations with changes of task, single sentences
of a prompt, short or disguised prompts, incomplete answers, and prompts of two questions.
"""

import logging
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dlp_lora.errors import TrainingError
from dlp_lora.router import Context
from dlp_lora.sentences import split
from dlp_lora.tasks.task import Example, Task

logger = logging.getLogger(__name__)

NUM_HISTORIES = 2_000  # conversations that the contexts share
HISTORY_CHARS = 1_200
CUTS = (3, 6, 9, 12, 18, 24, 36, 48)  # words that are left of a prompt
TYPOS = (0.03, 0.1)  # share of letters
SPLIT_SHARE = 0.5  # examples whose prompts are cut into sentences, which takes time

SMALL_TALK = (
    "Hello",
    "Hi, how are you?\nI'm well, thank you. What can I do for you?",
    "Good morning!\nGood morning! How may I help?",
    "Hey there\nHey! What would you like to know?",
    "Thank you so much!\nMy pleasure. Is there anything else?",
    "Great, that is what I needed.\nGlad to hear it.",
    "Are you there?\nYes, I am here.",
    "Can you help me with something?\nOf course. What is it about?",
    "Who made you?\nI am a language model.",
    "You are an assistant who answers briefly and honestly.",
    "You are a polite and careful assistant. Answer the user's questions as well as you can.",
    "Answer in one sentence.\nHi\nHello! What is your question?",
    "I have a question for you.",
    "ok",
    "No, that is wrong.\nI am sorry. Let me try again.",
    "Let us talk about something else.\nGladly. What about?",
)
"""Small talk of people and models, and system prompts: texts without a task."""

OPENINGS = (
    "You are a knowledgeable assistant.",
    "You are an expert. Please help the user.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Please answer the following question.",
    "Please read the following carefully before you respond.",
    "Here is a task for you.",
    "Could you help me with this, please?",
    "I need some help with the following.",
    "Consider the following problem and solve it.",
    "Look at this and tell me the answer.",
    "Your job is to reply to the user's message as accurately as possible.",
    "Use your knowledge to respond to the text that follows.",
    "Follow the instructions. Be truthful and precise.",
    "Take a deep breath and work on this problem carefully.",
    "### Instruction:",
    "### Input:",
    "Question:",
    "Task:",
    "User:",
    "Bitte beantworte die folgende Frage so genau wie möglich.",
    "Hier ist eine Aufgabe. Kannst du mir dabei helfen?",
    "Responde a la siguiente pregunta, por favor.",
    "Necesito ayuda con este problema.",
    "Réponds à la question suivante, s'il te plaît.",
    "Voici un problème à résoudre.",
    "Rispondi alla domanda che segue, per favore.",
    "Ho bisogno di aiuto con questo compito.",
    "Responda à seguinte pergunta.",
    "请回答下面的问题。",
    "我需要你帮我完成这个任务。",
    "Ответь, пожалуйста, на следующий вопрос.",
    "次の質問に答えてください。",
)
CLOSINGS = (
    "Respond with the answer and nothing else.",
    "Explain your reasoning, then give the result.",
    "Keep your reply short and clear.",
    "Write only the result.",
    "Be concise.",
    "Thank you very much!",
    "What is your answer?",
    "Do not add any comments.",
    "Let us think about it one step at a time.",
    "Make sure that your response is correct.",
    "### Response:",
    "Assistant:",
    "Reply:",
    "Gib nur das Ergebnis an, ohne Erklärung.",
    "Vielen Dank für deine Hilfe!",
    "Escribe solamente el resultado.",
    "Gracias por tu ayuda.",
    "Donne seulement le résultat.",
    "Scrivi soltanto il risultato. Grazie!",
    "Escreva apenas o resultado.",
    "只写结果，不要解释。",
    "谢谢你的帮助！",
    "Напиши только результат.",
    "結果だけを書いてください。",
)
"""Texts around a prompt of any task."""


@dataclass(frozen=True)
class Sample:
    """A context, and the index of its task."""

    context: Context
    label: int


def whole_examples(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples that are no part of a longer answer: the prompt of a part has several tasks."""
    return tuple(example for example in examples if example.complete and not example.answer_prefix)


def routable(task: Task) -> Task:
    """The task without parts of longer answers, which are only for adapters.

    Raises:
        TrainingError: if no training example is left.
    """
    whole = replace(task, train=whole_examples(task.train), test=whole_examples(task.test))
    if num_parts := len(task.train) + len(task.test) - len(whole.train) - len(whole.test):
        logger.warning(
            "%s: the router does not read %d examples that are parts of longer answers", task.name, num_parts
        )
    if not whole.train:
        raise TrainingError(
            f"the task {task.name!r} has no whole examples (with answer_prefix or complete=false they are parts); give "
            "some, 32 are often enough"
        )
    return whole


def draw_contexts(
    tasks: Sequence[Sequence[Example]],
    num_draws: int,
    mix: Mapping[str, float],
    rng: random.Random,
    *,
    at_least: int = 0,
) -> list[Sample]:
    """Draws `num_draws` contexts per example on average, of the kinds and with the frequencies of `mix` (see KINDS).

    Each task gets equally many, and at least `at_least`: examples of small tasks are drawn more often. Otherwise the
    router would neglect small tasks (the paper's appendix A).
    """
    draw = _Draw(tasks, rng)
    kinds, shares = list(mix), list(mix.values())
    num_each = max(at_least, round(num_draws * sum(map(len, tasks)) / len(tasks)))
    samples = []
    for label, examples in enumerate(tasks):
        least, more = divmod(num_each, len(examples))
        for i, example in enumerate(examples):
            for kind in rng.choices(kinds, shares, k=least + (i < more)):
                samples.append(Sample(KINDS[kind](draw, label, example), label))
    rng.shuffle(samples)
    return samples


class _Draw:
    """Draws one context of an example at a time."""

    def __init__(self, tasks: Sequence[Sequence[Example]], rng: random.Random) -> None:
        self.tasks = tasks
        self.rng = rng
        self.histories = [self._conversation() for _ in range(NUM_HISTORIES)]
        self.words = [word for history in self.histories for word in history.split()]
        self.sentences = lru_cache(maxsize=None)(split)

    def whole(self, label: int, example: Example) -> Context:
        return Context(example.prompt)

    def after_history(self, label: int, example: Example) -> Context:
        return Context(example.prompt, history=self._history(label))

    def sentence(self, label: int, example: Example) -> Context:
        """A sentence of the prompt, after those before it."""
        sentences = self._sentences(label)
        i = self.rng.randrange(len(sentences))
        before = "".join(sentences[:i])
        if self.rng.random() < 0.6:
            before = f"{self._history(label)}\n{before}"
        return Context(sentences[i], history=before)

    def alone(self, label: int, example: Example) -> Context:
        return Context(self.rng.choice(self._sentences(label)))

    def cut(self, label: int, example: Example) -> Context:
        return Context(" ".join(example.prompt.split(" ")[: self.rng.choice(CUTS)]))

    def disguised(self, label: int, example: Example) -> Context:
        """The prompt with typing errors, or among words that do not belong to its task."""
        if self.rng.random() < 0.3:
            return Context(_with_typos(example.prompt, self.rng.choice(TYPOS), self.rng))
        return Context(f"{self._noise()}\n{example.prompt}\n{self._noise()}".strip())

    def instructed(self, label: int, example: Example) -> Context:
        """The prompt among instructions that do not belong to its task."""
        return Context("\n".join([*self._some(OPENINGS), example.prompt, *self._some(CLOSINGS)]))

    def answer(self, label: int, example: Example) -> Context:
        """A new sentence in the middle of the answer."""
        history = self._history(label) if self.rng.random() < 0.3 else ""
        sentences = self.sentences(example.answer)
        if len(sentences) < 2:
            given = example.answer[: self.rng.randrange(len(example.answer) + 1)]
            return Context(example.prompt, given, history=history)
        i = self.rng.randrange(1, len(sentences))
        return Context(example.prompt, "".join(sentences[:i]), first_word(sentences[i]), history)

    def serial(self, label: int, example: Example) -> Context:
        """Two questions in one prompt, this one the first, or the second with the first answered."""
        # With more questions, bags of tokens lose the order.
        other = self.rng.choice(self.tasks[self._other(label)])
        is_first = self.rng.random() < 0.5
        space = self.rng.choice((" ", "\n", "\n", "\n\n", "\n\n"))
        if is_first:
            return Context(f"{example.prompt}{space}{other.prompt}")
        given = other.answer + self.rng.choice((" ", "\n"))
        return Context(f"{other.prompt}{space}{example.prompt}", given, first_word(example.answer))

    def _noise(self) -> str:
        num = self.rng.choice((0, 2, 6, 12, 20))
        return " ".join(self.rng.choice(self.words) for _ in range(num))

    def _some(self, texts: Sequence[str]) -> list[str]:
        return self.rng.sample(texts, self.rng.choice((0, 1, 1, 2)))

    def _sentences(self, label: int) -> list[str]:
        # A few examples are enough for this, so that fewer prompts are cut into sentences.
        examples = self.tasks[label]
        some = examples[: max(1, round(SPLIT_SHARE * len(examples)))]
        return self.sentences(self.rng.choice(some).prompt)

    def _history(self, label: int) -> str:
        if self.rng.random() < 0.2:
            return self.rng.choice(SMALL_TALK)
        if self.rng.random() < 0.15:  # a conversation that stays with its task
            same = self.rng.choice(self.tasks[label])
            return f"{same.prompt}\n{same.answer}"[-HISTORY_CHARS:]
        return self.rng.choice(self.histories)

    def _conversation(self) -> str:
        turns = [self.rng.choice(self.rng.choice(self.tasks)) for _ in range(self.rng.choice((1, 1, 2, 3, 4)))]
        # Also without answers, because the last adapter's text may not show its task.
        parts = [f"{e.prompt}\n{e.answer}" if self.rng.random() < 0.5 else e.prompt for e in turns]
        return "\n".join(parts)[-HISTORY_CHARS:]

    def _other(self, label: int) -> int:
        return self.rng.choice([i for i in range(len(self.tasks)) if i != label] or [label])


def _with_typos(text: str, share: float, rng: random.Random) -> str:
    letters = list(text)
    for i in rng.sample(range(len(letters)), round(share * len(letters))):
        letters[i] = rng.choice(("", letters[i] * 2, rng.choice(string.ascii_lowercase)))
    return "".join(letters)


def first_word(text: str) -> str:
    """Returns the first word of a text, as a router sees the beginning of a sentence."""
    return text.split(maxsplit=1)[0] if text.split() else text


MIX: Mapping[str, float] = {
    "whole": 3,
    "after_history": 2,
    "sentence": 3,
    "alone": 2,
    "cut": 1,
    "disguised": 1.5,
    "instructed": 3,
    "answer": 1,
    "serial": 0,
}
"""The default frequency of each kind. `serial` is for short questions: with long ones, bags of tokens hardly show the
question in turn, and the router becomes unsure of all others."""

KINDS: Mapping[str, Callable[[_Draw, int, Example], Context]] = {
    "whole": _Draw.whole,
    "after_history": _Draw.after_history,
    "sentence": _Draw.sentence,
    "alone": _Draw.alone,
    "cut": _Draw.cut,
    "disguised": _Draw.disguised,
    "instructed": _Draw.instructed,
    "answer": _Draw.answer,
    "serial": _Draw.serial,
}
"""Every kind of context by name."""

GENERATION = ("whole", "after_history", "answer", "serial")
"""The kinds that occur while a model writes."""
