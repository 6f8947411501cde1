"""Whether a quantized model is as good as it has to be, found out in the run that makes it."""
