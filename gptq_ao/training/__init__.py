"""Adapters on quantized models: made with the codes (`gptq_config(adapter_rank=…)`)."""

from gptq_ao.training.adapters import attach_adapter, save_adapter

__all__ = ["attach_adapter", "save_adapter"]
