"""AWQ's format of version "gemm", as AutoAWQ and its successors write it."""
