"""GGUF, the one file that llama.cpp and its relatives read: written, not read. What it holds, it holds exactly, but for
the offsets of asymmetric weights."""
