"""How a task's prompt and answer become tokens: the one way for training, evaluation and the command line."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from dlp_lora.errors import TaskError
from dlp_lora.tasks.task import Example, PromptFormat


def resolve_format(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> PromptFormat:
    """Turns "auto" into "chat" where the tokenizer has a chat template, else into "plain".

    Raises:
        TaskError: for "chat" without a chat template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if prompt_format == "chat" and not has_template:
        raise TaskError("the prompt format is 'chat', but the tokenizer has no chat template; use 'plain'")
    if prompt_format == "auto":
        return "chat" if has_template else "plain"
    return prompt_format


def as_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_format: PromptFormat
) -> str | list[dict[str, str]]:
    """What `engine.generate` takes: one user message, or the text itself."""
    if resolve_format(tokenizer, prompt_format) == "chat":
        return [{"role": "user", "content": prompt}]
    return prompt


def encode_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, prompt_format: PromptFormat
) -> tuple[list[int], list[int]]:
    """Gives the tokens that are read, and those that are learned: the answer, then end-of-sequence if it is whole.

    After a plain prompt, what separates it from the answer is learned with the answer.
    """
    prompt = as_prompt(tokenizer, example.prompt, prompt_format)
    if isinstance(prompt, str):
        read, separator = list(tokenizer(prompt)["input_ids"]), _separator(prompt)
    else:
        encoded: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        read, separator = list(encoded["input_ids"]), ""
    if example.answer_prefix:
        read += tokenizer(separator + example.answer_prefix, add_special_tokens=False)["input_ids"]
        separator = ""
    learned = list(tokenizer(separator + example.answer, add_special_tokens=False)["input_ids"])
    if example.complete and tokenizer.eos_token_id is not None:
        learned.append(tokenizer.eos_token_id)
    return read, learned


def _separator(prompt: str) -> str:
    # "A:" asks for its answer on the same line; any other prompt for one on the next.
    return "" if prompt[-1:].isspace() else " " if prompt.endswith(":") else "\n"
