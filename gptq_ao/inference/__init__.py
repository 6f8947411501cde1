"""A quantized model, made faster."""
