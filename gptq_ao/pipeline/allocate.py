"""How many bits each unit of weights gets, so that all of them fit a budget and harm the model least.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11): exactly one choice
of every unit, the least total cost, a total size within the budget. It is solved by dynamic programming over the
Pareto-optimal states, unit by unit: of all ways to decide the first units, only those matter that are cheaper than
every smaller one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_ao.errors import ConfigError
from gptq_ao.report import Choice, Unit

__all__ = ["allocate"]

MOST_STATES = 2**14  # after each unit. 300 units of 5 choices then take half a second and 20 MB


def allocate(units: Sequence[Unit], budget: int) -> tuple[Choice, ...]:
    """One choice per unit, in the order of `units`: the least total cost whose total size is within the budget.

    Exact while at most `MOST_STATES` = 2^14 Pareto-optimal states are left after each unit. Beyond that, states of
    nearly the same size are thinned, and the total cost is at most the optimum for a budget smaller by

        len(units) · (budget − smallest total size) / MOST_STATES   bytes.

    The budget is never exceeded, and no unit is left that a larger choice within it would make cheaper.

    Of equal costs the smaller size is taken, of equal sizes and costs the lower bits: within a unit, and of two totals
    in the last unit, by order of names, in which they differ. The result depends on the units, not on their order.

    Args:
        budget: bytes for all units together.

    Raises:
        ConfigError: the smallest choices together exceed the budget.
    """
    fronts = [_front(unit.choices) for unit in units]
    smallest = sum(front[0].size for front in fronts)
    if smallest > budget:
        raise ConfigError(
            f"the budget is {budget} bytes, but the weights take {smallest} bytes at the least, with the smallest "
            "choice of each: give a budget of that or more, or allow fewer bits or a larger group_size"
        )
    order = sorted(range(len(units)), key=lambda i: units[i].names)
    chosen = dict(zip(order, _cheapest([fronts[i] for i in order], budget - smallest), strict=True))
    _use_up(fronts, chosen, order, budget - sum(choice.size for choice in chosen.values()))
    return tuple(chosen[i] for i in range(len(units)))


def _front(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that are cheaper than every smaller one, by growing size."""
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.size, c.cost, c.bits)):
        if not front or choice.cost < front[-1].cost:
            front.append(choice)
    return front


def _cheapest(fronts: Sequence[list[Choice]], spare: int) -> list[Choice]:
    """One choice of each front, with at most `spare` bytes more than the smallest of each."""
    # A state is one way to decide the units so far: its bytes above the smallest choices, and its cost. Both are [S].
    extra = torch.zeros(1, dtype=torch.int64, device="cpu")
    cost = torch.zeros(1, dtype=torch.float64, device="cpu")
    steps: list[tuple[int, Tensor]] = []  # states before the unit; for each after it: choice · states before + state
    for front in fronts:
        before = len(extra)
        extra = torch.cat([extra + (choice.size - front[0].size) for choice in front])
        cost = torch.cat([cost + choice.cost for choice in front])
        kept = _pareto(extra, cost, spare)
        extra, cost = extra[kept], cost[kept]
        steps.append((before, kept.int()))  # half the memory

    chosen = []
    state = len(extra) - 1  # the largest is the cheapest
    for front, (before, kept) in zip(reversed(fronts), reversed(steps), strict=True):
        index, state = divmod(int(kept[state]), before)
        chosen.append(front[index])
    return chosen[::-1]


def _pareto(extra: Tensor, cost: Tensor, spare: int) -> Tensor:
    """Indices of the states within `spare` that are cheaper than every smaller one, by growing size.

    Of more than MOST_STATES, the cheapest of each cell of sizes is kept. Its size is true, not rounded: the state that
    stands for a thinned one is no costlier and at most spare // MOST_STATES bytes larger.
    """
    extra, order = extra.sort(stable=True)  # stable: of equal states, the one with the smaller choice comes first
    lowest = cost[order].cummin(0).values
    better = extra <= spare
    better[1:] &= lowest[1:] < lowest[:-1]
    extra, order = extra[better], order[better]
    cell = extra if len(extra) <= MOST_STATES else extra // (spare // MOST_STATES + 1)
    last = cell.diff(append=cell[-1:] + 1) != 0  # the largest of a cell is its cheapest
    return order[last]


def _use_up(fronts: Sequence[list[Choice]], chosen: dict[int, Choice], order: Sequence[int], left: int) -> None:
    """Spend what thinning left: the upgrade that saves most while one fits; of equal ones the smallest, then first."""
    while True:
        upgrades = [
            (choice.cost - chosen[i].cost, choice.size - chosen[i].size, place, choice)
            for place, i in enumerate(order)
            for choice in fronts[i]
            if choice.cost < chosen[i].cost and choice.size - chosen[i].size <= left
        ]
        if not upgrades:
            return
        _, size, place, choice = min(upgrades, key=lambda upgrade: upgrade[:3])
        chosen[order[place]] = choice
        left -= size
