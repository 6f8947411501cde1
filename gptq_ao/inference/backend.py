"""`torch.compile(model, backend="gptq_ao")`: inductor, and this project's passes over the graphs that it compiles.

    attend_once       of the graph that TorchDynamo traced, where attention is one function still
    around_products   of the graph that inductor is about to make kernels for, of ATen operators

The passes change what is computed for few rows, as in a step of decoding; for all else this is inductor.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from gptq_ao.inference import around_products, patterns
from gptq_ao.inference.attend_once import attend_once

__all__ = ["backend"]


class _Pass(CustomGraphPass):
    """Inductor calls it for each graph, and keeps what it compiled on disk under `uuid`."""

    def __init__(self) -> None:
        sources = (Path(module.__file__ or "").read_bytes() for module in (around_products, patterns))
        self.digest = hashlib.sha256(b"".join(sources)).hexdigest()

    def __call__(self, graph: Graph) -> None:
        around_products.around_products(graph)

    def uuid(self) -> str:
        return self.digest


PASS = _Pass()


def backend(
    graph: GraphModule, inputs: list[Any], mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """A backend of `torch.compile`, which knows it by the name "gptq_ao" where this package is installed.

    Args:
        mode, options: as inductor takes them, `mode="max-autotune-no-cudagraphs"` for instance. None of inductor's
            settings is changed for others.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    # What needs gradients is not for decoding, and the operators have none.
    inference = not torch.is_grad_enabled()
    if inference:
        attend_once(graph.graph)
        graph.recompile()
    settings = (list_mode_options(mode) if mode else {}) | (options or {})
    passes = {"post_grad_custom_pre_pass": PASS} if inference else {}
    return compile_fx(graph, inputs, config_patches={**passes, **settings})
