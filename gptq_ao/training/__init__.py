"""Quantized models in training code: what wrappers of several processes need to be told."""

from gptq_ao.training.shards import unshardable

__all__ = ["unshardable"]
