"""The command line: each command parses, calls one function and prints."""

from dlp_lora.cli.app import main

__all__ = ["main"]
