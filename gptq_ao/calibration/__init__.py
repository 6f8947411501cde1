"""Batches of calibration data, and where their activations wait."""
