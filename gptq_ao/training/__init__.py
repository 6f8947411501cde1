"""Quantized models in training code: adapters that are made with the codes and merged into them, and what several
processes need to be told."""

from gptq_ao.training.adapters import attach_adapter, save_adapter
from gptq_ao.training.load import load_full_state_dict
from gptq_ao.training.merge import merge_and_requantize_
from gptq_ao.training.shards import unshardable

__all__ = ["attach_adapter", "load_full_state_dict", "merge_and_requantize_", "save_adapter", "unshardable"]
