"""`python -m dlp_lora` is the `dlp-lora` command."""

from dlp_lora.cli import main

main()
