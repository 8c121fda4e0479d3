"""The laboratory: what measures the method, and what writes and shows the records."""
