"""Which weights of a quantized model hurt, and what to do about it."""
