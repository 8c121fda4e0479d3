"""Turns of a conversation in, what the router reads of them out."""

from collections.abc import Sequence
from dataclasses import dataclass

from dlp_lora.chat import Chat, text_of
from dlp_lora.router import Context

USER, ASSISTANT, TOOL = "user", "assistant", "tool"


@dataclass(frozen=True)
class Turn:
    """Who spoke, and what was said."""

    role: str
    text: str


def read_chat(chat: Chat) -> Context:
    """Gives what the router reads of a chat: the user's latest turn, what was said besides, and the answer so far.

    Raises:
        PromptError: if a message holds something else than text.
    """
    turns = [Turn(str(message.get("role")), text_of(message)) for message in chat.messages]
    return read_turns(turns if chat.continues else [*turns, Turn(ASSISTANT, "")])


def read_turns(turns: Sequence[Turn]) -> Context:
    """Gives what the router reads: the latest turn of the user is the prompt, all others are history.

    A last turn of the assistant is the answer so far, empty where it is still to begin. Where no user spoke, the prompt
    is the latest turn of somebody else than the assistant and its tools, if there is one.
    """
    said, answer = list(turns), ""
    if said and said[-1].role == ASSISTANT:
        answer = said.pop().text
    said = [turn for turn in said if turn.text.strip()]
    asked = (
        [i for i, turn in enumerate(said) if turn.role == USER]
        or [i for i, turn in enumerate(said) if turn.role not in (ASSISTANT, TOOL)]
        or range(len(said))
    )
    if not asked:
        return Context("", answer if answer.strip() else "")
    prompt = said.pop(asked[-1])
    history = "\n".join(turn.text.strip() for turn in said)
    return Context(prompt.text.strip(), answer if answer.strip() else "", history=history)
