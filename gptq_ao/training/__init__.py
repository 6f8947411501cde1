"""Quantized models in training code: what several processes need to be told."""

from gptq_ao.training.load import load_full_state_dict
from gptq_ao.training.shards import unshardable

__all__ = ["load_full_state_dict", "unshardable"]
