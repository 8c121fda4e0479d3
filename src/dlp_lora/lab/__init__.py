"""The laboratory: measures the method, and writes and shows the records."""
