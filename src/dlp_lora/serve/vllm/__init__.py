"""The vLLM backend: the same front, but ordinary vLLM servers compute the tokens."""
