"""The paper's experiments: a base model and task data in; adapters, router, answers and a record out."""

from dlp_lora.reproduce.args import LARGER, Event, ReproduceArgs, steps
from dlp_lora.reproduce.estimate import Estimate
from dlp_lora.reproduce.run import check_apart, reproduce
from dlp_lora.reproduce.settings import GROWING, added, grown

__all__ = [
    "GROWING",
    "LARGER",
    "Estimate",
    "Event",
    "ReproduceArgs",
    "added",
    "check_apart",
    "grown",
    "reproduce",
    "steps",
]
