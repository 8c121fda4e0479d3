"""The router benchmark: tasks and a router in, a record of its accuracy, calibration and cost out."""

from dlp_lora.lab.evals.router.run import SCENARIOS, bench_router
from dlp_lora.lab.evals.router.setting import RouterBenchArgs, Setting, Trained, read_trained

__all__ = ["SCENARIOS", "RouterBenchArgs", "Setting", "Trained", "bench_router", "read_trained"]
