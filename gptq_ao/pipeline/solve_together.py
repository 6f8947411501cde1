"""Solve the parts of weights that share a Hessian: those of equal recipes at once, as one tall matrix, since no row
depends on another; rounded to nearest where there is no data."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_ao.adapter import LowRank
from gptq_ao.config import GPTQConfig
from gptq_ao.distributed.ranks import ALONE, Ranks
from gptq_ao.errors import SolverError, StrictError
from gptq_ao.passes.records import Part
from gptq_ao.pipeline.solved_part import SolvedPart
from gptq_ao.pipeline.spread import factors, names_of_parts, rows_gathered, rows_of_each
from gptq_ao.recipe import Recipe
from gptq_ao.solver.compensate import corrected_target
from gptq_ao.solver.factor import Factor
from gptq_ao.solver.hessian import Hessian
from gptq_ao.solver.low_rank import low_rank
from gptq_ao.solver.refine import refine
from gptq_ao.solver.solution import Solution
from gptq_ao.solver.solve import better_rows, output_energy, round_to_nearest, solve

__all__ = ["SolvedPart", "join_parts", "round_matrix", "solve_together"]

Grid = tuple[Tensor, Tensor]  # scale [n, G] fp16 and zero point [n, G] uint8


def round_matrix(weight: str, matrix: Tensor, config: GPTQConfig, grid: Grid | None = None) -> SolvedPart:
    """Round `matrix` [N, K] to nearest, on a grid that there is already, if one is given."""
    return SolvedPart(Part(weight, 0, matrix.shape[0]), round_to_nearest(matrix.detach(), config.recipe, grid), "rtn")


def solve_together(
    matrices: Mapping[Part, Tensor],
    settings: Mapping[str, GPTQConfig],
    hessian: Hessian,
    strict: bool,
    fallback: str | None = None,
    residual_parts: tuple[Part, ...] = (),
    grids: Mapping[Part, Grid] | None = None,
    heights: Mapping[str, int] | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[SolvedPart]:
    """Solve the rows of `matrices` on the Hessian's device, recipe by recipe.

    Args:
        matrices: part → its rows [n, K], floating point, on the Hessian's device.
        settings: weight → its settings; those of every part's weight.
        fallback: the reason why `hessian` is not that of the parts' own rows; None if it is.
        residual_parts: the parts that the Hessian's `residuals` belong to, in order.
        grids: scales and zero points that parts may keep: each row does if that is better than new ones. All parts of
            a recipe have one, or none has.
        heights: weight → rows of one of its matrices, each of which gets an adapter of its own. By default a part is
            one matrix.
        ranks: that have the same Hessian and matrices. Each solves some of the rows, and all get all of them.

    Raises:
        SolverError: the Hessian cannot be factored.
        StrictError: `strict` forbids to round what no data reached.
    """
    alike: dict[Recipe, list[Part]] = {}
    residuals = dict(zip(residual_parts, hessian.residuals, strict=True))
    for part in matrices:
        alike.setdefault(settings[part.weight].recipe, []).append(part)
    # No data: H is zero, any rounding is as good as any other by its measure, and the nearest codes are the best guess.
    blind = hessian.matrix.diagonal().count_nonzero().item() == 0
    for recipe, parts in alike.items():
        why = fallback if recipe.method == "gptq" else None
        if blind and recipe.method == "gptq":
            why = "no calibration row reached it"
        if why and strict:
            raise StrictError(f"{names_of_parts(parts)}: {why}, and strict=True forbids rounding to nearest instead")
        f = lower = None
        if recipe.method == "gptq" and not blind:
            compensated = recipe.compensates and (hessian.drift is not None or bool(residuals))
            f, lower = factors(ranks, hessian, recipe, parts, compensated)
        # An adapter is of a whole matrix.
        mine = rows_of_each(parts, ranks.size, whole=f is not None and recipe.adapter_rank > 0)[ranks.rank]
        solved = _solve_alike(
            {p: _within(matrices[of], p, of) for p, of in mine},
            recipe,
            hessian,
            f,
            lower,
            why,
            {p: _within(residuals[of], p, of) for p, of in mine if of in residuals},
            {p: (_within(g[0], p, of), _within(g[1], p, of)) for p, of in mine if (g := (grids or {}).get(of))},
            heights or {},
        )
        yield from rows_gathered(ranks, parts, solved, hessian.matrix.device)


def _solve_alike(
    matrices: Mapping[Part, Tensor],
    recipe: Recipe,
    hessian: Hessian,
    f: Factor | None,
    lower: Tensor | None,
    why: str | None,
    residuals: Mapping[Part, Tensor],
    grids: Mapping[Part, Grid],
    heights: Mapping[str, int],
) -> Iterator[SolvedPart]:
    """See `solve_together`, for parts of one recipe; without a factor they are rounded to nearest."""
    parts, dense = list(matrices), list(matrices.values())
    if not parts:  # of this rank
        return
    sizes = [m.shape[0] for m in dense]
    targets = [m.float() for m in dense]
    given = [grids.get(part) for part in parts]
    adapters: Sequence[LowRank | None] = [None] * len(parts)
    if f is None:
        solutions = [round_to_nearest(m, recipe, grid) for m, grid in zip(dense, given, strict=True)]
    else:
        target = torch.cat(targets)
        # What is rounded is not W but the weights that W should have had behind quantized layers; the errors below are
        # measured against them, too.
        if recipe.compensates:
            try:
                target = corrected_target(target, hessian, _stacked(residuals, parts, targets), lower)
            except SolverError as e:
                raise SolverError(f"{names_of_parts(parts)}: {e}") from e
        each = [heights.get(part.weight, n) for part, n in zip(parts, sizes, strict=True)]
        solutions, adapters = _solve(target, sizes, each, hessian, f, _stacked_grids(given))
        targets = list(target.split(sizes))
    how = {"method": "rtn"} if f is None else {"method": "gptq", "damp": f.damp, "dead": f.dead}
    for part, matrix, solution, adapter in zip(parts, targets, solutions, adapters, strict=True):
        solved = SolvedPart(part, solution, rows=hessian.rows, fallback=why, adapter=adapter, **how)
        changed = output_energy(matrix - solved.dequantize(), hessian) * hessian.rows
        energy = output_energy(matrix, hessian) * hessian.rows
        yield dataclasses.replace(solved, changed=changed, energy=energy)


def _within(rows: Tensor, piece: Part, part: Part) -> Tensor:
    """Of what `part` has for each row, what belongs to a piece of it."""
    return rows[piece.start - part.start : piece.stop - part.start]


def _solve(
    target: Tensor, sizes: list[int], heights: list[int], hessian: Hessian, f: Factor, grid: Grid | None
) -> tuple[list[Solution], Sequence[LowRank | None]]:
    """Of parts that are stacked in `target` [N, K] fp32: their codes, and with `adapter_rank` what is added to them.
    Each is solved for what the other leaves, in turn."""
    recipe = f.recipe

    def codes_for(goal: Tensor) -> Solution:
        found = refine(solve(goal, f), goal, hessian, f)
        if grid is None:
            return found
        return better_rows(found, refine(solve(goal, f, grid), goal, hessian, f), goal, hessian)

    solution = codes_for(target)
    if not recipe.adapter_rank:
        return solution.split(sizes), [None] * len(sizes)

    def correct(solution: Solution) -> list[LowRank]:
        errors = (target - solution.dequantize()).split(sizes)
        matrices = (e if len(e) == n else e.unflatten(0, (-1, n)) for e, n in zip(errors, heights, strict=True))
        return [low_rank(each, f, recipe.adapter_rank) for each in matrices]

    adapters = correct(solution)
    for _ in range(recipe.adapter_rounds - 1):
        left = target - torch.cat([a.dense() for a in adapters])
        solution = codes_for(left)
        adapters = correct(solution)
    return solution.split(sizes), adapters


def _stacked_grids(grids: list[Grid | None]) -> Grid | None:
    given = [grid for grid in grids if grid is not None]
    return (torch.cat([s for s, _ in given]), torch.cat([z for _, z in given])) if len(given) == len(grids) else None


def _stacked(residuals: Mapping[Part, Tensor], parts: list[Part], weights: list[Tensor]) -> Tensor | None:
    """Zero for parts that add to no residual stream; None if none does."""
    if not residuals:
        return None
    return torch.cat([residuals.get(p, torch.zeros_like(w)) for p, w in zip(parts, weights, strict=True)])


def join_parts(parts: Iterable[SolvedPart], matrix: Tensor, config: GPTQConfig) -> SolvedPart:
    """The whole weight from its parts.

    Args:
        matrix: [N, K], floating point, the weight. Its rows that are in none of the parts were multiplied by no
            activation, and are rounded to nearest.
    """
    parts = sorted(parts, key=lambda p: p.part.start)
    pieces, end = [], 0
    for p in parts:
        if end < p.part.start:
            pieces.append(_unused(p.part.weight, matrix, end, p.part.start, config))
        pieces.append(p)
        end = p.part.stop
    if end < matrix.shape[0]:
        pieces.append(_unused(parts[0].part.weight, matrix, end, matrix.shape[0], config))
    if len(pieces) == 1:
        return pieces[0]
    solution = Solution(
        *(torch.cat([getattr(p.solution, name) for p in pieces]) for name in ("codes", "scale", "zero_point"))
    )
    damps = [p.damp for p in pieces if p.damp is not None]
    return SolvedPart(
        part=Part(parts[0].part.weight, 0, matrix.shape[0]),
        solution=solution,
        method="gptq" if any(p.method == "gptq" for p in pieces) else "rtn",
        rows=sum(p.rows for p in pieces),
        damp=max(damps, default=None),
        dead=sum(p.dead for p in pieces),
        changed=sum(p.changed or 0.0 for p in pieces),
        energy=sum(p.energy or 0.0 for p in pieces),
        fallback=_summary(pieces),
        adapter=_stack_of([p.adapter for p in pieces], [p.part.stop - p.part.start for p in pieces]),
        expert_rows=tuple(rows for p in pieces for rows in p.expert_rows),
    )


def _stack_of(adapters: list[LowRank | None], rows: list[int]) -> LowRank | None:
    """Those of experts as one. An expert without gets one that adds nothing and can be trained, as A is zero and B is
    not; nothing if all are without."""
    given = [a for a in adapters if a is not None]
    if not given:
        return None
    rank, k, height = given[0].rank, given[0].A.shape[-1], given[0].B.shape[-2]
    like: dict[str, Any] = {"dtype": given[0].A.dtype, "device": given[0].A.device}
    nothing = LowRank(torch.zeros(rank, k, **like), torch.eye(height, rank, **like))
    # What no product used is one piece, however many experts that are.
    each = [a or nothing for a, n in zip(adapters, rows, strict=True) for _ in range(1 if a else n // height)]
    return LowRank(
        torch.cat([a.A.reshape(-1, rank, k) for a in each]), torch.cat([a.B.reshape(-1, height, rank) for a in each])
    )


def _unused(weight: str, matrix: Tensor, start: int, stop: int, config: GPTQConfig) -> SolvedPart:
    part, why = Part(weight, start, stop), "no product of the captured forward uses it"
    return SolvedPart(part, round_to_nearest(matrix[start:stop].detach(), config.recipe), "rtn", fallback=why)


def _summary(parts: list[SolvedPart]) -> str | None:
    """Reason → the rows it concerns."""
    by_reason: dict[str, list[str]] = {}
    for p in parts:
        if p.fallback is not None:
            by_reason.setdefault(p.fallback, []).append(f"{p.part.start}:{p.part.stop}")
    return "; ".join(f"rows {', '.join(rows)}: {why}" for why, rows in by_reason.items()) or None
