"""Synthetic tasks: up to a thousand, each an action on a kind of text; no single word identifies a task.

Every action and every kind is shared by many tasks and the text itself says nothing, so a router must put two cues
together. They measure how many adapters a router can tell apart, and what that costs; not how people write.
"""

import random
from collections.abc import Sequence
from itertools import product

from dlp_lora.tasks.task import Example, Task

ACTIONS = (
    *("summarise", "shorten", "expand", "simplify", "censor", "continue", "contradict", "defend", "proofread"),
    *("translate into French", "translate into Latin", "rewrite politely", "rewrite rudely", "classify by mood"),
    *("turn into a poem", "turn into a list", "turn into a table", "turn into questions", "rate from one to ten"),
    *("find the names in", "find the numbers in", "find the verbs in", "list the places in", "count the words of"),
    *("guess the author of", "guess the year of", "give a title to", "make a headline of", "make a quiz of"),
    *("explain to a child", "explain to an expert", "check the facts of", "remove the jokes from", "add jokes to"),
    *("make a song of", "answer as a pirate to", "reply briefly to", "quote the key line of", "draw the moral of"),
    "spell backwards",
)
KINDS = (
    *("email", "invoice", "recipe", "news story", "contract", "diary entry", "weather report", "tweet", "sermon"),
    *("court ruling", "love letter", "lab report", "speech", "film review", "job advert", "travel guide", "patent"),
    *("shopping list", "complaint", "obituary", "fairy tale", "manual", "chat log", "horoscope", "match report"),
)
WORDINGS = (
    "Please {action} this {kind}:\n{text}",
    "Here is a {kind}. I want you to {action} it.\n{text}",
    "{text}\nThe text above is from a {kind}; {action} it.",
    "Task: {action}\nInput, a {kind}: {text}",
)
MAX_TASKS = len(ACTIONS) * len(KINDS)


def synthetic_tasks(
    texts: Sequence[str], *, num_tasks: int = MAX_TASKS, num_train: int = 20, num_test: int = 5, seed: int = 0
) -> list[Task]:
    """Tasks whose prompts wrap texts drawn from those given.

    Raises:
        ValueError: for more tasks than there are pairs of action and kind, or without texts.
    """
    if not 1 <= num_tasks <= MAX_TASKS:
        raise ValueError(f"num_tasks must be 1 to {MAX_TASKS}, got {num_tasks}")
    if not texts:
        raise ValueError("no texts to wrap; give at least one")
    rng = random.Random(f"synthetic {seed}")
    pairs = list(product(ACTIONS, KINDS))
    return [_task(*pair, texts, num_train, num_test, rng) for pair in rng.sample(pairs, num_tasks)]


def _task(action: str, kind: str, texts: Sequence[str], num_train: int, num_test: int, rng: random.Random) -> Task:
    def example() -> Example:
        text = rng.choice(texts).strip()
        return Example(prompt=rng.choice(WORDINGS).format(action=action, kind=kind, text=text), answer="Done.")

    made = [example() for _ in range(num_train + num_test)]
    return Task(name=f"{action}, {kind}", train=tuple(made[:num_train]), test=tuple(made[num_train:]))
