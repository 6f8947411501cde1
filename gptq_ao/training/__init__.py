"""Adapters on quantized models: made with the codes (`gptq_config(adapter_rank=…)`), and merged into them."""

from gptq_ao.training.adapters import attach_adapter, save_adapter
from gptq_ao.training.merge import merge_and_requantize_

__all__ = ["attach_adapter", "merge_and_requantize_", "save_adapter"]
