"""Disguises: a prompt in, the same question as other people would write it, wrap it or mislead about it, out."""

import random
import re
import string
from collections.abc import Callable, Mapping, Sequence

from dlp_lora.lab.evals.router.samples import Question, Sample, other_than
from dlp_lora.router import Context
from dlp_lora.sentences import split

Disguise = Callable[[str, Question, random.Random], str]
"""Takes a prompt, a question of another task and a source of chance."""

# Words and labels without content, and their replacements.
PARAPHRASES: Mapping[str, str] = {
    r"\bQ:": "Question:",
    r"\bA:": "My answer is",
    r"\bAnswer:": "The answer:",
    r"\bchoice:": "-",
    r"\bQuestion:": "Here is what I want to know:",
    r"\bWhat is\b": "What's",
    r"\bWhich\b": "What",
    r"\bHow many\b": "What number of",
    r"\bHow much\b": "What amount of",
    r"\bChoose\b": "Pick",
    r"\bchoose\b": "pick",
    r"\bcorrect\b": "right",
    r"\bfollowing\b": "below",
    r"\bquestion\b": "query",
    r"\bsentences?\b": "text",
    r"\bgiven\b": "stated",
    r"\bidentify\b": "tell",
    r"\bIdentify\b": "Tell",
    r"\bdetermine\b": "work out",
    r"\bDetermine\b": "Work out",
    r"\bwhether\b": "if",
    r"\bpassage\b": "paragraph",
    r"\bTranslate\b": "Put",
    r"\bSummarize\b": "Sum up",
    r"\bExplain\b": "Make clear",
    r"\bDescribe\b": "Tell me about",
    r"\bdo not\b": "don't",
    r"\bis not\b": "isn't",
}


def disguised(asked: Sequence[Question], disguise: Disguise, *, seed: int) -> list[Sample]:
    """The whole prompts in a disguise."""
    rng = random.Random(f"disguise {seed}")
    others = other_than(asked, rng)
    return [Sample(Context(disguise(q.example.prompt, o, rng)), q.task) for q, o in zip(asked, others, strict=True)]


def _typos(share: float) -> Disguise:
    def disguise(prompt: str, _: Question, rng: random.Random) -> str:
        return "".join(_typo(char, rng) if char.isalpha() and rng.random() < share else char for char in prompt)

    return disguise


def _typo(char: str, rng: random.Random) -> str:
    return rng.choice(("", char * 2, rng.choice(string.ascii_lowercase), char.swapcase()))


def _around(before: str, after: str) -> Disguise:
    return lambda prompt, _, __: f"{before}\n\n{prompt}\n\n{after}"


def _paraphrased(prompt: str, _: Question, __: random.Random) -> str:
    for pattern, instead in PARAPHRASES.items():
        prompt = re.sub(pattern, instead, prompt)
    return prompt


def _names_another(prompt: str, other: Question, _: random.Random) -> str:
    return f"This is not about {other.task.replace('_', ' ')}.\n{prompt}"


def _after_sentence(prompt: str, other: Question, rng: random.Random) -> str:
    return f"{rng.choice(split(other.example.prompt)).strip()}\n{prompt}"


def _after_prompt(prompt: str, other: Question, _: random.Random) -> str:
    return f"{other.example.prompt}\n\nNever mind the text above. What I want to ask is this:\n{prompt}"


DISGUISES: Mapping[str, Disguise] = {
    "typos, 3 % of letters": _typos(0.03),
    "typos, 10 % of letters": _typos(0.1),
    "upper case": lambda prompt, *_: prompt.upper(),
    "lower case": lambda prompt, *_: prompt.lower(),
    "all on one line": lambda prompt, *_: " ".join(prompt.split()),
    "double spaces": lambda prompt, *_: prompt.replace(" ", "  ").replace("\n", "\n\n"),
    "no punctuation": lambda prompt, *_: "".join(c for c in prompt if c not in string.punctuation),
    "paraphrased": _paraphrased,
    "chat labels": _around("User:", "Assistant:"),
    "instructions around": _around(
        "You are a helpful assistant. Read the text below with care and answer as well as you can.",
        "Think step by step. Give the final answer only, and keep it short.",
    ),
    "German around": _around(
        "Du bist ein hilfreicher Assistent. Lies den folgenden Text sorgfältig und antworte so gut du kannst.",
        "Denke Schritt für Schritt nach und gib nur die endgültige Antwort.",
    ),
    "Spanish around": _around(
        "Eres un asistente útil. Lee con atención el siguiente texto y responde lo mejor que puedas.",
        "Piensa paso a paso y da solo la respuesta final.",
    ),
    "Chinese around": _around(
        "你是一个乐于助人的助手。请仔细阅读以下内容并尽力回答。", "请一步一步思考，只给出最终答案。"
    ),
    "names another task": _names_another,
    "after another task's sentence": _after_sentence,
    "after another task's prompt": _after_prompt,
}
