"""allocate: the optimum where it claims it, the bound it states elsewhere, and ties that do not depend on order."""

import itertools
import random
import re
from collections.abc import Sequence

import pytest

from gptq_ao.errors import ConfigError
from gptq_ao.pipeline import allocate as module
from gptq_ao.pipeline.allocate import allocate
from gptq_ao.report import Choice, Unit

BITS = (2, 3, 4, 8, 16)


def unit(name: str, *choices: tuple[int, int, float]) -> Unit:
    return Unit((name,), tuple(Choice(*choice) for choice in choices))


def cost(choices: Sequence[Choice]) -> float:
    return sum(choice.cost for choice in choices)


def size(choices: Sequence[Choice]) -> int:
    return sum(choice.size for choice in choices)


def small_instance(r: random.Random) -> tuple[list[Unit], int]:
    """A few units with dominated choices, equal sizes, equal costs and zeros. Costs are integers: sums are exact."""
    largest = r.choice([4, 30, 10**6])
    units = [
        unit(f"u{i}", *((b, r.randint(0, largest), float(r.randint(0, 12))) for b in r.sample(BITS, r.randint(1, 4))))
        for i in range(r.randint(1, 6))
    ]
    smallest = sum(min(c.size for c in u.choices) for u in units)
    return units, r.randint(smallest, smallest + 2 * largest)


def optimum(units: Sequence[Unit], budget: float) -> float:
    """By brute force; infinite where nothing fits."""
    every = itertools.product(*(u.choices for u in units))
    return min((cost(choices) for choices in every if size(choices) <= budget), default=float("inf"))


def model(n: int, seed: int) -> tuple[list[Unit], int]:
    """Units as in a language model: sizes of a few shapes, costs that fall by about 4 per bit, with noise."""
    r = random.Random(seed)
    units = []
    for i in range(n):
        weights = r.choice([4096 * 4096, 4096 * 14336, 4096 * 6144]) + 128 * r.randrange(1000)
        harm = 10 ** r.uniform(-4, -1)
        units.append(
            unit(
                f"layers.{i}",
                *((b, weights * b // 8 + weights // 32, harm * 4.0**-b * r.uniform(0.5, 2)) for b in BITS),
            )
        )
    return units, sum(u.choices[1].size for u in units)


def relaxation(units: Sequence[Unit], budget: int) -> tuple[float, float]:
    """Optimum of the linear relaxation, and the largest saving of one of its steps.

    Along the lower convex hulls of the units, steps are taken by their saving per byte; the last one in part.
    """
    total, left, steps = 0.0, budget, []
    for u in units:
        hull: list[Choice] = []
        for c in sorted(u.choices, key=lambda c: (c.size, c.cost)):
            if hull and c.cost >= hull[-1].cost:
                continue
            while len(hull) > 1 and slope(hull[-1], c) <= slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(c)
        total, left = total + hull[0].cost, left - hull[0].size
        steps += [(slope(a, b), b.size - a.size) for a, b in itertools.pairwise(hull)]
    largest = max(-rate * length for rate, length in steps)
    for rate, length in sorted(steps):
        taken = min(length, left)
        total, left = total + rate * taken, left - taken
    return total, largest


def slope(a: Choice, b: Choice) -> float:
    return (b.cost - a.cost) / (b.size - a.size)


@pytest.mark.parametrize("seed", range(300))
def test_small_instances_reach_the_optimum(seed: int) -> None:
    units, budget = small_instance(random.Random(seed))
    result = allocate(units, budget)
    assert all(choice in u.choices for choice, u in zip(result, units, strict=True))
    assert size(result) <= budget
    assert cost(result) == optimum(units, budget)


@pytest.mark.parametrize("most", [1, 2, 8])
def test_thinned_states_keep_the_stated_bound(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(module, "MOST_STATES", most)
    missed = 0
    for seed in range(40):
        units, budget = model(5, seed)
        spare = budget - sum(min(c.size for c in u.choices) for u in units)
        result = allocate(units, budget)
        assert size(result) <= budget
        # A sum of five costs is within 5 · 2^−53 of the exact one, in whichever order.
        assert cost(result) <= optimum(units, budget - len(units) * spare / most) * (1 + 1e-14)
        for choice, u in zip(result, units, strict=True):  # what is left buys nothing
            room = budget - size(result) + choice.size
            assert not any(c.cost < choice.cost and choice.size < c.size <= room for c in u.choices)
        missed += cost(result) > optimum(units, budget) * (1 + 1e-14)
    assert missed > 0  # or nothing was thinned that mattered


@pytest.mark.parametrize("seed", range(3))
def test_a_large_model_is_near_its_linear_relaxation(seed: int) -> None:
    """Rounding the relaxation's one split step down costs at most that step: the optimum is within it.

    The states are thinned here. The stated bound, 300 · 2^−14 of the spare bytes, moves the relaxation too.
    """
    units, budget = model(300, seed)
    smallest = sum(min(c.size for c in u.choices) for u in units)
    lowest, _ = relaxation(units, budget)
    shrunk, step = relaxation(units, budget - len(units) * (budget - smallest) // module.MOST_STATES)
    result = allocate(units, budget)
    assert size(result) <= budget
    assert lowest <= cost(result) <= shrunk + step
    assert cost(result) <= lowest * 1.005  # measured: 0.05 to 0.07 %


@pytest.mark.parametrize("n", [6, 40])
def test_the_order_of_units_does_not_matter(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(module, "MOST_STATES", 64)  # thinned, so that the order of work would show
    units, budget = model(n, 0)
    result = dict(zip(units, allocate(units, budget), strict=True))
    for seed in range(5):
        shuffled = random.Random(seed).sample(units, n)
        assert dict(zip(shuffled, allocate(shuffled, budget), strict=True)) == result


def test_the_order_of_choices_does_not_matter() -> None:
    units, budget = model(12, 0)
    reverse = [Unit(u.names, u.choices[::-1]) for u in units]
    assert allocate(reverse, budget) == allocate(units, budget)


def test_a_larger_choice_that_is_no_cheaper_is_never_taken() -> None:
    noisy = unit("a", (2, 20, 9.0), (3, 30, 2.0), (4, 40, 3.0), (8, 80, 2.0))
    assert [c.bits for c in allocate([noisy], 1000)] == [3]


@pytest.mark.parametrize(
    ("choices", "bits"),
    [
        ([(8, 10, 1.0), (4, 10, 1.0)], 4),  # all equal: lower bits
        ([(3, 20, 1.0), (4, 10, 1.0)], 4),  # equal cost: smaller size
        ([(3, 10, 2.0), (4, 10, 1.0)], 4),  # equal size: lower cost
        ([(2, 10, 0.0), (16, 20, 0.0)], 2),
    ],
)
def test_ties_within_a_unit(choices: list[tuple[int, int, float]], bits: int) -> None:
    for order in itertools.permutations(choices):
        assert [c.bits for c in allocate([unit("a", *order)], 100)] == [bits]


def test_ties_among_units() -> None:
    """One of three equal units can be upgraded: the first by name."""
    same = (4, 10, 2.0), (8, 20, 1.0)
    units = [unit("c", *same), unit("a", *same), unit("b", *same)]
    assert [c.bits for c in allocate(units, 40)] == [4, 8, 4]
    units = [unit("a", (4, 10, 2.0), (8, 30, 1.0)), unit("b", (4, 10, 2.0), (8, 20, 1.0))]
    assert [c.bits for c in allocate(units, 40)] == [4, 8]  # equal costs: the smaller total


@pytest.mark.parametrize(("budget", "bits"), [(60, [4, 8]), (59, [8, 4]), (50, [8, 4]), (49, [4, 4]), (90, [8, 8])])
def test_a_budget_is_met_to_the_byte(budget: int, bits: list[int]) -> None:
    units = [unit("a", (4, 10, 4.0), (8, 40, 2.0)), unit("b", (4, 10, 9.0), (8, 50, 3.0))]
    assert [c.bits for c in allocate(units, budget)] == bits


@pytest.mark.parametrize(("budget", "bits"), [(10, 2), (19, 2), (20, 4), (39, 4), (40, 8), (10**15, 8)])
def test_one_unit(budget: int, bits: int) -> None:
    one = unit("a", (4, 20, 2.0), (2, 10, 3.0), (8, 40, 1.0))
    assert allocate([one], budget) == tuple(c for c in one.choices if c.bits == bits)


def test_no_units() -> None:
    assert allocate([], 0) == ()


def test_sizes_of_terabytes_and_costs_near_overflow() -> None:
    units = [unit(f"u{i:02}", (4, 10**13, 1e308), (8, 2 * 10**13, 1.0)) for i in range(20)]
    result = allocate(units, 40 * 10**13)
    assert [c.bits for c in result] == [8] * 20
    assert [c.bits for c in allocate(units, 30 * 10**13)].count(8) == 10


@pytest.mark.parametrize("budget", [-1, 0, 29])
def test_a_budget_that_nothing_fits(budget: int) -> None:
    units = [unit("a", (4, 20, 2.0), (2, 10, 3.0)), unit("b", (3, 20, 2.0), (2, 25, 1.0))]
    message = (
        f"the budget is {budget} bytes, but the weights take 30 bytes at the least, with the smallest choice of each: "
        "give a budget of that or more, or allow fewer bits or a larger group_size"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        allocate(units, budget)
    assert [c.bits for c in allocate(units, 30)] == [2, 3]


def test_a_unit_without_choices() -> None:
    with pytest.raises(ValueError, match=r"^unit \('a', 'b'\) has no choices$"):
        Unit(("a", "b"), ())


@pytest.mark.parametrize(
    ("size", "cost"), [(1, float("nan")), (1, float("inf")), (1, -1e-9), (-1, 1.0)], ids=["nan", "inf", "cost", "size"]
)
def test_a_choice_that_is_wrong(size: int, cost: float) -> None:
    message = rf"^unit \('a',\): Choice\(bits=4, size={size}, cost={cost}\) needs a size >= 0 and a finite cost >= 0$"
    with pytest.raises(ValueError, match=message):
        unit("a", (2, 1, 0.0), (4, size, cost))
