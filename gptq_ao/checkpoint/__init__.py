"""Checkpoints of other libraries: tensors of their files to codes, scales and zero points, and back."""
