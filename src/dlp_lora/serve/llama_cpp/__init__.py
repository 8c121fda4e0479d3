"""The llama.cpp backend: the same front over a GGUF file, in this process."""
