"""Benchmarks: ratios over the base model, measured side by side in one process."""
