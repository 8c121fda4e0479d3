"""The server: an OpenAI API in front of backends, which answer each sentence under its mixture of adapters."""
