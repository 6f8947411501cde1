"""The quantized model against the graph it was calibrated on: cut into segments, with the quantized weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import gptq_ao.planning.prepare
from gptq_ao.calibration.batches import as_batch
from gptq_ao.passes.calibrate import run_segment
from gptq_ao.passes.capture import calibration_mode
from gptq_ao.passes.records import Plan, Program
from gptq_ao.tensor import GroupTensor

__all__ = ["eager_outputs", "keep_plan", "largest_difference", "segmented_outputs"]


@contextmanager
def keep_plan() -> Iterator[list[tuple[Program, Plan]]]:
    """The (program, plan) of each `quantize_` inside, without a second capture."""
    kept: list[tuple[Program, Plan]] = []
    schedule = gptq_ao.planning.prepare.schedule

    def keeping(program: Program, *args: Any) -> Plan:
        plan = schedule(program, *args)
        kept.append((program, plan))
        return plan

    with mock.patch.object(gptq_ao.planning.prepare, "schedule", keeping):
        yield kept


def eager_outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All tensors the model returns, as it is calibrated: in eval mode, without a cache."""
    b = as_batch(batch)
    with calibration_mode(model), torch.no_grad():
        return _tensors(model(*b.args, **b.kwargs))


def segmented_outputs(model: nn.Module, program: Program, plan: Plan, batch: Any) -> list[Tensor]:
    """The same from the segments, one after the other, with the weights that the model has now."""
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    where = {**program.parameters, **program.buffers}

    def static(placeholder: str) -> Any:
        value = program.constants[placeholder] if placeholder in program.constants else state[where[placeholder]]
        return value.dequantize() if isinstance(value, GroupTensor) else value

    values: dict[str, Any] = dict(program.bind(as_batch(batch), "batch"))
    written: dict[str, Any] = {}
    for segment in (*plan.segments, plan.tail):
        made = run_segment(segment, values, [static(p) for p in segment.statics])
        written = dict(zip(segment.writes, made, strict=True))
        values = {name: written.get(name, values.get(name)) for name in segment.keeps}
    (output,) = program.graph.find_nodes(op="output")
    return _tensors([written[n.name] for n in pytree.tree_leaves(output.args) if isinstance(n, fx.Node)])


def largest_difference(eager: list[Tensor], graph: list[Tensor]) -> float:
    """0.0: the same, bit for bit (NaN equals NaN)."""
    if [t.shape for t in eager] != [t.shape for t in graph]:
        return float("inf")
    differences = [
        (a.double() - b.double()).abs().nan_to_num(float("inf")).max().item()
        for a, b in zip(eager, graph, strict=True)
        if a.numel() and not torch.equal(a.nan_to_num(), b.nan_to_num())
    ]
    return max(differences, default=0.0)


def _tensors(value: Any) -> list[Tensor]:
    """Also of objects that pytree does not know."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(value):
        found += [leaf] if isinstance(leaf, Tensor) else _tensors(vars(leaf)) if hasattr(leaf, "__dict__") else []
    return found
