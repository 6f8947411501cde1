"""The parameters of an nn.Module, wherever they are."""
