"""The report of `bench router`: its record in, targets, tables and pictures out."""

from dlp_lora.lab.report.router.page import router_sections, router_title
from dlp_lora.lab.report.router.pictures import router_pictures
from dlp_lora.lab.report.router.record import is_router_record, read_router_record

__all__ = ["is_router_record", "read_router_record", "router_pictures", "router_sections", "router_title"]
