"""The vLLM backend: the same front, and stock vLLM servers that compute the tokens."""
