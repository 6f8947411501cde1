"""GPTQ's format, versions 1 and 2, as AutoGPTQ and its successors write it."""
