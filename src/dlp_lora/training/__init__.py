"""Training: one LoRA a task through PEFT, and the router."""
