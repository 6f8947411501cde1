"""Solve the weights that share a Hessian: stacked where their settings agree, rounded to nearest where they must be."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_ao.config import GPTQConfig
from gptq_ao.errors import SolverError
from gptq_ao.hessian import Hessian
from gptq_ao.solver import Solution, factor, relative_error, round_to_nearest, solve

__all__ = ["SolvedWeight", "round_weight", "solve_group"]


@dataclass(frozen=True)
class SolvedWeight:
    """One weight's solution and what the report says of it (see `report.WeightReport`)."""

    name: str
    config: GPTQConfig
    solution: Solution
    method: str
    rows: int = 0
    damp: float | None = None
    dead: int = 0
    error: float | None = None
    fallback: str | None = None


def round_weight(name: str, weight: Tensor, config: GPTQConfig) -> SolvedWeight:
    """Round `weight` [..., N, K] to nearest."""
    solution = round_to_nearest(weight.detach(), bits=config.bits, group_size=config.group_size, sym=config.sym)
    return SolvedWeight(name, config, solution, "rtn")


def solve_group(
    weights: Mapping[str, Tensor], settings: Mapping[str, GPTQConfig], hessian: Hessian, strict: bool
) -> Iterator[SolvedWeight]:
    """Solve weights [N, K] on the Hessian's device, in order of their settings.

    Raises:
        SolverError: the Hessian cannot be factored, or `strict` forbids to round what no data reached.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name in weights:
        c = settings[name]
        alike.setdefault((c.method, c.act_order, c.damp_percent, c.bits, c.group_size, c.sym), []).append(name)
    blind = hessian.matrix.diagonal().count_nonzero().item() == 0
    for names in alike.values():
        c = settings[names[0]]
        fallback = "no calibration row reached it" if blind and c.method == "gptq" else None
        if fallback and strict:
            raise SolverError(f"{names[0]}: {fallback}, and strict=True forbids rounding to nearest instead")
        dense = [weights[name] for name in names]
        method, damp, dead = "rtn", None, 0
        if c.method == "rtn" or fallback:
            solutions = [round_weight(name, w, c).solution for name, w in zip(names, dense, strict=True)]
        else:
            try:
                f = factor(hessian, c.act_order, c.damp_percent)
            except SolverError as e:
                raise SolverError(f"{', '.join(names)}: {e}") from e
            stacked = solve(torch.cat(dense), f, bits=c.bits, group_size=c.group_size, sym=c.sym, act_order=c.act_order)
            solutions = stacked.split([w.shape[0] for w in dense])
            method, damp, dead = "gptq", f.damp, f.dead
        for name, weight, solution in zip(names, dense, solutions, strict=True):
            error = relative_error(weight, solution.dequantize(), hessian)
            yield SolvedWeight(name, c, solution, method, hessian.rows, damp, dead, error, fallback)
