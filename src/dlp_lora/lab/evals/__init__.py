"""Evaluation: answers in, numbers out."""
