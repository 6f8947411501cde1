"""Program × batches → an error for what would fail while the model runs: dtypes that cannot be multiplied, rows that a
table does not have (on a GPU an assertion of the device, after which nothing runs any more).

No weight is read. Row numbers are computed on the CPU, as far as they follow from the inputs alone.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from gptq_ao.errors import CalibrationError, ConfigError
from gptq_ao.passes.products.lookups import Lookup, check_rows, lookups
from gptq_ao.passes.products.operators import op_name
from gptq_ao.passes.products.table import products
from gptq_ao.passes.products.weight_views import trace_parameter
from gptq_ao.passes.records import Program

__all__ = ["check_dtypes", "check_lookups"]


def check_dtypes(program: Program) -> None:
    """
    Raises:
        CalibrationError: what an input leads to is multiplied by a weight of another floating dtype.
        ConfigError: so is another weight.
    """
    for node in program.graph.nodes:
        for product in products(node):
            found = trace_parameter(product.weight, program)
            x, w = product.activation.meta["val"].dtype, product.weight.meta["val"].dtype
            if found is None or x == w or not (x.is_floating_point and w.is_floating_point):
                continue
            dtypes = {name: n.meta["val"].dtype for name, n in program.placeholders.items()}
            given = next((n for n in program.inputs if n is not None and dtypes[n] == x), None)
            # A model that has this dtype itself, and another, would not be helped by another input.
            if given is not None and all(dtypes[p] != x for p in program.parameters):
                raise CalibrationError(
                    f"input {given!r} of the calibration batches is {x}, and the model multiplies what it makes of it "
                    f"by {found.weight!r}, which is {w}: convert the batches, {given}.to({w}), or the model"
                )
            raise ConfigError(
                f"the model multiplies {x} by {found.weight!r}, which is {w}, and {op_name(node)} takes no two dtypes: "
                "give all parts of the model the same, model.to(dtype)"
            )


def check_lookups(program: Program, batches: Iterable[Mapping[str, Tensor]], buffer: Callable[[str], Tensor]) -> None:
    """
    Args:
        batches: by placeholder name, see `Program.bind`. Those on meta have no values, and are passed over.
        buffer: a buffer by its name in the model; asked only for those that row numbers are computed from.

    Raises:
        CalibrationError: a batch asks for a row that is not there.
    """
    found = [each for each in lookups(program) if _follows_from_inputs(each.index, program)]
    if not found:
        return
    graph = _only(program, found)
    static: dict[str, Any] = {}
    for number, batch in enumerate(batches):
        if any(t.is_meta for t in batch.values()):
            continue
        for name in (n.name for n in graph.find_nodes(op="placeholder")):
            if name not in batch and name not in static:
                value = program.constants[name] if name in program.constants else buffer(program.buffers[name])
                static[name] = value.cpu() if isinstance(value, Tensor) else value
        values = {**static, **{n: t.cpu() for n, t in batch.items()}}
        try:
            with torch.no_grad():
                rows = _OnCpu(graph).run(*(values[n.name] for n in graph.find_nodes(op="placeholder")))
        except Exception:  # an operator that the CPU lacks, or an earlier mistake: the run itself will tell
            return
        for each, index in zip(found, rows, strict=True):
            check_rows(index, each.size, each.least, each.table, each.source, f"calibration batch {number}")


class _OnCpu(fx.Interpreter):
    """Wherever the graph would make its tensors."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), graph))

    def call_function(self, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        return super().call_function(target, args, kwargs)


def _needed(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found, todo = set(), list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _follows_from_inputs(node: fx.Node, program: Program) -> bool:
    needed = _needed([node])
    given = any(n.op == "placeholder" and n.name in program.inputs for n in needed)
    plain = all(n.op == "call_function" or (n.op == "placeholder" and n.name not in program.parameters) for n in needed)
    return given and plain


def _only(program: Program, found: list[Lookup]) -> fx.Graph:
    """The part of the graph that computes the row numbers, one output for each."""
    graph, needed = fx.Graph(), _needed(each.index for each in found)
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[each.index] for each in found))
    return graph
