"""Training: one LoRA per task with PEFT, and the router."""
