"""Into how many portions a stage is divided whose Hessians do not fit on the device together."""

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gptq_ao.passes.records import Plan, Portion, Stage
from gptq_ao.report import names_of

__all__ = ["Need", "Room", "choose_portions", "divisible", "note_of", "whole"]


@dataclass(frozen=True)
class Need:
    """Bytes at some moment: `working`, of all but the activations that wait, and those."""

    working: int
    waiting: int

    def besides(self, size: int) -> "Need":
        return Need(self.working + size, self.waiting)


@dataclass(frozen=True)
class Room:
    """Bytes that may be on the device that computes.

    Attributes:
        size: in all; None: unknown, or without limit.
        waiting: of it, that waiting activations take before they go to another place.
    """

    size: int | None = None
    waiting: int = 0

    def taken(self, needs: Iterable[Need]) -> int:
        """What is needed of it, at most."""
        return max(n.working + min(n.waiting, self.waiting) for n in needs)


def whole(stage: Stage) -> tuple[Portion, ...]:
    """All in one portion."""
    return (tuple(range(shared.experts) for shared in stage.inputs),)


def divisible(stage: Stage) -> bool:
    """Not with a single Hessian. Nor if the segment reads the stage's own weights, which must not change before it has
    run for the last time."""
    return sum(shared.experts for shared in stage.inputs) > 1 and not stage.entangled


def choose_portions(
    stage: Stage, sizes: Sequence[int], once: Sequence[Need], again: Sequence[Need], room: Room
) -> tuple[tuple[Portion, ...], Sequence[Need]]:
    """The fewest portions that fit, of about the same size, and what is needed with them. If not even one Hessian at a
    time fits, that is what is chosen.

    Args:
        sizes: of each of the stage's inputs, the bytes of one Hessian.
        once, again: what is needed if the segment runs once, or several times, with the bytes of all Hessians.
    """
    if room.size is None or not divisible(stage) or room.taken(once) <= room.size:
        return whole(stage), once
    # The Hessians of the stage, one after the other: of which input, which expert.
    hessians = [(i, e) for i, shared in enumerate(stage.inputs) for e in range(shared.experts)]
    everything = sum(sizes[i] for i, _ in hessians)
    fit = max(room.size - (room.taken(again) - everything), 0)
    fewest = len(_filled(hessians, sizes, fit))
    most = bisect_left(range(everything), True, key=lambda size: len(_filled(hessians, sizes, size)) <= fewest)
    groups = _filled(hessians, sizes, most)
    largest = max(sum(sizes[i] for i, _ in group) for group in groups)
    needs = [n.besides(largest - everything) for n in again]
    if room.taken(needs) >= room.taken(once):
        return whole(stage), once
    return tuple(_portion(stage, group) for group in groups), needs


def _filled(hessians: Sequence[tuple[int, int]], sizes: Sequence[int], most: int) -> list[list[tuple[int, int]]]:
    """In order, as many in each group as take `most` bytes; at least one."""
    groups: list[list[tuple[int, int]]] = []
    left = 0
    for hessian in hessians:
        size = sizes[hessian[0]]
        if not groups or size > left:
            groups.append([])
            left = most
        groups[-1].append(hessian)
        left -= size
    return groups


def _portion(stage: Stage, group: Sequence[tuple[int, int]]) -> Portion:
    ranges = [range(0)] * len(stage.inputs)
    for i, of_input in itertools.groupby(group, key=lambda hessian: hessian[0]):
        experts = [e for _, e in of_input]
        ranges[i] = range(experts[0], experts[-1] + 1)
    return tuple(ranges)


def note_of(plan: Plan, portions: Sequence[Sequence[Portion]]) -> str | None:
    """What is divided, for a reader; None if nothing is."""
    alike: dict[str, list[str]] = {}
    for stage, of_stage in zip(plan.stages, portions, strict=True):
        if len(of_stage) > 1:
            what = "experts" if any(shared.experts > 1 for shared in stage.inputs) else "weights"
            each = max(sum(map(len, portion)) for portion in of_stage)
            how = f"{what} in {len(of_stage)} portions of {each}: what leads to them runs {len(of_stage)} times"
            alike.setdefault(how, []).append(stage.inputs[0].weights[0])
    if not alike:
        return None
    listing = "; ".join(f"{how} ({names_of(names)})" for how, names in alike.items())
    return f"the Hessians do not fit in memory together. {listing}"
