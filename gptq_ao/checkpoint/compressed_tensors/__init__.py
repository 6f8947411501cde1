"""The format of compressed-tensors, as llm-compressor writes it."""
