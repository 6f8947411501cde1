"""Directories of files: quantized models saved, loaded and converted, in all formats."""
