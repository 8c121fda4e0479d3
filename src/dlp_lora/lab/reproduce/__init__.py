"""The paper's experiments: a base model and task data in; adapters, router, answers and a record out."""

from dlp_lora.lab.reproduce.args import ReproduceArgs, stages
from dlp_lora.lab.reproduce.estimate import Estimate
from dlp_lora.lab.reproduce.evaluate import Evaluated, evaluate_bundle
from dlp_lora.lab.reproduce.run import check_apart, reproduce
from dlp_lora.lab.reproduce.settings import GROWING, added, grown

__all__ = [
    "GROWING",
    "Estimate",
    "Evaluated",
    "ReproduceArgs",
    "added",
    "check_apart",
    "evaluate_bundle",
    "grown",
    "reproduce",
    "stages",
]
