"""Several processes that quantize one model together, as torch.distributed has them."""
