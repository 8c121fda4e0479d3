"""Questions apart: a prompt of several questions in, a prompt for each question out; then their answers as one answer.

Each question has a separate context, with the system prompt and the earlier turns, as if it were asked alone. So no
adapter reads the other questions; these cost small models most of their right answers (docs/log.md).
"""

from collections.abc import Sequence
from dataclasses import replace

from dlp_lora.chat import Chat, text_of
from dlp_lora.engine.trace import Generation, Sentence
from dlp_lora.router import Context
from dlp_lora.router.questions import Read, questions_apart

MAX_PARTS = 128  # questions that `Engine.generate` answers apart at most: each is a row of one batch


def prompts_apart(read: Read, prompt: str | Chat, context: Context) -> list[str | Chat]:
    """Returns a prompt for each question; or the prompt itself, if it is not cut.

    With tools or the beginning of an answer, a prompt has one answer, so it is not cut.

    Args:
        context: the router's context of the prompt.
    """
    if context.answer or (isinstance(prompt, Chat) and prompt.tools):
        return [prompt]
    text = context.prompt
    questions = questions_apart(read, context)
    if not questions:
        return [prompt]
    if isinstance(prompt, str):
        head, match, tail = prompt.rpartition(text)  # the chat template may add some around the turn
        return [f"{head}{question}{tail}" for question in questions] if match else [prompt]
    *before, newest = prompt.messages
    if newest.get("role") != "user" or text_of(newest).strip() != text:
        return [prompt]
    return [replace(prompt, messages=[*before, {**newest, "content": question}]) for question in questions]


def joined(parts: Sequence[Generation]) -> Generation:
    """Joins several answers, each on separate lines; the trace has the sentences of all."""
    if len(parts) == 1:
        return parts[0]
    text, trace, num_tokens = "", list[Sentence](), 0
    for i, part in enumerate(parts):
        line_break = line_break_after(part.text) if i < len(parts) - 1 else ""
        for sentence in part.trace:
            is_other = bool(trace) and sentence.mixture != trace[-1].mixture
            start, end = sentence.start + num_tokens, sentence.end + num_tokens
            trace.append(replace(sentence, start=start, end=end, switched=is_other))
        trace[-1] = replace(trace[-1], text=trace[-1].text + line_break)
        text += part.text + line_break
        num_tokens += len(part.tokens)
    tokens = tuple(token for part in parts for token in part.tokens)
    return Generation(text=text, tokens=tokens, trace=tuple(trace), parts=tuple(parts))


def line_break_after(text: str) -> str:
    """The text between an answer and the next."""
    return "" if text.endswith("\n") else "\n"
