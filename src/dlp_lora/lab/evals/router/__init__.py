"""The router benchmark: tasks and a router in, a record of what it gets right, how sure it is and what it costs out."""

from dlp_lora.lab.evals.router.run import SCENARIOS, bench_router
from dlp_lora.lab.evals.router.setting import RouterBenchArgs, Setting, Trained, read_trained

__all__ = ["SCENARIOS", "RouterBenchArgs", "Setting", "Trained", "bench_router", "read_trained"]
