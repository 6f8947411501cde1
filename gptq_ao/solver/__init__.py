"""The mathematics of GPTQ: tensors in, tensors out."""
