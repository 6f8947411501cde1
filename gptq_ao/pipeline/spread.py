"""Solving that is spread over ranks: of weights that share a Hessian each rank solves some rows, of experts some
experts; then all get all of it, since all run the next segment."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptq_ao.adapter import LowRank
from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.errors import SolverError
from gptq_ao.passes.records import Part
from gptq_ao.pipeline.solved_part import SolvedPart
from gptq_ao.recipe import Recipe
from gptq_ao.solver.compensate import compensation_factor
from gptq_ao.solver.factor import Factor, factor
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.solution import Solution

__all__ = ["each_expert", "factors", "gathered", "names_of_parts", "rows_gathered", "rows_of_each"]

T = TypeVar("T")


def names_of_parts(parts: Iterable[Part]) -> str:
    return ", ".join(dict.fromkeys(p.weight for p in parts))


def factors(
    ranks: Ranks, hessian: Hessian, recipe: Recipe, parts: Sequence[Part], compensated: bool
) -> tuple[Factor, Tensor | None]:
    """The factor and, if it is `compensated`, the one for that: each of one rank, on all of them. So no rank's differs
    by a bit, a broken one is an error of all, and two ranks work at the same time. A rank alone makes the second one
    when it needs it.

    Raises:
        SolverError: see `factor` and `compensation_factor`; names the weights of `parts`.
    """
    device = hessian.matrix.device
    numbers: dict[str, Any] = {}
    tensors: list[Tensor] = []
    lower: list[Tensor] = []
    try:
        if ranks.first:
            f = factor(hessian, recipe)
            if ranks.size == 1:
                return f, None
            numbers = {name: getattr(f, name) for name in ("damp", "added", "dead", "mean")}
            tensors = [f.unit, f.pivots, *([] if f.order is None else [f.order])]
        elif compensated and ranks.rank == 1:
            lower = [compensation_factor(hessian)]
    except SolverError as e:
        raise SolverError(f"{names_of_parts(parts)}: {e}") from e
    numbers, (unit, pivots, *order) = ranks.broadcast(0, numbers, tensors, device)
    if compensated:
        _, lower = ranks.broadcast(1, None, lower, device)
    return Factor(recipe, unit, pivots, order[0] if order else None, **numbers), next(iter(lower), None)


def rows_of_each(parts: Sequence[Part], ranks: int, *, whole: bool) -> list[list[tuple[Part, Part]]]:
    """What each rank solves: pieces, with the part that they are of. As many rows for each as can be; or, if `whole`,
    each part on one rank. There may be nothing."""
    if whole:
        return [[(part, part) for part in parts[rank::ranks]] for rank in range(ranks)]
    starts = [0, *itertools.accumulate(p.stop - p.start for p in parts)]
    bounds = [starts[-1] * rank // ranks for rank in range(ranks + 1)]
    return [
        [
            (Part(p.weight, p.start + max(first - start, 0), min(p.start + last - start, p.stop)), p)
            for p, (start, stop) in zip(parts, itertools.pairwise(starts), strict=True)
            if max(first, start) < min(last, stop)
        ]
        for first, last in itertools.pairwise(bounds)
    ]


def each_expert(
    ranks: Ranks,
    experts: Sequence[T],
    solve: Callable[[T, Ranks], Iterable[SolvedPart]],
    device: torch.device,
    *,
    single: bool,
) -> Iterator[SolvedPart]:
    """What `solve` gives for each, solved on one rank, which has it to itself; for what is no expert but a `single`
    matrix, by all together."""
    if single:
        for each in experts:
            yield from solve(each, ranks)
    else:
        mine = (part for expert in ranks.share(experts) for part in solve(expert, ALONE))
        yield from gathered(ranks, mine, device)


def gathered(ranks: Ranks, solved: Iterable[SolvedPart], device: torch.device) -> Iterator[SolvedPart]:
    """Those of all ranks, in their order."""
    if ranks.size == 1:
        yield from solved
        return
    facts: list[dict[str, Any]] = []
    tensors: list[Tensor] = []
    for p in solved:
        s, a = p.solution, p.adapter
        there = [s.codes, s.scale, s.zero_point, s.perm, *((None, None) if a is None else (a.A, a.B))]
        told = {f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name not in ("solution", "adapter")}
        facts.append({**told, "part": dataclasses.astuple(p.part), "there": [t is not None for t in there]})
        tensors += [t for t in there if t is not None]
    for all_told, received in ranks.gather(facts, tensors, device):
        left = iter(received)
        for told in all_told:
            codes, scale, zero_point, perm, A, B = (next(left) if there else None for there in told.pop("there"))
            assert codes is not None
            assert scale is not None
            assert zero_point is not None
            adapter = None if A is None or B is None else LowRank(A, B)
            told |= {"part": Part(*told["part"]), "adapter": adapter}
            yield SolvedPart(solution=Solution(codes, scale, zero_point, perm), **told)


def rows_gathered(
    ranks: Ranks, parts: Sequence[Part], solved: Iterable[SolvedPart], device: torch.device
) -> Iterator[SolvedPart]:
    """`parts` in order, of the pieces that the ranks have solved (see `rows_of_each`)."""
    if ranks.size == 1:  # each part is a piece; as soon as it is there
        yield from solved
        return
    everything = list(gathered(ranks, solved, device))
    for part in parts:
        pieces = [p for p in everything if p.part.weight == part.weight and part.start <= p.part.start < part.stop]
        first, names = pieces[0], ("codes", "scale", "zero_point")
        codes, scale, zero_point = (torch.cat([getattr(p.solution, name) for p in pieces]) for name in names)
        yield dataclasses.replace(
            first,
            part=part,
            solution=Solution(codes, scale, zero_point, first.solution.perm),
            changed=sum(p.changed or 0.0 for p in pieces),
            energy=sum(p.energy or 0.0 for p in pieces),
        )
