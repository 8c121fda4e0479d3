"""Questions apart: a prompt of several questions in, a prompt for each of them out; and their answers as one.

Each question stands in a context of its own, with the system prompt and the earlier turns, as if it were asked alone.
No adapter then reads the other questions, which costs small models most of their right answers (docs/log.md).
"""

from collections.abc import Sequence
from dataclasses import replace

from dlp_lora.chat import Chat, text_of
from dlp_lora.engine.trace import Generation, Sentence
from dlp_lora.router import Context
from dlp_lora.router.questions import Read, questions_apart


def prompts_apart(read: Read, prompt: str | Chat, context: Context) -> list[str | Chat]:
    """Gives a prompt for each question of a prompt; the prompt itself where it is not cut, or its answer was begun.

    Args:
        context: what the router reads of the prompt.
    """
    if context.answer:
        return [prompt]
    text = context.prompt
    questions = questions_apart(read, context)
    if isinstance(prompt, str):
        head, found, tail = prompt.rpartition(text)  # a text of the chat template has some around the turn
        return [f"{head}{question}{tail}" for question in questions] if found and questions else [prompt]
    *before, newest = prompt.messages
    if not questions or newest.get("role") != "user" or text_of(newest).strip() != text:
        return [prompt]
    return [replace(prompt, messages=[*before, {**newest, "content": question}]) for question in questions]


def joined(parts: Sequence[Generation]) -> Generation:
    """One answer of several, each on lines of its own; the trace runs through all of them."""
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
    """What stands between an answer and the next."""
    return "" if text.endswith("\n") else "\n"
