"""Turns of a conversation in, the router's context out."""

from collections.abc import Sequence
from dataclasses import dataclass

from dlp_lora.chat import Chat, text_of
from dlp_lora.router import Context

USER, ASSISTANT, TOOL = "user", "assistant", "tool"


@dataclass(frozen=True)
class Turn:
    """The role of a speaker, and the text."""

    role: str
    text: str


def read_chat(chat: Chat) -> Context:
    """Returns a chat's context for the router: the user's latest turn, the history, and the answer so far.

    Raises:
        PromptError: if a message has other content than text.
    """
    turns = [Turn(str(message.get("role")), text_of(message)) for message in chat.messages]
    return read_turns(turns if chat.continues else [*turns, Turn(ASSISTANT, "")])


def read_turns(turns: Sequence[Turn]) -> Context:
    """Returns the router's context: the user's latest turn is the prompt, all others are history.

    If the last turn is the assistant's, it is the answer so far. If there is no user, the prompt is the latest turn of
    any role other than the assistant and its tools.
    """
    history_turns, answer = list(turns), ""
    if history_turns and history_turns[-1].role == ASSISTANT:
        answer = history_turns.pop().text
    history_turns = [turn for turn in history_turns if turn.text.strip()]
    places = (
        [i for i, turn in enumerate(history_turns) if turn.role == USER]
        or [i for i, turn in enumerate(history_turns) if turn.role not in (ASSISTANT, TOOL)]
        or range(len(history_turns))
    )
    if not places:
        return Context("", answer if answer.strip() else "")
    prompt = history_turns.pop(places[-1])
    history = "\n".join(turn.text.strip() for turn in history_turns)
    return Context(prompt.text.strip(), answer if answer.strip() else "", history=history)
