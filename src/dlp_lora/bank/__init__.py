"""Adapters in, exact deltas out (section 3.3)."""
