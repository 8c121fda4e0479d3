"""Tasks: examples with their answers, read from folders or made by the package itself."""

from dlp_lora.tasks.procedural import PROCEDURAL, procedural_task
from dlp_lora.tasks.serial import compose, serial
from dlp_lora.tasks.sources import read_task, read_tasks, write_task
from dlp_lora.tasks.task import Example, Task

__all__ = [
    "PROCEDURAL",
    "Example",
    "Task",
    "compose",
    "procedural_task",
    "read_task",
    "read_tasks",
    "serial",
    "write_task",
]
