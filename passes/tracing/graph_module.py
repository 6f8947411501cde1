"""A graph as a module whose code is written when it first runs.

Passes make a module of every segment, one after the other, and only those of the last pass run: to write code for all
of them would be a third of what planning takes.
"""

from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule

__all__ = ["graph_module"]


def graph_module(owner: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """With the attributes of `owner` that the graph refers to."""
    return _LazyGraphModule(owner, graph)
