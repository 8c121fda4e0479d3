"""Tasks: examples with their answers, from folders, from the hub, or made by the package."""

from dlp_lora.tasks.catalog import CATALOG, COMPOSITES, METRICS, CatalogTask, composite
from dlp_lora.tasks.hub import read_data, read_hub_tasks
from dlp_lora.tasks.manifest import TaskInfo, kind_of, read_manifest
from dlp_lora.tasks.procedural import PROCEDURAL, procedural_task
from dlp_lora.tasks.serial import compose, serial
from dlp_lora.tasks.sources import read_examples, read_task, read_tasks, write_task
from dlp_lora.tasks.task import Example, Task

__all__ = [
    "CATALOG",
    "COMPOSITES",
    "METRICS",
    "PROCEDURAL",
    "CatalogTask",
    "Example",
    "Task",
    "TaskInfo",
    "compose",
    "composite",
    "kind_of",
    "procedural_task",
    "read_data",
    "read_examples",
    "read_hub_tasks",
    "read_manifest",
    "read_task",
    "read_tasks",
    "serial",
    "write_task",
]
