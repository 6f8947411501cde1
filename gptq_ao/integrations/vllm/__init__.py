"""vLLM serves all that this package reads: its products by quantized weights are those of `gptq_ao.kernels`."""
