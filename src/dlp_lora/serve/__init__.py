"""The server: an OpenAI API in front of backends that answer, each sentence under its own mixture of adapters."""
