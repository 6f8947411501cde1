"""Where other libraries meet this one: torchao, transformers."""
