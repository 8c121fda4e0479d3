"""A log of routing: each decision of the router as a line of JSON, to inspect them and to train the router."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from dlp_lora.engine.trace import Decision, Sentence
from dlp_lora.router import Context

TEXTS = ("prompt", "answer", "sentence", "history")  # of a context

logger = logging.getLogger(__name__)


class RoutingLog:
    """A file of routing decisions, one JSON object per line; new lines are appended.

        engine = dlp_lora.load("bundle/", routing_log=dlp_lora.RoutingLog("routing.jsonl"))

    A line has the `time`, the `answer` (the same for all its sentences), `of` ("answer", or "prompt" for a sentence of
    the prompt), the number of the `sentence`, the heaviest `adapter` (null for the base model alone), the weights in
    the `mixture`, the `probabilities`, and whether the mixture `switched` and the policy `abstained`. With `with_text`
    it also has the texts that the router read: `train-router --routed` learns from such lines.

    Several threads and processes may write into one file.

    Raises:
        ValueError: if the file cannot be written.
    """

    def __init__(self, path: str | Path, *, with_text: bool = False) -> None:
        self.path = Path(path)
        self.with_text = with_text
        self._lock = Lock()
        try:
            self._append("")
        except OSError as error:
            raise ValueError(f"the routing log {self.path} cannot be written: {error.strerror}") from error

    def write(
        self, decided: Decision | Sentence, context: Context, *, answer: str, sentence: int, is_prompt: bool = False
    ) -> None:
        """Adds a decision and its context. If this fails, the error is logged and the answer continues."""
        record: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "answer": answer,
            "of": "prompt" if is_prompt else "answer",
            "sentence": sentence,
            "adapter": next(iter(decided.mixture), None),
            "mixture": dict(decided.mixture),
            "probabilities": decided.probabilities,
            "switched": decided.switched,
            "abstained": decided.abstained,
            **({"text": {name: getattr(context, name) for name in TEXTS}} if self.with_text else {}),
        }
        try:
            self._append(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            logger.error("the routing log %s cannot be written: %s", self.path, error.strerror)

    def _append(self, line: str) -> None:
        # Opened for each line, so that it may be moved away at any time.
        with self._lock, self.path.open("ab", buffering=0) as file:
            file.write(line.encode())

    def __repr__(self) -> str:
        return f"RoutingLog({str(self.path)!r}, with_text={self.with_text})"
